"""`kvray bench serve` against small servers: what it prints, writes and returns."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import time
from pathlib import Path
from subprocess import PIPE

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from messages.errors import ConfigError
from tests.cluster.bench.lying_server import Server, serving
from tests.served import kvray_command, takes_interrupts

SMALL = ("--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "4", "--num-warmups", "0")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def document(server: Server, *arguments: str) -> dict:
    result = bench("--url", server.url, *SMALL, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_people_get_a_table():
    with serving(step_s=0.002) as server:
        result = bench("--url", server.url, *SMALL, "--ttft", "1000", "--itl", "1000")
    assert result.exit_code == 0, result.output
    for text in ("TTFT p99, ms", "ITL p50, ms", "TPOT mean, ms", "E2E p90, ms", "goodput, requests/s"):
        assert text in result.stdout
    rows = {line[: line.index("  ")]: line.split()[-2:] for line in result.stdout.splitlines() if "  " in line}
    assert rows["prompt tokens cached"] == ["50.0", "%"]
    assert rows["requests that meet the targets"] == ["100.0", "%"]


def test_programs_get_every_repeat_and_its_spread():
    with serving() as server:
        found = document(server, "--repeats", "3", "--save-detailed", "--max-concurrency", "2", "--seed", "5")
    [side] = found["servers"]
    assert side["model"] == "tiny"
    assert [len(repeat["requests"]) for repeat in side["repeats"]] == [6, 6, 6]
    assert side["summary"]["failed"] == {"median": 0, "low": 0, "high": 0}
    ttft_ms = [repeat["values"]["ttft_ms_p50"] for repeat in side["repeats"]]
    assert side["summary"]["ttft_ms_p50"] == {
        "median": sorted(ttft_ms)[1],
        "low": min(ttft_ms),
        "high": max(ttft_ms),
    }
    assert found["workload"]["seed"] == 5
    assert server.most_streaming <= 2
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 18  # no repeat finds what another left


def test_two_servers_are_asked_the_same_in_turn_and_compared():
    with serving(step_s=0.004) as slow, serving() as quick:
        found = document(slow, "--against", quick.url, "--repeats", "2")
        assert [body["prompt"] for body in slow.bodies] == [body["prompt"] for body in quick.bodies]
    assert [side["url"] for side in found["servers"]] == [slow.url, quick.url]
    assert found["ratios"]["e2e_ms_p50"]["median"] > 1.5
    with serving() as one, serving() as other:
        result = bench("--url", one.url, "--against", other.url, *SMALL)
    assert "ratio" in result.stdout.splitlines()[0]


def test_each_server_gets_its_own_key_and_no_other(tmp_path):
    one_key, other_key = tmp_path / "one", tmp_path / "other"
    one_key.write_text("one-key\n")
    other_key.write_text("other-key\n")
    with serving() as one, serving() as other:
        command = ("--url", one.url, "--api-key-file", str(one_key), "--against", other.url, *SMALL)
        assert bench(*command).exit_code == 0
        assert (one.keys, other.keys) == ({"one-key"}, set())
        assert bench(*command, "--against-api-key-file", str(other_key)).exit_code == 0
        assert (one.keys, other.keys) == ({"one-key"}, {"other-key"})


def test_a_lying_server_is_counted_and_said_in_a_line():
    with serving(mode="missing") as server:
        result = bench("--url", server.url, *SMALL)
    assert result.exit_code == 1
    assert "kvray: 6 of 6 requests failed: tokens missing (2 of 4 came)" in result.stderr.splitlines()
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_a_server_that_dies_meanwhile_is_counted_and_said():
    with serving(dies_after=3) as server:
        result = bench("--url", server.url, *SMALL, "--max-concurrency", "1", "--json")
    assert result.exit_code == 1
    [repeat] = json.loads(result.stdout)["servers"][0]["repeats"]
    assert repeat["values"]["requests_per_s"] > 0
    assert (repeat["values"]["failed"], set(repeat["faults"])) == (3, {"cut off", "not reached"})
    assert [line for line in result.stderr.splitlines() if "requests failed: not reached (Connect" in line]


@pytest.mark.slow
def test_ctrl_c_is_one_line():
    with serving(mode="hangs") as server:
        command = kvray_command("bench", "serve", "--url", server.url, "--num-warmups", "0")
        process = subprocess.Popen(
            command, stdout=PIPE, stderr=PIPE, text=True, cwd=Path(__file__).parents[2], preexec_fn=takes_interrupts
        )
        while not server.bodies:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said, complained = process.communicate(timeout=20)
    assert (process.returncode, said, complained) == (130, "", "kvray: stopped\n")


def test_what_figures_are_not_is_said():
    with serving(mode="no usage") as server:
        result = bench("--url", server.url, *SMALL)
    assert result.exit_code == 0
    assert "6 of 6 answers: no usage: tokens are counted by events" in result.stderr
    assert "cache hits: the server does not tell them" in result.stderr


def test_a_file_gets_the_document(tmp_path):
    path = tmp_path / "result.json"
    with serving() as server:
        assert bench("--base-url", server.url, *SMALL, "--result-filename", str(path)).exit_code == 0
    assert json.loads(path.read_text())["servers"][0]["summary"]["requests"]["median"] == 6


def test_a_trace_is_asked(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": [1, 2, 3], "max_tokens": 3}\n{"prompt": [1, 2, 4], "max_tokens": 2}\n')
    with serving() as server:
        found = document(server, "--dataset-path", str(path))
    assert found["servers"][0]["summary"]["requests"]["median"] == 2
    assert sorted((body["prompt"], body["max_tokens"]) for body in server.bodies) == [([1, 2, 3], 3), ([1, 2, 4], 2)]


def test_agents_are_drawn_in_turns():
    with serving() as server:
        small = ("--dataset-name", "agents", "--num-sessions", "2", "--turns", "3", "--block-tokens", "1")
        found = document(server, *small, "--max-prompt-len", "500", "--max-output-len", "4")
    assert found["servers"][0]["summary"]["requests"]["median"] == 6
    assert max(len(body["prompt"]) for body in server.bodies) <= 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "http://127.0.0.1:9", "--ready-check-timeout-sec", "0.1"), "nobody answers at http://127.0.0.1:9"),
        (("--url", "127.0.0.1:8000"), "wanted a URL such as"),
        (("--url", "http://a", "--base-url", "http://b"), "saw both"),
        (("--dataset-path", "/nowhere.jsonl"), "/nowhere.jsonl cannot be read"),
        (("--block-tokens", "1"), "--block-tokens: wanted with --dataset-path or --dataset-name agents"),
        (("--percentiles", "50,101"), "wanted numbers from 0 to 100"),
        (("--extra-body", "[1]"), "--extra-body: wanted a JSON object, saw '[1]'"),
        (("--plot", "plot.png"), "--plot: wanted "),
        (("--output", "/nowhere/out.json"), "--output: wanted a file in a directory that is there"),
        (("--dataset-path", "a.jsonl", "--dataset-name", "agents"), "--dataset-name: wanted either it or"),
        (("--url", "http://me:secret@127.0.0.1:9"), "wanted a URL without a name and password"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, said):
    where = () if "--url" in arguments else ("--url", "http://127.0.0.1:9")  # others may serve here
    error = bench(*where, *arguments).exception
    assert isinstance(error, ConfigError)
    assert said in error.message
    assert "\n" not in error.message


def test_a_model_that_is_not_there_is_named_with_those_that_are():
    with serving() as server:
        error = bench("--url", server.url, "--model", "big").exception
    assert isinstance(error, ConfigError)
    assert error.message == f"{server.url} has no model big: it has tiny (--model)"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_plot_has_a_line_for_each_server(tmp_path):
    path = tmp_path / "plot.svg"
    with serving() as server, serving() as other:
        result = bench("--url", server.url, "--against", other.url, *SMALL, "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_text().count("<svg") == 1
