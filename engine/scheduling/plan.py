"""The contract between deciding (`engine.scheduling.scheduler`) and doing (`engine.runner`, the workers).

Events go into the scheduler, instructions come out; a step's plan goes into the runner, its result comes back as an
event. Nothing here has behaviour beyond small derived counts. Plans are values that could cross a process: what the
scheduler goes on to change is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from messages.errors import KvrayError
from messages.handoff import BlockHint, FoundRun
from messages.request import CacheHint, Grammar, HeldRun, SamplingParams
from messages.stream import FinishReason, PromptPlan, PromptSources, TokenLogprob
from text.grammar import CompiledGrammar

# --------------------------------------------------------------------------------------------------------- sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """A sequence to run, as it is handed to the scheduler."""

    seq_id: str
    #: the prompt, then what was generated so far (a sequence that moved); copied. Choices of one prompt that come one
    #: after the other share the list: it is looked at and named once
    token_ids: Sequence[int]
    num_prompt_tokens: int
    params: SamplingParams
    salt: bytes = b""
    tenant: int = 0  #: whose its blocks are; 0: nobody's in particular
    hints: tuple[CacheHint, ...] = ()  #: what is wanted of its blocks in lower tiers
    priority: int = 0  #: smaller is sooner
    deadline_s: float | None = None  #: by the scheduler's clock; past it the sequence ends with an error
    #: predicted seconds until a prefill worker's KV of the prompt, and its first token, lie here; None: nobody's will.
    #: Infinite: it was placed so, but that worker cannot be reached
    remote_s: float | None = None
    remote_source: str = ""  #: that prefill worker's address
    is_kept: bool = False  #: when it finishes, its blocks stay pinned until BlocksReleased
    held: tuple[HeldRun, ...] | None = ()  #: where blocks of the prompt are said to lie, head first; None: nobody knows
    is_suspect: bool = False  #: a worker crashed with it: alone in its steps until it gave SUSPECT_TOKENS


# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class SequenceAdded:
    """A sequence to run."""

    spec: SequenceSpec


@dataclass(frozen=True, slots=True)
class SequenceCancelled:
    """A sequence is not wanted any more, in whatever phase; unknown ids are ignored.

    Blocks of a step or a pull that still runs are freed when that ends.
    """

    seq_id: str


@dataclass(frozen=True, slots=True)
class KvOffered:
    """A remote sequence's KV is readable at `source`, its owner. `first_token` is None on all but the last offer."""

    seq_id: str
    source: str
    blocks: bytes  #: packed, as in a KvHandoff
    is_last: bool
    first_token: int | None
    first_logprob: TokenLogprob | None
    num_peer_cached_tokens: int


@dataclass(frozen=True, slots=True)
class KvRefused:
    """No remote KV will come (worker lost, error, deadline): compute here what is missing."""

    seq_id: str
    is_suspect: bool = False  #: the worker that computed it is gone: it may have been this sequence's doing


@dataclass(frozen=True, slots=True)
class BlocksOffered:
    """Blocks that an AskBlocks named are readable at `source`, which holds them; `is_last`: it will offer no more.

    The last offer may be empty: also of a holder that was lost.
    """

    seq_id: str
    source: str
    blocks: bytes  #: packed, as in a KvHandoff
    is_last: bool
    is_lost: bool = field(default=False, compare=False)  #: the holder was lost, for people


@dataclass(frozen=True, slots=True)
class FoundAhead:
    """Where the holder at `source` has the blocks that AskAhead named, once or more; nowhere if it was lost."""

    seq_id: str
    source: str
    runs: tuple[FoundRun, ...]


@dataclass(frozen=True, slots=True)
class BlocksWanted:
    """Another worker wants those of these blocks that the pool has: LendBlocks is the answer.

    They stay pinned until BlocksReleased of the same id, which no sequence has.
    """

    lease_id: str
    first_index: int  #: position in the asker's sequence
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class TakeIn:
    """These blocks are worth having, and `source` holds them: pull those that are worth more than others here.

    Their names come as they would be evicted: tails before heads. Where there is not room for all, heads are pulled.

    `intake_id` stands for a sequence's id in what follows; no sequence has it.
    """

    intake_id: str
    source: str
    names: tuple[bytes, ...]
    used_s: float | None  #: when they were last used, by the scheduler's clock; None: they are wanted now


