"""A step that is planned while the one before it runs. Blocks of 4 tokens, chunks of 8."""

from __future__ import annotations

from collections import deque

import pytest

from engine.scheduling.plan import (
    EmitTokens,
    GrammarCompiled,
    Instruction,
    KvRefused,
    SequenceCancelled,
    SequenceStep,
    StepWanted,
)
from messages.errors import InvariantError, WorkerError
from messages.request import Grammar
from tests.engine.scheduling.scheduler_bench import PROMPT, Bench, emitted
from text.grammar import CompiledGrammar


class AheadBench(Bench):
    """Up to two steps run; `finish` ends the one that began first."""

    def __init__(self, **options: object) -> None:
        super().__init__(plans_ahead=True, **options)
        self.steps: deque[list[SequenceStep]] = deque()

    def start(self) -> list[SequenceStep]:
        parts = super().start()
        if parts:
            self.steps.append([(part, self.slots[part]) for part in parts])
        return parts

    def spans(self) -> list[tuple[str, str, int, int]]:
        """Of the parts of the step that begins now."""
        return [(part.seq_id, part.kind, part.start, part.end) for part in self.start()]

    def finish(self, token_id: int = 7, **options) -> list[Instruction]:
        step = self.steps.popleft()
        self.parts = [part for part, _ in step]
        for part, slot in step:
            if part.is_sampled:
                slot.take_sampled(token_id)
        return super().finish(token_id, **options)


@pytest.fixture
def bench() -> AheadBench:
    return AheadBench()


# ------------------------------------------------------------------------------------------------------ a plain life


def test_who_gets_a_token_by_the_step_that_runs_decodes_it_in_the_next_without_being_told_of_it(bench):
    bench.add("a", PROMPT, max_tokens=9)
    assert bench.spans() == [("a", "prefill", 0, 19)]
    [ahead] = bench.start()
    assert (ahead.kind, ahead.start, ahead.end, ahead.is_sampled) == ("decode", 19, 20, True)
    assert (ahead.awaits_token, ahead.new_token_ids) == (True, b"")
    assert bench.tokens == {}
    bench.finish()
    assert bench.tokens == {"a": [7]}
    [behind] = bench.start()
    assert (behind.start, behind.awaits_token, behind.new_token_ids) == (20, True, b"")


def test_a_step_is_told_of_tokens_that_came_back_before_it_was_planned(bench):
    bench.add("a", PROMPT, max_tokens=9)
    bench.start()
    bench.finish()
    [part] = bench.start()
    assert (part.start, part.awaits_token, len(part.new_token_ids)) == (19, False, 4)
    bench.start()
    bench.finish()
    bench.finish()
    [part] = bench.start()
    assert (part.start, part.awaits_token, len(part.new_token_ids)) == (21, False, 4), "the awaited one it has"


def test_no_more_than_two_steps_run_and_without_the_setting_one(bench):
    bench.add("a", PROMPT, max_tokens=9)
    assert bench.scheduler.num_steps == 0
    bench.start()
    bench.start()
    assert bench.scheduler.num_steps == 2
    with pytest.raises(InvariantError, match="a step is wanted while 2 run"):
        bench.post(StepWanted())
    alone = Bench()
    alone.add("a", PROMPT)
    alone.start()
    with pytest.raises(InvariantError, match="a step is wanted while one runs"):
        alone.post(StepWanted())


def test_the_next_chunk_of_a_prompt_is_planned_behind_the_one_that_runs():
    bench = AheadBench(max_num_batched_tokens=8)
    bench.add("a", PROMPT, max_tokens=9)
    assert [bench.spans(), bench.spans()] == [[("a", "prefill", 0, 8)], [("a", "prefill", 8, 16)]]
    bench.finish()
    assert bench.spans() == [("a", "prefill", 16, 19)]
    bench.finish()
    assert bench.spans() == [("a", "decode", 19, 20)]


def test_who_arrives_while_a_step_runs_is_in_the_one_behind_it(bench):
    bench.add("a", PROMPT, max_tokens=9)
    bench.start()
    bench.add("b", 5)
    assert bench.spans() == [("a", "decode", 19, 20), ("b", "prefill", 0, 5)]


def test_blocks_get_their_names_when_their_tokens_are_known():
    bench = AheadBench()
    bench.add("a", 7, max_tokens=9)
    bench.start()
    bench.start()  # its row is the last of a block
    assert len(bench.pool.snapshot()) == 0
    bench.finish()
    assert len(bench.pool.snapshot()) == 1
    bench.finish()
    assert len(bench.pool.snapshot()) == 2


# ------------------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(2, 200), (50, 21)])
def test_who_will_have_all_its_tokens_by_the_step_that_runs_is_not_in_the_next(max_tokens, max_model_len):
    bench = AheadBench(max_model_len=max_model_len)
    bench.add("a", PROMPT, max_tokens=max_tokens)
    bench.start()
    assert bench.spans() == [("a", "decode", 19, 20)]
    bench.finish()
    assert bench.start() == []
    assert emitted(bench.finish()) == [EmitTokens("a", [7], finish_reason="length")]
    assert bench.pool.num_used == 0


def test_who_ends_by_a_stop_token_is_computed_once_for_nothing_and_nobody_gets_what_that_wrote(bench):
    bench.add("a", 7, max_tokens=50, stop_token_ids=(9,))
    bench.start()
    [ahead] = bench.start()
    assert ahead.end == 8, "it fills a block"
    [last] = emitted(bench.finish(token_id=9))
    assert last.finish_reason == "stop"
    assert bench.pool.num_used == 2, "the step ahead still writes there"
    assert bench.finish() == []
    assert bench.pool.num_used == 0
    assert len(bench.pool.snapshot()) == 1, "of the prompt's full block alone"


