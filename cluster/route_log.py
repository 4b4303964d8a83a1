"""What one ingress knows of its last requests: where each was placed, and what came of it. Pure: no clock, no IO.

    begun --> placed --> first token: its runs are explained and counted --> kept, the newest ones
                 '-- ends before a token -----------------------------------'

Requests are known by what their sequences' ids begin with: the id that the client sees, and eight random digits.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeAlias

from cluster.explained_runs import Asked, ExplainedRun, explained_runs, missed_tokens, num_absent_tokens
from messages.fleet import WorkerInfo
from messages.miss import MISS_REASONS, MissedRun
from messages.request import GenerateRequest, HeldRun
from messages.route import Placement
from messages.stream import PromptSources, TokenChunk

_SEQUENCE_ID = re.compile(r"((.*)-[0-9a-f]{8})-\d+(#\d+)?")
_REPLY_PREFIXES = ("chatcmpl-", "cmpl-")  #: of the ids in replies, before the request's own

logger = logging.getLogger(__name__)

P = ParamSpec("P")


def _apart(told: Callable[P, None]) -> Callable[P, None]:
    """Let an error in what only explains be a line in the log: other requests' tokens are behind it."""

    @functools.wraps(told)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            told(*args, **kwargs)
        except Exception:  # the edge of what is only watched
            logger.exception("a request is not explained")

    return guarded


PlacedBy: TypeAlias = Literal["", "router", "hashing"]


@dataclass(slots=True, kw_only=True)
class RouteRecord:
    """One request, as far as it is known by now; of several prompts the first one is told of."""

    request_id: str  #: as its client knows it
    sequence_id: str  #: of its first sequence, at the ingress
    tenant: int  #: the number in its blocks
    num_prompt_tokens: int
    num_sequences: int
    wants_prompt_logprobs: bool
    began_s: float  #: unix time
    asked_s: float  #: by the clock of events
    placed_by: PlacedBy = ""
    placed_id: str = ""  #: the id that it has at the router
    reason: str = ""
    decode_worker: str = ""
    decode_address: str = ""
    prefill_worker: str | None = None
    predicted_ttft_s: float | None = None
    ttft_s: float | None = None
    sources: PromptSources | None = None
    runs: tuple[ExplainedRun, ...] = ()
    num_placements: int = 0
    num_matched_tokens: int = 0  #: that the decode worker was said to hold at the prompt's head
    held: tuple[HeldRun, ...] | None = None
    error: str = ""
    has_left: bool = False  #: its client, before any token came
    missing: tuple[MissedRun, ...] = ()
    offered: Placement | None = field(default=None, repr=False)  #: the router's answer, until a worker is sent it