@dataclass(frozen=True, slots=True)
class PullEnded:
    """A PullBlocks was carried out. `bad_indexes`: positions of blocks that did not arrive whole and verified.

    `quarantine_until_s`, by the scheduler's clock: the road could not abort the pull, so late bytes may land in the bad
    blocks' targets until then, and nobody gets them.
    """

    seq_id: str
    bad_indexes: frozenset[int]
    quarantine_until_s: float | None = None
    damaged_indexes: frozenset[int] = field(default=frozenset(), compare=False)  #: of the bad ones, for people


@dataclass(frozen=True, slots=True)
class GrammarCompiled:
    """A CompileGrammar was carried out: the grammar, or why there is none. Unknown ids are ignored.

    Whoever samples finds the grammar for as long as the scheduler keeps it (`text.grammar.GrammarCompiler`).
    """

    seq_id: str
    outcome: CompiledGrammar | KvrayError


@dataclass(frozen=True, slots=True)
class BlocksReleased:
    """The lease on a kept sequence's blocks, or on blocks that were lent, ended; unknown ids are ignored."""

    seq_id: str


@dataclass(frozen=True, slots=True)
class StepWanted:
    """The runner is idle, or, where steps are planned ahead, runs its last one: plan one if there is one to run."""


@dataclass(frozen=True, slots=True)
class StepEnded:
    """The step gave this that began first of those that run."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Some time passed: deadlines are looked at."""


Event: TypeAlias = (
    SequenceAdded
    | SequenceCancelled
    | KvOffered
    | KvRefused
    | BlocksOffered
    | FoundAhead
    | BlocksWanted
    | TakeIn
    | PullEnded
    | GrammarCompiled
    | BlocksReleased
    | StepWanted
    | StepEnded
    | TimePassed
)

# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class RunStep:
    """Compute `plan`, answer with StepEnded."""

    plan: StepPlan


@dataclass(frozen=True, slots=True)
class CompileGrammar:
    """A sequence waits for its grammar: compile it beside the steps, answer with GrammarCompiled."""

    seq_id: str
    grammar: Grammar


@dataclass(frozen=True, slots=True)
class AskRemote:
    """Blocks for the whole prompt are reserved: ask the prefill worker for what follows `num_held_tokens`."""

    seq_id: str
    num_held_tokens: int


@dataclass(frozen=True, slots=True)
class AskBlocks:
    """Blocks of the pool are reserved: ask the holder at `source` for those with these names.

    The answer is BlocksOffered, once or more. A second question to the same holder ends the first.
    """

    seq_id: str
    source: str
    first_index: int  #: position in the sequence of the first name
    names: tuple[bytes, ...]
    is_tail_first: bool  #: the head is computed meanwhile


@dataclass(frozen=True, slots=True)
class AskAhead:
    """A sequence that waits will ask `source` for blocks: it is to say where it has them, and to bring them to hand.

    The answer is FoundAhead.
    """

    seq_id: str
    source: str
    first_index: int  #: position in the sequence of the first name
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class StopAsking:
    """Nothing more of what AskBlocks or AskAhead asked for is wanted of the holder at `source`."""

    seq_id: str
    source: str


@dataclass(frozen=True, slots=True)
class LendBlocks:
    """Blocks that BlocksWanted named, those that are here; they stay pinned until BlocksReleased, if there are any."""

    lease_id: str
    blocks: bytes  #: packed, as in a KvHandoff


@dataclass(frozen=True, slots=True)
class OffloadBlocks:
    """A sequence has written these blocks, all full ones of its tokens from the first on: lower tiers may want them."""

    names: tuple[bytes, ...]
    tenant: int
    hints: tuple[BlockHint, ...] = ()


