"""The contract of a road: moves bytes out of another process's region into one's own memory."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt

from messages.errors import KvrayError
from messages.handoff import RegionInfo


class Arrived(Protocol):
    """Who is told of each copy that has landed whole."""

    def __call__(self, position: int, checksum: int | None = None, /) -> None:
        """Take note of it; `checksum` (transport.checksum) of what was written, where the road computed it."""
        ...


class TransferError(KvrayError):
    """A pull did not happen or stopped. What the target ranges hold is undefined.

    `quarantine_s`: for so long after it was raised late bytes may still land in the target ranges, `inf` for ever.
    `is_busy`: others had the road all the time, nothing was written; it says nothing against the road.
    """

    default_status = 503
    quarantine_s = 0.0
    is_busy = False


class RegionError(TransferError):
    """The region is unknown, gone or not the one described, or a range lies outside it. Nothing was written."""


class Copy(NamedTuple):
    """`num_bytes` from `source_offset` of the remote region to `target_offset` of the own memory."""

    source_offset: int
    target_offset: int
    num_bytes: int


class Copies(Sequence[Copy]):
    """Many copies as rows of an array `[n, 3]` int64, a Copy each only for who asks for one."""

    def __init__(self, table: npt.NDArray[np.int64]) -> None:
        self.table = table

    @classmethod
    def of(cls, copies: Sequence[Copy]) -> Copies:
        """Return the same copies as rows."""
        if isinstance(copies, Copies):
            return copies
        return cls(np.fromiter(itertools.chain.from_iterable(copies), np.int64, 3 * len(copies)).reshape(-1, 3))

    @classmethod
    def of_equal(
        cls, source_offsets: npt.NDArray[np.int64], target_offsets: npt.NDArray[np.int64], num_bytes: int
    ) -> Copies:
        """Return copies of `num_bytes` each."""
        table = np.empty((len(source_offsets), 3), np.int64)
        table[:, 0], table[:, 1], table[:, 2] = source_offsets, target_offsets, num_bytes
        return cls(table)

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return int(self.table[:, 2].sum())

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, position: int) -> Copy: ...
    @overload
    def __getitem__(self, position: slice) -> Copies: ...
    def __getitem__(self, position: int | slice) -> Copy | Copies:
        if isinstance(position, slice):
            return Copies(self.table[position])
        return Copy._make(self.table[position].tolist())

    def __iter__(self) -> Iterator[Copy]:
        return map(Copy._make, self.table.tolist())


class MappedRegion(Protocol):
    """A region of another process on the same node, mapped here. Compared by identity."""

    @property
    def view(self) -> Any:
        """The bytes, `[num_bytes]` uint8: a memoryview, or a device's array."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of the region in bytes."""
        ...

    def is_current(self) -> bool:
        """Tell whether its owner still publishes it."""
        ...

    def populate(self) -> None:
        """Map every page now, which the first touch would do."""
        ...


class CopyWatch:
    """A look into a copy from another thread, and the word to stop. For one copy after the other."""

    def __init__(self) -> None:
        self.words = (ctypes.c_int64 * 2)()  #: bytes copied, whether to stop; shared with compiled code

    @property
    def num_bytes(self) -> int:
        """Bytes copied so far."""
        return self.words[0]

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return bool(self.words[1])

    def stop(self) -> None:
        """End what is copied within some 0.1 ms, by a device with its batch; what is begun afterwards ends at once."""
        self.words[1] = 1


