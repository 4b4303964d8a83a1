"""Drives an engine from an event loop: decisions on the loop, forward passes on one thread.

All bookkeeping is touched by the loop's thread alone; the thread sees a plan and gives back a result. While it
computes, the loop keeps answering heartbeats, cancels and pulls.

    loop     plan 1 | plan 2 |                   | take in 1, plan 3 |     | take in 2, plan 4 ...
    thread          | launch 1 | launch 2 | finish 1                 | launch 3 | finish 2 ...

So it goes where steps are planned ahead; elsewhere a step is planned when the one before it was taken in.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from engine.core import Engine, EngineStep
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


class _Launched(NamedTuple):
    step: EngineStep
    begun_s: float  #: of the performance counter


class _RunningStep(NamedTuple):
    plan: StepPlan
    launched: Future[_Launched]
    begun_s: float  #: of the monotonic clock: when it was planned, or the step before it ended
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
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="engine-step", initializer=engine.prepare_thread
        )
        self._is_closed = False
        self._compiler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._running: deque[_RunningStep] = deque()  # oldest first
        self._ended_s = 0.0  # of the performance counter: when the last step ended
        self.num_steps = 0
        self.busy_s = 0.0  #: for which at least one step ran

    def start(self) -> None:
        """Begin stepping on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._tick()

    def post(self, event: Event) -> None:
        """Give an event to the scheduler, on the loop's thread; its instructions are handed out before this returns."""
        self._carry_out(event)
        self._wake.set()

    async def close(self) -> None:
        """Stop after the step in progress; what was launched behind it is not waited for."""
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
                num_before = len(self._running)
                self._carry_out(*events, StepWanted())
                events = []
                if num_before < len(self._running) < self.engine.max_steps:
                    continue  # with the step behind it
                if self._running:
                    events.append(StepEnded(await self._end_of(self._running[0])))
                    self._running.popleft()
                    if self._running:  # what waited behind it begins
                        self._running[0] = self._running[0]._replace(begun_s=time.monotonic())
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
        if not self._running:
            return
        running = self._running[0]
        age_s = time.monotonic() - running.begun_s
        if age_s > running.bound_s:
            parts = ", ".join(f"{part.seq_id} {part.kind} [{part.start}, {part.end})" for part in running.plan.parts)
            raise WorkerError(
                f"a step runs for {age_s:.1f} s, at most {running.bound_s:.1f} s were expected; in it are: {parts}"
            )

    def _carry_out(self, *events: Event) -> None:
        """Decide, begin the step that follows, and only then hand out the rest: it runs while peers are told."""
        others: list[Instruction] = []
        now_s = time.monotonic()  # one for all: what one event offers, the next does not take back before it is told
        for event in events:
            for instruction in self.engine.decide(event, now_s):
                if isinstance(instruction, RunStep):
                    plan = instruction.plan
                    launched = self._thread.submit(self._launch, plan)
                    self._running.append(_RunningStep(plan, launched, now_s, self.engine.bound_s(plan)))
                elif isinstance(instruction, CompileGrammar):
                    self._compile(instruction)
                else:
                    others.append(instruction)
        if others:
            self._on_instructions(others)

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

    def _launch(self, plan: StepPlan) -> _Launched:
        """Put a step on its way, on the engine's thread."""
        if plan.is_suspect:
            time.sleep(_TOLD_S)
        begun_s = time.perf_counter()
        return _Launched(self.engine.launch(plan), begun_s)

    def _end_of(self, running: _RunningStep) -> asyncio.Future[StepResult]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._finish, running.launched)

    def _finish(self, future: Future[_Launched]) -> StepResult:
        """Wait for the end of a step, on the engine's thread; raises what its launch raised."""
        launched = future.result()
        result = self.engine.finish(launched.step)
        ended_s = time.perf_counter()
        self.num_steps += 1
        self.busy_s += ended_s - max(launched.begun_s, self._ended_s)
        self._ended_s = ended_s
        return result
