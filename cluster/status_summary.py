"""What a whole fleet does, in a few lines: its queue, its tiers, where prompts' KV came from. Pure."""

from __future__ import annotations

from typing import Any, Final

_GIB: Final = 2**30


def summary_lines(status: dict[str, Any], before: dict[str, Any] | None, elapsed_s: float) -> list[str]:
    """Write the lines; `before` is the status of `elapsed_s` ago, or None."""
    return [*_queue_lines(status), *_tier_lines(status), *_hit_lines(status, before, elapsed_s)]


def _queue_lines(status: dict[str, Any]) -> list[str]:
    values = [worker["values"] for worker in status["workers"] if worker["is_answering"]]
    if not values:
        return []
    waiting = sum(one.get("kvray_sequences_waiting", 0) for one in values)
    tokens = sum(one.get("kvray_queued_tokens", 0) for one in values)
    longest_s = max(one.get("kvray_queued_seconds", 0.0) for one in values)
    lines = [f"queue: {waiting:.0f} wait, {tokens:,.0f} tokens to compute, {longest_s:.2f} s at most"]
    predicted = status.get("predicted_ttft")
    if predicted is not None:
        seconds, worker_id = predicted["seconds"], predicted["worker_id"]
        what = f"first token of {predicted['prompt_tokens']:,} new tokens"
        lines.append(f"{what}: predicted in {seconds:.2f} s at {worker_id}")
    return lines


def _tier_lines(status: dict[str, Any]) -> list[str]:
    """Say of each tier how much of it is held, by all who have it."""
    pools = [(one["values"], one["num_blocks"], one["block_bytes"]) for one in status["workers"] if one["is_answering"]]
    arenas = [(one["values"], one["num_blocks"], one["block_bytes"]) for one in status.get("caches", ())]
    parts = []
    for tier, owners in (("device", pools), ("host", arenas)):
        if owners:
            held = sum(values.get("kvray_cache_blocks_held", 0) * size for values, _, size in owners)
            room = sum(num_blocks * size for _, num_blocks, size in owners)
            parts.append(f"{tier} {_size(held)} of {_size(room)}")
    stores = [values for values, _, _ in arenas]
    disks = [one for one in stores if "kvray_disk_capacity_bytes" in one]
    if disks:
        held = sum(one["kvray_disk_bytes"] for one in disks)
        room = sum(one["kvray_disk_capacity_bytes"] for one in disks)
        parts.append(f"disk {_size(held)} of {_size(room)}")
    remotes = [one["kvray_remote_bytes"] for one in stores if "kvray_remote_bytes" in one]
    if remotes:  # each node counts what it has found there: of one store
        parts.append(f"remote {_size(max(remotes))}")
    return [f"tiers: {', '.join(parts)}"] if parts else []


def _hit_lines(status: dict[str, Any], before: dict[str, Any] | None, elapsed_s: float) -> list[str]:
    counts = status.get("prompt_tokens", {})
    lines = [f"hits: {_shares(counts)} of {sum(counts.values()):,} prompt tokens"] if sum(counts.values()) else []
    if before is None or elapsed_s <= 0:
        return lines
    known = before.get("prompt_tokens", {})
    new = {source: max(0, count - known.get(source, 0)) for source, count in counts.items()}
    rate = max(0.0, _num_generated(status) - _num_generated(before)) / elapsed_s
    line = f"last {elapsed_s:.2g} s: {rate:,.0f} tokens/s generated"
    return [*lines, f"{line}, {_shares(new)} of {sum(new.values()):,} prompt tokens" if sum(new.values()) else line]


def _shares(counts: dict[str, int]) -> str:
    """Write what share of prompt tokens nobody had to compute, and from where their KV came."""
    total = sum(counts.values())
    parts = [f"{source} {count / total:.1%}" for source, count in counts.items() if count and source != "computed"]
    share = f"{1 - counts.get('computed', 0) / total:.1%}"
    return f"{share} ({', '.join(parts)})" if parts else share


def _num_generated(status: dict[str, Any]) -> float:
    values = (worker["values"] for worker in status["workers"] if worker["role"] == "decode")
    return float(sum(one.get("kvray_generated_tokens_total", 0.0) for one in values))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB else f"{num_bytes / 2**20:.1f} MiB"