class RouteLog:
    """The requests of one ingress that have had no token yet, and the last `max_kept` of the others.

    `fleet` tells which workers are there.
    """

    def __init__(self, max_kept: int, fleet: Mapping[str, WorkerInfo]) -> None:
        self._max_kept = max_kept
        self.fleet = fleet
        self._open: dict[str, RouteRecord] = {}  # by what their sequences' ids begin with
        self._kept: OrderedDict[str, RouteRecord] = OrderedDict()
        self._by_id: dict[tuple[int, str], str] = {}  # that, by tenant and client's id: of several the last
        self._reply_ids: OrderedDict[str, str] = OrderedDict()  # that, by ids in replies that do not tell it
        self._missed: Counter[str] = Counter()  # prompt tokens, by reason
        self._num_explained_tokens = 0  # of those prompts, all
        self._num_predicted_blocks = 0
        self._num_absent_blocks = 0

    def __len__(self) -> int:
        return len(self._open) + len(self._kept)

    def predicted_blocks(self) -> tuple[int, int]:
        """Return how many blocks decode workers' pools were said to hold, and how many of those they had not."""
        return self._num_predicted_blocks, self._num_absent_blocks

    def stats(self) -> dict[str, float]:
        """Return the counters by metric name."""
        missed = {
            f'kvray_prompt_misses_total{{reason="{reason}"}}': float(self._missed[reason]) for reason in MISS_REASONS
        }
        return {"kvray_explained_prompt_tokens_total": float(self._num_explained_tokens), **missed}

    # ------------------------------------------------------------------------------------------------- what happened

    def begin(self, requests: Sequence[GenerateRequest], began_s: float, now_s: float) -> None:
        """Take in that a client asked for these sequences, at unix time `began_s`."""
        first = requests[0]
        key, request_id = _key(first.request_id), _client_id(first.request_id)
        self._open[key] = RouteRecord(
            request_id=request_id,
            sequence_id=first.request_id,
            tenant=first.tenant,
            num_prompt_tokens=first.num_prompt_tokens,
            num_sequences=len(requests),
            wants_prompt_logprobs=first.params.prompt_logprobs is not None,
            began_s=began_s,
            asked_s=now_s,
        )
        self._by_id[first.tenant, request_id] = key

    def name_reply(self, sequence_id: str, reply_id: str) -> None:
        """Take in by which id a client will know a request whose first sequence has this one."""
        if self._max_kept:
            self._reply_ids[reply_id] = _key(sequence_id)
            while len(self._reply_ids) > 2 * self._max_kept:
                self._reply_ids.popitem(last=False)

    @_apart
    def take_placement(self, placement: Placement) -> None:
        """Take in what the router answered; it counts once a worker is sent the request by it."""
        record = self._open.get(_key(placement.request_id))
        if record is not None:
            record.offered = placement

    @_apart
    def send(self, worker_id: str, address: str, request: GenerateRequest) -> None:
        """Take in that a worker is sent a request, or that part of it which has one of its prompts."""
        record = self._open.get(_key(request.request_id))
        if record is None or record.placed_id == request.request_id or not _is_first(record, request.request_id):
            return
        placement, record.offered = record.offered, None
        record.placed_id = request.request_id
        record.num_placements += 1
        record.decode_worker, record.decode_address = worker_id, address
        record.prefill_worker = request.prefill_worker
        record.predicted_ttft_s = request.predicted_ttft_s
        record.held = request.held
        if placement is not None and placement.decode_worker == worker_id:
            record.placed_by, record.reason = "router", placement.reason
            record.num_matched_tokens = min(placement.decode_match_tokens, record.num_prompt_tokens)
            record.missing = placement.missing
        else:
            record.placed_by, record.reason = "hashing", "no router answered: by rendezvous hashing of the first blocks"
            record.num_matched_tokens, record.missing = 0, ()

    @_apart
    def take_chunk(self, chunk: TokenChunk, now_s: float) -> None:
        """Take in a first chunk, which tells about the prompt, or an error, under the client's sequence id."""
        record = self._open.get(_key(chunk.request_id))
        if record is None:
            return
        if chunk.error is not None:
            record.error = chunk.error.message
        elif chunk.request_id == record.sequence_id:
            self._explain(record, chunk, now_s)
            self._close(_key(chunk.request_id))

    @_apart
    def end(self, sequence_id: str) -> None:
        """Take in that a request is over, by its first sequence's id."""
        key = _key(sequence_id)
        if (record := self._open.get(key)) is not None:
            record.has_left = not record.error
        self._close(key)

    def _explain(self, record: RouteRecord, chunk: TokenChunk, now_s: float) -> None:
        record.ttft_s = now_s - record.asked_s
        record.sources = chunk.sources
        worker = self.fleet.get(record.decode_worker)
        if worker is None or chunk.plan is None:
            return
        asked = Asked(
            num_tokens=record.num_prompt_tokens,
            block_size=worker.block_size,
            decode_address=record.decode_address,
            held=record.held,
            missing=record.missing,
            wants_prompt_logprobs=record.wants_prompt_logprobs,
        )
        record.runs = explained_runs(asked, chunk.plan.got)
        self._missed.update(missed_tokens(record.runs))
        self._num_explained_tokens += record.num_prompt_tokens
        self._num_predicted_blocks += record.num_matched_tokens // worker.block_size
        self._num_absent_blocks += num_absent_tokens(record.runs, record.num_matched_tokens) // worker.block_size

    def _close(self, key: str) -> None:
        record = self._open.pop(key, None)
        if record is None:
            return
        record.held, record.missing, record.offered = None, (), None
        self._kept[key] = record
        while len(self._kept) > self._max_kept:
            old, forgotten = self._kept.popitem(last=False)
            if self._by_id.get((forgotten.tenant, forgotten.request_id)) == old:
                del self._by_id[forgotten.tenant, forgotten.request_id]

    # ------------------------------------------------------------------------------------------------ what is known

    def find(self, asked_id: str, tenant: int | None) -> RouteRecord | None:
        """Return the last request of this id, one that its client saw anywhere; None: there is none of this tenant's.

        `tenant`: None finds anybody's.
        """
        ids = [asked_id, *(asked_id.removeprefix(prefix) for prefix in _REPLY_PREFIXES if asked_id.startswith(prefix))]
        owners = sorted({owner for owner, one in self._by_id if one in ids}) if tenant is None else [tenant]
        keys = [self._reply_ids.get(asked_id), *(self._by_id.get((owner, one)) for one in ids for owner in owners)]
        found = [record for key in keys if key and (record := self._open.get(key) or self._kept.get(key)) is not None]
        return max((one for one in found if tenant in (None, one.tenant)), key=lambda one: one.began_s, default=None)

    def newest(self, limit: int, tenant: int | None) -> list[RouteRecord]:
        """Return the requests that began last, `limit` of them at most, the newest first."""
        seen = [one for one in (*self._open.values(), *self._kept.values()) if tenant in (None, one.tenant)]
        return sorted(seen, key=lambda one: one.began_s, reverse=True)[:limit]


def _key(sequence_id: str) -> str:
    found = _SEQUENCE_ID.fullmatch(sequence_id)
    return sequence_id if found is None else found[1]


def _client_id(sequence_id: str) -> str:
    found = _SEQUENCE_ID.fullmatch(sequence_id)
    return sequence_id if found is None else found[2]


def _is_first(record: RouteRecord, placed_id: str) -> bool:
    """Tell whether a worker's sequence is the first one of a request, or what it moves as."""
    return placed_id.partition("#")[0] == record.sequence_id