def test_a_slot_that_was_left_is_another_s_only_behind_the_step_that_still_has_it(bench):
    bench.add("a", 7, max_tokens=50, stop_token_ids=(9,))
    bench.start()
    [ahead] = bench.start()
    bench.finish(token_id=9)
    bench.add("b", 5)
    [part] = bench.start()
    assert (part.seq_id, part.slot, part.begins is not None) == ("b", ahead.slot, True)
    bench.finish()
    assert emitted(bench.finish())[0].seq_id == "b"


def test_blocks_of_who_is_cancelled_are_nobody_s_until_the_last_step_with_it_has_ended(bench):
    bench.add("a", PROMPT, max_tokens=9)
    bench.start()
    bench.start()
    bench.post(SequenceCancelled("a"))
    for num_used in (5, 0):
        assert emitted(bench.finish()) == []
        assert bench.pool.num_used == num_used


def test_an_error_ends_its_sequence_and_what_the_step_behind_gives_of_it_is_dropped(bench):
    bench.add("a", PROMPT, max_tokens=9)
    bench.add("b", 5, max_tokens=9)
    bench.start()
    bench.start()
    error = WorkerError("no")
    first = emitted(bench.finish(a=error))
    assert {item.seq_id: item.error for item in first} == {"a": error, "b": None}
    assert [item.seq_id for item in emitted(bench.finish())] == ["b"]
    assert bench.spans() == [("b", "decode", 6, 7)]


def test_a_kept_sequence_ends_with_its_first_token_and_its_blocks_stay(bench):
    bench.add("a", PROMPT, is_kept=True)
    bench.add("b", 5, max_tokens=9)
    bench.start()
    assert bench.spans() == [("b", "decode", 5, 6)]
    bench.finish()
    assert [location.index for location in bench.offered] == [0, 1, 2, 3, 4]
    bench.finish()
    assert bench.scheduler.num_kept == 1


# -------------------------------------------------------------------------------------------- what is not planned ahead


def test_behind_a_token_that_a_grammar_is_to_see_nothing_is_planned():
    bench = AheadBench(max_num_batched_tokens=16)
    bench.add("g", PROMPT, max_tokens=9, grammar=Grammar(kind="regex", spec="a*"))
    bench.post(GrammarCompiled("g", CompiledGrammar.__new__(CompiledGrammar)))  # nobody here follows it
    bench.add("b", 5, max_tokens=9)
    assert bench.spans() == [("b", "prefill", 0, 5), ("g", "prefill", 0, 8)]
    assert bench.spans() == [("b", "decode", 5, 6), ("g", "prefill", 8, 16)]
    bench.finish()
    assert bench.spans() == [("b", "decode", 6, 7), ("g", "prefill", 16, 19)], "its prompt is known"
    bench.finish()
    assert bench.start() == [], "its token is not"
    bench.finish()
    assert bench.spans() == [("g", "decode", 19, 20), ("b", "decode", 7, 8)]


def test_behind_a_prompt_s_last_log_probabilities_nothing_is_planned(bench):
    bench.add("a", PROMPT, max_tokens=9, prompt_logprobs=0)
    chunks = [bench.spans(), bench.spans()]
    assert chunks == [[("a", "prefill", 0, 8)], [("a", "prefill", 8, 16)]]
    bench.finish()
    assert bench.spans() == [("a", "prefill", 16, 19)]
    bench.finish()
    assert bench.start() == []
    [first] = emitted(bench.finish())
    assert len(first.prompt_logprobs) == 19
    assert [bench.spans(), bench.spans()] == [[("a", "decode", 19, 20)], [("a", "decode", 20, 21)]]


def test_nothing_is_planned_behind_a_suspect_s_step_even_when_it_has_ended_nor_a_suspect_behind_others(bench):
    bench.add("s", 5, max_tokens=9, is_suspect=True)
    bench.add("b", 5, max_tokens=9)
    assert bench.spans() == [("s", "prefill", 0, 5)]
    assert bench.start() == []
    bench.post(SequenceCancelled("s"))
    assert bench.start() == []
    bench.finish()
    assert bench.spans() == [("b", "prefill", 0, 5)]
    bench.add("t", 5, is_suspect=True)
    assert bench.start() == []


def test_who_becomes_a_suspect_in_a_step_that_runs_is_alone_in_its_next(bench):
    bench.add("a", PROMPT, max_tokens=9)
    bench.add("b", 5, max_tokens=9)
    bench.start()
    bench.post(KvRefused("a", is_suspect=True))
    assert bench.start() == []
    bench.finish()
    assert bench.spans() == [("a", "decode", 19, 20)]


def test_a_step_ahead_takes_no_room_from_anybody_the_next_one_does():
    bench = AheadBench(num_blocks=5)
    bench.add("a", 8, max_tokens=9)
    bench.add("b", 8, max_tokens=9)
    assert len(bench.spans()) == 2
    for position in (8, 9, 10, 11):
        assert bench.spans() == [("a", "decode", position, position + 1)], "who finds no room keeps what it has"
        bench.finish()
    assert bench.start() == [], "there is no block but those of its junior"
    assert bench.scheduler.stats()["num_preemptions"] == 0
    bench.finish()
    assert bench.spans() == [("a", "decode", 12, 13)]
    assert bench.scheduler.stats()["num_preemptions"] == 1


# ---------------------------------------------------------------------------------------------------- what steps cost


def test_each_step_teaches_its_own_cost(bench):
    bench.add("a", PROMPT, max_tokens=9)
    bench.start()
    bench.start()
    bench.finish(elapsed_s=0.019)
    bench.finish(elapsed_s=0.002)
    assert bench.scheduler.prefill_tokens_per_s == pytest.approx(1000)
    assert bench.scheduler.decode_step_s == 0.002
