"""What a step is made of: whose turn it is, how far its chunk goes, and what the runner is told of it."""

from __future__ import annotations

import pytest

from engine.scheduling.plan import SequenceStep, SlotBegins
from engine.scheduling.sequence import Phase, Sequence
from engine.scheduling.step_cost import StepCost
from engine.scheduling.step_planner import StepPlanner
from kvcache.names import pack_tokens
from messages.errors import InvariantError
from tests.engine.scheduling.ledger_bench import LedgerBench


class Planner(LedgerBench):
    """A ledger and who plans its steps; chunks of 8 tokens."""

    def __init__(self, *, num_blocks: int = 64, max_tokens: int = 64) -> None:
        super().__init__(num_blocks)
        self.cost = StepCost()
        self.planner = StepPlanner(self.ledger, self.cost, max_tokens=max_tokens, quantum_tokens=8, itl_target_s=0.1)

    def decoding(self, seq_id: str, num_prompt: int, **fields: object) -> Sequence:
        seq = self.running(seq_id, num_prompt, **fields)
        self.compute(seq, num_prompt)
        self.append(seq)
        return seq

    def plan(self) -> list[SequenceStep]:
        planned = self.planner.plan()
        self.ledger.check_invariants()
        assert [part.seq_id for part, _ in planned] == [seq.seq_id for _, seq in planned]
        return [part for part, _ in planned]

    def spans(self) -> list[tuple[str, str, int, int]]:
        return [(part.seq_id, part.kind, part.start, part.end) for part in self.plan()]

    def finish(self, *parts: SequenceStep) -> None:
        """The step of `parts` ran."""
        for part in parts:
            self.ledger.commit_up_to(self.ledger.sequences[part.seq_id], part.end)


# ---------------------------------------------------------------------------------------------------------------- turns


def test_nobody_runs_and_nothing_is_planned():
    bench = Planner()
    bench.waiting("a", 5)
    bench.pulling("b", 5)
    assert bench.plan() == []


def test_decodes_come_before_prefill_whoever_began_to_run_first():
    bench = Planner()
    bench.running("p", 8)
    bench.decoding("d", 3)
    bench.decoding("e", 4)
    assert bench.spans() == [("d", "decode", 3, 4), ("e", "decode", 4, 5), ("p", "prefill", 0, 8)]


def test_replayed_tokens_go_with_the_decodes_behind_those_that_generate():
    bench = Planner()
    bench.running("measured", 8)
    bench.cost.observe(bench.plan(), elapsed_s=1e-4)  # so that more than one chunk is tried beside decodes
    bench.ledger.end(bench.ledger.sequences["measured"])
    moved = bench.running("moved", 4, generated=6)  # more is left of it than of the prompt
    bench.compute(moved, 4)
    bench.running("p", 4)
    bench.decoding("d", 3)
    assert bench.spans() == [("d", "decode", 3, 4), ("moved", "decode", 4, 10), ("p", "prefill", 0, 4)]


def test_the_short_remainder_goes_first_however_long_the_prompt_was():
    bench = Planner(max_tokens=8)
    long = bench.running("long", 60)
    bench.compute(long, 56)
    bench.running("short", 8)
    assert bench.spans() == [("long", "prefill", 56, 60)]


def test_priority_comes_before_the_length_of_the_remainder():
    bench = Planner(max_tokens=8)
    bench.running("short", 3)
    bench.running("urgent", 40, priority=-1)
    assert bench.spans() == [("urgent", "prefill", 0, 8)]


def test_of_equal_remainders_the_one_that_came_first_goes_first():
    bench = Planner(max_tokens=8)
    bench.running("a", 8)
    bench.running("b", 8)
    assert bench.spans() == [("a", "prefill", 0, 8)]


def test_every_step_that_passes_a_prompt_over_halves_what_it_counts_for():
    bench = Planner(max_tokens=8)
    long = bench.running("long", 63)
    turns = []
    for number in range(5):
        bench.running(f"short{number}", 8)
        [part] = bench.plan()
        bench.finish(part)
        turns.append(part.seq_id)
        if part.seq_id != "long":
            bench.ledger.end(bench.ledger.sequences[part.seq_id])
    assert turns == ["short0", "short1", "short2", "long", "short3"]  # 63, 31, 15, 7: shorter than 8
    assert long.num_computed == 8


