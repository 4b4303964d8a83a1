"""What goes into the next step: decodes first, a row each, then chunks of prefill and of replay; a suspect alone.

In every second step those of which little is left go first, whoever waits longer. A step may be planned ahead, while
the one before it runs: from what all will have by its end, without taking anything from anybody.
"""

from __future__ import annotations

from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import SequenceStep, SlotBegins
from engine.scheduling.sequence import Phase, RemotePull, Sequence
from engine.scheduling.step_cost import ChunkBudget, StepCost
from kvcache.names import pack_tokens
from kvcache.price import SHORT_TOKENS
from messages.errors import InvariantError

# A prefill that got nothing for so many steps goes before all others, whatever their priority.
_MAX_PASSED_OVER = 16
#: Of what is to be computed before it meets what is pulled, so much in the next step: few steps, and a short last one.
_OF_THE_WAY = 0.75


class StepPlanner:
    """Fills steps of at most `max_tokens` tokens; a row for each decode and one chunk fit in any case."""

    def __init__(
        self, ledger: SequenceLedger, cost: StepCost, *, max_tokens: int, quantum_tokens: int, itl_target_s: float
    ) -> None:
        self._ledger = ledger
        self._cost = cost
        self._max_tokens = max_tokens
        self._quantum_tokens = quantum_tokens
        self._itl_target_s = itl_target_s
        self._was_suspects_turn = False
        self._was_shorts_turn = False

    def plan(self) -> list[tuple[SequenceStep, Sequence]]:
        """Plan the parts of the next step, decode parts first, with blocks for all that they write. May preempt.

        Suspects take turns with all others: one of them alone, the oldest first, in every second step.
        """
        running = list(self._ledger.running.values())
        suspects = [[seq] for seq in running if seq.is_suspect]
        if not suspects:
            return self._plan(running)
        others = [seq for seq in running if not seq.is_suspect]
        turns = [others, *suspects] if self._was_suspects_turn else [*suspects, others]
        for turn in turns:  # the next where one finds no room: the most senior of all always does
            planned = self._plan([seq for seq in turn if seq.phase is Phase.RUNNING])
            if planned:
                self._was_suspects_turn = turn is not others
                return planned
        return []

    def plan_ahead(self, max_model_len: int) -> list[tuple[SequenceStep, Sequence]]:
        """Plan the step behind the one that runs; no part at all where something is to be known or taken first.

        Who ends with the step that runs, as its tokens are `max_model_len` or as many as were asked for, is left out.
        """
        going_on = [
            seq
            for seq in self._ledger.running.values()
            if not (seq.num_awaited and seq.is_at_length(max_model_len, seq.num_expected_tokens))
        ]
        if any(seq.is_suspect or seq.must_be_known for seq in going_on):
            return []
        return self._plan(going_on, is_ahead=True)

    def _plan(self, running: list[Sequence], *, is_ahead: bool = False) -> list[tuple[SequenceStep, Sequence]]:
        planned: list[tuple[SequenceStep, Sequence]] = []
        chunked: list[Sequence] = []
        for seq in running:
            if seq.phase is not Phase.RUNNING:
                continue  # preempted by one before it
            if not seq.will_decode:
                chunked.append(seq)
                continue
            end = seq.num_expected_tokens
            if is_ahead and self._ledger.would_take(seq, end):
                return []
            if self._ledger.reserve(seq, end):
                planned.append((_part(seq, end - 1, end), seq))
        if chunked and not self._plan_chunks(chunked, planned, is_ahead=is_ahead):
            return []
        planned = [(part, seq) for part, seq in planned if seq.phase is Phase.RUNNING]
        for part, seq in planned:
            _tell(seq, part)
        return sorted(planned, key=_is_prefill)  # stable

    def _plan_chunks(
        self, chunked: list[Sequence], planned: list[tuple[SequenceStep, Sequence]], *, is_ahead: bool
    ) -> bool:
        """Plan chunks, short remainders first, for the lowest mean TTFT; who is passed over counts as ever shorter.

        Where many wait all of them have been passed over for long: then short prompts have every second step to
        themselves, or each would wait for a chunk of everybody else.

        Returns:
            False where that would take something from others though it `is_ahead`: then nothing counts as planned.
        """
        is_shorts_turn = not self._was_shorts_turn
        num_passed_over: list[tuple[Sequence, int]] = []
        budget = ChunkBudget(
            self._cost,
            max_tokens=self._max_tokens,
            quantum_tokens=self._quantum_tokens,
            decode_parts=[part for part, _ in planned],
            target_s=self._itl_target_s,
        )
        for seq in sorted(chunked, key=_short_order if is_shorts_turn else _chunk_order):
            if seq.phase is not Phase.RUNNING:
                continue
            self._ledger.extend_match(seq)
            start = seq.next_start
            end = budget.end_of(start, seq.num_prompt_tokens, seq.num_tokens)
            if seq.pull is not None:
                end = _before_arrivals(seq, seq.pull, end)
                if not seq.pull.is_over:  # a longer step would compute what comes meanwhile
                    rest = int(_OF_THE_WAY * (seq.pull.meet_tokens - start))
                    num_quanta = max(1, rest // self._quantum_tokens)
                    end = min(end, (start // self._quantum_tokens + num_quanta) * self._quantum_tokens)
            if seq.wants_prompt_logprobs:  # logits of all its rows, each a vocabulary wide, live until the step ends
                end = min(end, (start // self._quantum_tokens + 1) * self._quantum_tokens)
            if is_ahead and self._ledger.would_take(seq, end):
                return False
            if end > start and self._ledger.reserve(seq, end):
                planned.append((_part(seq, start, end), seq))
                budget.spend(start, end, seq.num_prompt_tokens)
                num_passed_over.append((seq, 0))
            else:
                num_passed_over.append((seq, seq.num_passed_over + 1))
        for seq, number in num_passed_over:
            seq.num_passed_over = number
        self._was_shorts_turn = is_shorts_turn
        return True


def _before_arrivals(seq: Sequence, pull: RemotePull, end: int) -> int:
    """Return where a chunk of a mixed sequence ends that would end at `end`: at the first block that is on its way."""
    size = seq.block_size
    coming = (index for index in range(seq.num_blocks_for(seq.num_computed), end // size + 1) if pull.is_coming(index))
    return min(end, next(coming, end) * size)


def _chunk_order(seq: Sequence) -> tuple[bool, int, int, int]:
    is_patient = seq.num_passed_over < _MAX_PASSED_OVER
    remaining = (seq.num_tokens - seq.next_start) >> seq.num_passed_over
    return (is_patient, seq.spec.priority if is_patient else 0, remaining, seq.order)


def _short_order(seq: Sequence) -> tuple[int, bool, tuple[bool, int, int, int]]:
    return (seq.spec.priority, seq.num_tokens - seq.next_start > SHORT_TOKENS, _chunk_order(seq))


def _is_prefill(planned: tuple[SequenceStep, Sequence]) -> bool:
    return planned[0].kind == "prefill"


def _part(seq: Sequence, start: int, end: int) -> SequenceStep:
    """Make the part that computes the tokens [start, end) of `seq`."""
    slot = seq.slot
    if slot is None:
        raise InvariantError(f"sequence {seq.seq_id!r} is {seq.phase.value}, and has no slot")
    num_blocks = seq.num_blocks_for(end)  # what is still to be pulled lies behind them, and may yet change
    begins = None
    if not slot.num_told_tokens:
        begins = SlotBegins(num_prompt_tokens=seq.num_prompt_tokens, params=seq.params)
    return SequenceStep(
        seq_id=seq.seq_id,
        slot=slot.index,
        begins=begins,
        kind="prefill" if start < seq.num_prompt_tokens else "decode",
        start=start,
        num_tokens=end - start,
        new_token_ids=pack_tokens(seq.token_ids[slot.num_told_tokens :]),
        new_block_ids=tuple(seq.block_table[slot.num_told_blocks : num_blocks]),
        is_sampled=end == seq.num_expected_tokens,
        wants_prompt_logprobs=seq.wants_prompt_logprobs,
        is_kept=seq.spec.is_kept,
        awaits_token=seq.num_awaited > 0,
    )


def _tell(seq: Sequence, part: SequenceStep) -> None:
    """Note that the slot of `seq` is told, by its part, of all that there is now."""
    slot = seq.slot
    assert slot is not None, "it is planned"
    slot.num_told_tokens = seq.num_expected_tokens
    slot.num_told_blocks += len(part.new_block_ids)