@dataclass(frozen=True, slots=True)
class StopRemote:
    """The prefill worker took too long: what it has not offered is computed here, it need not go on."""

    seq_id: str


@dataclass(frozen=True, slots=True)
class PullBlocks:
    """Copy each block of the pool at `source` into the block of the own that is its target, verify.

    The answer is PullEnded.
    """

    seq_id: str
    source: str
    blocks: bytes  #: packed, as in a KvHandoff
    targets: tuple[int, ...]  #: block ids, one for each


@dataclass(frozen=True, slots=True)
class EmitTokens:
    """Tokens for whoever asked. `finish_reason` ends the sequence; `error` goes with finish_reason "error"."""

    seq_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    sources: PromptSources | None = None  #: on a sequence's first emission
    plan: PromptPlan | None = field(default=None, compare=False)  #: with it, for people
    is_alone: bool = False  #: of a suspect: the step that begins now computes nothing else; any later word ends that
    stop_token_id: int | None = None
    finish_reason: FinishReason | None = None
    error: KvrayError | None = None


@dataclass(frozen=True, slots=True)
class OfferBlocks:
    """A kept sequence's prompt blocks are written; they stay pinned until BlocksReleased.

    The last offer comes just before the EmitTokens that holds the first token.
    """

    seq_id: str
    blocks: bytes  #: packed, as in a KvHandoff
    is_last: bool
    num_cached_tokens: int


Instruction: TypeAlias = (
    RunStep
    | CompileGrammar
    | AskRemote
    | StopRemote
    | AskBlocks
    | AskAhead
    | StopAsking
    | PullBlocks
    | EmitTokens
    | OfferBlocks
    | LendBlocks
    | OffloadBlocks
)

# --------------------------------------------------------------------------------------------------------------- step


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotBegins:
    """The facts that the runner is told once of a sequence that takes a slot."""

    num_prompt_tokens: int
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStep:
    """One sequence's part of a step: its tokens [start, start + num_tokens) are computed.

    kind "prefill": one chunk, causal, attends to all before it. kind "decode": every token is a row of its own with
    the decode kernel (one when generating, several when replaying generated tokens).

    The runner keeps tokens and block table by slot; a part appends to them what it was not told of yet.

        told in earlier parts                 new_token_ids
        [ 0 ............................... ][ ........... ]   all tokens of the sequence, when the step was planned
                       [ start ....... end )                   its blocks are in the table by then
    """

    seq_id: str
    slot: int  #: the sequence's while it runs
    begins: SlotBegins | None = None  #: on a slot's first part for this sequence; what the slot held before is over
    kind: Literal["prefill", "decode"]
    start: int
    num_tokens: int
    new_token_ids: bytes = b""  #: packed, as in a GenerateRequest
    new_block_ids: tuple[int, ...] = ()
    is_sampled: bool  #: the last token's logits give the next token
    wants_prompt_logprobs: bool = False
    is_kept: bool = False  #: its blocks will be published
    #: its only token is the one that the step before samples for this slot: the plan is made before that is known, and
    #: does not hold it, nor does a later one
    awaits_token: bool = False

    @property
    def end(self) -> int:
        """One past the last token computed."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Decode parts first, then prefill parts. Plans build on each other: each is carried out once, in order."""

    parts: tuple[SequenceStep, ...]
    freed_slots: tuple[int, ...] = ()  #: left by their sequences since the last plan, before `parts` begin in any
    is_suspect: bool = False  #: its only part may end the process: whoever asked has to know by then
    #: a part of a plan that did not fit: the slots were told of it then
    is_told: bool = False


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that was sampled."""

    token_id: int
    logprob: TokenLogprob | None = None  #: where params.logprobs asked for it


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave. Every planned part is computed unless its id is in `errors`."""

    sampled: dict[str, Sampled]
    #: for parts with wants_prompt_logprobs: of tokens [start + 1, end + 1) given what precedes them, those that exist
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    errors: dict[str, KvrayError] = field(default_factory=dict)
    elapsed_s: float = 0.0
