"""The requests that a decode worker answers. Pure: events in, instructions out.

A stream lives until its last token, or until nobody wants it any more. What its worker borrows for it from others, and
for how long, is `engine.loans`' business.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

import msgspec

from engine.scheduling.plan import AskRemote, EmitTokens, SequenceSpec
from engine.scheduling.requests import spec_of
from kvcache.names import TOKEN_BYTES, token_array
from messages.errors import InvariantError
from messages.handoff import PrefillRequest
from messages.request import GenerateRequest
from messages.stream import TokenChunk

# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Requested:
    """An ingress wants an answer. `can_pull`: blocks can come from its prefill address, as far as is known."""

    ingress: bytes
    request: GenerateRequest
    can_pull: bool


@dataclass(frozen=True, slots=True)
class Accepted:
    """The scheduler has taken the request in: it is not refused any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client does not want the request any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class IngressLost:
    """The ingress is gone: nobody reads its answers."""

    ingress: bytes


#: What the scheduler of a decode worker wants done is an event here.
StreamEvent: TypeAlias = EmitTokens | AskRemote | Requested | Accepted | Cancelled | IngressLost

# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class Reply:
    """Send `chunk` to the ingress."""

    ingress: bytes
    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class BeginSequence:
    """Give `spec` to the scheduler."""

    spec: SequenceSpec


@dataclass(frozen=True, slots=True)
class CancelSequence:
    """Tell the scheduler that the sequence is not wanted any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class AskPrefill:
    """Borrow the prompt's KV from the prefill worker at `source`."""

    source: str
    message: PrefillRequest


StreamInstruction: TypeAlias = Reply | BeginSequence | CancelSequence | AskPrefill

# ----------------------------------------------------------------------------------------------------------- the book


@dataclass(slots=True)
class _Stream:
    ingress: bytes
    request: GenerateRequest
    position: int  #: output tokens so far, those given with the request included


class StreamBook:
    """All streams of a decode worker."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    @property
    def num_open(self) -> int:
        """Requests that are still to be answered."""
        return len(self._streams)

    def has(self, request_id: str) -> bool:
        """Tell whether the request is still to be answered."""
        return request_id in self._streams

    def on_event(self, event: StreamEvent, now_s: float) -> list[StreamInstruction]:
        """Take in `event`; return what is to be done, in order. Unknown ids are ignored. `now_s` never goes back.

        Carrying an instruction out may lead to further events before the next one is carried out.
        """
        match event:
            case EmitTokens():
                return self._reply(event)
            case AskRemote(request_id, num_held_tokens):
                return self._ask(request_id, num_held_tokens)
            case Requested():
                return self._open(event, now_s)
            case Accepted(request_id):
                return self._accept(request_id)
            case Cancelled(request_id):
                return self._cancel(request_id)
            case IngressLost(ingress):
                lost = [key for key, stream in self._streams.items() if stream.ingress == ingress]
                return [instruction for request_id in lost for instruction in self._cancel(request_id)]
            case _ as unreachable:
                assert_never(unreachable)

    def check_invariants(self, seq_ids: Iterable[str]) -> None:
        """Check the book when every instruction was carried out. `seq_ids`: the sequences that the scheduler has.

        Raises:
            InvariantError: the two differ.
        """
        held = set(seq_ids)
        if held != self._streams.keys():
            raise InvariantError(f"streams {sorted(self._streams)} and sequences {sorted(held)} are not the same")

    def _open(self, event: Requested, now_s: float) -> list[StreamInstruction]:
        """Begin a stream for each choice: read path step 3."""
        num_prompt_bytes = TOKEN_BYTES * event.request.num_prompt_tokens
        prompt = token_array(event.request.token_ids[:num_prompt_bytes])
        begun: list[StreamInstruction] = []
        for request in each_choice(event.request):
            if request.request_id in self._streams:
                continue  # it came twice
            generated = token_array(request.token_ids[num_prompt_bytes:])
            self._streams[request.request_id] = _Stream(event.ingress, request, len(generated))
            token_ids = prompt + generated if generated else prompt  # shared by those that begin
            begun.append(
                BeginSequence(_spec_of(request, token_ids, _remote_s(request, can_pull=event.can_pull), now_s))
            )
        return begun

    def _accept(self, request_id: str) -> list[StreamInstruction]:
        stream = self._streams.get(request_id)
        if stream is None or not stream.request.wants_word:
            return []
        return [Reply(stream.ingress, TokenChunk(request_id=request_id, is_accepted=True))]

    def _cancel(self, request_id: str) -> list[StreamInstruction]:
        if self._streams.pop(request_id, None) is None:
            return []
        return [CancelSequence(request_id)]

    def _reply(self, emitted: EmitTokens) -> list[StreamInstruction]:
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
            plan=None
            if emitted.plan is None
            else msgspec.structs.replace(emitted.plan, predicted_ttft_s=stream.request.predicted_ttft_s),
            is_alone=emitted.is_alone,
            stop_token_id=emitted.stop_token_id,
            finish_reason=emitted.finish_reason,
            error=None if emitted.error is None else emitted.error.info(),
        )
        stream.position += len(emitted.token_ids)
        if emitted.finish_reason is not None:
            del self._streams[emitted.seq_id]
        return [Reply(stream.ingress, chunk)]

    def _ask(self, request_id: str, num_held_tokens: int) -> list[StreamInstruction]:
        """Ask the prefill worker for the prompt's KV: read path step 4."""
        stream = self._streams.get(request_id)
        if stream is None or stream.request.prefill_address is None:
            return []  # it is about to be cancelled
        message = PrefillRequest(request=stream.request, num_held_tokens=num_held_tokens)
        return [AskPrefill(stream.request.prefill_address, message)]


def each_choice(request: GenerateRequest) -> Iterator[GenerateRequest]:
    """Yield a request for each of the choices that `request` is about; those that begin share their tokens."""
    yield msgspec.structs.replace(request, others=())
    prompt = request.token_ids[: TOKEN_BYTES * request.num_prompt_tokens]
    for other in request.others:
        yield msgspec.structs.replace(
            request,
            request_id=other.request_id,
            token_ids=prompt + other.token_ids,
            wants_word=False,
            params=msgspec.structs.replace(request.params, choice=other.choice),
            others=(),
        )


def _spec_of(request: GenerateRequest, token_ids: array[int], remote_s: float | None, now_s: float) -> SequenceSpec:
    return replace(
        spec_of(request, token_ids, now_s),
        remote_s=remote_s,
        remote_source=request.prefill_address or "",
        is_suspect=request.is_suspect,
    )


def _remote_s(request: GenerateRequest, *, can_pull: bool) -> float | None:
    """Return in how many seconds the prefill worker's KV will lie here: as predicted, or never (infinite).

    None where no prefill worker was named.
    """
    if request.prefill_address is None or request.is_suspect:  # one worker at a time is enough for it
        return None
    is_of_use = request.params.prompt_logprobs is None  # another worker's prefill does not give them
    return request.prefill_s if can_pull and is_of_use else math.inf
