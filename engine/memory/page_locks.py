"""Which mapped host memory is page-locked, so that a device copies to and from it by itself.

Locking takes the kernel a while, some 0.1 s per GiB, during which CUDA may answer nobody else: it is done in pieces, on
a thread, and until a piece is locked copies of it go through a buffer. A copy must not lie in two pieces.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engine.memory.device import Device
from transport.protocol import MappedRegion

logger = logging.getLogger(__name__)

#: Locked at once: a step that wants something of CUDA meanwhile waits for some 5 ms.
_PIECE_BYTES = 64 << 20
_PAUSE_S = 0.002


class Part(NamedTuple):
    """Bytes `[begin, end)` of a range, all locked or none."""

    begin: int
    end: int
    is_locked: bool


class PageLocks:
    """The locked pieces of mapped regions. Any thread. A region is unlocked when nobody refers to its mapping."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._change = threading.Lock()
        #: where locked pieces begin, ascending, and where they end; replaced as a whole, so that readers need no lock
        self._locked: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._regions: weakref.WeakSet[MappedRegion] = weakref.WeakSet()
        self._closed = threading.Event()

    def lock(self, region: MappedRegion) -> threading.Thread | None:
        """Begin to lock a region that is mapped writable, on a thread, which is returned; None: that was done before.

        What cannot be locked is one line in the log, and stays as it is.
        """
        with self._change:
            if region in self._regions or self._closed.is_set():
                return None
            self._regions.add(region)
        pieces: list[int] = []  # their addresses
        weakref.finalize(region, self._begin_release, region.view, pieces).atexit = False
        thread = threading.Thread(target=self._lock_all, args=(region, pieces), name="lock-pages", daemon=True)
        thread.start()
        return thread

    def cut(self, address: int, num_bytes: int, max_bytes: int) -> Iterator[Part]:
        """Cut a range of host memory where locked pieces begin and end, and to `max_bytes` at most."""
        begins, ends = self._locked
        done = 0
        while done < num_bytes:
            at = address + done
            index = bisect.bisect_right(begins, at) - 1
            is_locked = index >= 0 and at < ends[index]
            following = ends[index : index + 1] if is_locked else begins[index + 1 : index + 2]
            end = min(num_bytes, done + max_bytes, *(border - address for border in following))
            yield Part(done, end, is_locked)
            done = end

    def close(self) -> None:
        """Unlock everything. Nothing is copied any more."""
        with self._change:
            self._closed.set()
            (begins, _), self._locked = self._locked, ((), ())
        for begin in begins:
            self._device.unlock_pages(begin)

    def _lock_all(self, region: MappedRegion, pieces: list[int]) -> None:
        address, num_bytes = address_of(region.view), region.num_bytes
        for offset in range(0, num_bytes, _PIECE_BYTES):
            if self._closed.is_set() or not region.is_current():
                return
            size = min(_PIECE_BYTES, num_bytes - offset)
            reason = self._device.lock_pages(address + offset, size)
            if reason:
                logger.warning(
                    "%d of %d bytes of a node cache cannot be page-locked (%s): copies of them go through a buffer, "
                    "which is slower; what helps: a higher limit of locked memory (ulimit -l, IPC_LOCK)",
                    *(num_bytes - offset, num_bytes, reason),
                )
                return
            with self._change:
                if self._closed.is_set():
                    self._device.unlock_pages(address + offset)
                    return
                pieces.append(address + offset)
                self._note(address + offset, size)
            time.sleep(_PAUSE_S)

    def _note(self, begin: int, num_bytes: int) -> None:
        begins, ends = self._locked
        index = bisect.bisect(begins, begin)
        self._locked = (
            (*begins[:index], begin, *begins[index:]),
            (*ends[:index], begin + num_bytes, *ends[index:]),
        )

    def _begin_release(self, view: memoryview, pieces: list[int]) -> None:
        """Unlock a region that nobody copies to or from any more; `view` keeps it mapped until that is done."""
        threading.Thread(target=self._release, args=(view, pieces), name="unlock-pages", daemon=True).start()

    def _release(self, view: memoryview, pieces: list[int]) -> None:
        with self._change:
            pairs = list(zip(*self._locked, strict=True))
            kept = [pair for pair in pairs if pair[0] not in pieces]
            self._locked = (tuple(begin for begin, _ in kept), tuple(end for _, end in kept))
        for begin, _ in pairs:
            if begin in pieces:
                self._device.unlock_pages(begin)


def address_of(view: memoryview) -> int:
    """Return where the bytes of `view` lie in this process."""
    address: int = np.frombuffer(view, np.uint8).ctypes.data
    return address
