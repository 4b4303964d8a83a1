"""`kvray bench serve` against a kvray that serves."""

from __future__ import annotations

import json

import pytest

from tests.served import Served, run_kvray, serving

pytestmark = pytest.mark.alone

SESSIONS = (
    *("--dataset-name", "agents", "--num-sessions", "6", "--turns", "4", "--num-prompts", "24"),
    *("--block-tokens", "1", "--max-prompt-len", "2000", "--max-output-len", "8"),
)


def bench(served: Served, *arguments: str) -> dict:
    finished, left = run_kvray("bench", "serve", "--url", served.url, "--json", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert left == []
    return json.loads(finished.stdout)["servers"][0]["summary"]


def test_what_is_told_is_what_the_server_did(tmp_path):
    with serving("--prefill", "1", "--decode", "1", "--host-memory", "64MiB", log_dir=tmp_path) as served:
        told = bench(served, *SESSIONS, "--repeats", "2", "--ttft", "60000", "--itl", "60000")
        chats = bench(served, "--endpoint", "/v1/chat/completions", "--num-prompts", "3", "--random-output-len", "4")
        responses = bench(served, "--endpoint", "/v1/responses", "--num-prompts", "3", "--random-output-len", "4")
        served.wait_until_idle()
    assert (told["requests"]["median"], told["failed"]["high"], told["good_share"]["low"]) == (24, 0, 1)
    # A later turn is mostly the one before it, and no repeat finds what the other left.
    assert 0.4 < told["hit_share"]["low"] <= told["hit_share"]["high"] < 0.9
    sources = [told[name] for name in told if name.startswith("from_")]
    assert sum(source["median"] for source in sources) == pytest.approx(1, abs=0.05)
    assert 0 < told["ttft_ms_p50"]["median"] <= told["e2e_ms_p50"]["median"]
    assert (chats["failed"]["high"], responses["failed"]["high"]) == (0, 0)


@pytest.mark.long
def test_by_load_workers_keep_their_caches_to_themselves(tmp_path):
    config = tmp_path / "kvray.yaml"
    config.write_text("pools: {routing: load}\n")
    shares = {}
    for routing, flags in (("load", ("--config", str(config))), ("cache", ())):
        with serving("--prefill", "0", "--decode", "2", *flags, log_dir=tmp_path) as served:
            shares[routing] = bench(served, *SESSIONS, "--max-concurrency", "2")
    assert shares["load"]["failed"]["high"] == 0
    assert "from_peer" not in shares["load"]
    assert shares["load"]["hit_share"]["median"] < shares["cache"]["hit_share"]["median"] - 0.02
