"""How a model is named, and what is said of names that are no directory."""

from __future__ import annotations

import pytest

from cluster.model_argument import model_directory
from messages.errors import ConfigError


def test_a_directory_is_itself_wherever_one_stands(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_directory("model") == model_directory(f"{tmp_path}/model/") == tmp_path / "model"
    (tmp_path / "link").symlink_to("model")
    assert model_directory("link") == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_directory("~/model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B-Instruct", "gpt2", "Qwen/Qwen3-0.6B"])
def test_of_a_name_on_the_hub_it_is_said_that_nothing_is_downloaded_and_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        model_directory(name)
    for words in (f"no directory {name} here", "nothing is downloaded", f"hf download {name} --local-dir"):
        assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["/models/none", "./none", "models/llama/none", "none/"])
def test_of_a_path_it_is_said_where_nothing_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no model directory at /.*none"):
        model_directory(name)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ConfigError, match="is a file, wanted a transformers model directory"):
        model_directory(str(tmp_path / "model.bin"))
