"""What this worker asked of owners of blocks, until it lets go of it again. Pure: events in, instructions out.

    asked ---offered, pulled---> offered whole, last pull ended; or not wanted any more ---> released
      '-----refused, owner lost-----> the scheduler asks another, or computes

A loan is a lease seen from the asker's side: it begins with the question to the owner, which computes a prompt
(PrefillRequest), has the blocks (BlocksRequest) or makes them ready (PrefetchBlocks). It ends with the word that
nothing more of its blocks will be read, or when the owner says that there is nothing or is gone.

A sequence that ends while an owner still makes its blocks releases at once, even under a pull: the owner is to stop.
Once all was offered the loan waits for the pull, for what comes whole is of use to the next request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias, assert_never

from engine.scheduling.plan import (
    AskAhead,
    AskBlocks,
    BlocksOffered,
    Event,
    FoundAhead,
    KvOffered,
    KvRefused,
    PullBlocks,
    PullEnded,
    StopAsking,
    StopRemote,
)
from messages.errors import InvariantError
from messages.handoff import (
    BlocksFound,
    BlocksRequest,
    KvHandoff,
    PrefetchBlocks,
    PrefillRequest,
    ReleaseLease,
    RenewLease,
)
from messages.tier import SLOW_TIERS, TIERS, Tier

_AVOID_S = 1.0  #: how long an address is left alone after it was lost

# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PromptWanted:
    """The prefill worker at `source` is to compute a sequence's prompt."""

    source: str
    message: PrefillRequest


@dataclass(frozen=True, slots=True)
class HandedOff:
    """An owner offers blocks."""

    source: str
    handoff: KvHandoff


@dataclass(frozen=True, slots=True)
class Found:
    """An owner says where it has blocks that will be asked for."""

    source: str
    found: BlocksFound


@dataclass(frozen=True, slots=True)
class Refused:
    """An owner has nothing for this question, and will have nothing."""

    source: str
    loan_id: str


@dataclass(frozen=True, slots=True)
class OwnerLost:
    """The owner is gone, with all that it held."""

    source: str


@dataclass(frozen=True, slots=True)
class PullProgressed:
    """A pull still runs; `num_arrived` of its blocks came so far."""

    seq_id: str
    num_arrived: int


@dataclass(frozen=True, slots=True)
class PullStopped:
    """A pull has ended, well or not. `bad_indexes`: of blocks that did not arrive whole and verified.

    For `quarantine_s` late bytes may land in their targets.
    """

    seq_id: str
    bad_indexes: frozenset[int]
    quarantine_s: float = 0.0
    damaged_indexes: frozenset[int] = field(default=frozenset(), compare=False)  #: of the bad ones, for people


@dataclass(frozen=True, slots=True)
class SequenceOver:
    """Nobody wants the sequence any more: it ended, or was cancelled."""

    seq_id: str


@dataclass(frozen=True, slots=True)
class SchedulerTold:
    """The scheduler took an event of this sequence in, and what it wants done about it was told here."""

    seq_id: str


#: What a scheduler wants done about blocks of others is an event here.
LoanEvent: TypeAlias = (
    AskBlocks
    | AskAhead
    | StopAsking
    | StopRemote
    | PullBlocks
    | PromptWanted
    | HandedOff
    | Found
    | Refused
    | OwnerLost
    | PullProgressed
    | PullStopped
    | SequenceOver
    | SchedulerTold
)

# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class TellScheduler:
    """Post `event`, tell what the scheduler then wants, and answer with SchedulerTold."""

    seq_id: str
    event: Event


@dataclass(frozen=True, slots=True)
class AskOwner:
    """Connect to `source` unless that was done, and send it `message`."""

    source: str
    message: PrefillRequest | BlocksRequest | PrefetchBlocks


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
    """What was asked of `source` came, whole or not: `elapsed_s` after the question, `source_s` of them by its work.

    `tier`: where it had the blocks; None where it computed some.
    """

    source: str
    tier: Tier | None
    elapsed_s: float
    source_s: float
    num_blocks: int
    asked_s: float  #: when, by the clock of the book


