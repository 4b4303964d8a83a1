"""What the scheduler decides, case by case. Blocks of 4 tokens, chunks of 8."""

from __future__ import annotations

import pytest

from engine.scheduling.plan import (
    BlocksReleased,
    CompileGrammar,
    EmitTokens,
    GrammarCompiled,
    KvOffered,
    KvRefused,
    Sampled,
    SequenceCancelled,
    StepEnded,
    StepResult,
    StepWanted,
    StopAsking,
    TakeIn,
    TimePassed,
)
from messages.errors import CapacityError, ConfigError, InvariantError, RequestError, WorkerError
from messages.request import Grammar
from messages.stream import PromptSources, TokenLogprob
from tests.engine.scheduling.scheduler_bench import PROMPT, Bench, emitted
from text.grammar import CompiledGrammar

# ------------------------------------------------------------------------------------------------------ a plain life


def test_a_prompt_is_prefilled_then_decoded_token_by_token(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=3)
    assert bench.step() == [("a", "prefill", 0, 19)]
    [first] = emitted(bench.out)
    assert first == EmitTokens("a", [7], sources=PromptSources(computed=19))
    assert bench.step() == [("a", "decode", 19, 20)]
    assert emitted(bench.out) == [EmitTokens("a", [7])]
    assert bench.step() == [("a", "decode", 20, 21)]
    assert emitted(bench.out) == [EmitTokens("a", [7], finish_reason="length")]
    assert bench.start() == []
    assert bench.scheduler.seq_ids() == ()
    assert bench.pool.num_used == 0


def test_a_stop_token_ends_the_sequence_in_its_step(bench: Bench) -> None:
    bench.add("a", 5, max_tokens=50, stop_token_ids=(9,))
    bench.step()
    bench.step(token_id=9)
    assert emitted(bench.out) == [EmitTokens("a", [9], stop_token_id=9, finish_reason="stop")]


def test_no_stop_token_counts_before_min_tokens(bench: Bench) -> None:
    bench.add("a", 5, max_tokens=50, stop_token_ids=(9,), min_tokens=2)
    reasons = []
    for _ in range(3):
        bench.step(token_id=9)
        reasons.append(emitted(bench.out)[0].finish_reason)
    assert reasons == [None, None, "stop"]


def test_the_models_length_ends_a_sequence() -> None:
    bench = Bench(max_model_len=8)
    bench.add("a", 5, max_tokens=50)
    assert bench.run() == {"a": [7, 7, 7]}


def test_the_pools_size_ends_a_sequence() -> None:
    bench = Bench(num_blocks=2)
    bench.add("a", 5, max_tokens=50)
    assert bench.run() == {"a": [7, 7, 7]}


def test_logprobs_go_with_their_tokens(bench: Bench) -> None:
    bench.add("a", 3, logprobs=0)
    bench.start()
    logprob = TokenLogprob(7, -0.5, 1)
    out = bench.post(StepEnded(StepResult(sampled={"a": Sampled(7, logprob)})))
    assert emitted(out)[0].logprobs == [logprob]


def test_an_error_of_the_runner_ends_only_its_sequence(bench: Bench) -> None:
    bench.add("a", 5)
    bench.add("b", 5)
    error = WorkerError("logits are not finite")
    bench.step(a=error)
    assert emitted(bench.out)[0] == EmitTokens("a", finish_reason="error", error=error)
    assert bench.scheduler.seq_ids() == ("b",)


