"""Placement without a router: rendezvous hashing on the prompt's first blocks, bounded by what is known of the load.

Prompts that begin alike meet at the same worker, whichever ingress places them, so most of the cache still hits; no
worker gets more than its share and a quarter (consistent hashing with bounded loads, Mirrokni et al. 2018).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kvcache.price import ASSUMED_COMPUTE, ASSUMED_MOVE, SHORT_TOKENS, Computation, compute_s, handoff_s, harm_s
from kvrouter.fit import can_ever_hold, can_hand_over
from kvrouter.policy import Assumptions, check_ttft
from kvrouter.rendezvous import affinity, ranks, worker_hash
from kvrouter.worker_state import Reserved, WorkerState
from messages.errors import CapacityError, RequestError, WorkerError
from messages.fleet import WorkerInfo
from messages.route import Placement, RouteRequest

_MAX_SHARE = 1.25  #: of the mean number of sequences


class OwnQueues:
    """The prefill that waits for whoever computes it, of the requests that one ingress placed itself."""

    def __init__(self) -> None:
        self._workers: dict[str, WorkerState] = {}
        self._placed: dict[str, str] = {}  #: worker id, by request

    def set_fleet(self, workers: Iterable[WorkerInfo]) -> None:
        """Take in which workers are there."""
        self._workers = {info.worker_id: self._workers.get(info.worker_id) or WorkerState(info) for info in workers}

    def add(self, request: RouteRequest, placement: Placement) -> None:
        """Count a request that was placed, by whomever, until it ends here."""
        self.end(request.request_id)
        worker_id = placement.prefill_worker or placement.decode_worker
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        start = request.num_prompt_tokens - max(1, placement.num_computed_tokens - sum(request.other_prompts))
        computing_s = _computed_s(request, worker.info, start)
        short_s = computing_s if placement.num_computed_tokens <= SHORT_TOKENS else 0.0
        worker.reserve(request.request_id, Reserved(computing_s, 0, 0, short_s))
        self._placed[request.request_id] = worker_id

    def end(self, request_id: str) -> None:
        """Count a request no longer: its first token came, or nothing will; unknown ids are ignored."""
        worker = self._workers.get(self._placed.pop(request_id, ""))
        if worker is not None:
            worker.release(request_id)

    def wait_s(self, worker_id: str, num_tokens: int) -> float:
        """Return the seconds that a prompt of so many tokens waits for those before it."""
        worker = self._workers.get(worker_id)
        return 0.0 if worker is None else worker.queue_s(num_tokens)


def choose(
    request: RouteRequest,
    workers: Sequence[WorkerInfo],
    num_sequences: Mapping[str, int],
    queues: OwnQueues,
    max_ttft_s: float,
) -> Placement:
    """Choose where `request` runs. `num_sequences`: by worker id, as far as the caller knows; absent means none.

    Raises:
        CapacityError: there is no decode worker (503), or the predicted time to first token is beyond `max_ttft_s`.
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
            f"the prompt has {request.num_prompt_tokens} tokens, more than any worker holds: it exceeds this model's "
            "maximum context length here (context_length_exceeded)",
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
    computing = prefill or decode
    own_s = there_s if prefill else _computed_s(request, decode)
    queue_s = queues.wait_s(computing.worker_id, request.num_prompt_tokens + sum(request.other_prompts))
    excess = num_sequences.get(decode.worker_id, 0) + request.num_sequences - decode.max_num_seqs
    delay_s = queue_s + max(0, excess) / decode.max_num_seqs * Assumptions().sequence_s
    check_ttft(delay_s, own_s, max_ttft_s)
    return Placement(
        request_id=request.request_id,
        decode_worker=decode.worker_id,
        decode_address=decode.address,
        prefill_worker=prefill.worker_id if prefill else None,
        prefill_address=prefill.address if prefill else None,
        prefill_s=there_s + queue_s if prefill else 0.0,
        num_computed_tokens=request.num_prompt_tokens + sum(request.other_prompts),
        held=None,
        predicted_ttft_s=delay_s + own_s,
        reason="no router: rendezvous hashing of the first blocks",
    )


def _computed_s(request: RouteRequest, worker: WorkerInfo, start: int = 0) -> float:
    """Return the seconds that the prompt takes from token `start` on, by what the worker measured at its start."""
    price = worker.compute or ASSUMED_COMPUTE
    others_s = sum(compute_s(price, Computation.of(0, num_tokens)) for num_tokens in request.other_prompts)
    return compute_s(price, Computation.of(start, request.num_prompt_tokens)) + others_s


def _handed_over_s(request: RouteRequest, prefill: WorkerInfo, decode: WorkerInfo) -> float:
    computed_s = _computed_s(request, prefill)
    num_blocks = -(-request.num_prompt_tokens // decode.block_size)
    return computed_s + handoff_s(ASSUMED_MOVE, num_blocks * decode.block_bytes, computed_s)


def _bounded_rendezvous(
    request: RouteRequest, workers: Sequence[WorkerInfo], num_sequences: Mapping[str, int]
) -> WorkerInfo:
    loads = {worker.worker_id: num_sequences.get(worker.worker_id, 0) for worker in workers}
    most = _MAX_SHARE * (sum(loads.values()) + request.num_sequences) / len(workers)
    # Whoever has least is always within the bound, also when the mean is below one sequence.
    most = max(most, min(loads.values()) + request.num_sequences)
    roomy = [worker for worker in workers if loads[worker.worker_id] + request.num_sequences <= most]
    hashes = np.array([worker_hash(worker.worker_id) for worker in roomy], np.uint64)
    return roomy[int(ranks(affinity(request), hashes).argmax())]
