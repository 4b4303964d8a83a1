"""What the scheduler decides, case by case. Blocks of 4 tokens, chunks of 8."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.plan import (
    AskRemote,
    BlocksReleased,
    EmitTokens,
    Instruction,
    KvOffered,
    KvRefused,
    OfferBlocks,
    PullBlocks,
    PullEnded,
    RunStep,
    Sampled,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
    SequenceStep,
    StepEnded,
    StepResult,
    StepWanted,
    TimePassed,
)
from engine.scheduler import Scheduler, SchedulerConfig
from kvcache.names import block_names, pack_tokens, split_names
from kvcache.pool import BlockPool
from messages.errors import CapacityError, ConfigError, InvariantError, RequestError, WorkerError
from messages.handoff import BlockLocation
from messages.request import SamplingParams
from messages.stream import PromptSources, TokenLogprob


class Bench:
    """A scheduler, a clock that stands still, and a model that always says 7."""

    def __init__(self, *, num_blocks: int = 64, **config: object) -> None:
        defaults = {
            "max_model_len": 200,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "chunk_quantum_tokens": 8,
            "remote_threshold_tokens": 4,
            "watermark": 0.0,
        }
        self.pool = BlockPool(num_blocks, 4)
        self.scheduler = Scheduler(SchedulerConfig(**(defaults | config)), self.pool, b"model")
        self.now_s = 0.0
        self.tokens: dict[str, list[int]] = {}  # emitted so far
        self.offered: list[BlockLocation] = []

    def post(self, event) -> list[Instruction]:
        out = self.scheduler.on_event(event, self.now_s)
        self.scheduler.check_invariants()
        for item in out:
            if isinstance(item, EmitTokens):
                self.tokens.setdefault(item.seq_id, []).extend(item.token_ids)
            elif isinstance(item, OfferBlocks):
                self.offered += item.blocks
        return out

    def add(self, seq_id: str, prompt: list[int] | int, *, generated: int = 0, **fields) -> list[Instruction]:
        """`prompt`: tokens, or how many of those that this id alone has."""
        if isinstance(prompt, int):
            prompt = [1000 * sum(seq_id.encode()) + i for i in range(prompt)]
        params = {"max_tokens": fields.pop("max_tokens", 4)}
        for name in ("stop_token_ids", "min_tokens", "prompt_logprobs", "logprobs"):
            if name in fields:
                params[name] = fields.pop(name)
        spec = SequenceSpec(
            seq_id=seq_id,
            token_ids=prompt + [7] * generated,
            num_prompt_tokens=len(prompt),
            params=SamplingParams(**params),
            **fields,
        )
        return self.post(SequenceAdded(spec))

    def start(self) -> list[SequenceStep]:
        """The parts of the step that the scheduler wants to run now."""
        steps = [item for item in self.post(StepWanted()) if isinstance(item, RunStep)]
        self.parts = steps[0].plan.parts if steps else []
        return self.parts

    def finish(self, token_id: int = 7, elapsed_s: float = 0.001, **errors) -> list[Instruction]:
        sampled = {
            part.seq_id: Sampled(token_id) for part in self.parts if part.is_sampled and part.seq_id not in errors
        }
        logprobs = {
            part.seq_id: [
                TokenLogprob(token, -1.0, 1)
                for token in part.token_ids[part.start + 1 : min(part.end + 1, part.num_prompt_tokens)]
            ]
            for part in self.parts
            if part.wants_prompt_logprobs
        }
        return self.post(
            StepEnded(StepResult(sampled=sampled, prompt_logprobs=logprobs, errors=errors, elapsed_s=elapsed_s))
        )

    def step(self, **kwargs) -> list[tuple[str, str, int, int]]:
        """Run a step: (id, kind, start, end) of its parts."""
        spans = [(part.seq_id, part.kind, part.start, part.end) for part in self.start()]
        self.out = self.finish(**kwargs) if spans else []
        return spans

    def run(self) -> dict[str, list[int]]:
        """Steps until nothing runs; the tokens emitted for each sequence so far."""
        while self.step():
            pass
        return self.tokens

    def locations(
        self, prompt: list[int], *, begin: int = 0, end: int | None = None, salt: bytes = b""
    ) -> list[BlockLocation]:
        """What a peer would offer of `prompt`."""
        names = split_names(block_names(b"model", salt, pack_tokens(prompt), 4))
        num_blocks = (len(prompt) + 3) // 4
        return [
            BlockLocation(i, 90 + i, 5, names[i] if i < len(names) else b"", min(4, len(prompt) - 4 * i))
            for i in range(begin, num_blocks if end is None else end)
        ]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.scheduler.check_invariants()


def emitted(out: list[Instruction]) -> list[EmitTokens]:
    return [item for item in out if isinstance(item, EmitTokens)]


PROMPT = list(range(100, 119))  # four full blocks and three tokens


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


# ---------------------------------------------------------------------------------------------------- prefix reuse


def test_a_prompt_seen_before_is_reused_up_to_its_last_full_block(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=1)
    bench.run()
    bench.add("b", PROMPT, max_tokens=1)
    assert bench.step() == [("b", "prefill", 16, 19)]
    assert emitted(bench.out)[0].sources == PromptSources(device=16, computed=3)


def test_at_least_one_token_is_computed(bench: Bench) -> None:
    bench.add("a", PROMPT[:16], max_tokens=1)
    bench.run()
    bench.add("b", PROMPT[:16], max_tokens=1)
    assert bench.step() == [("b", "prefill", 12, 16)]


def test_generated_blocks_are_reused_by_the_next_turn(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=6)
    bench.run()
    bench.add("b", [*PROMPT, *[7] * 6, 1], max_tokens=1)
    assert bench.step() == [("b", "prefill", 24, 26)]


def test_tenants_do_not_share(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=1, salt=b"one")
    bench.run()
    bench.add("b", PROMPT, max_tokens=1, salt=b"two")
    assert bench.step() == [("b", "prefill", 0, 19)]


def test_prompt_logprobs_compute_everything_and_are_told_once(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=2)
    bench.run()
    bench.add("b", PROMPT, max_tokens=2, prompt_logprobs=0)
    assert [bench.step() for _ in range(3)] == [
        [("b", "prefill", 0, 8)],
        [("b", "prefill", 8, 16)],
        [("b", "prefill", 16, 19)],
    ]
    [first] = emitted(bench.out)
    assert first.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in first.prompt_logprobs] == [None, *PROMPT[1:]]
    bench.step()
    assert emitted(bench.out)[0].prompt_logprobs is None


def test_a_burst_with_one_prompt_computes_it_once(bench: Bench) -> None:
    for choice in range(4):
        bench.add(f"c{choice}", PROMPT, max_tokens=2)
    assert bench.step() == [("c0", "prefill", 0, 19)]
    assert bench.step() == [("c0", "decode", 19, 20), *((f"c{choice}", "prefill", 16, 19) for choice in (1, 2, 3))]
    bench.run()
    assert bench.scheduler.stats()["num_prompt_tokens_computed"] == 19 + 3 * 3


def test_who_shares_only_the_head_waits_only_for_the_head() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add("a", 40, max_tokens=1)
    prompt = bench.scheduler._ledger.sequences["a"].token_ids
    bench.add("b", [*prompt[:8], 1, 2, 3], max_tokens=1)
    assert bench.scheduler.num_waiting == 1
    assert bench.step() == [("a", "prefill", 0, 8)]
    assert bench.scheduler.num_waiting == 0
    assert ("b", "prefill", 8, 11) in bench.step()


def test_who_waits_for_a_prefix_goes_on_when_its_owner_is_cancelled(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.add("b", PROMPT)
    assert bench.scheduler.num_waiting == 1
    bench.post(SequenceCancelled("a"))
    assert bench.step() == [("b", "prefill", 0, 19)]


def test_the_urgent_do_not_wait_for_the_patient(bench: Bench) -> None:
    bench.add("a", PROMPT, priority=1)
    bench.add("b", PROMPT, priority=0)
    bench.add("c", PROMPT, priority=1)
    assert [span[0] for span in bench.step()] == ["b", "a"]


def test_an_id_in_use_costs_no_one_else_its_deadline(bench: Bench) -> None:
    bench.add("a", 5)
    bench.add("b", 5, deadline_s=1.0)
    bench.now_s = 1.0
    with pytest.raises(RequestError):
        bench.add("a", 5)
    assert [emit.seq_id for emit in emitted(bench.post(TimePassed()))] == ["b"]


def test_who_is_held_back_does_not_hold_back_others(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.add("b", PROMPT)
    bench.add("c", 5)
    assert bench.step() == [("c", "prefill", 0, 5), ("a", "prefill", 0, 19)]


def test_the_queue_counts_a_shared_prompt_once(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.add("b", PROMPT)
    assert bench.scheduler.queued_tokens == 19 + 3


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
    for event in (SequenceCancelled("x"), BlocksReleased("x"), KvRefused("x"), KvOffered("x", [], True, 1, None, 0)):
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


# -------------------------------------------------------------------------------------------------------------- kept


def test_a_kept_sequence_offers_its_blocks_just_before_its_token(bench: Bench) -> None:
    bench.add("a", PROMPT, is_kept=True, max_tokens=100)
    bench.start()
    table = list(bench.parts[0].block_table)
    offer, emit = bench.finish()
    assert isinstance(offer, OfferBlocks)
    assert offer.is_last
    assert [location.block_id for location in offer.blocks] == table
    names = split_names(block_names(b"model", b"", pack_tokens(PROMPT), 4))
    assert [location.name for location in offer.blocks] == [*names, b""]
    assert [location.num_tokens for location in offer.blocks] == [4, 4, 4, 4, 3]
    assert [location.generation for location in offer.blocks] == [bench.pool.generation(b) for b in table]
    assert emit == EmitTokens("a", [7], sources=PromptSources(computed=19), finish_reason="length")
    assert (bench.scheduler.num_kept, bench.pool.num_used) == (1, 5)
    assert bench.start() == []
    bench.post(BlocksReleased("a"))
    assert (bench.scheduler.num_kept, bench.pool.num_used) == (0, 0)


def test_finished_chunks_are_offered_while_prefill_goes_on() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add("a", PROMPT, is_kept=True)
    offers = []
    while bench.step():
        offers += [item for item in bench.out if isinstance(item, OfferBlocks)]
    assert [[location.index for location in offer.blocks] for offer in offers] == [[0, 1], [2, 3], [4]]
    assert [offer.is_last for offer in offers] == [False, False, True]


def test_the_cached_head_of_a_long_prompt_is_offered_at_admission(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=1)
    bench.run()
    [offer] = bench.add("b", [*PROMPT[:16], *range(40)], is_kept=True)
    assert isinstance(offer, OfferBlocks)
    assert [location.index for location in offer.blocks] == [0, 1, 2, 3]
    assert offer.num_cached_tokens == 16


def test_blocks_offered_before_a_preemption_are_offered_again() -> None:
    bench = Bench(num_blocks=8, max_num_batched_tokens=8)
    bench.add("a", 6, max_tokens=30)
    bench.step()
    bench.add("b", 20, is_kept=True)
    bench.step()
    assert [location.index for location in bench.offered] == [0, 1]
    bench.scheduler._ledger.preempt(bench.scheduler._ledger.sequences["b"])
    bench.offered.clear()
    while bench.scheduler.num_kept == 0:
        assert bench.step()
    assert [location.index for location in bench.offered] == [0, 1, 2, 3, 4]


def test_a_lease_that_ends_during_prefill_cancels_it(bench: Bench) -> None:
    bench.add("a", PROMPT, is_kept=True)
    bench.post(BlocksReleased("a"))
    assert bench.scheduler.seq_ids() == ()


# ------------------------------------------------------------------------------------------------------------ remote


def remote(bench: Bench, **fields) -> AskRemote:
    [ask] = bench.add("r", PROMPT, is_remote=True, **fields)
    assert isinstance(ask, AskRemote)
    return ask


def test_a_remote_prompt_is_asked_for_at_once_with_its_blocks_reserved(bench: Bench) -> None:
    assert remote(bench) == AskRemote("r", 0)
    assert bench.pool.num_used == 5
    assert bench.start() == []


def test_only_what_is_lacking_is_asked_for_and_pulled(bench: Bench) -> None:
    bench.add("a", PROMPT[:9], max_tokens=1)
    bench.run()
    assert remote(bench) == AskRemote("r", 8)
    emit, pull = bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 12))
    assert emit == EmitTokens("r", [42], sources=PromptSources(device=8, peer=4, computed=7))
    assert isinstance(pull, PullBlocks)
    assert [location.index for location, _ in pull.pairs] == [2, 3, 4]
    bench.post(PullEnded("r", frozenset()))
    assert bench.step() == [("r", "decode", 19, 20)]


def test_the_first_token_does_not_wait_for_the_pull(bench: Bench) -> None:
    remote(bench)
    emit, _ = bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0))
    assert isinstance(emit, EmitTokens)
    assert bench.start() == []


def test_a_first_token_that_is_the_last_needs_no_pull(bench: Bench) -> None:
    remote(bench, max_tokens=1)
    [emit] = bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0))
    assert emitted([emit])[0].finish_reason == "length"
    assert bench.pool.num_used == 0


def test_offers_are_pulled_as_they_come_one_pull_at_a_time(bench: Bench) -> None:
    remote(bench)
    [first] = bench.post(KvOffered("r", bench.locations(PROMPT, end=2), False, None, None, 0))
    assert bench.post(KvOffered("r", bench.locations(PROMPT, begin=2, end=3), False, None, None, 0)) == []
    [emit] = bench.post(KvOffered("r", bench.locations(PROMPT, begin=3), True, 42, None, 0))
    assert emitted([emit])
    [second] = bench.post(PullEnded("r", frozenset()))
    assert isinstance(first, PullBlocks)
    assert isinstance(second, PullBlocks)
    assert [location.index for location, _ in [*first.pairs, *second.pairs]] == [0, 1, 2, 3, 4]
    bench.post(PullEnded("r", frozenset()))
    assert bench.step() == [("r", "decode", 19, 20)]


def test_pulled_blocks_have_names_and_serve_the_next(bench: Bench) -> None:
    remote(bench, max_tokens=2)
    bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0))
    bench.post(PullEnded("r", frozenset()))
    bench.add("b", PROMPT, max_tokens=1)
    assert ("b", "prefill", 16, 19) in bench.step()


def test_what_follows_a_bad_block_is_computed_and_the_token_replayed(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0))
    bench.post(PullEnded("r", frozenset({1, 4})))
    assert bench.scheduler.stats()["num_rejected_blocks"] == 2
    spans = bench.step()
    assert spans == [("r", "prefill", 4, 19)]
    assert emitted(bench.out) == [], "its first token was given already"
    assert bench.step() == [("r", "decode", 19, 20)]
    assert emitted(bench.out) == [EmitTokens("r", [7])]


def test_good_blocks_after_a_bad_one_are_not_computed_again() -> None:
    bench = Bench(max_num_batched_tokens=8)
    remote(bench)
    bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0))
    bench.post(PullEnded("r", frozenset({1})))
    assert bench.step() == [("r", "prefill", 4, 8)]
    assert bench.step() == [("r", "prefill", 16, 19)]


def test_a_block_under_another_name_is_not_even_pulled(bench: Bench) -> None:
    remote(bench)
    wrong = bench.locations([*PROMPT[:4], *PROMPT])[:5]
    [_, pull] = bench.post(KvOffered("r", wrong, True, 42, None, 0))
    assert isinstance(pull, PullBlocks)
    assert [location.index for location, _ in pull.pairs] == [0]
    assert bench.scheduler.stats()["num_rejected_blocks"] == 4


def test_a_bad_block_offered_again_is_pulled_again(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", bench.locations(PROMPT, end=2), False, None, None, 0))
    bench.post(PullEnded("r", frozenset({1})))
    [pull] = bench.post(KvOffered("r", bench.locations(PROMPT, end=2), False, None, None, 0))
    assert isinstance(pull, PullBlocks)
    assert [location.index for location, _ in pull.pairs] == [1]


def test_a_refusal_leads_to_computing_here(bench: Bench) -> None:
    remote(bench, max_tokens=1)
    bench.post(KvRefused("r"))
    assert bench.step() == [("r", "prefill", 0, 19)]
    assert emitted(bench.out)[0].sources == PromptSources(computed=19)


def test_what_came_before_a_refusal_is_kept(bench: Bench) -> None:
    remote(bench, max_tokens=1)
    bench.post(KvOffered("r", bench.locations(PROMPT, end=3), False, None, None, 8))
    bench.post(PullEnded("r", frozenset()))
    bench.post(KvRefused("r"))
    assert bench.step() == [("r", "prefill", 12, 19)]
    assert emitted(bench.out)[0].sources == PromptSources(peer=8, computed=11)


def test_a_peer_that_stays_silent_is_given_up(bench: Bench) -> None:
    remote(bench)
    bench.now_s = 29.9
    assert bench.start() == []
    bench.now_s = 30.0
    assert bench.step() == [("r", "prefill", 0, 19)]
    assert bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0)) == []


def test_targets_of_a_pull_that_was_given_up_are_nobodys_until_it_ends() -> None:
    bench = Bench(num_blocks=12)
    remote(bench)
    [pull] = bench.post(KvOffered("r", bench.locations(PROMPT, end=4), False, None, None, 0))
    targets = {target for _, target in pull.pairs}
    bench.post(KvRefused("r"))
    parts = bench.start()
    assert targets.isdisjoint(parts[0].block_table)
    bench.finish()
    bench.post(SequenceCancelled("r"))
    assert bench.pool.num_used == 4
    bench.post(PullEnded("r", frozenset({0, 1, 2, 3})))
    assert bench.pool.num_used == 0


def test_a_pull_that_could_not_be_aborted_quarantines_its_targets(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0))
    bench.post(PullEnded("r", frozenset({3, 4}), quarantine_until_s=9.0))
    assert bench.pool.num_quarantined == 2
    assert bench.step() == [("r", "prefill", 12, 19)]
    bench.now_s = 9.0
    bench.post(TimePassed())
    assert bench.pool.num_quarantined == 0


def test_a_cancel_during_a_pull_frees_blocks_when_it_ends(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", bench.locations(PROMPT, end=2), False, None, None, 0))
    bench.post(SequenceCancelled("r"))
    assert bench.pool.num_used == 2
    [refusal] = emitted(bench.add("r", 5))
    assert isinstance(refusal.error, WorkerError)
    bench.post(PullEnded("r", frozenset()))
    assert bench.pool.num_used == 0


def test_a_pull_that_nobody_ordered_cannot_end(bench: Bench) -> None:
    remote(bench)
    with pytest.raises(InvariantError, match="was not running"):
        bench.post(PullEnded("r", frozenset()))


def test_little_is_computed_here_rather_than_asked_for() -> None:
    threshold = [20]
    bench = Bench(remote_threshold_tokens=lambda: threshold[0])
    assert bench.add("a", PROMPT, is_remote=True, max_tokens=1) == []
    assert bench.step() == [("a", "prefill", 0, 19)]
    threshold[0] = 4
    assert bench.add("b", 19, is_remote=True) == [AskRemote("b", 0)]


def test_choices_of_a_remote_prompt_pull_it_once(bench: Bench) -> None:
    remote(bench)
    assert bench.add("r2", PROMPT, is_remote=True) == []
    bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0))
    assert bench.scheduler.num_waiting == 1
    bench.post(PullEnded("r", frozenset()))
    assert sorted(bench.step()) == [("r", "decode", 19, 20), ("r2", "prefill", 16, 19)]


def test_a_last_offer_without_a_token_counts_as_a_refusal(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", bench.locations(PROMPT), True, None, None, 0))
    assert bench.step() == [("r", "prefill", 0, 19)]


def test_prompt_logprobs_are_never_left_to_a_peer(bench: Bench) -> None:
    assert bench.add("r", PROMPT, is_remote=True, prompt_logprobs=1) == []
    assert bench.step() == [("r", "prefill", 0, 8)]


def test_a_stream_that_moved_pulls_its_prompt_and_replays_its_tokens(bench: Bench) -> None:
    [ask] = bench.add("r", PROMPT, generated=3, is_remote=True, max_tokens=9)
    assert isinstance(ask, AskRemote)
    [pull] = bench.post(KvOffered("r", bench.locations(PROMPT), True, 42, None, 0))
    assert isinstance(pull, PullBlocks)
    bench.post(PullEnded("r", frozenset()))
    assert bench.step() == [("r", "decode", 19, 22)]


# -------------------------------------------------------------------------------------------------------------- load


def test_load_is_what_is_still_to_be_computed(bench: Bench) -> None:
    bench.add("a", 10, max_tokens=5)
    bench.add("b", 30, max_tokens=5)
    remote(bench)
    assert bench.scheduler.queued_tokens == 40
    assert (bench.scheduler.num_running, bench.scheduler.num_pulling, bench.scheduler.num_waiting) == (2, 1, 0)
    bench.step(elapsed_s=0.5)
    assert bench.scheduler.queued_tokens == 0
    assert bench.scheduler.prefill_tokens_per_s == pytest.approx(80)
    assert bench.scheduler.decode_step_s == 0
    bench.step(elapsed_s=0.02)
    assert bench.scheduler.decode_step_s == 0.02
    assert set(bench.scheduler.seq_ids()) == {"a", "b", "r"}


def test_the_last_token_of_a_prompt_counts_as_queued(bench: Bench) -> None:
    bench.add("a", 1)
    assert bench.scheduler.queued_tokens == 1


def test_prompt_tokens_are_counted_by_where_they_came_from(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=1)
    bench.run()
    bench.add("b", PROMPT, max_tokens=2)
    bench.run()
    stats = bench.scheduler.stats()
    assert stats["num_prompt_tokens_device"] == 16
    assert stats["num_prompt_tokens_computed"] == 19 + 3
    assert stats["num_generated_tokens"] == 3


def test_prompt_logprobs_take_one_quantum_a_step():
    """A chunk of them keeps logits of [chunk, vocabulary]: 2,048 tokens of a large vocabulary would be gigabytes."""
    bench = Bench(num_blocks=64)
    bench.add("p", 28, prompt_logprobs=0, max_tokens=1)
    assert [bench.step()[0][2:] for _ in range(4)] == [(0, 8), (8, 16), (16, 24), (24, 28)]