def test_blocks_of_a_failed_part_get_no_name(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.step(a=WorkerError("no"))
    assert bench.pool.snapshot() == []
    assert bench.pool.num_used == 0


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_prompt_longer_than_the_model_is_refused_by_name(bench: Bench) -> None:
    [emit] = emitted(bench.add("a", 200))
    assert emit.finish_reason == "error"
    assert isinstance(emit.error, RequestError)
    assert (emit.error.code, emit.error.status) == ("context_length_exceeded", 400)
    assert "200 tokens; at most 199" in emit.error.message
    assert bench.add("b", 199) == []


def test_a_prompt_longer_than_the_pool_is_refused() -> None:
    bench = Bench(num_blocks=2)
    [emit] = emitted(bench.add("a", 8))
    assert isinstance(emit.error, CapacityError)
    assert "8 tokens; at most 7" in emit.error.message
    assert bench.scheduler.seq_ids() == ()


def test_an_empty_prompt_is_refused(bench: Bench) -> None:
    [emit] = emitted(bench.add("a", []))
    assert isinstance(emit.error, RequestError)


def test_a_token_beyond_the_vocabulary_is_refused_by_number() -> None:
    bench = Bench(vocab_size=100)
    [emit] = emitted(bench.add("a", [1, 100, 2]))
    assert isinstance(emit.error, RequestError)
    assert "token 100; the model's vocabulary ends at 99" in emit.error.message
    assert bench.add("b", [1, 99, 2]) == []


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {7: float("nan")}),
        ("temperature", float("nan")),
        ("temperature", -1.0),
        ("top_k", 2**63),
        ("top_p", 0.0),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
    ],
)
def test_a_parameter_that_no_step_can_compute_with_is_refused_by_name(param: str, value: object) -> None:
    bench = Bench(vocab_size=100)
    [emit] = emitted(bench.add("a", [1, 2, 3], **{param: value}))
    assert isinstance(emit.error, RequestError)
    assert emit.error.param == param


def test_a_generated_token_beyond_the_vocabulary_ends_only_its_sequence() -> None:
    bench = Bench(vocab_size=8)
    bench.add("a", [1, 2, 3])
    bench.add("b", [1, 2, 4])
    bench.start()
    out = bench.post(StepEnded(StepResult(sampled={"a": Sampled(8), "b": Sampled(7)})))
    assert [(one.seq_id, one.finish_reason) for one in emitted(out)] == [("a", "error"), ("b", None)]


def test_an_id_in_use_is_refused_and_disturbs_nobody(bench: Bench) -> None:
    bench.add("a", 5)
    with pytest.raises(RequestError, match="'a' is in use"):
        bench.add("a", 6)
    assert bench.step() == [("a", "prefill", 0, 5)]


