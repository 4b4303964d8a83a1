"""What is running where: gathered by an ingress, shown by `kvray status`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from cluster.dispatch import Dispatcher


async def fleet_status(dispatcher: Dispatcher) -> dict[str, Any]:
    """All workers and their numbers as one JSON document; one that does not answer is shown without numbers."""
    values = {stats.worker_id: stats for stats in await dispatcher.fleet_stats()}
    workers = [
        {
            "worker_id": info.worker_id,
            "role": info.role,
            "address": info.address,
            "node": info.node_id,
            "roads": list(info.roads),
            "num_blocks": info.num_blocks,
            "block_bytes": info.block_bytes,
            "block_size_tokens": info.block_size,
            "max_model_len_tokens": info.max_model_len,
            "is_answering": info.worker_id in values,
            "values": values[info.worker_id].values if info.worker_id in values else {},
        }
        for info in sorted(dispatcher.fleet.values(), key=lambda info: (info.role, info.worker_id))
    ]
    routers = [
        {"worker_id": stats.worker_id, "values": stats.values} for stats in values.values() if stats.role == "router"
    ]
    return {"workers": workers, "routers": routers, "is_routing_by_cache": bool(routers)}


def status_table(status: dict[str, Any]) -> Table:
    """`fleet_status` for people."""
    table = Table(title=None, box=None, pad_edge=False)
    for column in ("WORKER", "ROLE", "ADDRESS", "BLOCKS FREE", "RUNNING", "WAITING", "PREFILL TOK/S", "STEP MS"):
        table.add_column(column, justify="left" if column in ("WORKER", "ROLE", "ADDRESS") else "right")
    for worker in status["workers"]:
        values = worker["values"]
        if not worker["is_answering"]:
            table.add_row(worker["worker_id"], worker["role"], worker["address"], "no answer", "", "", "", "")
            continue
        table.add_row(
            worker["worker_id"],
            worker["role"],
            worker["address"].removeprefix("tcp://"),
            f"{values.get('kvray_blocks_free', 0):.0f} of {worker['num_blocks']}",
            f"{values.get('kvray_sequences_running', 0):.0f}",
            f"{values.get('kvray_sequences_waiting', 0):.0f}",
            f"{values.get('kvray_prefill_tokens_per_s', 0):.0f}",
            f"{1000 * values.get('kvray_decode_step_seconds', 0):.1f}",
        )
    for router in status["routers"]:
        table.add_row(router["worker_id"], "router", "", "", "", "", "", "")
    if not status["is_routing_by_cache"]:
        table.add_row("(no router answers: placing by rendezvous hashing)", "", "", "", "", "", "", "")
    return table
