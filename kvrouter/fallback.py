"""Placement without a router: rendezvous hashing on the prompt's first blocks, bounded by what is known of the load.

Prompts that begin alike meet at the same worker, whichever ingress places them, so most of the cache still hits; no
worker gets more than its share and a quarter (consistent hashing with bounded loads, Mirrokni et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcache.price import ASSUMED_COMPUTE, ASSUMED_MOVE, Computation, compute_s, handoff_s, harm_s
from kvrouter.policy import affinity_key, can_ever_hold, can_hand_over, rendezvous
from messages.errors import CapacityError, RequestError, WorkerError
from messages.fleet import WorkerInfo
from messages.route import Placement, RouteRequest

_MAX_SHARE = 1.25  #: of the mean number of sequences


def choose(request: RouteRequest, workers: Sequence[WorkerInfo], num_sequences: Mapping[str, int]) -> Placement:
    """Choose where `request` runs. `num_sequences`: by worker id, as far as the caller knows; absent means none.

    Raises:
        CapacityError: there is no decode worker (503).
        WorkerError: all decode workers are excluded.
        RequestError: the prompt fits none of them.
    """
    decodes = [worker for worker in workers if worker.role == "decode"]
    if not decodes:
        raise CapacityError("no decode worker is there", status=503, code="no_workers", retry_after_s=1.0)
    decodes = [worker for worker in decodes if worker.worker_id not in request.exclude]
    if not decodes:
        raise WorkerError(f"every decode worker failed this request: {', '.join(request.exclude)}")
    decodes = [worker for worker in decodes if can_ever_hold(worker, request)]
    if not decodes:
        raise RequestError(
            f"the prompt has {request.num_prompt_tokens} tokens, more than any worker holds",
            code="context_length_exceeded",
        )
    decode = _bounded_rendezvous(request, decodes, num_sequences)
    prefills = [
        worker
        for worker in workers
        if worker.role == "prefill"
        and worker.worker_id not in request.exclude
        and can_ever_hold(worker, request)
        and can_hand_over(worker, decode)
    ]
    prefill = _bounded_rendezvous(request, prefills, num_sequences) if prefills else None
    there_s = 0.0
    if prefill is not None:
        there_s = _handed_over_s(request, prefill, decode)
        here_s = _computed_s(request, decode)
        if here_s + harm_s(here_s, num_sequences.get(decode.worker_id, 0)) <= there_s:
            prefill = None
    return Placement(
        request_id=request.request_id,
        decode_worker=decode.worker_id,
        decode_address=decode.address,
        prefill_worker=prefill.worker_id if prefill else None,
        prefill_address=prefill.address if prefill else None,
        prefill_s=there_s if prefill else 0.0,
        reason="no router: rendezvous hashing of the first blocks",
    )


def _computed_s(request: RouteRequest, worker: WorkerInfo) -> float:
    """Return the seconds that the whole prompt takes, by what the worker measured at its start."""
    return compute_s(worker.compute or ASSUMED_COMPUTE, Computation.of(0, request.num_prompt_tokens))


def _handed_over_s(request: RouteRequest, prefill: WorkerInfo, decode: WorkerInfo) -> float:
    computed_s = _computed_s(request, prefill)
    num_blocks = -(-request.num_prompt_tokens // decode.block_size)
    return computed_s + handoff_s(ASSUMED_MOVE, num_blocks * decode.block_bytes, computed_s)


def _bounded_rendezvous(
    request: RouteRequest, workers: Sequence[WorkerInfo], num_sequences: Mapping[str, int]
) -> WorkerInfo:
    key = affinity_key(request)
    loads = {worker.worker_id: num_sequences.get(worker.worker_id, 0) for worker in workers}
    most = _MAX_SHARE * (sum(loads.values()) + request.num_sequences) / len(workers)
    # Whoever has least is always within the bound, also when the mean is below one sequence.
    most = max(most, min(loads.values()) + request.num_sequences)
    roomy = [worker for worker in workers if loads[worker.worker_id] + request.num_sequences <= most]
    return max(roomy, key=lambda worker: rendezvous(key, worker.worker_id))
