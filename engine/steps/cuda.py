"""A CUDA device as steps use it: the stream that is current, which is the default one, is its stream of work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.steps.device import DeviceEvent, StepGraph


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph

    def launch(self) -> None:
        """Implement `StepGraph.launch`."""
        self.graph.replay()


class CudaSteps:
    """Implements `StepDevice`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graph_memory = torch.cuda.graph_pool_handle()

    def pinned(self, num_words: int) -> torch.Tensor:
        """Implement `StepDevice.pinned`."""
        return torch.empty(num_words, dtype=torch.int64, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Implement `StepDevice.copy`."""
        target.copy_(source, non_blocking=True)

    def event(self) -> DeviceEvent:
        """Implement `StepDevice.event`."""
        event: DeviceEvent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def capture(self, work: Callable[[], None]) -> StepGraph:
        """Implement `StepDevice.capture`; other threads may go on using the device meanwhile."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(before)  # where the end of a capture raises, torch leaves its own stream current
        return _Graph(graph)

    @contextmanager
    def forbid_waits(self) -> Iterator[None]:
        """Implement `StepDevice.forbid_waits`, by what torch notices; of all threads."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():  # torch says that it does not notice all of it
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def synchronize(self) -> None:
        """Implement `StepDevice.synchronize`."""
        torch.cuda.synchronize(self.device)
