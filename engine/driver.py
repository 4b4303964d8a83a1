"""Drives an engine from an event loop: decisions on the loop, forward passes on one thread.

All bookkeeping is touched by the loop's thread alone; the thread sees a plan and gives back a result. While it
computes, the loop keeps answering heartbeats, cancels and pulls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from engine.core import Engine
from engine.scheduling.plan import (
    CompileGrammar,
    Event,
    Instruction,
    RunStep,
    StepEnded,
    StepPlan,
    StepResult,
    StepWanted,
    TimePassed,
)
from messages.errors import WorkerError

_TICK_S = 0.1  #: how late a deadline may be noticed
#: A step that may end the process begins so much later: until then the word of it has left the process.
_TOLD_S = 0.02


class _RunningStep(NamedTuple):
    plan: StepPlan
    begun_s: float  #: of the monotonic clock
    bound_s: float  #: a step that takes longer will never end


class EngineDriver:
    """Feeds events in, hands instructions out, keeps steps running while there is work.

    `on_instructions` is called on the loop with what events led to, in order, RunStep and CompileGrammar left out.
    `on_crash` is called if a step raises, whatever it is, or never ends: the engine's state is then unknown and the
    worker must end. Grammars are compiled on a thread beside the steps, which only those that want them wait for.
    """

    def __init__(
        self,
        engine: Engine,
        on_instructions: Callable[[Sequence[Instruction]], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self.engine = engine
        self._on_instructions = on_instructions
        self._on_crash = on_crash
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-step")
        self._is_closed = False
        self._compiler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._running: _RunningStep | None = None
        self.num_steps = 0
        self.busy_s = 0.0

    def start(self) -> None:
        """Begin stepping on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._tick()

    def post(self, event: Event) -> None:
        """Give an event to the scheduler, on the loop's thread; its instructions are handed out before this returns."""
        self._carry_out(event)
        self._wake.set()

    async def close(self) -> None:
        """Stop after the step in progress."""
        self._is_closed = True
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _run(self) -> None:
        try:
            events: list[Event] = []
            while True:
                self._wake.clear()
                step = self._carry_out(*events, StepWanted())
                events = []
                if step is not None:
                    events.append(StepEnded(await step))
                    self._running = None
                    continue
                await self._wake.wait()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - the edge: a worker that cannot step must not look alive
            self._on_crash(error)

    def _tick(self) -> None:
        """Let time pass, whether a step runs or not: deadlines do not wait for one that hangs."""
        self._tick_timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        try:
            self.post(TimePassed())
            self._check_step()
        except BaseException as error:  # noqa: BLE001 - the edge, as above
            self._tick_timer.cancel()
            self._on_crash(error)

    def _check_step(self) -> None:
        """Raise WorkerError if the step in progress runs for so long that it will never end; says what is in it."""
        running = self._running
        if running is None:
            return
        age_s = time.monotonic() - running.begun_s
        if age_s > running.bound_s:
            parts = ", ".join(f"{part.seq_id} {part.kind} [{part.start}, {part.end})" for part in running.plan.parts)
            raise WorkerError(
                f"a step runs for {age_s:.1f} s, at most {running.bound_s:.1f} s were expected; in it are: {parts}"
            )

    def _carry_out(self, *events: Event) -> asyncio.Future[StepResult] | None:
        """Decide, begin the step that follows, and only then hand out the rest: it runs while peers are told."""
        step = None
        others: list[Instruction] = []
        now_s = time.monotonic()  # one for all: what one event offers, the next does not take back before it is told
        for event in events:
            for instruction in self.engine.decide(event, now_s):
                if isinstance(instruction, RunStep):
                    self._running = _RunningStep(instruction.plan, now_s, self.engine.bound_s(instruction.plan))
                    step = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, instruction.plan)
                elif isinstance(instruction, CompileGrammar):
                    self._compile(instruction)
                else:
                    others.append(instruction)
        if others:
            self._on_instructions(others)
        return step

    def _compile(self, wanted: CompileGrammar) -> None:
        """Have a grammar compiled, and the scheduler told: soon, where it was compiled before."""
        loop = asyncio.get_running_loop()
        if self.engine.is_compiled(wanted.grammar):
            loop.call_soon(self._tell, lambda: self.engine.compile(wanted))
            return
        future = loop.run_in_executor(self._compiler, self.engine.compile, wanted)
        future.add_done_callback(lambda done: None if done.cancelled() else self._tell(done.result))

    def _tell(self, outcome: Callable[[], Event]) -> None:
        if self._is_closed:
            return  # a compiler cannot be interrupted
        try:
            self.post(outcome())
        except BaseException as error:  # noqa: BLE001 - the edge, as above
            self._on_crash(error)

    def _compute(self, plan: StepPlan) -> StepResult:
        """Compute a step, on the engine's thread."""
        if plan.is_suspect:
            time.sleep(_TOLD_S)
        started_s = time.perf_counter()
        result = self.engine.compute(plan)
        self.num_steps += 1
        self.busy_s += time.perf_counter() - started_s
        return result