def test_who_was_passed_over_sixteen_times_goes_before_the_most_urgent():
    bench = Planner(max_tokens=8)
    patient = bench.running("patient", 40, priority=9)
    urgent = bench.running("urgent", 400, priority=-9)
    patient.num_passed_over = 15
    [part] = bench.plan()
    assert (part.seq_id, patient.num_passed_over) == ("urgent", 16)
    bench.finish(part)
    assert bench.spans() == [("patient", "prefill", 0, 8)]
    assert (patient.num_passed_over, urgent.num_passed_over) == (0, 1)


def test_a_short_prompt_does_not_wait_for_a_chunk_of_each_long_one():
    bench = Planner(max_tokens=8, num_blocks=4096)
    for number in range(20):
        bench.running(f"long{number}", 300).num_passed_over = 16 + number
    bench.running("short", 64)
    turns = []
    for _ in range(4):
        [part] = bench.plan()
        bench.finish(part)
        turns.append(part.seq_id)
    assert turns.count("short") == 2  # every second step is its own, the others' turn is not lost
    assert len(set(turns)) == 3


# --------------------------------------------------------------------------------------------------------------- ahead


def begin(seq: Sequence, part: SequenceStep) -> None:
    """The step with this part runs."""
    seq.num_steps, seq.num_awaited, seq.planned_end = 1, int(part.is_sampled), part.end


def test_a_step_ahead_goes_on_where_the_one_that_runs_will_have_ended():
    bench = Planner(max_tokens=12)
    decoding, prompt = bench.decoding("d", 3), bench.running("p", 19)
    for part, seq in bench.planner.plan():
        begin(seq, part)
    ahead = [(part.seq_id, part.start, part.end, part.awaits_token) for part, _ in bench.planner.plan_ahead(200)]
    assert ahead == [("d", 4, 5, True), ("p", 8, 16, False)]
    assert (decoding.num_computed, prompt.num_computed) == (3, 0), "nothing of it has ended"


def test_blocks_that_others_wrote_meanwhile_are_not_put_under_a_running_step():
    bench = Planner(max_tokens=8)
    prompt = list(range(100, 119))
    seq = bench.running("a", prompt)
    [(part, _)] = bench.planner.plan()
    begin(seq, part)
    bench.hold(prompt[:12])
    [(part, _)] = bench.planner.plan_ahead(200)
    assert (part.start, part.end) == (8, 16)


@pytest.mark.parametrize("is_chunk", [False, True])
def test_a_step_ahead_that_is_given_up_for_want_of_room_counts_for_nobody(is_chunk):
    bench = Planner(num_blocks=4, max_tokens=8)
    senior = bench.running("s", 16) if is_chunk else bench.decoding("s", 7)
    junior = bench.decoding("j", 6, priority=1)  # of four blocks each has two then
    [*_, (part, _)] = [(part, seq) for part, seq in bench.planner.plan() if seq is senior]
    begin(senior, part)
    told = senior.slot.num_told_tokens, senior.slot.num_told_blocks, junior.slot.num_told_tokens
    turn = bench.planner._was_shorts_turn
    senior.num_passed_over = 3
    assert bench.planner.plan_ahead(200) == []
    assert (senior.slot.num_told_tokens, senior.slot.num_told_blocks, junior.slot.num_told_tokens) == told
    assert (senior.num_passed_over, bench.planner._was_shorts_turn) == (3, turn)
    assert junior.phase is Phase.RUNNING


# -------------------------------------------------------------------------------------------------------------- chunks


def test_blocks_that_others_wrote_meanwhile_are_not_computed():
    bench = Planner()
    prompt = list(range(100, 119))
    bench.running("a", prompt)
    bench.hold(prompt[:12])
    assert bench.spans() == [("a", "prefill", 12, 19)]


def test_only_the_chunk_that_ends_a_sequences_tokens_gives_a_token():
    bench = Planner(max_tokens=8)
    bench.running("a", 12)
    [first] = bench.plan()
    assert (first.end, first.is_sampled) == (8, False)
    bench.finish(first)
    [second] = bench.plan()
    assert (second.end, second.is_sampled) == (12, True)


def test_a_prefill_of_a_sequence_that_moved_ends_with_its_prompt_and_gives_no_token():
    bench = Planner()
    bench.running("a", 10, generated=3)
    [part] = bench.plan()
    assert (part.kind, part.end, part.is_sampled) == ("prefill", 10, False)


