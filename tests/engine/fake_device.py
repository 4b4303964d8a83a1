"""Devices in plain memory whose streams do nothing before somebody waits for them: a missing wait is wrong data."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.memory.kv_pool import KvPool

_WRONG = 0xA5  #: what is in memory that nobody wrote
_exported: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()


@dataclass(slots=True)
class FakeEvent:
    """A place in the queue of a stream."""

    stream: FakeStream
    position: int

    def is_done(self) -> bool:
        return self.stream.num_done >= self.position

    def wait(self) -> None:
        self.stream.carry_out(self.position)


class FakeStream:
    """A queue that is carried out, in order, when an event behind it is waited for; and no sooner."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._queue: list[Callable[[], object]] = []
        self.num_done = 0

    def buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), _WRONG, dtype=torch.uint8)

    def run(self, work: Callable[[], object]) -> None:
        self.queue(lambda: self._device.carry_out(work))

    def wait(self, event: FakeEvent) -> None:
        self.queue(event.wait)

    def queue(self, work: Callable[[], object]) -> None:
        self._queue.append(work)

    def record(self) -> FakeEvent:
        return FakeEvent(self, len(self._queue))

    @property
    def num_waiting(self) -> int:
        """What is queued and not done."""
        return len(self._queue) - self.num_done

    def carry_out(self, end: int) -> None:
        with self._device.lock:
            while self.num_done < end:
                work, self._queue[self.num_done] = self._queue[self.num_done], None
                self.num_done += 1
                work()


@dataclass(slots=True)
class FakeDevice:
    """The fake `engine.memory.device.Device`. `refusal`: why pages cannot be locked."""

    refusal: str = ""
    max_locked_bytes: int = 1 << 62
    lock: threading.RLock = field(default_factory=threading.RLock)
    streams: list[FakeStream] = field(default_factory=list)
    steps: FakeStream = None
    locked: dict[int, int] = field(default_factory=dict)  #: bytes by address
    num_host_bytes: int = 0  #: of all buffers that were asked for

    def __post_init__(self) -> None:
        self.steps = FakeStream(self)

    def new_stream(self) -> FakeStream:
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def step_stream(self) -> FakeStream:
        return self.steps

    def pool(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def export(self, pool: torch.Tensor) -> bytes:
        if self.refusal:
            raise OSError(self.refusal)
        _exported[pool.data_ptr()] = pool
        return pool.data_ptr().to_bytes(8, "little")

    def open(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        pool = _exported.get(int.from_bytes(handle, "little"))
        if pool is None:
            raise OSError("nobody exported that")
        return pool[:num_bytes]

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        self.num_host_bytes += num_bytes
        return torch.full((num_bytes,), _WRONG, dtype=torch.uint8)

    def lock_pages(self, address: int, num_bytes: int) -> str:
        assert not any(begin < address + num_bytes and address < begin + size for begin, size in self.locked.items())
        if self.refusal or sum(self.locked.values()) + num_bytes > self.max_locked_bytes:
            return self.refusal or "out of memory"
        self.locked[address] = num_bytes
        return ""

    def unlock_pages(self, address: int) -> None:
        del self.locked[address]

    def carry_out(self, work: Callable[[], object]) -> None:
        with torch.inference_mode():
            work()


class TwinDevice(FakeDevice):
    """Has the pool twice, as the steps of a real engine see it and as copies do.

    What a step wrote is in the copies' one when somebody waited for the event behind the step; what was copied in is in
    the steps' one once it was carried out. So an engine that computes at once, on a CPU, is as late as a device is.
    """

    def __init__(self, refusal: str = "") -> None:
        super().__init__(refusal)
        self.of_copies = self.of_steps = self._noted = torch.empty(0, dtype=torch.uint8)

    def pool(self, num_bytes: int) -> torch.Tensor:
        self.of_copies, self.of_steps, self._noted = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(3))
        return self.of_copies

    def step_stream(self) -> FakeStream:
        """Queue what the steps wrote since the last time."""
        with self.lock:
            changed = torch.nonzero(self.of_steps != self._noted).flatten()
            values = self.of_steps[changed]
            self._noted[changed] = values
        self.steps.queue(lambda: self.of_copies.index_copy_(0, changed, values))
        return self.steps

    def carry_out(self, work: Callable[[], object]) -> None:
        before = self.of_copies.clone()
        super().carry_out(work)
        self._show_steps(before)

    def land(self, write: Callable[[], object]) -> None:
        """Write into the pool past all streams, as roads do."""
        with self.lock:
            before = self.of_copies.clone()
            write()
            self._show_steps(before)

    def wipe(self) -> None:
        """Leave nothing in the pool that could be right by chance."""
        with self.lock:
            for tensor in (self.of_copies, self.of_steps, self._noted):
                tensor.fill_(_WRONG)

    def _show_steps(self, before: torch.Tensor) -> None:
        changed = torch.nonzero(self.of_copies != before).flatten()
        self.of_steps[changed] = self._noted[changed] = self.of_copies[changed]


def install(monkeypatch, make: Callable[[], FakeDevice] = TwinDevice) -> list[FakeDevice]:
    """Let engines that are built from now on have their pools on fake devices, which are listed in order."""
    made: list[FakeDevice] = []

    def device_of(_: torch.device) -> FakeDevice:
        made.append(make())
        return made[-1]

    def kv_pool(specs, block_size, dtype, device, memory) -> KvPool:
        own = made[-1].of_steps if isinstance(made[-1], TwinDevice) else memory
        return KvPool(specs, block_size, dtype, device, own)

    monkeypatch.setattr("engine.core.device_of", device_of)
    monkeypatch.setattr("engine.core.KvPool", kv_pool)
    return made