class RegionMemory(Protocol):
    """Memory that can be registered and pulled into: `transport.memory.Memory`, or an accelerator's."""

    @property
    def num_bytes(self) -> int:
        """Size of the memory in bytes."""
        ...

    @property
    def nonce(self) -> bytes:
        """Identity of the memory: 16 random bytes."""
        ...

    @property
    def is_host(self) -> bool:
        """Whether the CPU can touch the memory; then it is a `transport.memory.Memory`."""
        ...

    def slice(self, offset: int, num_bytes: int) -> object:
        """Return a view of a part: the buffer protocol on the host, `__cuda_array_interface__` on a device."""
        ...

    def fill(self, source: MappedRegion, copies: Copies, watch: CopyWatch) -> list[int]:
        """Carry out all copies out of `source`; return the checksums (transport.checksum) of what each wrote.

        Blocks until it is done; for a thread where the memory is not a host's. `watch` shows how far it is, and may
        stop it: then the answer has only the copies that are whole, the first ones.
        """
        ...

    def prepare(self, source: MappedRegion) -> None:
        """Begin to make `source` ready for many copies, on a thread of its own: pages are mapped, or locked."""
        ...


class Link:
    """An authenticated channel as roads see it, and whether the peer at its other end is still there.

    Both sides of a channel have one. Compared by identity; belongs to one event loop.
    """

    def __init__(self, send: Callable[[str, bytes], bool]) -> None:
        """Make a link. `send(road, body)` queues a message to that road at the peer; False: the peer is lost."""
        self._send = send
        self.is_lost = False

    def send(self, road: str, body: bytes) -> bool:
        """Queue a message, never blocks; the channel encrypts it. False: the peer is lost."""
        return not self.is_lost and self._send(road, body)


class Transport(Protocol):
    """A road. One object per process and road, used from one event loop."""

    @property
    def road(self) -> str:
        """Name of the road: "shm", "ucx", "socket" or "plasma", as in `RegionInfo.road`."""
        ...

    @property
    def is_one_sided(self) -> bool:
        """Whether the owner's process takes no part in a pull."""
        ...

    @property
    def is_direct(self) -> bool:
        """Whether nobody's memory but the two peers' is involved; roads that are not direct are tried last."""
        ...

    def can_fill(self, memory: RegionMemory) -> bool:
        """Tell whether pulls can land in `memory`, whether or not peers can read it over this road."""
        ...

    def register(self, memory: RegionMemory) -> RegionInfo:
        """Make `memory` readable by peers; the answer describes it to them. Idempotent.

        Raises:
            RegionError: not memory that this road can read, or the transport is closed.
        """
        ...

    async def pull(
        self,
        link: Link,
        source: RegionInfo,
        copies: Sequence[Copy],
        target: RegionMemory,
        stall_s: float,
        on_arrived: Arrived | None = None,
    ) -> None:
        """Carry out all copies, in any order (targets must not overlap); return when the last byte has landed.

        `on_arrived(i)`, with the checksum of what was written where the road computes it as it writes, is called once
        for each copy, when it has landed, from any thread, and never after the return.
        A cancelled pull ends as a failed one does, and is then cancelled: nothing lands after the return.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: it failed, the peer was lost, or nothing arrived for `stall_s` seconds.
        """
        ...

    def on_message(self, link: Link, body: bytes) -> None:
        """Handle what the same road at the peer sent over the link; junk is logged and dropped."""
        ...

    def on_link_lost(self, link: Link) -> None:
        """Forget a peer that is gone: pulls from it fail at once, what was kept open for it is closed."""
        ...

    def carriers(self, link: Link) -> str:
        """Name, for people, what carries the bytes to and from this peer: "memcpy", "tcp", "cuda_ipc"; "": unknown."""
        ...

    def close(self) -> None:
        """Unregister everything; later pulls from this process's regions fail, own pulls end with TransferError."""
        ...


def check_ranges(copies: Sequence[Copy], source_bytes: int, target_bytes: int) -> None:
    """Raise RegionError unless every copy lies within both regions."""
    rows = Copies.of(copies)
    source_offset, target_offset, num_bytes = rows.table.T
    is_out = (num_bytes < 0) | (source_offset < 0) | (target_offset < 0)
    is_out |= (source_offset > source_bytes - num_bytes) | (target_offset > target_bytes - num_bytes)
    if is_out.any():
        copy = rows[int(is_out.argmax())]
        raise RegionError(f"{copy} is out of bounds: source {source_bytes} bytes, target {target_bytes} bytes")
