"""An accelerator as who moves blocks in and out of its memory sees it: streams, events, buffers, locked pages.

A stream carries out what is queued in it in order, beside the thread that queued it and beside other streams. What one
stream is to see of another is said by events, and so is what a thread is to see of a stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from engine.memory.pool_allocation import PeerAllocation, allocate_pool, cuda_driver

logger = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: locked for all contexts of the process


class Event(Protocol):
    """A place in a stream."""

    def is_done(self) -> bool:
        """Tell whether all that was queued before the event is done."""
        ...

    def wait(self) -> None:
        """Block this thread until all that was queued before the event is done. Other threads go on meanwhile."""
        ...


class Stream(Protocol):
    """A queue of work on the device. Any thread, one at a time."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Allocate device memory for this stream, `[num_bytes]` uint8: nothing queued elsewhere may still use it."""
        ...

    def run(self, work: Callable[[], object]) -> None:
        """Queue what `work` launches; it is called without gradients, and must wait for nothing."""
        ...

    def wait(self, event: Event) -> None:
        """Let what is queued from now on begin after `event`; does not block."""
        ...

    def record(self) -> Event:
        """Return the place behind all that was queued so far."""
        ...


class Device(Protocol):
    """An accelerator. Any thread."""

    def new_stream(self) -> Stream:
        """Make a stream that runs beside all others."""
        ...

    def step_stream(self) -> Stream:
        """Return the stream to which the calling thread's own launches go."""
        ...

    def pool(self, num_bytes: int) -> torch.Tensor:
        """Allocate zeroed device memory that other processes can be given, `[num_bytes]` uint8, aligned to 2 MiB.

        Raises:
            ConfigError: there is not that much.
        """
        ...

    def export(self, pool: torch.Tensor) -> bytes:
        """Describe what `pool` gave to other processes of this node.

        Raises:
            OSError: it cannot be exported.
        """
        ...

    def open(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        """Map what another process exported, `[num_bytes]` uint8, on this device or one that this reaches.

        Raises:
            OSError: it cannot be reached.
        """
        ...

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Allocate page-locked host memory, `[num_bytes]` uint8. It may be dropped when what uses it was queued."""
        ...

    def lock_pages(self, address: int, num_bytes: int) -> str:
        """Lock mapped host memory, so that copies to and from it need no CPU; return why not, "" where it was done."""
        ...

    def unlock_pages(self, address: int) -> None:
        """Take back what `lock_pages` did at that address."""
        ...


class CudaEvent:
    """An `Event` of CUDA; who waits for it sleeps, and does not spin."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def is_done(self) -> bool:
        """Tell whether all that was queued before the event is done."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread until all that was queued before the event is done."""
        self.event.synchronize()


class CudaStream:
    """A `Stream` of CUDA."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Allocate device memory out of what this stream had."""
        with torch.cuda.stream(self._stream):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._stream.device)

    def run(self, work: Callable[[], object]) -> None:
        """Call `work`, whose launches go to this stream."""
        with torch.cuda.stream(self._stream), torch.inference_mode():
            work()

    def wait(self, event: Event) -> None:
        """Let what is queued from now on begin after `event`."""
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)

    def record(self) -> CudaEvent:
        """Return the place behind all that was queued so far."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._stream.record_event(event)
        return CudaEvent(event)


class CudaDevice:
    """A `Device` of CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self) -> CudaStream:
        """Make a stream that runs beside all others, also beside CUDA's default one."""
        return CudaStream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def step_stream(self) -> CudaStream:
        """Return the stream to which the calling thread's own launches go."""
        return CudaStream(torch.cuda.current_stream(self._device))

    def pool(self, num_bytes: int) -> torch.Tensor:
        """Allocate zeroed device memory past torch's allocator. See pool_allocation."""
        with torch.cuda.device(self._device):
            return allocate_pool(num_bytes, self._device)

    def export(self, pool: torch.Tensor) -> bytes:
        """Describe a pool to other processes, by CUDA IPC."""
        with torch.cuda.device(self._device):
            torch.zeros(1, device=self._device)  # the thread's context is there
            error, handle = cuda_driver().export(pool.data_ptr())
        if error:
            raise OSError(error)
        return handle

    def open(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        """Map another process's pool, by CUDA IPC."""
        with torch.cuda.device(self._device):
            torch.zeros(1, device=self._device)  # the thread's context is there
            peer = PeerAllocation(handle, num_bytes, cuda_driver())
            # with no device torch copies it to the host, and with another one to that
            return torch.as_tensor(peer, device=torch.device("cuda", peer.ordinal))

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Allocate page-locked host memory, `[num_bytes]` uint8; torch keeps it for as long as a stream uses it."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def lock_pages(self, address: int, num_bytes: int) -> str:
        """Call cudaHostRegister; return CUDA's words where it refuses."""
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = runtime.cudaHostRegister(address, num_bytes, _PORTABLE)
            return "" if int(status) == 0 else str(runtime.cudaGetErrorString(status))

    def unlock_pages(self, address: int) -> None:
        """Call cudaHostUnregister; a refusal is logged, for nobody can do anything about it."""
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = runtime.cudaHostUnregister(address)
            if int(status) != 0:
                logger.warning("pages stay locked: %s", runtime.cudaGetErrorString(status))


def device_of(device: torch.device) -> Device | None:
    """Return the accelerator that `device` names; None for a CPU, whose memory needs nobody to bring it in or out."""
    return None if device.type == "cpu" else CudaDevice(device)
