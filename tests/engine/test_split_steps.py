"""A step that is computed in parts gives what it gives as a whole; who does not fit alone ends alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import Engine, EngineOptions
from engine.model.load import load_model
from engine.scheduling.plan import Sampled, SequenceAdded, SequenceSpec, SequenceStep, SlotBegins, StepPlan, StepResult
from engine.split_steps import SplitSteps, split
from messages.errors import CapacityError
from messages.request import SamplingParams
from messages.stream import TokenLogprob
from tests.models import VOCAB_SIZE, make_tiny_model

BEGINS = SlotBegins(num_prompt_tokens=1, params=SamplingParams(max_tokens=9))


def part_of(seq_id: str, kind: str, start: int, num_tokens: int, **options) -> SequenceStep:
    options = {"is_sampled": True, **options}
    return SequenceStep(seq_id=seq_id, slot=int(seq_id), kind=kind, start=start, num_tokens=num_tokens, **options)


@st.composite
def plans(draw) -> StepPlan:
    parts = [
        part_of(str(number), "decode", draw(st.integers(0, 600)), draw(st.sampled_from([1, 1, 1, 7])))
        for number in range(draw(st.integers(0, 5)))
    ]
    for number in range(draw(st.integers(0, 3))):
        size = draw(st.sampled_from([1, 2, 15, 16, 17, 255, 256, 700]))
        is_last = draw(st.booleans())
        start = draw(st.sampled_from([0, 256, 512, 700]))
        options = {"is_sampled": is_last, "wants_prompt_logprobs": draw(st.booleans())}
        parts.append(part_of(str(10 + number), "prefill", start, size, **options))
    if not parts:
        parts.append(part_of("0", "decode", 3, 1))
    return StepPlan(tuple(parts), freed_slots=(99,))


def tokens_of(plan: StepPlan) -> list[tuple[str, int]]:
    return [(part.seq_id, place) for part in plan.parts for place in range(part.start, part.end)]


@dataclass
class Machine:
    """Computes plans of at most `max_tokens`, and none with a token that is `too_large`; records what it computed."""

    max_tokens: int = 10**9
    too_large: tuple[str, int] | None = None
    computed: list[StepPlan] = field(default_factory=list)
    num_released: int = 0
    num_failed: int = 0
    told: list[StepPlan] = field(default_factory=list)

    @property
    def steps(self) -> SplitSteps[StepPlan]:
        return SplitSteps(self.launch, self.finish, self.release)

    def launch(self, plan: StepPlan) -> StepPlan:
        if not plan.is_told:
            self.told.append(plan)
        tokens = tokens_of(plan)
        if len(tokens) > self.max_tokens or self.too_large in tokens:
            self.num_failed += 1
            raise torch.OutOfMemoryError("out of memory")
        self.computed.append(plan)
        return plan

    def release(self) -> None:
        self.num_released += 1

    def finish(self, plan: StepPlan) -> StepResult:
        """What it gives depends on the token alone."""
        return StepResult(
            sampled={part.seq_id: Sampled(part.end) for part in plan.parts if part.is_sampled},
            prompt_logprobs={
                part.seq_id: [TokenLogprob(place, 0.0, 1, ()) for place in range(part.start, part.end)]
                for part in plan.parts
                if part.wants_prompt_logprobs
            },
            elapsed_s=1.0,
        )


@given(plan=plans(), max_tokens=st.integers(1, 900))
@settings(max_examples=200, deadline=None)
def test_the_parts_of_a_step_compute_each_token_once_and_give_what_the_whole_gives(plan, max_tokens):
    machine = Machine(max_tokens)
    steps = machine.steps
    result = steps.finish(steps.launch(plan))
    computed = [token for part in machine.computed for token in tokens_of(part)]
    assert sorted(computed) == sorted(tokens_of(plan))
    for seq_id in {part.seq_id for part in plan.parts}:
        places = [place for found, place in computed if found == seq_id]
        assert places == sorted(places), "a token sees those before it"
    whole = Machine().finish(plan)
    assert result == replace(whole, elapsed_s=float(len(machine.computed)))
    assert machine.told == [plan], "what a plan tells of its slots is told once"
    assert all(
        part.kind == "prefill" or earlier.kind == "decode"
        for each in machine.computed
        for earlier, part in zip(each.parts, each.parts[1:], strict=False)
    ), "decode parts stay first"
    assert machine.num_released == machine.num_failed == steps.num_splits


@given(plan=plans())
@settings(max_examples=200, deadline=None)
def test_a_step_is_split_until_it_is_one_token_and_every_half_is_smaller(plan):
    left, num_single = [plan], 0
    while left:
        some = left.pop()
        halves = split(some)
        if halves is None:
            assert len(tokens_of(some)) == 1
            num_single += 1
            continue
        assert sum(len(tokens_of(half)) for half in halves) == len(tokens_of(some))
        for half in halves:
            assert half.parts
            assert half.is_told
            assert not half.freed_slots
        left += halves
    assert num_single == len(tokens_of(plan))


def test_chunks_are_halved_before_sequences_are_parted_and_are_cut_where_the_scheduler_cuts_them():
    rows = tuple(part_of(str(number), "decode", 50, 1, awaits_token=True) for number in range(4))
    plan = StepPlan((*rows, part_of("8", "prefill", 256, 700), part_of("9", "prefill", 0, 100)))
    first, second = split(plan)
    assert [(part.seq_id, part.start, part.end) for part in first.parts[4:]] == [("8", 256, 512)]
    assert first.parts[:4] == rows
    assert [(part.seq_id, part.start, part.end) for part in second.parts] == [("8", 512, 956), ("9", 0, 100)]
    assert not first.parts[4].is_sampled
    assert second.parts[0].is_sampled
    alone, others = split(StepPlan(rows))
    assert (alone.parts, others.parts) == (rows[:2], rows[2:])


def test_who_does_not_fit_alone_ends_with_an_error_and_nobody_else_does():
    plan = StepPlan(
        (
            *(part_of(str(i), "decode", 50, 1) for i in range(3)),
            part_of("8", "prefill", 0, 600),
            part_of("9", "prefill", 0, 5),
        )
    )
    machine = Machine(too_large=("8", 300))
    steps = machine.steps
    result = steps.finish(steps.launch(plan))
    assert set(result.sampled) == {"0", "1", "2", "9"}
    error = result.errors["8"]
    assert isinstance(error, CapacityError)
    assert error.status == 503
    assert "too small for token 300" in error.message
    assert not any(token[0] == "8" and token[1] >= 300 for part in machine.computed for token in tokens_of(part))


def test_a_step_that_was_planned_before_the_error_was_known_leaves_that_sequence_out_and_tells_of_its_slots():
    machine = Machine(too_large=("1", 7))
    steps = machine.steps
    first = StepPlan((part_of("0", "decode", 7, 1), part_of("1", "decode", 7, 1)))
    error = steps.finish(steps.launch(first)).errors["1"]
    behind = StepPlan((part_of("1", "decode", 8, 1, awaits_token=True),), freed_slots=(5,))
    result = steps.finish(steps.launch(behind))
    assert result == StepResult(sampled={}, errors={"1": error}, elapsed_s=1.0)
    assert machine.told[-1].freed_slots == (5,)
    again = StepPlan((part_of("1", "prefill", 0, 3, begins=BEGINS),))
    assert set(steps.finish(steps.launch(again)).sampled) == {"1"}, "whoever begins is another"


def test_other_errors_of_a_device_are_not_a_want_of_memory():
    def fail(plan: StepPlan) -> StepPlan:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        SplitSteps(fail, Machine().finish, lambda: None).launch(StepPlan((part_of("0", "decode", 0, 1),)))


# ---------------------------------------------------------------------------------------------------- a whole engine


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model"), eos_token_id=None, max_position_embeddings=512))


def answers(loaded, limit: int | None, *, plans_ahead: bool) -> tuple[dict[str, list], int]:
    """Tokens and log-probabilities of prompts of all lengths, where steps of more than `limit` tokens do not fit.

    Memory runs out late in the forward: all KV of the step is written by then.
    """
    options = EngineOptions(
        block_size=8,
        kv_cache_bytes=2**22,
        max_num_batched_tokens=300,
        max_num_seqs=6,
        itl_target_s=1e9,
        plans_ahead=plans_ahead,
    )
    engine = Engine.build(loaded, options)

    def run_out(module, args) -> None:
        if limit is not None and args[0].shape[1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = loaded.model.model.norm.register_forward_pre_hook(run_out)
    rng = random.Random(5)
    kinds = [
        {"temperature": 0.0, "prompt_logprobs": 2},
        {"frequency_penalty": 0.6, "repetition_penalty": 1.2, "seed": 3, "logprobs": 1},
        {"top_p": 0.9, "seed": 4},
    ]
    for number in range(9):
        prompt = [rng.randrange(4, VOCAB_SIZE) for _ in range(rng.choice([1, 7, 60, 270]))]
        params = SamplingParams(max_tokens=6, **kinds[number % 3])
        spec = SequenceSpec(seq_id=str(number), token_ids=prompt, num_prompt_tokens=len(prompt), params=params)
        engine.post(SequenceAdded(spec))
    found: dict[str, list] = {}
    while engine.has_work():
        for emitted in engine.step():
            assert emitted.error is None, emitted.error
            found.setdefault(emitted.seq_id, []).extend(emitted.token_ids)
            found[emitted.seq_id].extend(emitted.logprobs)
            found[emitted.seq_id].extend(emitted.prompt_logprobs or ())
    handle.remove()
    engine.pool.check_invariants()
    engine.close()
    return found, engine.steps.num_splits


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("plans_ahead", [False, True])
def test_an_engine_that_runs_out_of_memory_gives_the_tokens_that_it_gives_with_plenty(loaded, plans_ahead):
    plenty, num_splits = answers(loaded, None, plans_ahead=plans_ahead)
    assert num_splits == 0
    assert len(plenty) == 9
    for limit in (150, 17, 1):
        scarce, num_splits = answers(loaded, limit, plans_ahead=plans_ahead)
        assert scarce == plenty
        assert num_splits > 2
