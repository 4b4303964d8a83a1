"""kvray plan: what a trace wants, and what is said of targets that nothing meets."""

import json
import random

import pytest
from typer.testing import CliRunner

from cluster import plan_cli
from cluster.cli import app
from messages.errors import ConfigError
from tests.shared_traces import mooncake

WORKER = ["--prefill-tokens-per-s", "10000", "--step-ms", "8", "--row-ms", "0.1"]
WORKER += ["--kv-bytes-per-token", "131072", "--kv-cache-memory", "64GiB"]


@pytest.fixture
def trace(tmp_path):
    """Eight requests a second for half a minute; every second one repeats the prompt of the one before it."""
    source = random.Random(1)
    times = sorted(source.randrange(30_000) for _ in range(240))
    lines = [
        {
            "timestamp": times[n],
            "input_length": 4096,
            "output_length": 100,
            "hash_ids": list(range(n // 2 * 8, n // 2 * 8 + 8)),
        }
        for n in range(240)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def planned(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=True)
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_says_how_many_and_what_pays(trace):
    told = json.loads(planned(trace, "--ttft", 2, "--itl", 20, *WORKER, "--json"))
    assert told["num_requests"] == 240
    assert told["endless_hit_share"] == pytest.approx(0.5, abs=0.001)
    assert told["num_prefill"] == 2, "four prompts of 0.45 s a second"
    assert told["ttft_p90_s"] <= 2.0
    assert [point["tokens"] for point in told["curve"]] == [65536]
    assert told["host_bytes"] == 65536 * 131072
    assert told["disk_bytes"] == 0


@pytest.mark.slow
def test_tighter_targets_want_more_workers(trace):
    loose = json.loads(planned(trace, "--ttft", 5, "--itl", 50, *WORKER, "--json"))
    tight = json.loads(planned(trace, "--ttft", 0.6, "--itl", 8.15, *WORKER, "--json"))
    assert tight["num_prefill"] > loose["num_prefill"]
    assert tight["num_decode"] > loose["num_decode"]


def test_people_get_a_table(trace):
    told = planned(trace, "--ttft", 2, *WORKER)
    assert "240 requests, 1.0 M prompt tokens, of which a cache without end has 50.0%" in told
    assert "workers: 2 prefill, 1 decode" in told
    assert "no disk (reading a token takes 262 us, computing it 100)" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ttft", 0.1], "--ttft: with any number of workers one request in ten takes 0.45.* s or more by itself"),
        (["--itl", 5], "--itl: a step with a single sequence takes 8.1 ms; wanted were 5 ms"),
        (["--kv-cache-memory", "256MiB"], "the longest request has 4196 tokens, a worker has KV for 2048"),
        (["--kv-cache-memory", "much"], "wanted a size such as"),
    ],
)
def test_targets_that_nothing_meets_are_told(trace, arguments, told):
    with pytest.raises(ConfigError, match=told):
        planned(trace, *WORKER, *arguments)


def test_without_a_server_all_that_is_wanted_is_named(trace):
    with pytest.raises(ConfigError, match=r"give --step-ms, --kv-bytes-per-token, --kv-cache-memory, or --url \(no st"):
        planned(trace, "--prefill-tokens-per-s", 1, "--url", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("status", "told"),
    [([], "has no workers"), ({"workers": [{"compute": None}]}, "says of its workers no block_bytes")],
)
def test_what_is_no_kvray_is_told(status, told):
    with pytest.raises(ConfigError, match=told):
        plan_cli._a_worker(status)


def test_a_broken_line_is_told(trace):
    trace.write_text(trace.read_text() + "{}\n")
    with pytest.raises(ConfigError, match="line 241: timestamp: missing"):
        planned(trace, *WORKER)


@pytest.mark.long
def test_the_real_conversations_want_several_prefill_workers_and_one_for_decode():
    told = json.loads(planned(mooncake(), "--ttft", 5, "--itl", 30, *WORKER, "--kv-cache-memory", "120GiB", "--json"))
    assert 3 <= told["num_prefill"] <= 10
    assert told["num_decode"] <= 2