def test_where_every_tokens_logits_are_wanted_a_chunk_is_one_quantum():
    bench = Planner()
    a = bench.running("a", 30, prompt_logprobs=0)
    bench.running("b", 30)
    [first, other] = bench.plan()
    assert (first.end, first.wants_prompt_logprobs) == (8, True)
    assert (other.end, other.wants_prompt_logprobs) == (30, False)
    bench.ledger.commit_up_to(a, 10)
    assert [part.end for part in bench.plan() if part.seq_id == "a"] == [16], "it ends where a quantum ends"


# -------------------------------------------------------------------------------------------------------------- blocks


def test_what_is_planned_has_blocks_for_all_that_it_writes():
    bench = Planner()
    bench.running("p", 13)
    bench.decoding("d", 8)
    for part in bench.plan():
        assert len(bench.ledger.sequences[part.seq_id].block_table) * 4 >= part.end


def test_a_decode_whose_blocks_a_senior_took_is_not_in_the_step_and_one_without_room_waits_with_its_blocks():
    bench = Planner(num_blocks=4)
    senior, junior = bench.decoding("s", 8), bench.decoding("j", 8)
    assert bench.spans() == [("s", "decode", 8, 9)]
    assert (senior.phase, junior.phase) == (Phase.RUNNING, Phase.WAITING)

    bench = Planner(num_blocks=4)
    junior = bench.decoding("j", 8, priority=1)
    senior = bench.decoding("s", 7)
    assert bench.spans() == [("s", "decode", 7, 8)], "the senior needs no block, so that nobody has to give way"
    assert (junior.phase, len(junior.block_table)) == (Phase.RUNNING, 2)


def test_a_decode_that_was_planned_before_a_senior_took_its_blocks_is_taken_out_again():
    bench = Planner(num_blocks=4)
    bench.decoding("j", 7, priority=1)
    bench.decoding("s", 8)
    assert bench.spans() == [("s", "decode", 8, 9)]
    assert bench.ledger.sequences["j"].phase is Phase.WAITING


def test_a_prefill_without_room_is_passed_over_and_spends_none_of_the_budget():
    bench = Planner(num_blocks=5, max_tokens=8)
    bench.decoding("d", 12)
    big, small = bench.running("big", 8, priority=1), bench.running("small", 4, priority=2)
    assert bench.spans() == [("d", "decode", 12, 13), ("small", "prefill", 0, 4)]
    assert (big.num_passed_over, small.num_passed_over, big.num_computed) == (1, 0, 0)


# ------------------------------------------------------------------------------------------------- what a slot is told


def test_a_slot_is_told_who_begins_in_it_once_and_then_only_what_is_new():
    bench = Planner(max_tokens=8)
    seq = bench.running("a", 12)
    [first] = bench.plan()
    assert first.begins == SlotBegins(num_prompt_tokens=12, params=seq.params)
    assert (first.new_token_ids, first.new_block_ids) == (pack_tokens(seq.token_ids), tuple(seq.block_table))
    bench.finish(first)
    [second] = bench.plan()
    assert (second.slot, second.begins, second.new_token_ids) == (first.slot, None, b"")
    assert second.new_block_ids == (seq.block_table[2],)
    bench.finish(second)
    bench.append(seq, 42)
    [third] = bench.plan()
    assert (third.begins, third.new_token_ids) == (None, pack_tokens([42]))
    assert third.new_block_ids == (seq.block_table[3],)


def test_who_comes_back_is_told_from_the_beginning():
    bench = Planner()
    seq = bench.decoding("a", 5)
    bench.plan()
    bench.ledger.preempt(seq)
    bench.ledger.admit(seq, bench.pool.match(seq.names[:1]))
    [part] = bench.plan()
    assert part.begins is not None
    assert (part.start, part.new_token_ids) == (4, pack_tokens(seq.token_ids))
    assert part.new_block_ids == tuple(seq.block_table)


@pytest.mark.parametrize("is_kept", [False, True])
def test_the_runner_knows_whose_blocks_will_be_published(is_kept):
    bench = Planner()
    bench.running("a", 4, is_kept=is_kept)
    assert [part.is_kept for part in bench.plan()] == [is_kept]


def test_who_runs_without_a_slot_is_a_bug():
    bench = Planner()
    bench.running("a", 4).slot = None
    with pytest.raises(InvariantError, match="'a' is running, and has no slot"):
        bench.planner.plan()
