"""Steps follow each other, peers are told meanwhile, and a step that raises ends it all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
import torch

from engine.driver import EngineDriver
from engine.scheduling.plan import (
    CompileGrammar,
    EmitTokens,
    Event,
    GrammarCompiled,
    Instruction,
    RunStep,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
    SequenceStep,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
    TimePassed,
)
from engine.split_steps import SplitSteps
from messages.errors import RequestError
from messages.request import Grammar, SamplingParams
from tests.workers import until

WAIT_S = 2.0


class ScriptedEngine:
    """Runs `num_steps` steps, each of which emits its number; records which have begun."""

    max_steps = 1

    def __init__(self, num_steps: int, failing_step: int | None = None, failure: BaseException | None = None) -> None:
        self.failure = failure or RuntimeError("no such kernel")
        self.left = num_steps
        self.failing_step = failing_step
        self.num_ended = 0
        self.begun = [threading.Event() for _ in range(num_steps)]
        self.num_begun = 0
        self.prepared: list[str] = []

    def prepare_thread(self) -> None:
        self.prepared.append(threading.current_thread().name)

    def decide(self, event: Event, now_s: float | None = None) -> list[Instruction]:
        match event:
            case StepWanted() if self.left:
                self.left -= 1
                return [RunStep(StepPlan(()))]
            case StepEnded():
                self.num_ended += 1
                return [EmitTokens("s", [self.num_ended])]
            case SequenceCancelled(seq_id):
                return [EmitTokens(seq_id, finish_reason="cancelled")]
        return []

    def bound_s(self, plan: StepPlan) -> float:
        return WAIT_S

    def launch(self, plan: StepPlan) -> int:
        number, self.num_begun = self.num_begun, self.num_begun + 1
        self.begun[number].set()
        if number == self.failing_step:
            raise self.failure
        return number

    def finish(self, step: int) -> StepResult:
        return StepResult(sampled={}, elapsed_s=0.001)


async def drive(engine: ScriptedEngine, on_instructions, is_over) -> list[BaseException]:
    crashes: list[BaseException] = []
    driver = EngineDriver(engine, on_instructions, crashes.append)
    driver.start()
    async with asyncio.timeout(WAIT_S):
        while not is_over() and not crashes:  # noqa: ASYNC110 - the engine under test counts, it sets no event
            await asyncio.sleep(0.001)
    await driver.close()
    return crashes


async def test_what_a_step_gave_is_handed_out_while_the_next_one_runs():
    engine = ScriptedEngine(num_steps=3)
    is_next_running: list[bool] = []

    def on_instructions(instructions: Sequence[Instruction]) -> None:
        [emitted] = instructions
        if emitted.token_ids[0] < 3:
            is_next_running.append(engine.begun[emitted.token_ids[0]].wait(WAIT_S / 4))

    assert await drive(engine, on_instructions, lambda: engine.num_ended == 3) == []
    assert is_next_running == [True, True]


async def test_what_steps_gave_is_handed_out_in_order():
    engine = ScriptedEngine(num_steps=20)
    seen: list[int] = []

    def on_instructions(instructions: Sequence[Instruction]) -> None:
        seen.extend(token for emitted in instructions for token in emitted.token_ids)

    assert await drive(engine, on_instructions, lambda: len(seen) == 20) == []
    assert seen == list(range(1, 21))


async def test_the_thread_of_steps_is_prepared_once_before_the_first():
    engine = ScriptedEngine(num_steps=2)
    assert not await drive(engine, lambda _: None, lambda: engine.num_ended == 2)
    assert engine.prepared == ["engine-step_0"]


async def test_instructions_of_a_posted_event_are_handed_out_before_post_returns():
    seen: list[Instruction] = []
    driver = EngineDriver(ScriptedEngine(num_steps=0), seen.extend, lambda _: None)
    driver.start()
    driver.post(SequenceCancelled("a"))
    assert [emitted.seq_id for emitted in seen] == ["a"]
    await driver.close()


async def test_a_step_that_raises_is_reported_once_and_nothing_runs_after_it(caplog: pytest.LogCaptureFixture):
    engine = ScriptedEngine(num_steps=5, failing_step=1)
    crashes = await drive(engine, lambda _: None, lambda: False)
    assert [str(error) for error in crashes] == ["no such kernel"]
    assert engine.num_begun == 2


class Panic(BaseException):
    """As native libraries raise it."""


async def test_a_panic_in_a_step_is_reported_like_an_error():
    crashes = await drive(
        ScriptedEngine(2, failing_step=1, failure=Panic("at src/lib.rs:7")), lambda _: None, lambda: False
    )
    assert [str(error) for error in crashes] == ["at src/lib.rs:7"]


async def test_a_device_that_failed_ends_the_worker_and_is_not_taken_for_a_want_of_memory():
    """Both are RuntimeErrors: one leaves a context in which nothing works any more."""
    failure = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    engine = ScriptedEngine(3, failing_step=1, failure=failure)
    steps = SplitSteps(engine.launch, engine.finish, lambda: None)
    engine.launch, engine.finish = steps.launch, steps.finish
    assert await drive(engine, lambda _: None, lambda: False) == [failure]
    assert engine.num_begun == 2


# -------------------------------------------------------------------------------------------------------- steps ahead


class AheadEngine(ScriptedEngine):
    """Two of its steps may be on their way; it notes what is done, and computes as an accelerator: until `finish`."""

    max_steps = 2

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.may_end = threading.Event()
        self.may_end.set()
        self.done: list[str] = []

    def decide(self, event: Event, now_s: float | None = None) -> list[Instruction]:
        if isinstance(event, StepEnded):
            self.done.append(f"take in {self.num_ended}")
        return super().decide(event, now_s)

    def launch(self, plan: StepPlan) -> int:
        number = super().launch(plan)
        self.done.append(f"launch {number}")
        return number

    def finish(self, step: int) -> StepResult:
        assert self.may_end.wait(WAIT_S)
        self.done.append(f"finish {step}")
        return super().finish(step)


async def test_a_step_is_launched_before_the_one_before_it_is_waited_for():
    engine = AheadEngine(num_steps=4)
    assert await drive(engine, lambda _: None, lambda: engine.num_ended == 4) == []
    on_thread = [what for what in engine.done if not what.startswith("take")]
    assert on_thread == [
        *("launch 0", "launch 1", "finish 0", "launch 2", "finish 1", "launch 3", "finish 2", "finish 3"),
    ]
    assert [what for what in engine.done if what.startswith("take")] == [f"take in {i}" for i in range(4)]
    assert engine.done.index("take in 0") < engine.done.index("launch 2")


async def test_what_steps_gave_that_were_launched_ahead_is_handed_out_in_order():
    engine = AheadEngine(num_steps=20)
    seen: list[int] = []

    def on_instructions(instructions: Sequence[Instruction]) -> None:
        seen.extend(token for emitted in instructions for token in emitted.token_ids)

    assert await drive(engine, on_instructions, lambda: len(seen) == 20) == []
    assert seen == list(range(1, 21))


@pytest.mark.parametrize("failing_step", [0, 1, 4])
async def test_a_step_that_cannot_be_launched_is_reported_once_whatever_runs_before_it(failing_step):
    engine = AheadEngine(num_steps=9, failing_step=failing_step)
    crashes = await drive(engine, lambda _: None, lambda: False)
    assert [str(error) for error in crashes] == ["no such kernel"]
    assert engine.num_ended == failing_step


async def test_who_is_added_while_nothing_runs_is_stepped_alone_and_then_ahead():
    engine = AheadEngine(num_steps=0)
    driver = EngineDriver(engine, lambda _: None, lambda _: None)
    driver.start()
    await asyncio.sleep(0.01)
    assert engine.done == []
    engine.left, engine.begun = 3, [threading.Event() for _ in range(3)]
    driver.post(SequenceCancelled("a"))
    await until(lambda: engine.num_ended == 3)
    assert driver.num_steps == 3
    await driver.close()


async def test_a_step_that_waits_behind_another_begins_when_that_has_ended():
    engine = AheadEngine(num_steps=2)
    engine.may_end.clear()
    begins_s: list[float] = []  # of what runs as the tokens of a step are handed out: until when it may take, counts

    def on_instructions(_: Sequence[Instruction]) -> None:
        begins_s.extend(running.begun_s for running in driver._running)

    driver = EngineDriver(engine, on_instructions, lambda _: None)
    begun_s = time.monotonic()
    driver.start()
    await until(lambda: len(driver._running) == 2)
    await asyncio.sleep(0.05)
    released_s = time.monotonic()
    engine.may_end.set()
    await until(lambda: engine.num_ended == 2)
    assert len(begins_s) == 1
    assert begins_s[0] >= released_s
    assert 0.05 <= driver.busy_s <= time.monotonic() - begun_s
    await driver.close()


# -------------------------------------------------------------------------------------------------------------- hangs


class HangingEngine(ScriptedEngine):
    """Its first step goes on until the test lets it end; whoever waits has a deadline."""

    def __init__(self) -> None:
        super().__init__(1)
        self.may_end = threading.Event()

    def decide(self, event: Event, now_s: float | None = None) -> list[Instruction]:
        match event:
            case TimePassed():
                return [EmitTokens("w", finish_reason="error")]
            case StepWanted() if self.left:
                self.left -= 1
                part = SequenceStep(seq_id="s", slot=0, kind="prefill", start=0, num_tokens=5, is_sampled=True)
                return [RunStep(StepPlan((part,)))]
        return super().decide(event, now_s)

    def bound_s(self, plan: StepPlan) -> float:
        return 0.05

    def finish(self, step: int) -> StepResult:
        assert self.may_end.wait(WAIT_S)
        return super().finish(step)


async def test_time_passes_while_a_step_hangs_which_ends_the_worker_with_what_is_in_it():
    engine = HangingEngine()
    seen: list[Instruction] = []
    crashes: list[BaseException] = []
    driver = EngineDriver(engine, seen.extend, crashes.append)
    driver.start()
    await asyncio.sleep(0)
    seen.clear()
    await until(lambda: seen)
    assert seen[0] == EmitTokens("w", finish_reason="error")
    await until(lambda: crashes)
    assert "in it are: s prefill [0, 5)" in crashes[0].message
    engine.may_end.set()
    await driver.close()


# ----------------------------------------------------------------------------------------------------------- grammars


class CompilingEngine(ScriptedEngine):
    """Wants a grammar when a sequence is added; compiling it goes on until the test lets it end."""

    def __init__(self, num_steps: int, failure: BaseException | None = None) -> None:
        super().__init__(num_steps)
        self.compiling_failure = failure
        self.known: set[Grammar] = set()
        self.may_end = threading.Event()
        self.compiled: list[str] = []

    def decide(self, event: Event, now_s: float | None = None) -> list[Instruction]:
        match event:
            case SequenceAdded(spec):
                return [CompileGrammar(spec.seq_id, spec.params.grammar)]
            case GrammarCompiled(seq_id):
                self.compiled.append(seq_id)
        return super().decide(event, now_s)

    def is_compiled(self, grammar: Grammar) -> bool:
        return grammar in self.known

    def compile(self, wanted: CompileGrammar) -> GrammarCompiled:
        if not self.is_compiled(wanted.grammar):
            assert self.may_end.wait(WAIT_S)
            if self.compiling_failure is not None:
                raise self.compiling_failure
        self.known.add(wanted.grammar)
        return GrammarCompiled(wanted.seq_id, RequestError("any outcome"))


def asking(seq_id: str, pattern: str) -> SequenceAdded:
    params = SamplingParams(max_tokens=1, grammar=Grammar(kind="regex", spec=pattern))
    return SequenceAdded(SequenceSpec(seq_id=seq_id, token_ids=[1], num_prompt_tokens=1, params=params))


async def test_steps_and_known_grammars_do_not_wait_for_one_that_is_compiled():
    engine = CompilingEngine(num_steps=20)
    engine.known.add(Grammar(kind="regex", spec="known"))
    driver = EngineDriver(engine, lambda _: None, lambda _: None)
    driver.post(asking("slow", "new"))
    driver.start()
    driver.post(asking("quick", "known"))
    await until(lambda: engine.num_ended == 20 and engine.compiled == ["quick"])
    engine.may_end.set()
    await until(lambda: engine.compiled == ["quick", "slow"])
    await driver.close()


async def test_a_grammar_that_is_ready_after_the_end_is_told_to_nobody():
    engine = CompilingEngine(num_steps=0)
    driver = EngineDriver(engine, lambda _: None, lambda _: None)
    driver.start()
    driver.post(asking("s", "new"))
    await driver.close()
    engine.may_end.set()
    await until(lambda: engine.known)
    await asyncio.sleep(0)
    assert engine.compiled == []


async def test_a_panic_of_the_compiler_is_reported_like_one_in_a_step():
    engine = CompilingEngine(num_steps=0, failure=Panic("at src/compiler.rs:7"))
    crashes: list[BaseException] = []
    driver = EngineDriver(engine, lambda _: None, crashes.append)
    driver.start()
    driver.post(asking("s", "new"))
    engine.may_end.set()
    await until(lambda: crashes)
    assert [str(error) for error in crashes] == ["at src/compiler.rs:7"]
    await driver.close()
