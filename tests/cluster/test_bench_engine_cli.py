"""`kvray bench engine` on this CPU: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from messages.errors import ConfigError

SMALL = ("--shape", "llama-tiny", "--batch-size", "2", "--input-len", "20", "--output-len", "6")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "engine", "--device", "cpu", *arguments])


@pytest.mark.slow
def test_people_get_a_table_and_programs_every_repeat(tmp_path):
    path = tmp_path / "result.json"
    result = bench(*SMALL, "--repeats", "2", "--dtype", "float32", "-o", str(path))
    assert result.exit_code == 0, result.output
    rows = [line.strip() for line in result.stdout.splitlines()]
    for text in ("output tokens/s", "of the bound", "prefill, prompt tokens/s", "decode, tokens/s", "ITL p90, ms"):
        assert any(row.startswith(text) for row in rows), result.stdout
    for line in (
        "kvray: llama-tiny: llama, 0.1 M parameters, drawn, float32, ",
        "kvray: 2 sequences, 20 tokens in, 6 out",
    ):
        assert line in result.stderr
    found = json.loads(path.read_text())
    assert found["workload"] == {"batch_size": 2, "input_len": 20, "output_len": 6, "vocab_size": 512, "seed": 0}
    [engine] = found["engines"]
    assert (engine["name"], len(engine["repeats"])) == ("kvray", 2)
    for repeat in engine["repeats"]:
        assert repeat["output_tokens_per_s"] == pytest.approx(12 / repeat["seconds"])
        assert 0 < repeat["of_bound"] < 1
    assert found["machine"]["copy_bytes_per_s"] > 1e8
    assert found["bound"]["output_tokens_per_s"] == pytest.approx(12 / found["bound"]["seconds"])


@pytest.mark.long
def test_a_peer_is_measured_beside(tiny_model):
    small = ("--batch-size", "2", "--input-len", "20", "--output-len", "6", "--repeats", "1", "--dtype", "float32")
    result = bench(str(tiny_model), *small, "--peer", "transformers", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [engine["name"] for engine in found["engines"]] == ["kvray", "transformers"]
    assert found["same_tokens"] == {"sequences": 2, "of": 2}
    assert found["ratios"]["seconds"]["median"] > 0
    assert "2 of 2 sequences got the same tokens from both" in result.stderr


@pytest.fixture
def tiny_model(tmp_path) -> Path:
    from tests.models import make_tiny_model

    return make_tiny_model(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--shape", "llama-9b"), r"--shape: wanted one of llama-tiny, .*, llama-8b, saw 'llama-9b'"),
        (("--shape", "llama-8b", "smollm2"), "--shape: wanted either it or a model, saw llama-8b and smollm2"),
        ((*SMALL, "--device", "tpu"), "--device: wanted auto, cpu, cuda or cuda:0 and so on, saw 'tpu'"),
        ((*SMALL, "--device", "meta"), "--device: wanted auto, cpu, cuda or cuda:0 and so on, saw 'meta'"),
        ((*SMALL, "--device", "cuda:63"), "device cuda:63 was asked for: torch .*"),
        (
            (*SMALL, "--input-len", "262143"),
            "--input-len 262143 and --output-len 6: 262149 tokens, llama-tiny has positions for 262144",
        ),
        ((*SMALL, "-o", "/no/such/place.json"), "--output: wanted a file in a directory that is there, saw .*"),
        (("/no/such/model",), "no model directory at /no/such/model, and no GGUF file; .*"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(arguments, line):
    result = bench(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert pytest.raises(ConfigError, match=f"^{line}$").matches(result.exception)
    assert "\n" not in result.exception.message


def test_a_directory_that_is_no_model_is_refused_in_a_line(tmp_path):
    result = bench(str(tmp_path))
    assert isinstance(result.exception, ConfigError)
    assert result.exception.message == f"{tmp_path} is no model directory: it has no config.json"


def test_a_model_for_which_there_is_no_memory_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr("cluster.bench.bare.measuring.free_bytes", lambda _: 1_000_000_000)
    result = bench("--shape", "llama-8b")
    assert isinstance(result.exception, ConfigError)
    assert result.exception.message == (
        "llama-8b has 16.1 GB of weights, 1.0 GB are free on cpu: a smaller model, or another --device"
    )
