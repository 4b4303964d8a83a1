"""A sequence as the scheduler sees it.

token_ids  [ prompt ................. | generated ....... ]
           0        num_computed      num_prompt_tokens   num_tokens
           [ KV is written ][ KV is still to be computed ]
names      one for each full block of token_ids that was asked for so far
block_table  block ids that cover at least [0, num_computed); while it runs nothing in it changes, it only grows
"""

from __future__ import annotations

import math
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from engine.scheduling.coming import Coming, ComingBlocks
from engine.scheduling.plan import SequenceSpec
from engine.scheduling.prompt_origins import PromptOrigins
from engine.scheduling.slots import Slot
from kvcache.load_plan import LoadPlan
from kvcache.names import BlockNamer, pack_tokens
from messages.request import SUSPECT_TOKENS, Copy
from messages.stream import FinishReason, TokenLogprob
from messages.tier import Tier
from text.grammar import CompiledGrammar


class Phase(Enum):
    """Where a sequence is in its life. A running one prefills or decodes: `Sequence.is_decoding`."""

    WAITING = "waiting"  #: holds no block
    PULLING = "pulling"  #: blocks for its whole prompt are reserved; their content comes from another worker
    RUNNING = "running"
    KEPT = "kept"  #: finished; its blocks stay for others to read
    ENDED = "ended"  #: gone; a step or a pull may still use its blocks


