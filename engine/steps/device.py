"""What steps want of an accelerator: one stream of work, host memory that copies leave from, events, graphs.

Everything that is put on its way runs there in that order, beside the host; `engine.steps.cuda` is a GPU, and tests
have an emulator on the CPU that checks ordering and lifetimes (`tests/engine/steps/emulator.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch


class DeviceEvent(Protocol):
    """A place in the device's stream of work."""

    def record(self) -> None:
        """Stand, from now on, for what was put on its way so far."""
        ...

    def synchronize(self) -> None:
        """Block until the device is through with that; at once where nothing was recorded."""
        ...


class StepGraph(Protocol):
    """Work that was captured: the same operations on the same memory, put on its way as one."""

    def launch(self) -> None:
        """Put it on its way once more."""
        ...


class StepDevice(Protocol):
    """An accelerator as steps use it. One thread at a time."""

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        ...

    def pinned(self, num_words: int) -> torch.Tensor:
        """Allocate host memory that `copy` leaves from while the host goes on: `[num_words]` int64."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Put the copy of `source`, pinned, into `target`, on the device, on its way; neither changes until it ran."""
        ...

    def event(self) -> DeviceEvent:
        """Make an event; nothing is recorded in it."""
        ...

    def capture(self, work: Callable[[], None]) -> StepGraph:
        """Record what `work` puts on its way, without running it; all graphs share the memory that they work in.

        What `work` reads and writes has to stay where it is for as long as the graph is launched.

        Raises:
            RuntimeError: it does what cannot be captured, or memory ran out.
        """
        ...

    def forbid_waits(self) -> AbstractContextManager[None]:
        """Let whatever blocks the host until the device is through raise RuntimeError, within this context."""
        ...

    def synchronize(self) -> None:
        """Block until everything on its way is done.

        Raises:
            RuntimeError: the device failed, and cannot go on.
        """
        ...
