"""The prompts that a prefill worker computes for others, and what it publishes. Pure: events in, instructions out.

    asked ---(an earlier one of that id is freed)---> begun ---chunks published---> published whole ---> freed
                                                        '-----failed-----> told, gone

How long a prompt is held `kvcache.leases` decides; this book says what is told of it. The last offer waits for the
first token, which follows at once, and the lease begins with both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from engine.scheduling.plan import EmitTokens, OfferBlocks, SequenceSpec
from engine.scheduling.requests import spec_of
from kvcache.leases import Asked, AskerLost, Failed, FreeBlocks, LeaseBook, Published, Released, Renewed, TimePassed
from kvcache.locations import unpack_locations
from kvcache.names import token_array
from messages.errors import InvariantError, KvrayError, WorkerError
from messages.handoff import KvHandoff, PrefillFailed, PrefillRequest

# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PromptAsked:
    """A worker wants this prompt's KV; another one that wanted it before is told that it gets nothing."""

    asker: bytes
    message: PrefillRequest


@dataclass(frozen=True, slots=True)
class BlocksFreed:
    """A FreeBlocks was carried out: what the scheduler says of this request is about the old prompt no more."""

    request_id: str


#: What the scheduler of a prefill worker wants done is an event here.
PublicationEvent: TypeAlias = (
    OfferBlocks | EmitTokens | PromptAsked | BlocksFreed | Renewed | Released | AskerLost | TimePassed
)

# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class BeginPrompt:
    """Give `spec` to the scheduler."""

    spec: SequenceSpec


@dataclass(frozen=True, slots=True)
class Publish:
    """Send `handoff` to the asker, with the checksums of its blocks filled in."""

    asker: bytes
    handoff: KvHandoff


@dataclass(frozen=True, slots=True)
class TellFailed:
    """Send `message` to the asker."""

    asker: bytes
    message: PrefillFailed


#: FreeBlocks is answered with BlocksFreed.
PublicationInstruction: TypeAlias = BeginPrompt | FreeBlocks | Publish | TellFailed

# ----------------------------------------------------------------------------------------------------------- the book


@dataclass(slots=True)
class _Prompt:
    spec: SequenceSpec
    num_held_tokens: int  #: at its head; the asker has their blocks
    asked_s: float
    is_begun: bool = False  #: the scheduler has it
    offer: OfferBlocks | None = None  #: the last one, until the first token comes


