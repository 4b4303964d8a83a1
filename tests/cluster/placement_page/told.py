"""Documents as servers give them, for what no small deployment shows: a large fleet, an explained request."""

from __future__ import annotations

import time
from typing import Any


def large_document(num_workers: int = 200) -> dict[str, Any]:
    """What `/cache/data` says of a large fleet, eight workers and a node cache on each node."""
    tier = {
        "blocks": 9000, "known_blocks": 8990, "bytes": 9000 << 17, "capacity_bytes": 20000 << 17, "hits": 5,
        "evictions": 1,
    }  # fmt: skip
    roads = {
        "shm": {"bytes": 1e12, "seconds": 300.0, "failed": 0},
        "ucx": {"bytes": 1e9, "seconds": 9.0, "failed": 2},
    }
    owners: list[dict[str, Any]] = [
        {
            "worker_id": f"decode-{number:08x}", "role": "decode", "node": f"{number // 8:056x}",
            "is_answering": number != 7, "is_in_step": number != 9, "tiers": {"device": tier},
            "running": 12, "waiting": 3, "promised": 1,
            "free_blocks": 11000, "num_blocks": 20000, "queue_s": 0.4, "ttft_s": 1.2, "decode_step_s": 0.02,
            "roads": roads,
        }
        for number in range(num_workers)
    ]  # fmt: skip
    owners += [
        {
            "worker_id": f"cache-node-{node:08x}", "role": "cache", "node": f"{node:056x}", "is_answering": True,
            "is_in_step": True, "tiers": {"host": tier, "disk": {**tier, "capacity_bytes": None}},
        }
        for node in range(num_workers // 8)
    ]  # fmt: skip
    prefixes = [
        {
            "name": f"{number:032x}", "num_tokens": 1024 * (number + 1), "num_requests": 50.5 - number, "age_s": 4.0,
            "last_request": f"r{number}", "tenant": "", "text": "<system> You are a helpful assistant … of Alexandria.",
            "runs": [{"begin": 0, "end": 1024, "holders": [[owner["worker_id"], "device"] for owner in owners[:32]]}],
        }
        for number in range(20)
    ]  # fmt: skip
    return {
        "made_s": time.time(), "model": "llama", "tenant": "", "has_router": True, "nominal_tokens": 1024,
        "has_previews": True, "counts_prefixes": True, "owners": owners, "prefixes": prefixes,
        "prompt_tokens": {"device": 5e9, "host": 1e9, "peer": 2e9, "disk": 1e8, "remote": 0, "computed": 3e9},
        "ttft_count": 1e6, "ttft_sum_s": 4e5, "placed": {"router": 1e6, "hashing": 3},
        "counts": {"kvray_router_index_names": 2e6, "kvray_router_workers_out_of_step": 1},
    }  # fmt: skip


def explained_request() -> dict[str, Any]:
    """What `/v1/route/{id}` says of a request that was answered."""
    parts = {"wait_s": 0.0, "load_s": 0.02, "queue_s": 0.3, "compute_s": 0.5, "handoff_s": 0, "crowding_s": 0.1}
    candidate = {
        "decode_worker": "decode-1", "prefill_worker": None, "cost_s": 0.92, "ttft_s": 0.82, "parts": parts,
        "matched_tokens": {"device": 512, "host": 256}, "num_computed_tokens": 300, "is_chosen": True,
    }  # fmt: skip

    def run(begin: int, end: int, source: str, holder: str, why: str | None = None, missed: str | None = None) -> dict:
        return {
            "begin": begin, "end": end, "source": source, "holder": holder, "why": why, "missed_holder": missed,
        }  # fmt: skip

    other = {**candidate, "decode_worker": "decode-2", "prefill_worker": "prefill-1", "cost_s": 1.5, "is_chosen": False}
    return {
        "request_id": "chat-1", "began_s": time.time(), "model": "tiny", "num_prompt_tokens": 1068,
        "num_cached_tokens": 768, "num_sequences": 1, "num_placements": 1, "state": "answered", "placed_by": "router",
        "reason": "decode 768 of 1068 held", "decode_worker": "decode-1", "prefill_worker": None,
        "predicted_ttft_s": 0.82, "ttft_s": 0.9,
        "predicted": {"candidates": [candidate, other], "num_possible": 7},
        "runs": [
            run(0, 512, "device", "decode-1"),
            run(512, 768, "host", "cache-1"),
            run(768, 1067, "computed", "decode-1", "evicted", "cache-1"),
            run(1067, 1068, "computed", "decode-1", "prompt_end"),
        ],
        "error": None, "sentences": ["decode-1 was cheapest: it held 512 tokens, and its node's cache 256 more."],
    }  # fmt: skip