@dataclass(slots=True)
class RemotePull:
    """The KV that others have for a sequence. One pull at a time, so that its end needs no number.

    While nothing can be computed before more arrives the sequence is PULLING. Where its head is computed meanwhile
    (`is_mixed`) it is RUNNING until it comes to a block that is on its way:

        block_table  [ computed | being computed | to compute or to pull | arrived or open ]
                                                 computing --->     <--- pulling, portion by portion
    """

    first_index: int  #: blocks before it were held already
    end_tokens: int  #: that the blocks of the table hold when all arrived: all full, or the whole prompt
    deadline_s: float  #: of the whole phase
    blocks: ComingBlocks  #: of the table, from `first_index` on; those found have arrived
    expected_s: float = math.inf  #: by then it is predicted to be over
    is_mixed: bool = False
    meet_tokens: int = 0  #: where computing and pulling are predicted to meet, where the head is computed meanwhile
    portion_blocks: int = sys.maxsize  #: in one pull, where the head is computed meanwhile
    found: frozenset[int] = frozenset()  #: indexes from `first_index` on that were held, too
    asked: dict[int, Copy] = field(default_factory=dict)  #: the holder that each index is to come, or came, from
    holders: set[str] = field(default_factory=set)  #: that were asked for blocks by name, and may offer more
    failed: set[Copy] = field(default_factory=set)  #: that did not give what they were asked for
    num_peer_cached_tokens: int = 0
    has_last_offer: bool = False  #: of the worker that computes the rest; True where there is none

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come: the last offer was made, and nothing is offered or being pulled."""
        return self.has_last_offer and not self.holders and not self.is_pulling and not self.blocks.has(Coming.OFFERED)

    @property
    def is_pulling(self) -> bool:
        """Whether blocks are being pulled."""
        return self.blocks.has(Coming.OPEN)

    def is_coming(self, index: int) -> bool:
        """Tell whether the block is here by this pull, or being pulled."""
        return self.blocks.state(index) >= Coming.OPEN

    def first_missing(self, num_blocks: int) -> int:
        """Return the first index below `num_blocks` that is neither held nor arrived; `num_blocks` if there is none."""
        return min(num_blocks, self.first_index + self.blocks.num_leading())


class Sequence:
    """One sequence's state. Changed by the scheduler only."""

    __slots__ = (
        "_namer",
        "arrived_s",
        "began_s",
        "block_size",
        "block_table",
        "brought",
        "expected_match_tokens",
        "expected_s",
        "first_in_flight",
        "grammar",
        "has_declined",
        "has_emitted",
        "held",
        "held_for",
        "held_until_s",
        "is_counted",
        "is_handed_over",
        "is_long",
        "lacks_holders",
        "lacks_room_s",
        "names",
        "num_awaited",
        "num_computed",
        "num_device_tokens",
        "num_loaded_tokens",
        "num_offered_blocks",
        "num_offloaded_blocks",
        "num_passed_over",
        "num_peer_tokens",
        "num_prompt_tokens",
        "num_pulled_tokens",
        "num_steps",
        "order",
        "origins",
        "params",
        "phase",
        "plan",
        "planned_end",
        "prompt_logprobs",
        "pull",
        "pull_ended_s",
        "seq_id",
        "slot",
        "spec",
        "suspect_until_tokens",
        "token_ids",
        "wants_prompt_logprobs",
        "wants_remote",
    )

    def __init__(
        self, spec: SequenceSpec, *, order: int, namer: BlockNamer, block_size: int, names: list[bytes] | None = None
    ) -> None:
        """Make a sequence that waits. `names`: the first of its blocks', those that `namer` gave already."""
        self.spec = spec
        self.seq_id = spec.seq_id
        self.params = spec.params
        self.order = order  #: of arrival
        self.block_size = block_size
        self.token_ids = array("I", spec.token_ids)
        self.num_prompt_tokens = spec.num_prompt_tokens
        self.num_computed = 0
        self.block_table: list[int] = []
        self.names = names or []
        self.phase = Phase.WAITING
        self.slot: Slot | None = None  #: while it runs
        self.is_counted = False  #: where the KV of its prompt came from
        self.num_steps = 0  #: steps that run with it
        self.num_awaited = 0  #: tokens that they will give
        self.planned_end = 0  #: one past the last token of its part in the step that was planned last
        self.has_emitted = False
        self.held_for: bytes | None = None  #: the name of a block that another sequence is about to write
        self.held_until_s = 0.0  #: by then that block is predicted to be there; nobody waits longer
        self.first_in_flight = 0  #: blocks before it were held when it was admitted: nobody waits for it to write them
        self.expected_match_tokens = 0  #: while held back: what will be there already
        self.arrived_s = 0.0
        self.began_s: float | None = None  #: when it was admitted for the first time
        self.pull_ended_s: float | None = None  #: when nothing more of its pull was on its way
        self.expected_s = 0.0  #: predicted for it and those before it, when it arrived; 0: no prediction to learn from
        self.num_passed_over = 0  #: steps since its prefill last got a chunk
        self.num_device_tokens = 0  #: prompt tokens found in the pool
        self.num_loaded_tokens: Counter[Tier] = Counter()  #: prompt tokens that holders had, by tier
        self.num_peer_tokens = 0  #: prompt tokens that the worker which computed the rest had cached
        self.num_pulled_tokens = 0  #: prompt tokens whose KV a peer gave, cached or computed there
        self.num_offered_blocks = 0  #: of a kept sequence, as far as it was told
        self.num_offloaded_blocks = 0  #: of which lower tiers were told
        self.pull: RemotePull | None = None
        self.plan = LoadPlan()  #: what was decided when it was admitted
        self.is_handed_over = False  #: a prefill worker was asked for what follows
        self.is_long = False  #: since it was admitted: more of it was to be computed than of a short prompt
        self.lacks_room_s: float | None = None  #: since when it waits for room that costs nothing
        self.wants_prompt_logprobs = spec.params.prompt_logprobs is not None and len(self.token_ids) == (
            spec.num_prompt_tokens
        )
        self.wants_remote = spec.remote_s is not None and not self.wants_prompt_logprobs
        self.held = spec.held or ()  #: where blocks of it lie, as far as is known by now
        self.lacks_holders = False  #: somebody was asked for that, and it is not admitted before there is an answer
        self.brought: dict[int, Copy] = {}  #: blocks that were asked for while it waited, and from where they come
        self.origins = PromptOrigins()  #: of its prompt, until its first token
        self.has_declined = False  #: computed here though it was placed with a prefill worker
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.grammar: CompiledGrammar | None = (
            None  #: of its params, kept for whoever samples; without it, it is not admitted
        )
        self.suspect_until_tokens = 0  #: while it has fewer, its steps compute nothing else
        if spec.is_suspect:
            self.suspect()
        self._namer = namer
        self.extend_names()

    @property
    def lacks_grammar(self) -> bool:
        """Whether its grammar is not compiled yet."""
        return self.params.grammar is not None and self.grammar is None

    @property
    def is_ready(self) -> bool:
        """Whether all is there that it takes to be admitted, but for the room."""
        return not self.lacks_grammar and not self.lacks_holders

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, and those generated so far."""
        return len(self.token_ids)

    @property
    def is_suspect(self) -> bool:
        """Whether no other sequence is to be computed in its steps."""
        return self.num_tokens < self.suspect_until_tokens

    def suspect(self) -> None:
        """Compute it alone until it gave some tokens more."""
        self.suspect_until_tokens = self.num_tokens + SUSPECT_TOKENS

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the KV of its last, generated token is missing."""
        return self.num_computed == len(self.token_ids) - 1 and self.num_computed >= self.num_prompt_tokens

    @property
    def is_in_step(self) -> bool:
        """Whether a step runs with it."""
        return self.num_steps > 0

    @property
    def next_start(self) -> int:
        """The first token to compute in the next step to be planned."""
        return self.planned_end if self.is_in_step else self.num_computed

    @property
    def num_expected_tokens(self) -> int:
        """Tokens that it has when the steps have ended that run, unless it ends with them."""
        return len(self.token_ids) + self.num_awaited

    @property
    def will_decode(self) -> bool:
        """Whether then only the KV of its last, generated token is missing."""
        return self.next_start == self.num_expected_tokens - 1 and self.next_start >= self.num_prompt_tokens

    @property
    def must_be_known(self) -> bool:
        """Whether nothing can be planned for it before what runs with it has ended.

        Its grammar says by each token which ones may follow, its prompt's log-probabilities go with the first one, and
        where its computing meets what is pulled is seen then.
        """
        if self.pull is not None:
            return self.is_in_step
        return self.num_awaited > 0 and (self.params.grammar is not None or self.wants_prompt_logprobs)

    @property
    def seniority(self) -> tuple[int, int]:
        """Priority, then order of arrival: the smaller is admitted sooner, and preempted later."""
        return (self.spec.priority, self.order)

    @property
    def max_match_blocks(self) -> int:
        """Blocks that reuse may give: at least one token is left to compute, all of them for prompt logprobs."""
        return 0 if self.wants_prompt_logprobs else (len(self.token_ids) - 1) // self.block_size

    def num_prompt_tokens_of(self, index: int) -> int:
        """Return how many tokens of the prompt the block at `index` has."""
        return min(self.block_size, max(0, self.num_prompt_tokens - index * self.block_size))

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Return how its last token, a generated one, ends it; None where it does not."""
        params = self.params
        if self.token_ids[-1] in params.stop_token_ids and self.num_output_tokens > params.min_tokens:
            return "stop"
        return "length" if self.is_at_length(max_model_len, self.num_tokens) else None

    def is_at_length(self, max_model_len: int, num_tokens: int) -> bool:
        """Tell whether so many tokens, some of them generated, are as many as it may have."""
        max_tokens = 1 if self.spec.is_kept else self.params.max_tokens
        return num_tokens >= min(max_model_len, self.num_prompt_tokens + max_tokens)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold `num_tokens` tokens."""
        return (num_tokens + self.block_size - 1) // self.block_size

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV this worker found in its pool or got from holders."""
        return self.num_device_tokens + self.num_loaded_tokens.total()

    @property
    def num_lacking_blocks(self) -> int:
        """Blocks to allocate before all known tokens have their KV."""
        return max(0, self.num_blocks_for(len(self.token_ids)) - len(self.block_table))

    def extend_names(self) -> None:
        """Name all full blocks of the tokens known."""
        begin, end = len(self.names) * self.block_size, self.num_tokens // self.block_size * self.block_size
        if begin < end:
            self.names += self._namer.extend(pack_tokens(self.token_ids[begin:end]))