@pytest.mark.parametrize(
    "config",
    [{"max_model_len": 0}, {"max_num_seqs": 0}, {"max_num_batched_tokens": 0}, {"watermark": 1.0}, {"watermark": -0.1}],
)
def test_numbers_without_sense_are_refused(config: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        Bench(**config)


def test_steps_out_of_turn_are_bugs(bench: Bench) -> None:
    with pytest.raises(InvariantError, match="was not running"):
        bench.post(StepEnded(StepResult(sampled={})))
    bench.add("a", 5)
    bench.start()
    with pytest.raises(InvariantError, match="while one runs"):
        bench.post(StepWanted())


def test_a_step_result_without_its_token_is_a_bug() -> None:
    bench = Bench()
    bench.add("a", 5)
    bench.start()
    with pytest.raises(InvariantError, match="neither a token nor an error"):
        bench.scheduler.on_event(StepEnded(StepResult(sampled={})), 0.0)


# ---------------------------------------------------------------------------------------------- chunks and fairness


def test_decodes_go_first_and_chunks_end_at_multiples() -> None:
    bench = Bench(max_num_batched_tokens=20)
    bench.add("a", 5, max_tokens=10)
    bench.step()
    bench.add("b", 21)
    assert bench.step() == [("a", "decode", 5, 6), ("b", "prefill", 0, 16)]
    assert bench.step() == [("a", "decode", 6, 7), ("b", "prefill", 16, 21)]


def test_without_decodes_the_whole_budget_is_prefill() -> None:
    bench = Bench(max_num_batched_tokens=20)
    bench.add("a", 50)
    assert bench.step() == [("a", "prefill", 0, 16)]
    assert bench.step() == [("a", "prefill", 16, 32)]


def test_slow_prefill_beside_decodes_is_cut_to_one_quantum() -> None:
    bench = Bench(itl_target_s=0.05)
    bench.add("a", 5, max_tokens=50)
    bench.step(elapsed_s=0.05)  # 10 ms a token
    bench.add("b", 40)
    for start in (0, 8, 16):
        assert bench.step(elapsed_s=0.09) == [
            ("a", "decode", 5 + start // 8, 6 + start // 8),
            ("b", "prefill", start, start + 8),
        ]


def test_a_short_prompt_overtakes_a_long_one_that_still_progresses() -> None:
    bench = Bench(max_num_batched_tokens=8, max_num_seqs=30, num_blocks=200)
    bench.add("long", 100, max_tokens=1)
    bench.step()
    order = []
    for number in range(12):
        bench.add(f"s{number}", 8, max_tokens=1)
        order += [seq_id for seq_id, *_ in bench.step()]
    assert order[0] == "s0"
    assert order.count("long") >= 2, "short ones without end do not starve it"


def test_a_prefill_in_progress_is_not_starved_by_higher_priority() -> None:
    bench = Bench(max_num_batched_tokens=8, max_num_seqs=30, num_blocks=200)
    bench.add("low", 24, max_tokens=1, priority=5)
    bench.step()
    steps_until_served = 0
    while True:
        bench.add(f"s{steps_until_served}", 8, max_tokens=1, priority=0)
        if bench.step()[0][0] == "low":
            break
        steps_until_served += 1
    assert steps_until_served == 16


def test_smaller_priority_is_admitted_sooner_then_first_come_first_served() -> None:
    bench = Bench(max_num_seqs=1)
    for seq_id, priority in (("a", 0), ("b", 1), ("c", 0), ("d", -1)):
        bench.add(seq_id, 3, max_tokens=1, priority=priority)
    order = []
    while spans := bench.step():
        order += [span[0] for span in spans]
    assert order == ["a", "d", "c", "b"]


def test_no_more_than_max_num_seqs_run() -> None:
    bench = Bench(max_num_seqs=2)
    for seq_id in "abc":
        bench.add(seq_id, 3)
    assert [span[0] for span in bench.step()] == ["a", "b"]
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (2, 1)


# --------------------------------------------------------------------------------------------- preemption, admission


def test_the_youngest_gives_way_and_comes_back_by_reuse() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", 7, max_tokens=10)
    bench.add("b", 7, max_tokens=10)
    while bench.scheduler.stats()["num_preemptions"] == 0:
        spans = bench.step()
    assert [span[0] for span in spans] == ["a"]
    assert bench.scheduler.num_waiting == 1
    while "b" not in [span[0] for span in spans]:
        spans = bench.step()
    assert min(span[2] for span in spans if span[0] == "b") >= 4, "its first block was still there"
    bench.run()
    assert [len(bench.tokens[seq_id]) for seq_id in "ab"] == [10, 10]
    assert bench.pool.num_used == 0


def test_generated_tokens_come_back_as_decode_rows() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", 7, max_tokens=13)
    bench.add("b", 6, max_tokens=13)
    spans = []
    while step := bench.step():
        spans += step
    replays = [span for span in spans if span[0] == "b" and span[1] == "decode" and span[3] - span[2] > 1]
    assert replays, "the blocks of b were reused by a, so its tokens are replayed"
    assert all(start >= 6 for _, kind, start, _ in spans if kind == "decode")


def test_lower_priority_gives_way_before_the_youngest() -> None:
    bench = Bench(num_blocks=5)
    bench.add("a", 7, max_tokens=6, priority=1)
    bench.add("b", 7, max_tokens=6, priority=0)
    while bench.scheduler.stats()["num_preemptions"] == 0:
        assert bench.step()
    assert list(bench.scheduler._ledger.running) == ["b"]


def test_nobody_takes_blocks_from_a_senior() -> None:
    bench = Bench(num_blocks=4, max_num_batched_tokens=8)
    bench.add("a", 6, max_tokens=20)
    bench.step()
    bench.add("b", 4, max_tokens=20)
    while bench.scheduler.num_running == 2:
        assert bench.step()
    assert list(bench.scheduler._ledger.running) == ["a"]
    assert bench.scheduler.stats()["num_preemptions"] == 1
    ledger, senior = bench.scheduler._ledger, bench.scheduler._ledger.sequences["a"]
    junior = ledger.sequences["b"]
    ledger.admit(junior, [])
    assert not ledger.reserve(junior, 16)
    assert senior.block_table
    assert bench.scheduler.stats()["num_preemptions"] == 1


def test_a_prefill_that_takes_a_juniors_blocks_leaves_it_out_of_the_step() -> None:
    bench = Bench(num_blocks=8, max_num_batched_tokens=28)
    bench.add("old", 20, max_tokens=1)
    ledger = bench.scheduler._ledger
    ledger.sequences["old"].num_passed_over = 3  # so its chunk is planned first
    bench.add("young", 16, max_tokens=1)
    ledger.admit(ledger.sequences["young"], [])
    ledger.reserve(ledger.sequences["young"], 16)
    assert bench.step() == [("old", "prefill", 0, 20)]
    assert bench.scheduler.stats()["num_preemptions"] == 1
    assert bench.step() == [("young", "prefill", 0, 16)]


def test_prompt_logprobs_begin_anew_after_a_preemption() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add("a", PROMPT, prompt_logprobs=0, max_tokens=1)
    bench.step()
    bench.scheduler._ledger.preempt(bench.scheduler._ledger.sequences["a"])
    while bench.step():
        told = emitted(bench.out)
    assert [entry and entry.token_id for entry in told[0].prompt_logprobs or []] == [None, *PROMPT[1:]]


def test_a_prompt_is_admitted_without_room_for_its_answer() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", 11, max_tokens=100)
    assert [span[0] for span in bench.step()] == ["a"]


def test_admission_counts_what_running_prompts_still_need() -> None:
    bench = Bench(num_blocks=10, max_num_batched_tokens=8)
    bench.add("a", 30, max_tokens=1)
    bench.add("b", 10, max_tokens=1)
    bench.step()
    assert bench.scheduler.num_waiting == 1, "eight blocks are a's, of which it holds two"


def test_the_watermark_is_kept_free_at_admission() -> None:
    for watermark, num_running in ((0.0, 2), (0.3, 1)):
        bench = Bench(num_blocks=10, watermark=watermark)
        bench.add("a", 15)
        bench.add("b", 18)
        assert bench.scheduler.num_running == num_running


def test_a_sequence_alone_may_use_the_whole_pool() -> None:
    bench = Bench(num_blocks=4, watermark=0.5)
    bench.add("a", 15, max_tokens=1)
    assert bench.run() == {"a": [7]}


def test_a_sequence_that_moved_here_is_prefilled_then_replayed(bench: Bench) -> None:
    bench.add("a", 10, generated=5, max_tokens=20)
    assert bench.step() == [("a", "prefill", 0, 10)]
    assert bench.out == []
    assert bench.step() == [("a", "decode", 10, 15)]
    [emit] = emitted(bench.out)
    assert emit == EmitTokens("a", [7], sources=PromptSources(computed=10))


def test_a_sequence_that_moved_after_its_last_token_ends_at_once(bench: Bench) -> None:
    assert bench.add("a", 10, generated=5, max_tokens=5) == [EmitTokens("a", finish_reason="length")]
    assert bench.add("b", 10, generated=5, max_tokens=9, stop_token_ids=(7,)) == [
        EmitTokens("b", stop_token_id=7, finish_reason="stop")
    ]
    assert bench.scheduler.seq_ids() == ()


# ---------------------------------------------------------------------------------------------- cancels and deadlines


def test_a_cancel_during_a_step_frees_blocks_when_it_ends(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.start()
    assert bench.post(SequenceCancelled("a")) == []
    assert bench.pool.num_used == 5
    assert bench.scheduler.seq_ids() == ()
    assert bench.finish() == []
    assert bench.pool.num_used == 0


def test_an_id_may_come_again_while_its_cancelled_step_runs(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.start()
    bench.post(SequenceCancelled("a"))
    bench.add("a", 5)
    assert bench.finish() == []
    assert bench.step() == [("a", "prefill", 0, 5)]


def test_unknown_ids_are_ignored(bench: Bench) -> None:
    for event in (
        SequenceCancelled("x"),
        BlocksReleased("x"),
        KvRefused("x"),
        KvOffered("x", "owner", b"", True, 1, None, 0),
    ):
        assert bench.post(event) == []


def test_a_deadline_ends_a_sequence_with_504(bench: Bench) -> None:
    bench.add("a", 5, deadline_s=10.0, max_tokens=50)
    bench.step()
    bench.now_s = 10.0
    [emit] = emitted(bench.post(TimePassed()))
    assert emit.finish_reason == "error"
    assert emit.error is not None
    assert (emit.error.status, emit.error.code) == (504, "deadline_exceeded")
    assert bench.pool.num_used == 0


def test_what_is_kept_is_held_by_its_lease_not_by_its_deadline(bench: Bench) -> None:
    bench.add("a", PROMPT, is_kept=True, deadline_s=10.0)
    bench.step()
    bench.now_s = 11.0
    assert bench.post(TimePassed()) == []
    assert bench.scheduler.num_kept == 1


def test_a_deadline_in_the_past_is_refused(bench: Bench) -> None:
    bench.now_s = 5.0
    [emit] = emitted(bench.add("a", 5, deadline_s=4.0))
    assert emit.error is not None
    assert emit.error.status == 504


# ---------------------------------------------------------------------------------------------------------- suspects


def test_a_suspect_is_alone_in_its_steps_in_turns_with_the_others_until_it_gave_four_tokens(bench: Bench) -> None:
    bench.add("a", 5, max_tokens=50)
    bench.add("s", 5, max_tokens=50, is_suspect=True)
    bench.add("t", 5, max_tokens=50, is_suspect=True)
    bench.add("b", 5, max_tokens=50)
    turns = ["".join(seq_id for seq_id, *_ in bench.step()) for _ in range(17)]
    assert turns == ["s", "ab", "s", "ab", "s", "ab", "s", "asb", *["t", "asb"] * 3, "t", "astb", "astb"]


def test_whoever_asked_is_told_before_a_suspects_step_begins_and_when_it_has_ended(bench: Bench) -> None:
    bench.add("s", 100, is_suspect=True)
    out = bench.post(StepWanted())
    assert out[0] == EmitTokens("s", is_alone=True)
    assert out[1].plan.is_suspect
    bench.parts = list(bench.slots.take_in(out[1].plan, bench.scheduler).parts)
    assert emitted(bench.finish()) == [EmitTokens("s")]  # its prompt is not at its end


def test_what_a_lost_owner_computed_is_a_suspect_here(bench: Bench) -> None:
    bench.add("r", 5, remote_s=0.0)
    bench.add("a", 5)
    bench.post(KvRefused("r", is_suspect=True))
    assert [[seq_id for seq_id, *_ in bench.step()] for _ in range(2)] == [["r"], ["a"]]


# ----------------------------------------------------------------------------------------------------------- grammars

YES = Grammar(kind="choice", spec='["yes"]')


def compiled() -> CompiledGrammar:
    """A grammar that nobody here follows."""
    return CompiledGrammar.__new__(CompiledGrammar)


def test_a_sequence_waits_for_its_grammar_and_later_ones_do_not(bench: Bench) -> None:
    assert bench.add("a", 5, grammar=YES) == [CompileGrammar("a", YES)]
    bench.add("b", 5, max_tokens=2)
    assert bench.step() == [("b", "prefill", 0, 5)]
    bench.post(GrammarCompiled("a", compiled()))
    assert bench.step() == [("b", "decode", 5, 6), ("a", "prefill", 0, 5)]


def test_a_grammar_that_does_not_compile_ends_its_sequence_alone(bench: Bench) -> None:
    bench.add("a", 5, grammar=YES)
    bench.add("b", 5, max_tokens=1)
    error = RequestError("too dear")
    assert bench.post(GrammarCompiled("a", error)) == [EmitTokens("a", finish_reason="error", error=error)]
    assert bench.run() == {"a": [], "b": [7]}


def test_a_grammar_that_nobody_waits_for_any_more_is_dropped(bench: Bench) -> None:
    bench.add("a", 5, grammar=YES)
    bench.post(SequenceCancelled("a"))
    assert bench.post(GrammarCompiled("a", compiled())) == []
    assert bench.start() == []


def test_a_deadline_does_not_wait_for_a_grammar(bench: Bench) -> None:
    bench.add("a", 5, grammar=YES, deadline_s=bench.now_s + 1)
    bench.now_s += 2
    [ended] = emitted(bench.post(TimePassed()))
    assert (ended.seq_id, ended.finish_reason) == ("a", "error")
    assert bench.scheduler.seq_ids() == ()


# ------------------------------------------------------------------------------------------- the share of short prompts


def running(bench: Bench) -> set[str]:
    return set(bench.scheduler._ledger.running)


def test_long_prompts_leave_slots_to_short_ones() -> None:
    bench = Bench(num_blocks=4000, max_model_len=2000, max_num_seqs=32)
    long_ids = ["l" * number for number in range(1, 34)]
    for seq_id in long_ids:
        bench.add(seq_id, 300)
    assert running(bench) == set(long_ids[:30])
    bench.add("short", 20)
    bench.add("other", 256)
    assert running(bench) == {*long_ids[:30], "short", "other"}
    bench.add("one too many", 20)
    assert len(running(bench)) == 32
    assert (bench.scheduler.num_short, bench.scheduler.num_waiting) == (3, 4)
    bench.post(SequenceCancelled("l"))  # the senior one gets its slot
    assert long_ids[30] in running(bench)
    bench.post(SequenceCancelled("short"))  # and a short one that of a short one
    assert "one too many" in running(bench)


def test_a_long_prompt_whose_head_is_held_is_a_short_one() -> None:
    bench = Bench(num_blocks=4000, max_model_len=2000, max_num_seqs=16)
    head = list(range(5000, 5300))
    bench.add("before", head, max_tokens=1)
    bench.run()
    for number in range(1, 17):
        bench.add("l" * number, 300)
    assert len(running(bench)) == 15
    bench.add("next turn", [*head, 1, 2, 3])
    assert "next turn" in running(bench)


def test_long_prompts_leave_blocks_to_short_ones() -> None:
    bench = Bench(num_blocks=160, max_model_len=640)
    bench.add("a", 300)
    bench.add("b", 300)  # 75 blocks each: together they would take 150 of 160, of which 10 are kept free
    assert running(bench) == {"a"}
    bench.add("short", 20)
    assert running(bench) == {"a", "short"}
    bench.post(SequenceCancelled("a"))
    bench.post(SequenceCancelled("short"))
    assert running(bench) == {"b"}


def test_the_queue_of_short_prompts_is_told_apart(bench: Bench) -> None:
    bench = Bench(num_blocks=4000, max_model_len=2000)
    bench.add("long", 1000)
    bench.add("short", 200)
    assert (bench.scheduler.queued_s, bench.scheduler.queued_short_s) == pytest.approx((1.2, 0.2))


def test_what_is_taken_in_for_nobody_gives_way_to_a_sequence_that_comes():
    bench = Bench(num_blocks=12)
    bench.add("runs", 4)
    names = tuple(bytes([number]) * 16 for number in range(8))
    bench.post(TakeIn("warm", "source", names, 0.0))
    assert bench.pool.num_used == 8
    out = bench.add("comes", 24)
    assert StopAsking("warm", "source") in out
    assert bench.scheduler._ledger.running.keys() == {"runs", "comes"}
    bench.run()
