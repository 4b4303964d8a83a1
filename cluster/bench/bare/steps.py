"""Tells of an engine's steps which time was the device's and which the host's.

    watch.begin(); ...; watch.end() -> StepTimes       around each step of one engine

On a CPU the model's forward is the device's time. On a CUDA device events lie in the stream before and behind what is
launched: the host waits for the one behind, and between that and the next one before the device has nothing to
do. The two overlap where a step is planned while another computes: what is hidden behind the device is the host's time
too, and idle is what is not hidden.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cluster.bench.bare.batch import StepTimes
from engine.core import Engine


class StepWatch(Protocol):
    """Looks at the steps of one engine, from one thread."""

    def begin(self) -> None:
        """Begin to look: a step begins."""
        ...

    def end(self) -> StepTimes:
        """Return what the step took that began last."""
        ...

    def close(self) -> None:
        """Leave the engine as it was."""
        ...


class ForwardWatch:
    """Steps on a CPU: what is not the model's forward is the host's."""

    def __init__(self, model: nn.Module) -> None:
        self._begun_s = self._forward_s = self._idle_s = 0.0
        self._ended_s: float | None = None  # of the forward before
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after),
        ]

    def begin(self) -> None:
        """Begin to look: a step begins."""
        self._forward_s = self._idle_s = 0.0
        self._begun_s = time.perf_counter()

    def end(self) -> StepTimes:
        """Return what the step took that began last."""
        now_s = time.perf_counter()
        return StepTimes(now_s, now_s - self._begun_s - self._forward_s, self._idle_s)

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_: Any) -> None:
        now_s = time.perf_counter()
        if self._ended_s is not None:
            self._idle_s += now_s - self._ended_s
        self._forward_s -= now_s

    def _after(self, *_: Any) -> None:
        self._ended_s = time.perf_counter()
        self._forward_s += self._ended_s


class TimedEvent(Protocol):
    """A place in a device's stream: `torch.cuda.Event` with timing, or a fake."""

    def record(self) -> None:
        """Put it behind what was launched so far."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has come to it."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from it to another that the device has come to."""
        ...


class DeviceWatch:
    """Steps on a CUDA device. Stands between the engine and what launches its steps."""

    def __init__(self, engine: Engine, new_event: Callable[[], TimedEvent]) -> None:
        """Put itself in the place of the engine's steps. `new_event()` makes an event."""
        self._engine = engine
        self._steps: Any = engine.steps
        self._new_event = new_event
        self._launched: deque[tuple[TimedEvent, TimedEvent]] = deque()  # before and behind steps in progress
        self._ended: TimedEvent | None = None  # behind the last step that was finished
        self._begun_s = self._waited_s = self._idle_s = 0.0
        engine.steps = self  # type: ignore[assignment]  # it launches and finishes as they do

    def begin(self) -> None:
        """Begin to look: a step begins."""
        self._waited_s = self._idle_s = 0.0
        self._begun_s = time.perf_counter()

    def end(self) -> StepTimes:
        """Return what the step took that began last."""
        now_s = time.perf_counter()
        return StepTimes(now_s, now_s - self._begun_s - self._waited_s, self._idle_s)

    def close(self) -> None:
        """Give the engine its own back."""
        self._engine.steps = self._steps

    def launch(self, plan: Any) -> Any:
        """Launch as they do, with an event before and one behind."""
        before, behind = self._new_event(), self._new_event()
        before.record()
        launched = self._steps.launch(plan)
        behind.record()
        self._launched.append((before, behind))
        return launched

    def finish(self, launched: Any) -> Any:
        """Finish the step that was launched first, as they do, once the device has come to its end."""
        before, behind = self._launched.popleft()
        begun_s = time.perf_counter()
        behind.synchronize()
        self._waited_s += time.perf_counter() - begun_s
        if self._ended is not None:
            self._idle_s += self._ended.elapsed_time(before) / 1e3
        self._ended = behind
        return self._steps.finish(launched)


def watch_of(engine: Engine) -> StepWatch:
    """Return what looks at an engine's steps on its device."""
    if engine.loaded.device.type != "cuda":
        return ForwardWatch(engine.loaded.model)
    return DeviceWatch(engine, functools.partial(torch.cuda.Event, enable_timing=True))
