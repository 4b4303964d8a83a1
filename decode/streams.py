"""The requests that a decode worker answers, and what others hold for them. Pure: events in, instructions out.

    requested ---asked---> leased ---offered whole, last pull ended; or stream ended---> released
                              '-----refused, owner lost-----> computed here

A stream lives until its last token, or until nobody wants it any more. A lease, seen from the asker's side, begins with
the question to the owner (a prefill worker) and ends with the word that nothing more of its blocks will be read, or
when the owner says that there is nothing or is gone.

A stream that ends while its prompt is still computed releases at once, even under a pull: the owner is to stop
computing. Once all was offered the lease waits for the pull, for what comes whole is of use to the next request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from engine.scheduling.plan import (
    AskRemote,
    EmitTokens,
    Event,
    KvOffered,
    KvRefused,
    PullBlocks,
    PullEnded,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
    StopRemote,
)
from kvcache.names import unpack_tokens
from messages.errors import InvariantError
from messages.handoff import KvHandoff, PrefillRequest, ReleaseLease, RenewLease
from messages.request import GenerateRequest
from messages.stream import TokenChunk

_AVOID_S = 1.0  #: how long an address is left alone after it was lost

# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Requested:
    """An ingress wants an answer. `can_pull`: blocks can come from its prefill address, as far as is known."""

    ingress: bytes
    request: GenerateRequest
    can_pull: bool


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client does not want the request any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class IngressLost:
    """The ingress is gone: nobody reads its answers."""

    ingress: bytes


@dataclass(frozen=True, slots=True)
class HandedOff:
    """An owner offers blocks."""

    source: str
    handoff: KvHandoff


@dataclass(frozen=True, slots=True)
class Refused:
    """An owner has nothing for this request, and will have nothing."""

    source: str
    request_id: str


@dataclass(frozen=True, slots=True)
class OwnerLost:
    """The owner is gone, with all that it held."""

    source: str


@dataclass(frozen=True, slots=True)
class PullProgressed:
    """A pull still runs; `num_arrived` of its blocks came so far."""

    request_id: str
    num_arrived: int


@dataclass(frozen=True, slots=True)
class PullStopped:
    """A pull has ended, well or not. `bad_indexes`: of blocks that did not arrive whole and verified.

    For `quarantine_s` late bytes may land in their targets.
    """

    request_id: str
    bad_indexes: frozenset[int]
    quarantine_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SchedulerTold:
    """The scheduler took an event of this request in, and what it wants done about it was told here."""

    request_id: str


#: What the scheduler of a decode worker wants done is an event here.
StreamEvent: TypeAlias = (
    EmitTokens
    | AskRemote
    | StopRemote
    | PullBlocks
    | Requested
    | Cancelled
    | IngressLost
    | HandedOff
    | Refused
    | OwnerLost
    | PullProgressed
    | PullStopped
    | SchedulerTold
)

# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class Reply:
    """Send `chunk` to the ingress."""

    ingress: bytes
    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class TellScheduler:
    """Post `event`, tell what the scheduler then wants, and answer with SchedulerTold."""

    request_id: str
    event: Event


@dataclass(frozen=True, slots=True)
class AskOwner:
    """Connect to `source` unless that was done, and send it `message`."""

    source: str
    message: PrefillRequest


@dataclass(frozen=True, slots=True)
class TellOwner:
    """Send `message` to `source` if it is still there."""

    source: str
    message: RenewLease | ReleaseLease


@dataclass(frozen=True, slots=True)
class BeginPull:
    """Carry out `pull`, tell PullProgressed some times in a lease meanwhile, and answer with PullStopped."""

    pull: PullBlocks


@dataclass(frozen=True, slots=True)
class LearnHandoff:
    """A prompt's KV came whole from `source`: `elapsed_s` after it was asked, of which it needed `source_s` itself."""

    source: str
    elapsed_s: float
    source_s: float
    num_blocks: int


StreamInstruction: TypeAlias = Reply | TellScheduler | AskOwner | TellOwner | BeginPull | LearnHandoff

# ----------------------------------------------------------------------------------------------------------- the book


@dataclass(slots=True)
class _Stream:
    ingress: bytes
    request: GenerateRequest
    position: int  #: output tokens so far, those given with the request included


@dataclass(slots=True)
class _Lease:
    source: str
    asked_s: float
    is_offered_whole: bool = False  #: the last handoff came
    source_s: float = 0.0  #: what the owner needed until then
    num_pulled_blocks: int = 0
    has_failed: bool = False  #: a block did not come well
    num_arrived: int = 0  #: blocks of the pull that runs, when the lease was last renewed