LoanInstruction: TypeAlias = TellScheduler | AskOwner | TellOwner | BeginPull | LearnHandoff

# ----------------------------------------------------------------------------------------------------------- the book


@dataclass(slots=True)
class _Loan:
    seq_id: str
    source: str
    asked_s: float
    is_prompt: bool = False  #: the owner computes what it does not have
    is_ahead: bool = False  #: the owner makes ready what it will be asked for
    is_wanted: bool = True  #: the sequence has not ended
    is_offered_whole: bool = False  #: the last handoff came
    tier: Tier = "device"  #: the slowest one that blocks were offered from
    source_s: float = 0.0  #: what the owner needed until the last handoff
    num_pulled_blocks: int = 0
    pulled: tuple[Tier, float, int] = ("device", 0.0, 0)  #: the three when the last pull began
    come: tuple[Tier, float, int] = ("device", 0.0, 0)  #: of what has come
    come_s: float = 0.0  #: when the last pull ended
    has_failed: bool = False  #: a block did not come well
    num_arrived: int = 0  #: blocks of the pull that runs, when the loan was last renewed


@dataclass(slots=True)
class LoanBook:
    """All loans of a worker. A sequence has at most one prompt, one open question to a holder, one pull at a time."""

    num_refused: int = 0  #: prompts that were asked for and did not come whole
    _loans: dict[str, _Loan] = field(default_factory=dict)  #: by the question's request id
    _pulling: dict[str, str] = field(default_factory=dict)  #: owners, by sequence, those that ended included
    _avoided_until_s: dict[str, float] = field(default_factory=dict)  #: by address
    _numbers: count[int] = field(default_factory=count)

    @property
    def num_pulls(self) -> int:
        """Pulls in progress."""
        return len(self._pulling)

    def is_avoided(self, source: str, now_s: float) -> bool:
        """Tell whether an owner was lost a moment ago."""
        return self._avoided_until_s.get(source, now_s) > now_s

    def on_event(self, event: LoanEvent, now_s: float) -> list[LoanInstruction]:
        """Take in `event`; return what is to be done, in order. Unknown ids and addresses are ignored.

        `now_s` never goes back. Carrying an instruction out may lead to further events before the next one is
        carried out.

        Raises:
            InvariantError: a pull begins while another of that sequence runs, or ends that was not running.
        """
        match event:
            case PromptWanted(source, message):
                self._loans[message.request.request_id] = _Loan(
                    message.request.request_id, source, now_s, is_prompt=True
                )
                return [AskOwner(source, message)]
            case AskBlocks() | AskAhead():
                return self._ask(event, now_s)
            case StopAsking(seq_id, source):
                return self._give_up(seq_id, source, teaches=True)
            case StopRemote(seq_id):
                return self._give_up(seq_id, None)
            case PullBlocks():
                return self._begin_pull(event)
            case HandedOff(source, handoff):
                return self._take_handoff(source, handoff)
            case Found() | Refused():
                return self._take_word(event)
            case OwnerLost(source):
                self._avoided_until_s = {key: s for key, s in self._avoided_until_s.items() if s > now_s}
                self._avoided_until_s[source] = now_s + _AVOID_S
                lost = [key for key, loan in self._loans.items() if loan.source == source]
                return [i for loan_id in lost for i in self._do_without(loan_id, is_suspect=True)]
            case PullProgressed(seq_id, num_arrived):
                return self._renew(seq_id, num_arrived)
            case PullStopped():
                return self._end_pull(event, now_s)
            case SequenceOver(seq_id):
                for _, loan in self._of(seq_id):
                    loan.is_wanted = False
                return self._release_if_over(seq_id, now_s)
            case SchedulerTold(seq_id):
                return self._release_if_over(seq_id, now_s)
            case _ as unreachable:
                assert_never(unreachable)

    def check_invariants(self, seq_ids: Iterable[str]) -> None:
        """Check the book when every instruction was carried out. `seq_ids`: the sequences that the scheduler has.

        Raises:
            InvariantError: a loan is held for nothing.
        """
        held = set(seq_ids)
        for loan_id, loan in self._loans.items():
            if loan.is_wanted and loan.seq_id not in held:
                raise InvariantError(f"loan {loan_id!r} is of sequence {loan.seq_id!r}, which is not there")
            if not (loan.seq_id in self._pulling if loan.is_offered_whole else loan.is_wanted):
                raise InvariantError(f"nothing more comes of loan {loan_id!r}, and it was not released")

    # ---------------------------------------------------------------------------------------------------------- loans

    def _of(self, seq_id: str) -> list[tuple[str, _Loan]]:
        return [(loan_id, loan) for loan_id, loan in self._loans.items() if loan.seq_id == seq_id]

    def _ask(self, asked: AskBlocks | AskAhead, now_s: float) -> list[LoanInstruction]:
        """Ask a holder for blocks by name, in the stead of what it was asked for that sequence before."""
        ended = self._give_up(asked.seq_id, asked.source)
        loan_id = f"{asked.seq_id}#{next(self._numbers)}"
        first_index, names = asked.first_index, b"".join(asked.names)
        message: BlocksRequest | PrefetchBlocks
        if isinstance(asked, AskAhead):
            message = PrefetchBlocks(request_id=loan_id, first_index=first_index, names=names)
        else:
            message = BlocksRequest(
                request_id=loan_id, first_index=first_index, names=names, is_tail_first=asked.is_tail_first
            )
        self._loans[loan_id] = _Loan(asked.seq_id, asked.source, now_s, is_ahead=isinstance(asked, AskAhead))
        return [*ended, AskOwner(asked.source, message)]

    def _give_up(self, seq_id: str, source: str | None, *, teaches: bool = False) -> list[LoanInstruction]:
        """Release what the scheduler wants no more, even under a pull: blocks by name, or (None) a prompt.

        One owner may be asked for both. What was offered whole is released when its pull has ended. What came so far
        from a slow tier `teaches` its price: nothing may ever come whole from a tier that is slower than was thought.
        """
        told: list[LoanInstruction] = []
        for loan_id, loan in self._of(seq_id):
            if loan.is_offered_whole or loan.is_prompt is not (source is None) or source not in (None, loan.source):
                continue
            del self._loans[loan_id]
            self.num_refused += loan.is_prompt
            told.append(TellOwner(loan.source, ReleaseLease(request_id=loan_id)))
            tier, source_s, num_blocks = loan.come
            if teaches and tier in SLOW_TIERS and num_blocks > 0 and not loan.has_failed:
                elapsed_s = loan.come_s - loan.asked_s
                told.append(LearnHandoff(loan.source, tier, elapsed_s, source_s, num_blocks, loan.asked_s))
        return told

    def _take_handoff(self, source: str, handoff: KvHandoff) -> list[LoanInstruction]:
        loan_id = handoff.request_id
        loan = self._loans.get(loan_id)
        if loan is None or loan.source != source or not loan.is_wanted:
            return [TellOwner(source, ReleaseLease(request_id=loan_id))]  # it must not wait for its lease
        loan.is_offered_whole |= handoff.is_last
        loan.source_s = handoff.elapsed_s
        if len(handoff.blocks):
            loan.tier = max(loan.tier, handoff.tier, key=TIERS.index)
        if not loan.is_prompt:
            return [TellScheduler(loan.seq_id, BlocksOffered(loan.seq_id, source, handoff.blocks, handoff.is_last))]
        offered = KvOffered(
            seq_id=loan.seq_id,
            source=source,
            blocks=handoff.blocks,
            is_last=handoff.is_last,
            first_token=handoff.first_token,
            first_logprob=handoff.first_logprob,
            num_peer_cached_tokens=handoff.num_cached_tokens,
        )
        return [TellScheduler(loan.seq_id, offered)]

    def _take_word(self, word: Found | Refused) -> list[LoanInstruction]:
        """Take in what an owner has, or that it has nothing; not of a question that is over, or was another's."""
        loan_id = word.found.request_id if isinstance(word, Found) else word.loan_id
        loan = self._loans.get(loan_id)
        if loan is None or loan.source != word.source:
            return []
        if isinstance(word, Refused):
            return self._do_without(loan_id)
        return [TellScheduler(loan.seq_id, FoundAhead(loan.seq_id, word.source, word.found.runs))]

    def _do_without(self, loan_id: str, *, is_suspect: bool = False) -> list[LoanInstruction]:
        """Forget a loan that ended at its owner; the scheduler is to do without what was not offered.

        `is_suspect`: the owner is gone, maybe by computing this prompt.
        """
        loan = self._loans.pop(loan_id)
        if loan.is_offered_whole or not loan.is_wanted:
            return []
        if loan.is_ahead:
            return [TellScheduler(loan.seq_id, FoundAhead(loan.seq_id, loan.source, ()))]
        if not loan.is_prompt:
            nothing = BlocksOffered(loan.seq_id, loan.source, b"", is_last=True, is_lost=is_suspect)
            return [TellScheduler(loan.seq_id, nothing)]
        self.num_refused += 1
        return [TellScheduler(loan.seq_id, KvRefused(loan.seq_id, is_suspect))]

    def _renew(self, seq_id: str, num_arrived: int) -> list[LoanInstruction]:
        """Keep loans alive while blocks arrive, also from another owner: what others offered waits for its turn.

        A while without any is for the owners to judge.
        """
        renewed: list[LoanInstruction] = []
        for loan_id, loan in self._of(seq_id):
            if loan.num_arrived != num_arrived:
                loan.num_arrived = num_arrived
                renewed.append(TellOwner(loan.source, RenewLease(request_id=loan_id)))
        return renewed

    def _release_if_over(self, seq_id: str, now_s: float) -> list[LoanInstruction]:
        """Release loans of which nothing more will be read; what came whole teaches its price."""
        told: list[LoanInstruction] = []
        for loan_id, loan in self._of(seq_id):
            if seq_id in self._pulling if loan.is_offered_whole else loan.is_wanted:
                continue
            del self._loans[loan_id]
            told.append(TellOwner(loan.source, ReleaseLease(request_id=loan_id)))
            has_come = loan.is_prompt or loan.num_pulled_blocks > 0  # a holder that had nothing teaches no price
            if loan.is_wanted and has_come and not loan.has_failed:
                tier, elapsed_s = None if loan.is_prompt else loan.tier, now_s - loan.asked_s
                told.append(
                    LearnHandoff(loan.source, tier, elapsed_s, loan.source_s, loan.num_pulled_blocks, loan.asked_s)
                )
        return told

    # ---------------------------------------------------------------------------------------------------------- pulls

    def _begin_pull(self, pull: PullBlocks) -> list[LoanInstruction]:
        """Begin a pull, and renew the sequence's loans, which must not end by themselves meanwhile."""
        if pull.seq_id in self._pulling:
            raise InvariantError(f"a pull of {pull.seq_id!r} begins while another runs")
        self._pulling[pull.seq_id] = pull.source
        renewed: list[LoanInstruction] = []
        for loan_id, loan in self._of(pull.seq_id):
            loan.num_arrived = 0
            if loan.source == pull.source:
                loan.num_pulled_blocks += len(pull.targets)
                loan.pulled = (loan.tier, loan.source_s, loan.num_pulled_blocks)
            renewed.append(TellOwner(loan.source, RenewLease(request_id=loan_id)))
        return [*renewed, BeginPull(pull)]

    def _end_pull(self, stopped: PullStopped, now_s: float) -> list[LoanInstruction]:
        """End a pull, and tell the scheduler, whose blocks its targets are, whatever became of the sequence."""
        seq_id, bad = stopped.seq_id, stopped.bad_indexes
        if seq_id not in self._pulling:
            raise InvariantError(f"a pull of {seq_id!r} ended that was not running")
        source = self._pulling.pop(seq_id)
        for _, loan in self._of(seq_id):
            if loan.source == source:
                loan.has_failed |= bool(bad)
                loan.come_s, loan.come = now_s, loan.pulled
        until_s = now_s + stopped.quarantine_s if stopped.quarantine_s > 0 and bad else None
        return [TellScheduler(seq_id, PullEnded(seq_id, bad, until_s, stopped.damaged_indexes))]
