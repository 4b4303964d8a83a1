"""What `kvray serve` says once requests are answered."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from cluster.config import KvrayConfig, parse_config
from cluster.ready_lines import ready_lines
from messages.fleet import Role, WorkerInfo


def worker(role: Role, **more: object) -> WorkerInfo:
    fields = {
        "worker_id": f"{role}-a1",
        "role": role,
        "address": "tcp://x@127.0.0.1:1",
        "node_id": "node",
        "fingerprint": b"",
        "block_size": 16,
        "num_blocks": 8192 if role == "decode" else 4096,
        "block_bytes": 16384,
        "max_model_len": 8192,
        "max_num_seqs": 256,
        "roads": ("shm",),
        "kernel_path": "cpu/dot/native-16-bf16dot",
        "dtype": "bfloat16",
    }
    return WorkerInfo(**(fields | more))  # type: ignore[arg-type]


def said(config: KvrayConfig | None = None, workers: tuple[WorkerInfo, ...] = (), **more: object) -> str:
    facts = {"wants_api_key": False, "is_own_cluster": True, "log_dir": Path("/tmp/ray/session_1/logs/kvray")}
    lines = ready_lines(config or KvrayConfig(), "http://127.0.0.1:8000", workers, **(facts | more))  # type: ignore[arg-type]
    assert "Ctrl-C ends everything" in lines[-1]
    return "\n".join(lines)


def test_they_say_what_computes_how_much_it_keeps_and_where_to_look():
    text = said(workers=(worker("decode"), worker("prefill")))
    for words in (
        "kvray serves kvray-demo at http://127.0.0.1:8000/v1",
        "model: bfloat16, context of 8,192 tokens",
        "KV tokens: 131,072 per decode worker, 65,536 per prefill worker; tiers: none",
        "kernels: cpu/dot/native-16-bf16dot",
        "http://127.0.0.1:8000/docs",
        "http://127.0.0.1:8000/metrics",
        "http://127.0.0.1:8000/cache",
        "logs: /tmp/ray/session_1/logs/kvray",
    ):
        assert words in text
    assert "SLOW" not in text
    assert "Bearer" not in text


def test_the_command_is_one_for_a_shell_whatever_the_model_is_called():
    [line] = [line for line in said(parse_config({"model": {"served_names": ["it's"]}})).splitlines() if "curl" in line]
    assert json.loads(shlex.split(line)[-1])["model"] == "it's"


def test_slow_kernels_are_said_with_the_command_that_mends_it():
    text = said(workers=(worker("decode", kernel_path="cpu/onednn/torch", lacks_kernels=True),))
    assert "kernels: SLOW ones, cpu/onednn/torch, about half the tokens/s" in text
    assert f"{sys.executable} -m engine.kernels.cpu.build" in text


def test_tiers_are_named():
    tiers = {"disk_dir": "/var/kv", "disk_capacity": "5GiB", "remote": "s3://bucket/kv"}
    text = said(parse_config({"tiers": tiers}), (worker("decode"),))
    assert "tiers: host memory auto, disk 5GiB in /var/kv, remote s3://bucket/kv (lossless)" in text


def test_workers_that_are_not_known_are_not_described():
    text = said(wants_api_key=True, is_own_cluster=False, log_dir=None)
    assert "kernels" not in text
    assert "-H 'Authorization: Bearer ...'" in text
    assert "the Ray cluster that was there" in text
    assert "those of Ray" in text