class StreamBook:
    """All streams of a decode worker. A request has at most one lease, and one pull at a time."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._leases: dict[str, _Lease] = {}  #: by request; one whose stream ended is there while it is pulled
        self._pulling: set[str] = set()  #: requests, those whose stream ended included
        self._avoided_until_s: dict[str, float] = {}  #: by address
        self.num_refused = 0  #: prompts that were asked for and did not come whole

    @property
    def num_open(self) -> int:
        """Requests that are still to be answered."""
        return len(self._streams)

    def has(self, request_id: str) -> bool:
        """Tell whether the request is still to be answered."""
        return request_id in self._streams

    @property
    def num_pulls(self) -> int:
        """Pulls in progress."""
        return len(self._pulling)

    def on_event(self, event: StreamEvent, now_s: float) -> list[StreamInstruction]:
        """Take in `event`; return what is to be done, in order. Unknown ids and addresses are ignored.

        `now_s` never goes back. Carrying an instruction out may lead to further events before the next one is
        carried out.

        Raises:
            InvariantError: a pull begins while another of that request runs, or ends that was not running.
        """
        match event:
            case EmitTokens():
                return self._reply(event, now_s)
            case AskRemote(request_id, num_held_tokens):
                return self._ask(request_id, num_held_tokens, now_s)
            case StopRemote(request_id):
                return self._give_up(request_id)
            case PullBlocks():
                return self._begin_pull(event)
            case Requested():
                return self._open(event, now_s)
            case Cancelled(request_id):
                return self._cancel(request_id, now_s)
            case IngressLost(ingress):
                lost = [key for key, stream in self._streams.items() if stream.ingress == ingress]
                return [instruction for request_id in lost for instruction in self._cancel(request_id, now_s)]
            case HandedOff(source, handoff):
                return self._take_handoff(source, handoff)
            case Refused(source, request_id):
                lease = self._leases.get(request_id)
                return self._compute_here(request_id) if lease is not None and lease.source == source else []
            case OwnerLost(source):
                self._avoided_until_s = {key: s for key, s in self._avoided_until_s.items() if s > now_s}
                self._avoided_until_s[source] = now_s + _AVOID_S
                lost = [key for key, lease in self._leases.items() if lease.source == source]
                return [i for request_id in lost for i in self._compute_here(request_id, is_suspect=True)]
            case PullProgressed(request_id, num_arrived):
                return self._renew(request_id, num_arrived)
            case PullStopped():
                return self._end_pull(event, now_s)
            case SchedulerTold(request_id):
                return self._release_if_over(request_id, now_s)
            case _ as unreachable:
                assert_never(unreachable)

    def check_invariants(self, seq_ids: Iterable[str]) -> None:
        """Check the book when every instruction was carried out. `seq_ids`: the sequences that the scheduler has.

        Raises:
            InvariantError: the books differ, or a lease is held for nothing.
        """
        held = set(seq_ids)
        if held != self._streams.keys():
            raise InvariantError(f"streams {sorted(self._streams)} and sequences {sorted(held)} are not the same")
        for request_id, lease in self._leases.items():
            if request_id not in (self._pulling if lease.is_offered_whole else self._streams):
                raise InvariantError(f"nothing more comes of the lease of {request_id!r}, and it was not released")

    # -------------------------------------------------------------------------------------------------------- streams

    def _open(self, event: Requested, now_s: float) -> list[StreamInstruction]:
        """Begin a stream: read path step 3."""
        request = event.request
        if request.request_id in self._streams:
            return []  # it came twice
        token_ids = unpack_tokens(request.token_ids)
        self._streams[request.request_id] = _Stream(event.ingress, request, len(token_ids) - request.num_prompt_tokens)
        spec = SequenceSpec(
            seq_id=request.request_id,
            token_ids=token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            params=request.params,
            salt=request.salt,
            priority=request.priority,
            deadline_s=None if request.deadline_s is None else now_s + request.deadline_s,
            remote_s=self._remote_s(event, now_s),
            is_suspect=request.is_suspect,
        )
        return [TellScheduler(request.request_id, SequenceAdded(spec))]

    def _remote_s(self, event: Requested, now_s: float) -> float | None:
        """Return in how many seconds the prefill worker's KV will lie here: as predicted, or never (infinite).

        None where no prefill worker was named.
        """
        request = event.request
        address = request.prefill_address
        if address is None or request.is_suspect:  # one worker at a time is enough for it
            return None
        is_of_use = request.params.prompt_logprobs is None  # another worker's prefill does not give them
        is_avoided = self._avoided_until_s.get(address, now_s) > now_s
        return request.prefill_s if event.can_pull and is_of_use and not is_avoided else math.inf

    def _cancel(self, request_id: str, now_s: float) -> list[StreamInstruction]:
        if self._streams.pop(request_id, None) is None:
            return []
        return [TellScheduler(request_id, SequenceCancelled(request_id)), *self._release_if_over(request_id, now_s)]

    def _reply(self, emitted: EmitTokens, now_s: float) -> list[StreamInstruction]:
        """Send what was emitted to the stream's ingress: read path step 8."""
        stream = self._streams.get(emitted.seq_id)
        if stream is None:
            return []
        chunk = TokenChunk(
            request_id=emitted.seq_id,
            position=stream.position,
            token_ids=emitted.token_ids,
            logprobs=emitted.logprobs,
            prompt_logprobs=emitted.prompt_logprobs,
            sources=emitted.sources,
            is_alone=emitted.is_alone,
            stop_token_id=emitted.stop_token_id,
            finish_reason=emitted.finish_reason,
            error=None if emitted.error is None else emitted.error.info(),
        )
        stream.position += len(emitted.token_ids)
        if emitted.finish_reason is None:
            return [Reply(stream.ingress, chunk)]
        del self._streams[emitted.seq_id]
        return [Reply(stream.ingress, chunk), *self._release_if_over(emitted.seq_id, now_s)]

    # --------------------------------------------------------------------------------------------------------- leases

    def _ask(self, request_id: str, num_held_tokens: int, now_s: float) -> list[StreamInstruction]:
        """Ask the prefill worker for the prompt's KV, which begins a lease: read path step 4."""
        stream = self._streams.get(request_id)
        if stream is None or stream.request.prefill_address is None:
            return []  # it is about to be cancelled
        self._leases[request_id] = _Lease(stream.request.prefill_address, now_s)
        return [
            AskOwner(
                stream.request.prefill_address,
                PrefillRequest(request=stream.request, num_held_tokens=num_held_tokens),
            )
        ]

    def _take_handoff(self, source: str, handoff: KvHandoff) -> list[StreamInstruction]:
        request_id = handoff.request_id
        lease = self._leases.get(request_id)
        if lease is None or lease.source != source or request_id not in self._streams:
            return [TellOwner(source, ReleaseLease(request_id=request_id))]  # it must not wait for its lease
        lease.is_offered_whole |= handoff.is_last
        lease.source_s = handoff.elapsed_s
        offered = KvOffered(
            seq_id=request_id,
            source=source,
            blocks=handoff.blocks,
            is_last=handoff.is_last,
            first_token=handoff.first_token,
            first_logprob=handoff.first_logprob,
            num_peer_cached_tokens=handoff.num_cached_tokens,
        )
        return [TellScheduler(request_id, offered)]

    def _compute_here(self, request_id: str, *, is_suspect: bool = False) -> list[StreamInstruction]:
        """Forget a lease that ended at its owner; the scheduler is to compute what was not offered whole.

        `is_suspect`: the owner is gone, maybe by computing this prompt.
        """
        lease = self._leases.pop(request_id)
        if lease.is_offered_whole or request_id not in self._streams:
            return []
        self.num_refused += 1
        return [TellScheduler(request_id, KvRefused(request_id, is_suspect))]

    def _give_up(self, request_id: str) -> list[StreamInstruction]:
        """Release the lease of a prompt that took too long, even under a pull: the owner is to stop computing."""
        lease = self._leases.get(request_id)
        if lease is None or lease.is_offered_whole:
            return []
        del self._leases[request_id]
        self.num_refused += 1
        return [TellOwner(lease.source, ReleaseLease(request_id=request_id))]

    def _renew(self, request_id: str, num_arrived: int) -> list[StreamInstruction]:
        """Keep the lease alive while blocks arrive: a while without any is for the lease to judge."""
        lease = self._leases.get(request_id)
        if lease is None or lease.num_arrived == num_arrived:
            return []
        lease.num_arrived = num_arrived
        return [TellOwner(lease.source, RenewLease(request_id=request_id))]

    def _release_if_over(self, request_id: str, now_s: float) -> list[StreamInstruction]:
        """Release the lease once nothing more will be read of the owner's blocks; what came whole teaches its price."""
        lease = self._leases.get(request_id)
        if lease is None or request_id in (self._pulling if lease.is_offered_whole else self._streams):
            return []
        del self._leases[request_id]
        release = TellOwner(lease.source, ReleaseLease(request_id=request_id))
        if request_id not in self._streams or lease.has_failed:
            return [release]
        return [
            release,
            LearnHandoff(lease.source, now_s - lease.asked_s, lease.source_s, lease.num_pulled_blocks),
        ]

    # ---------------------------------------------------------------------------------------------------------- pulls

    def _begin_pull(self, pull: PullBlocks) -> list[StreamInstruction]:
        """Begin a pull, and renew the lease, which must not end by itself meanwhile."""
        if pull.seq_id in self._pulling:
            raise InvariantError(f"a pull of {pull.seq_id!r} begins while another runs")
        self._pulling.add(pull.seq_id)
        lease = self._leases.get(pull.seq_id)
        if lease is None:
            return [BeginPull(pull)]
        lease.num_arrived = 0
        lease.num_pulled_blocks += len(pull.pairs)
        return [TellOwner(lease.source, RenewLease(request_id=pull.seq_id)), BeginPull(pull)]

    def _end_pull(self, stopped: PullStopped, now_s: float) -> list[StreamInstruction]:
        """End a pull, and tell the scheduler, whose blocks its targets are, whatever became of the stream."""
        request_id, bad = stopped.request_id, stopped.bad_indexes
        if request_id not in self._pulling:
            raise InvariantError(f"a pull of {request_id!r} ended that was not running")
        self._pulling.discard(request_id)
        if bad and request_id in self._leases:
            self._leases[request_id].has_failed = True
        until_s = now_s + stopped.quarantine_s if stopped.quarantine_s > 0 and bad else None
        return [TellScheduler(request_id, PullEnded(request_id, bad, until_s))]