class PublicationBook:
    """All prompts of a prefill worker, from the question until their blocks are freed."""

    def __init__(self, lease_s: float, block_size: int) -> None:
        """Make an empty book. `lease_s`: of a prompt that was published whole; `block_size` in tokens."""
        self.leases = LeaseBook(lease_s)
        self._block_size = block_size
        self._prompts: dict[str, _Prompt] = {}
        self.num_asked = 0
        self.num_published_blocks = 0

    @property
    def num_open(self) -> int:
        """Prompts that are being computed or held."""
        return len(self._prompts)

    def on_event(self, event: PublicationEvent, now_s: float) -> list[PublicationInstruction]:
        """Take in `event`; return what is to be done, in order. Unknown ids are ignored. `now_s` never goes back.

        Carrying an instruction out may lead to further events before the next one is carried out.
        """
        match event:
            case OfferBlocks():
                return self._take_offer(event, now_s)
            case EmitTokens():
                return self._take_token(event, now_s)
            case PromptAsked():
                return self._ask(event, now_s)
            case BlocksFreed(request_id):
                return self._begin(request_id)
            case Renewed() | Released() | AskerLost() | TimePassed():
                freed = self.leases.on_event(event, now_s)
                for item in freed:
                    del self._prompts[item.request_id]
                return [*freed]
            case _ as unreachable:
                assert_never(unreachable)

    def check_invariants(self, seq_ids: Iterable[str]) -> None:
        """Check the book when every instruction was carried out. `seq_ids`: the sequences that the scheduler has.

        Raises:
            InvariantError: the books differ, or an offer waits for a token.
        """
        self.leases.check_invariants(seq_ids)
        self.leases.check_invariants(self._prompts)
        for request_id, prompt in self._prompts.items():
            if not prompt.is_begun or prompt.offer is not None:
                raise InvariantError(f"prompt {request_id!r} was not begun, or is computed and not published")

    def _ask(self, event: PromptAsked, now_s: float) -> list[PublicationInstruction]:
        request = event.message.request
        request_id = request.request_id
        prompt = token_array(request.token_ids)[: request.num_prompt_tokens]
        spec = replace(spec_of(request, prompt, now_s), is_kept=True)
        before = self.leases.asker_of(request_id)
        freed = self.leases.on_event(Asked(request_id, event.asker), now_s)
        self.num_asked += 1
        self._prompts[request_id] = _Prompt(spec, event.message.num_held_tokens, now_s)
        if before is None:
            return self._begin(request_id)
        if before == event.asker:
            return [*freed]
        # It may be the later one that waits: what a dead worker asked can arrive after its successor's question.
        error = WorkerError(f"request {request_id!r} was asked for by another worker")
        return [TellFailed(before, PrefillFailed(request_id=request_id, error=error.info())), *freed]

    def _begin(self, request_id: str) -> list[PublicationInstruction]:
        """Begin to compute a prompt that was asked for: read path step 4."""
        prompt = self._prompts.get(request_id)
        if prompt is None or prompt.is_begun:
            return []
        prompt.is_begun = True
        return [BeginPrompt(prompt.spec)]

    def _take_offer(self, offer: OfferBlocks, now_s: float) -> list[PublicationInstruction]:
        prompt = self._prompts.get(offer.seq_id)
        if prompt is None or not prompt.is_begun:
            return []
        if not offer.is_last:
            return self._publish(prompt, offer, None, now_s)
        prompt.offer = offer
        return []

    def _take_token(self, emitted: EmitTokens, now_s: float) -> list[PublicationInstruction]:
        prompt = self._prompts.get(emitted.seq_id)
        if prompt is None or not prompt.is_begun:
            return []
        offer, prompt.offer = prompt.offer, None
        if emitted.error is None and emitted.token_ids and offer is not None:
            return self._publish(prompt, offer, emitted, now_s)
        error = emitted.error or KvrayError(f"prefill ended with {emitted.finish_reason} and no token")
        asker = self._asker_of(emitted.seq_id)
        del self._prompts[emitted.seq_id]
        self.leases.on_event(Failed(emitted.seq_id), now_s)
        return [TellFailed(asker, PrefillFailed(request_id=emitted.seq_id, error=error.info()))]

    def _publish(
        self, prompt: _Prompt, offer: OfferBlocks, emitted: EmitTokens | None, now_s: float
    ) -> list[PublicationInstruction]:
        """Publish what the asker lacks of the offer, and in the end the first token: read path step 5."""
        first_index = prompt.num_held_tokens // self._block_size
        rows = unpack_locations(offer.blocks)
        rows = rows[rows["index"] >= first_index]
        self.num_published_blocks += len(rows)
        if emitted is not None:
            self.leases.on_event(Published(offer.seq_id), now_s)
        handoff = KvHandoff(
            request_id=offer.seq_id,
            lease_s=self.leases.lease_s,
            blocks=rows.tobytes(),
            is_last=emitted is not None,
            first_token=None if emitted is None else emitted.token_ids[0],
            first_logprob=emitted.logprobs[0] if emitted is not None and emitted.logprobs else None,
            num_cached_tokens=offer.num_cached_tokens,
            elapsed_s=now_s - prompt.asked_s,
        )
        return [Publish(self._asker_of(offer.seq_id), handoff)]

    def _asker_of(self, request_id: str) -> bytes:
        asker = self.leases.asker_of(request_id)
        if asker is None:
            raise InvariantError(f"prompt {request_id!r} is computed for nobody")
        return asker
