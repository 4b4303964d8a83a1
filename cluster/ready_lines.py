"""What `kvray serve` says once requests are answered: where, how to ask, what computes and how much it keeps."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config import KvrayConfig, TiersConfig, num_ingresses
from messages.fleet import WorkerInfo

#: which builds the C++ kernels, the checksum and the router's index for this machine
BUILD_COMMAND = "{python} -m engine.kernels.cpu.build && {python} -m kvrouter.build"


def ready_lines(
    config: KvrayConfig,
    url: str,
    workers: Sequence[WorkerInfo],
    *,
    wants_api_key: bool,
    is_own_cluster: bool,
    log_dir: Path | None,
) -> list[str]:
    """Write the lines; `workers` is one of each kind, as far as they are known."""
    name = config.model.names[0]
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]})
    key = " -H 'Authorization: Bearer ...'" if wants_api_key else ""
    lines = [
        f"kvray serves {name} at {url}/v1",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
    ]
    if workers:
        first = workers[0]
        kept = ", ".join(f"{info.num_blocks * info.block_size:,} per {info.role} worker" for info in workers)
        lines.append(f"  model: {first.dtype}, context of {first.max_model_len:,} tokens")
        lines.append(f"  KV tokens: {kept}; tiers: {_tiers(config.tiers)}")
        lines += _kernels(workers)
    lines.append(f"  docs: {url}/docs; metrics: {url}/metrics; what is cached where: {url}/cache")
    lines.append(f"  logs: {log_dir}" if log_dir is not None else "  logs: those of Ray, on each node (`ray logs`)")
    where = "Ray started here" if is_own_cluster else "the Ray cluster that was there"
    pools = config.pools
    lines.append(
        f"  {pools.prefill} prefill, {pools.decode} decode, 1 router, {num_ingresses(pools)} ingress on {where}; "
        "`kvray status` says more. Ctrl-C ends everything."
    )
    return lines


def _kernels(workers: Sequence[WorkerInfo]) -> list[str]:
    paths = ", ".join(dict.fromkeys(info.kernel_path for info in workers))
    if not any(info.lacks_kernels for info in workers):
        return [f"  kernels: {paths}"]
    return [
        f"  kernels: SLOW ones, {paths}, about half the tokens/s: those in C++ were not built on this machine",
        f"    build them, and start again: {BUILD_COMMAND.format(python=shlex.quote(sys.executable))}",
    ]


def _tiers(tiers: TiersConfig) -> str:
    if not tiers.is_wanted:
        return "none (--host-memory, --disk-dir, --remote)"
    named = [f"host memory {tiers.host_memory or 'auto'}"]
    if tiers.disk_dir is not None:
        named.append(f"disk {tiers.disk_capacity} in {tiers.disk_dir}")
    if tiers.remote is not None:
        named.append(f"remote {tiers.remote} ({tiers.remote_compression})")
    return ", ".join(named)
