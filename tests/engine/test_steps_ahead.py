"""An engine that plans each step while the one before it runs gives what one gives that does not."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from engine.core import Engine, EngineOptions
from engine.kernels.cpu.native import load_kernels
from engine.model.load import load_model
from engine.scheduling.plan import BlocksReleased, EmitTokens, SequenceAdded, SequenceCancelled, SequenceSpec
from messages.request import Grammar, SamplingParams
from tests.models import VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BLOCK_SIZE = 8
#: Long enough to be at work for some steps.
PATTERN = Grammar(kind="regex", spec="(the|fox|code|red){3,9}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=160)


def engine_of(directory, *, plans_ahead: bool, dtype: str = "float32", num_blocks: int = 60) -> Engine:
    loaded = load_model(directory, dtype=dtype)
    token_bytes = loaded.dtype.itemsize * sum(spec.token_elements for spec in loaded.layer_specs)
    options = EngineOptions(
        block_size=BLOCK_SIZE,
        kv_cache_bytes=num_blocks * BLOCK_SIZE * token_bytes,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        plans_ahead=plans_ahead,
    )
    return Engine.build(loaded, options, model_dir=directory)


class Answer(NamedTuple):
    """What whoever asked got."""

    token_ids: list[int]
    logprobs: list
    prompt_logprobs: list | None
    ends: list[tuple]


def run(engine: Engine, arrivals: list[tuple[int, SequenceSpec]]) -> dict[str, Answer]:
    """Add each sequence before the step with its number, step until all have ended; check the books as it goes."""
    answers: dict[str, Answer] = {}
    number = 0
    while arrivals or engine.has_work():
        while arrivals and arrivals[0][0] <= number:
            engine.post(SequenceAdded(arrivals.pop(0)[1]))
        for emitted in engine.step():
            answer = answers.setdefault(emitted.seq_id, Answer([], [], emitted.prompt_logprobs, []))
            take(answer, emitted)
            if emitted.finish_reason is not None:
                engine.post(BlocksReleased(emitted.seq_id))
        engine.scheduler.check_invariants()
        number += 1
    assert engine.pool.num_used == 0
    return answers


def take(answer: Answer, emitted: EmitTokens) -> None:
    answer.token_ids.extend(emitted.token_ids)
    answer.logprobs.extend(emitted.logprobs)
    if emitted.finish_reason is not None:
        answer.ends.append((emitted.finish_reason, emitted.stop_token_id, emitted.error))


def arrivals_at_random(seed: int, num_sequences: int) -> list[tuple[int, SequenceSpec]]:
    """Sequences of every kind, half of which begin alike."""
    rng, number, arrivals = random.Random(seed), 0, []
    for index in range(num_sequences):
        number += rng.choice([0, 0, 1, 5])
        base = [rng.randrange(4, VOCAB_SIZE) for _ in range(rng.randint(1, 40))]
        prompt = [*(i % 40 + 4 for i in range(rng.choice([0, 32]))), *base]
        params = SamplingParams(
            max_tokens=rng.randint(1, 50),
            temperature=rng.choice([0.0, 0.9]),
            top_p=rng.choice([1.0, 0.8]),
            seed=index,
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
            logit_bias=rng.choice([{}, {17: 2.0}]),
            min_tokens=rng.choice([0, 6]),
            stop_token_ids=tuple(rng.sample(range(4, VOCAB_SIZE), rng.choice([0, 12, 40]))),
            logprobs=rng.choice([None, 2]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            grammar=PATTERN if rng.random() < 0.1 else None,
        )
        spec = SequenceSpec(
            seq_id=f"s{index}",
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            params=params,
            priority=rng.choice([0, 0, 1]),
            is_kept=rng.random() < 0.1,
            is_suspect=rng.random() < 0.05,
        )
        arrivals.append((number, spec))
    return arrivals


class Ahead(NamedTuple):
    """What a run is to have met, or it shows nothing."""

    num_awaited: int
    num_for_nothing: int
    stats: dict[str, int]


def run_both(directory, arrivals, **options) -> Ahead:
    """Compare an engine that plans ahead with one that does not."""
    answers, num_awaited, num_for_nothing = [], 0, 0
    for plans_ahead in (False, True):
        engine = engine_of(directory, plans_ahead=plans_ahead, **options)
        finish, ended = engine.finish, set()

        def watch(step, finish=finish, engine=engine, ended=ended):
            nonlocal num_awaited, num_for_nothing
            awaiting = [part for part in step.plan.parts if part.awaits_token]
            num_awaited += len(awaiting)
            num_for_nothing += sum(part.seq_id not in engine.scheduler.seq_ids() for part in awaiting)
            return finish(step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "finish", lambda _, step, watch=watch: watch(step))
            answers.append(run(engine, list(arrivals)))
        stats = engine.scheduler.stats()
        engine.close()
        assert plans_ahead or num_awaited == 0
    assert answers[0] == answers[1]
    assert {reason for answer in answers[0].values() for reason, _, _ in answer.ends} == {"length", "stop"}
    return Ahead(num_awaited, num_for_nothing, stats)


def needs_kernels() -> None:
    if load_kernels() is None:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")


def test_sequences_of_every_kind_get_the_same_tokens_and_log_probabilities(directory):
    needs_kernels()
    ahead = run_both(directory, arrivals_at_random(1, 60))
    assert ahead.num_awaited > 300
    assert ahead.num_for_nothing > 3
    assert ahead.stats["num_prompt_tokens_device"] > 100


def test_so_they_do_where_there_is_so_little_room_that_they_are_preempted(directory):
    needs_kernels()
    ahead = run_both(directory, arrivals_at_random(2, 40), num_blocks=22)
    assert ahead.num_awaited > 100
    assert ahead.stats["num_preemptions"] > 3


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(3, 8))
def test_so_they_do_in_more_runs(directory, dtype, seed):
    needs_kernels()
    assert run_both(directory, arrivals_at_random(seed, 80), dtype=dtype, num_blocks=30).num_awaited > 200


def test_what_is_cancelled_under_two_steps_leaves_the_others_as_they_were(directory):
    params = SamplingParams(max_tokens=30, temperature=0.0)
    specs = [
        SequenceSpec(seq_id=f"s{i}", token_ids=[i + 5] * (9 + i), num_prompt_tokens=9 + i, params=params)
        for i in range(4)
    ]
    outputs = []
    for plans_ahead in (False, True):
        engine = engine_of(directory, plans_ahead=plans_ahead)
        tokens: dict[str, list[int]] = {}
        for spec in specs:
            engine.post(SequenceAdded(spec))
        number = 0
        while engine.has_work():
            for emitted in engine.step():
                tokens.setdefault(emitted.seq_id, []).extend(emitted.token_ids)
            number += 1
            if number == 7:
                engine.post(SequenceCancelled("s1"))
            engine.scheduler.check_invariants()
        assert engine.pool.num_used == 0
        engine.close()
        outputs.append(tokens)
    assert outputs[0] == outputs[1]
    assert {seq_id: len(tokens) for seq_id, tokens in outputs[0].items()} == {"s0": 30, "s1": 7, "s2": 30, "s3": 30}


def test_a_warm_engine_has_no_step_left_and_knows_what_steps_cost(directory):
    engine = engine_of(directory, plans_ahead=True)
    engine.warm_up()
    assert (engine.scheduler.num_steps, engine.has_work(), engine.pool.num_named) == (0, False, 0)
    assert engine.scheduler.prefill_tokens_per_s > 0
    assert engine.scheduler.decode_step_s > 0
    engine.close()


def test_on_a_cpu_steps_are_planned_ahead_by_request_alone(directory):
    loaded = load_model(directory)
    for wanted, max_steps in ((None, 1), (False, 1), (True, 2)):
        engine = Engine.build(loaded, EngineOptions(kv_cache_bytes=1 << 22, plans_ahead=wanted))
        assert engine.max_steps == max_steps
        engine.close()
