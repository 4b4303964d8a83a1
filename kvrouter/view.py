"""What the router tells people who look at it (messages.view), gathered when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from kvcache.names import NAME_BYTES
from kvcache.price import Computation, compute_s
from kvrouter.hot_prefixes import HotPrefix
from kvrouter.index import BlockIndex, Run
from kvrouter.worker_state import WorkerState
from messages.cache import BlockHolder, KnownRun
from messages.view import HolderView, PrefixView

#: Tokens of the prompt for which a first token is predicted: workers are compared by it.
NOMINAL_TOKENS: Final = 1024
_MAX_RUNS = 16  #: of a prefix that are told
_MAX_HOLDERS = 32  #: of a run that are named


def holder_views(
    workers: Mapping[str, WorkerState], index: BlockIndex, is_in_step: Callable[[str], bool]
) -> tuple[HolderView, ...]:
    """Return what is known of each worker and node cache."""
    return tuple(
        HolderView(
            worker_id=worker_id,
            role=worker.info.role,
            node_id=worker.info.node_id,
            is_in_step=is_in_step(worker_id),
            known_blocks=index.num_held_by_tier(worker_id),
            num_spare=index.num_spare(worker_id),
            num_running=worker.load.num_running if worker.load else 0,
            num_waiting=worker.load.num_waiting if worker.load else 0,
            num_promised=worker.reserved_sequences,
            free_blocks=worker.free_blocks,
            queue_s=worker.queue_s(NOMINAL_TOKENS),
            ttft_s=predicted_ttft_s(worker),
        )
        for worker_id, worker in workers.items()
    )


def prefix_views(hottest: Iterable[HotPrefix], runs: Callable[[bytes], list[Run]]) -> tuple[PrefixView, ...]:
    """Return these beginnings of prompts with who holds them now."""
    return tuple(
        PrefixView(
            name=prefix.names[-NAME_BYTES:],
            num_blocks=len(prefix.names) // NAME_BYTES,
            num_tokens=len(prefix.names) // NAME_BYTES * prefix.block_size,
            num_requests=prefix.num_requests,
            age_s=prefix.age_s,
            last_request=prefix.last_request,
            tenant=prefix.tenant,
            runs=tuple(
                KnownRun(run.begin, run.end, tuple(BlockHolder(*holder) for holder in run.holders[:_MAX_HOLDERS]))
                for run in runs(prefix.names)[:_MAX_RUNS]
            ),
        )
        for prefix in hottest
    )


def predicted_ttft_s(worker: WorkerState) -> float | None:
    """Return when a worker would give the first token of a nominal prompt that nobody holds; None: nobody measured."""
    price = worker.compute_price
    if price is None or worker.info.role == "cache":
        return None
    return worker.queue_s(NOMINAL_TOKENS) + compute_s(price, Computation.of(0, NOMINAL_TOKENS))
