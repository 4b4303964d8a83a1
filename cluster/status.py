"""What is running where: gathered by an ingress, shown by `kvray status`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from cluster.dispatch import Dispatcher
from cluster.status_summary import summary_lines

_HEADERS = ("WORKER", "ADDRESS", "FREE/BLOCKS", "RUN", "WAIT", "TOK/S", "STEP MS")
_SOURCES: Final = ("device", "peer", "host", "disk", "remote", "computed")
_EXAMPLE_TOKENS: Final = 1000  #: of a prompt for which a time to first token is told
_NUM_TEXT_COLUMNS = 2  #: then come numbers, aligned to the right


async def fleet_status(dispatcher: Dispatcher, own: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Gather all workers and their numbers into one JSON document; one that does not answer is without numbers.

    `own`: what the ingress that gathers counts, by metric name.
    """
    told = await dispatcher.fleet_stats()
    values = {stats.worker_id: stats for stats in told}
    names = {info.address: info.worker_id for info in dispatcher.fleet.values()}
    workers = [
        {
            "worker_id": info.worker_id,
            "role": info.role,
            "address": info.address,
            "node": info.node_id,
            "roads": list(info.roads),
            "kernel_path": info.kernel_path,
            "checksum_path": info.checksum_path,
            "num_blocks": info.num_blocks,
            "block_bytes": info.block_bytes,
            "block_size_tokens": info.block_size,
            "max_model_len_tokens": info.max_model_len,
            "max_num_seqs": info.max_num_seqs,
            "compute": msgspec.to_builtins(info.compute),
            "is_answering": info.worker_id in values,
            "values": values[info.worker_id].values if info.worker_id in values else {},
            "pulls_from": [
                {**msgspec.to_builtins(road), "peer": names.get(road.peer, road.peer)}
                for road in (values[info.worker_id].roads if info.worker_id in values else ())
            ],
        }
        for info in sorted(dispatcher.fleet.values(), key=lambda info: (info.role, info.worker_id))
    ]
    routers = [
        {"worker_id": stats.worker_id, "values": stats.values} for stats in values.values() if stats.role == "router"
    ]
    caches = [
        {
            "worker_id": cache.info.worker_id,
            "address": cache.info.address,
            "node": cache.info.node_id,
            "num_blocks": cache.info.num_blocks,
            "block_bytes": cache.info.block_bytes,
            "values": cache.values,
        }
        for stats in told
        for cache in stats.caches
    ]
    return {
        "workers": workers,
        "caches": caches,
        "routers": routers,
        "is_routing_by_cache": bool(routers),
        "prompt_tokens": _prompt_tokens([own or {}, *(ingress.values for one in told for ingress in one.ingresses)]),
        "predicted_ttft": _predicted_ttft(workers),
    }


def _prompt_tokens(ingresses: Iterable[Mapping[str, float]]) -> dict[str, int]:
    """Add up the prompt tokens of answered requests by where their KV came from."""
    values = list(ingresses)
    names = {source: f'kvray_prompt_tokens_total{{source="{source}"}}' for source in _SOURCES}
    return {source: int(sum(one.get(name, 0) for one in values)) for source, name in names.items()}


def _predicted_ttft(workers: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Tell how long a new prompt of which nobody holds anything would take, and at whom; None: not measured yet."""
    seconds = [
        (one["values"].get("kvray_queued_seconds", 0.0) + _EXAMPLE_TOKENS / rate, one["worker_id"])
        for one in workers
        if (rate := one["values"].get("kvray_prefill_tokens_per_second", 0.0)) > 0
    ]
    if not seconds:
        return None
    least_s, worker_id = min(seconds)
    return {"prompt_tokens": _EXAMPLE_TOKENS, "seconds": least_s, "worker_id": worker_id}


def status_table(status: dict[str, Any], before: dict[str, Any] | None = None, elapsed_s: float = 0.0) -> str:
    """Write `fleet_status` for people: a line per worker, the whole fleet, details; nothing is cut off.

    TOK/S is the measured speed of prefill, STEP MS the time of a decode step. `before`: the status of `elapsed_s` ago,
    for what happened since; None: there is none.
    """
    rows = [_HEADERS, *(_row(worker) for worker in status["workers"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADERS))]
    lines = [_line(row, widths) for row in rows]
    if not status["workers"]:
        lines = ["no workers"]
    lines += summary_lines(status, before, elapsed_s)
    lines += [f"{worker['worker_id']} by {worker['kernel_path']}" for worker in status["workers"]]
    if status["workers"]:
        lines.append(f"checksums by {', '.join(sorted({worker['checksum_path'] for worker in status['workers']}))}")
    lines += [_road_line(worker["worker_id"], road) for worker in status["workers"] for road in worker["pulls_from"]]
    lines += [_cache_line(cache) for cache in status.get("caches", ())]
    for router in status["routers"]:
        values = router["values"]
        lines.append(
            f"{router['worker_id']}: {values.get('kvray_router_workers', 0):.0f} workers, "
            f"{values.get('kvray_router_index_names', 0):.0f} block names known, "
            f"{values.get('kvray_router_requests', 0):.0f} requests under way"
        )
    if not status["is_routing_by_cache"]:
        lines.append("no router answers: requests are placed by rendezvous hashing")
    return "\n".join(lines)


def _row(worker: dict[str, Any]) -> tuple[str, ...]:
    name, address = worker["worker_id"], worker["address"].removeprefix("tcp://").rpartition("@")[2]
    if not worker["is_answering"]:
        return (name, address, "no answer", "", "", "", "")
    values = worker["values"]
    return (
        name,
        address,
        f"{values.get('kvray_blocks_free', 0):.0f}/{worker['num_blocks']}",
        f"{values.get('kvray_sequences_running', 0):.0f}",
        f"{values.get('kvray_sequences_waiting', 0):.0f}",
        f"{values.get('kvray_prefill_tokens_per_second', 0):.0f}",
        f"{1000 * values.get('kvray_decode_step_seconds', 0):.1f}",
    )


def _cache_line(cache: dict[str, Any]) -> str:
    values, gib = cache["values"], cache["block_bytes"] / 2**30
    held = values.get("kvray_cache_blocks_held", 0)
    line = f"{cache['worker_id']}: host {held * gib:.2f} of {cache['num_blocks'] * gib:.2f} GiB"
    if "kvray_disk_capacity_bytes" in values:
        line += (
            f", disk {values['kvray_disk_bytes'] / 2**30:.2f} of {values['kvray_disk_capacity_bytes'] / 2**30:.2f} GiB"
        )
    if "kvray_remote_bytes" in values:
        plain = values["kvray_remote_plain_bytes"]
        line += f", remote {values['kvray_remote_bytes'] / 2**30:.2f} GiB (plain {plain / 2**30:.2f} GiB)"
    return line


def _road_line(worker_id: str, road: dict[str, Any]) -> str:
    if not road["road"]:
        return f"{worker_id} <- {road['peer']}: no road works"
    rate = f"{road['bytes_per_s'] / 1e9:.2f} GB/s"
    failed = f", {road['num_failed']} transfers failed" if road["num_failed"] else ""
    return f"{worker_id} <- {road['peer']}: {road['road']} ({road['carriers']}), {rate}{failed}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        text.ljust(width) if column < _NUM_TEXT_COLUMNS else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
