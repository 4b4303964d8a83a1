"""Ray's object store, for nodes that may not connect to each other. The slowest road, and where Ray is, it is there.

    puller                                             source's node: its vault
    export: region, ranges of each segment      --->   maps the region, copies the ranges, puts each segment
                                                <---   references
    segment                                     <===   Ray moves it into the puller's node
    copies it to where it belongs
    release                                     --->   forgets the segments

A pull of much is many exports, of which the next is made while the last is copied. The vault owns the segments: they
outlive the process that they were read from. Who calls a vault must know the region's nonce.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import msgspec
import numpy as np

from messages.handoff import RegionInfo
from transport.checksum import Bytes
from transport.memory import Memory, as_host_memory
from transport.protocol import Arrived, Copy, Link, RegionError, RegionMemory, TransferError, check_ranges
from transport.shm import ShmTransport

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 8 << 20
_SEGMENT_PIECES = 8192
_EXPORT_SEGMENTS = 4  #: two exports of a pull are held at a time
_NUM_THREADS = 2

Range: TypeAlias = tuple[int, int]  #: offset and length in the region
T = TypeVar("T")


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """Whose vault reads the region, and how it finds it."""

    node_id: str  #: Ray's, in hex
    region: RegionInfo  #: of road "shm"


class Vaults(Protocol):
    """The vaults of all nodes, as a puller sees them; they are made when needed."""

    @property
    def node_id(self) -> str:
        """Ray's id, in hex, of this process's node."""
        ...

    async def export(
        self, node_id: str, export_id: bytes, region: RegionInfo, segments: Sequence[Sequence[Range]]
    ) -> Sequence[object]:
        """Have the vault of `node_id` read the ranges of its node's `region`; the answer refers to the segments.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds.
            TransferError: no vault can be had, it died, or it holds too much.
        """
        ...

    async def segment(self, reference: object) -> Bytes:
        """Return a segment's bytes, read-only, in this process; TransferError when it was lost."""
        ...

    def release(self, node_id: str, export_id: bytes) -> None:
        """Let go of an export, whether it was answered or not. Never blocks; unknown ids are ignored."""
        ...


class NoVaults:
    """`Vaults` for a process that Ray does not know, on a node of Ray's: it can be pulled from, and pulls nothing."""

    def __init__(self, node_id: str) -> None:
        """Make them for the node of this id, Ray's, in hex: its vault reads this process's region."""
        self.node_id = node_id

    async def export(
        self, node_id: str, export_id: bytes, region: RegionInfo, segments: Sequence[Sequence[Range]]
    ) -> Sequence[object]:
        """Raise TransferError."""
        raise TransferError("plasma: this process is not connected to Ray")

    async def segment(self, reference: object) -> Bytes:
        """Raise TransferError."""
        raise TransferError("plasma: this process is not connected to Ray")

    def release(self, node_id: str, export_id: bytes) -> None:
        """Do nothing: there are no exports."""


class _Piece(NamedTuple):
    """Bytes that are copied as one; a copy is cut where a segment ends."""

    position: int  #: of the copy
    source_offset: int
    target_offset: int
    num_bytes: int
    is_last: bool  #: of its copy


_Segment: TypeAlias = list[_Piece]


@dataclass(eq=False, slots=True)
class _Pull:
    """A pull under way, as `close` and `on_link_lost` stop it."""

    link: Link
    stall_s: float
    stopped: asyncio.Future[str]  #: why


class PlasmaTransport:
    """The `Transport` of road "plasma". A pull that was given up has stopped writing: it does its own copying."""

    road = "plasma"
    is_one_sided = True
    is_direct = False

    def __init__(self, vaults: Vaults) -> None:
        self._vaults = vaults
        self._shm = ShmTransport()  # makes regions readable by the own node's vault
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="plasma-pull")
        self._pulls: set[_Pull] = set()
        self._is_closed = False

    def can_fill(self, memory: RegionMemory) -> bool:
        """Tell whether it is host memory."""
        return isinstance(memory, Memory)

    def register(self, memory: RegionMemory) -> RegionInfo:
        """Make `memory` readable by way of this node's vault; the answer describes it to peers. Idempotent.

        Raises:
            RegionError: it is not host memory, or the transport is closed.
        """
        if self._is_closed:
            raise RegionError("the transport is closed")
        handle = _Handle(self._vaults.node_id, self._shm.register(as_host_memory(memory, self.road)))
        return RegionInfo(
            road=self.road, handle=msgspec.msgpack.encode(handle), num_bytes=memory.num_bytes, nonce=memory.nonce
        )

    async def pull(
        self,
        link: Link,
        source: RegionInfo,
        copies: Sequence[Copy],
        target: RegionMemory,
        stall_s: float,
        on_arrived: Arrived | None = None,
    ) -> None:
        """Carry out all copies, in order; return when the last byte has landed.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: it failed, the peer was lost, or no segment came for `stall_s` seconds.
        """
        if self._is_closed:
            raise RegionError("the transport is closed")
        memory, handle = as_host_memory(target, self.road), _handle_of(source)
        check_ranges(copies, source.num_bytes, target.num_bytes)
        if link.is_lost:
            raise TransferError("plasma: the peer was lost")
        pull = _Pull(link, stall_s, asyncio.get_running_loop().create_future())
        self._pulls.add(pull)
        try:
            await self._carry_out(pull, handle, copies, memory, on_arrived or _tell_nobody)
        finally:
            self._pulls.discard(pull)

    def on_message(self, link: Link, body: bytes) -> None:
        """Drop the message with a warning: the ends of this road say nothing over the link."""
        logger.warning("plasma: a message of %d bytes that nobody wanted", len(body))

    def on_link_lost(self, link: Link) -> None:
        """End the pulls over `link` with TransferError; nothing else is kept for a peer."""
        self._stop([pull for pull in self._pulls if pull.link is link], "the peer was lost")

    def carriers(self, link: Link) -> str:
        """Return "ray object store", whoever the peer is."""
        return "ray object store"

    def close(self) -> None:
        """Withdraw what was registered; own pulls end with TransferError."""
        self._is_closed = True
        self._shm.close()
        self._stop(self._pulls, "the transport was closed")
        self._threads.shutdown(wait=False)

    def _stop(self, pulls: Iterable[_Pull], reason: str) -> None:
        for pull in pulls:
            if not pull.stopped.done():
                pull.stopped.set_result(reason)

    async def _carry_out(
        self, pull: _Pull, handle: _Handle, copies: Sequence[Copy], target: Memory, on_arrived: Arrived
    ) -> None:
        exports = deque(_Export(self._vaults, handle, segments) for segments in _planned(copies))
        is_granted = False
        try:
            while exports:
                references = await self._wait(pull, exports[0].begin())
                if not is_granted:
                    is_granted = True
                    for position, copy in enumerate(copies):
                        if copy.num_bytes == 0:
                            on_arrived(position)
                if len(exports) > 1:
                    exports[1].begin()
                await self._fetch(pull, exports[0].segments, references, target, on_arrived)
                exports.popleft().end()
        except RegionError as error:
            if is_granted:  # then something may have been written
                raise TransferError(error.message) from None
            raise
        finally:
            for export in exports:
                export.end()

    async def _fetch(
        self,
        pull: _Pull,
        segments: Sequence[_Segment],
        references: Sequence[object],
        target: Memory,
        on_arrived: Arrived,
    ) -> None:
        if len(references) != len(segments):
            raise TransferError(f"plasma: {len(segments)} segments were asked for, {len(references)} are there")
        fetches = deque(asyncio.ensure_future(self._vaults.segment(reference)) for reference in references)
        try:
            for pieces in segments:
                data = await self._wait(pull, fetches[0])
                fetches.popleft()
                await self._in_thread(_place, data, pieces, target, on_arrived)
                del data  # the store's memory
        finally:
            for fetch in fetches:
                _discard(fetch)

    async def _wait(self, pull: _Pull, task: asyncio.Future[T]) -> T:
        waited_for: list[asyncio.Future[Any]] = [task, pull.stopped]
        await asyncio.wait(waited_for, timeout=pull.stall_s, return_when=asyncio.FIRST_COMPLETED)
        if pull.stopped.done():
            raise TransferError(f"plasma: {pull.stopped.result()}")
        if not task.done():
            raise TransferError(f"plasma: nothing came for {pull.stall_s:g} s")
        return task.result()

    async def _in_thread(self, function: Callable[..., None], *arguments: object) -> None:
        """Call `function` in a thread, and wait until it is over through any cancellation, which is then passed on."""
        call = asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        cancelled: asyncio.CancelledError | None = None
        while not call.done():
            try:
                await asyncio.wait([call])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            call.exception()  # looked at, or asyncio complains
            raise cancelled
        call.result()


class _Export:
    """One export as the puller sees it."""

    def __init__(self, vaults: Vaults, handle: _Handle, segments: Sequence[_Segment]) -> None:
        self.segments = segments
        self._vaults = vaults
        self._handle = handle
        self._id = secrets.token_bytes(16)
        self._task: asyncio.Task[Sequence[object]] | None = None

    def begin(self) -> asyncio.Task[Sequence[object]]:
        """Ask the vault for the export, if that was not done before; the answer refers to the segments."""
        if self._task is None:
            ranges = [[(piece.source_offset, piece.num_bytes) for piece in pieces] for pieces in self.segments]
            self._task = asyncio.get_running_loop().create_task(self._ask(ranges))
        return self._task

    def end(self) -> None:
        """Release the export, and drop an answer that is still to come."""
        if self._task is not None:
            _discard(self._task)
            self._vaults.release(self._handle.node_id, self._id)

    async def _ask(self, ranges: Sequence[Sequence[Range]]) -> Sequence[object]:
        return await self._vaults.export(self._handle.node_id, self._id, self._handle.region, ranges)


def _planned(copies: Sequence[Copy]) -> list[list[_Segment]]:
    """Cut the copies, in order, into exports of segments; at least one export, perhaps of no segment."""
    exports: list[list[_Segment]] = [[]]
    room_bytes = 0
    for position, copy in enumerate(copies):
        done = 0
        while done < copy.num_bytes:
            if room_bytes == 0 or len(exports[-1][-1]) == _SEGMENT_PIECES:
                if len(exports[-1]) == _EXPORT_SEGMENTS:
                    exports.append([])
                exports[-1].append([])
                room_bytes = SEGMENT_BYTES
            length = min(room_bytes, copy.num_bytes - done)
            exports[-1][-1].append(
                _Piece(
                    position,
                    copy.source_offset + done,
                    copy.target_offset + done,
                    length,
                    done + length == copy.num_bytes,
                )
            )
            done += length
            room_bytes -= length
    return exports


def _place(data: Bytes, pieces: _Segment, target: Memory, on_arrived: Arrived) -> None:
    """Copy a segment's pieces to where they belong."""
    wanted = sum(piece.num_bytes for piece in pieces)
    if len(data) != wanted:
        raise TransferError(f"plasma: a segment of {wanted} bytes was asked for, one of {len(data)} came")
    whole = np.frombuffer(target.view, dtype=np.uint8)
    begin = 0
    for piece in pieces:
        end = begin + piece.num_bytes
        whole[piece.target_offset : piece.target_offset + piece.num_bytes] = data[begin:end]
        begin = end
        if piece.is_last:
            on_arrived(piece.position)


def _handle_of(source: RegionInfo) -> _Handle:
    if source.road != PlasmaTransport.road:
        raise RegionError(f"a region of road {source.road!r} cannot be read by plasma")
    try:
        handle = msgspec.msgpack.decode(source.handle, type=_Handle)
    except msgspec.DecodeError as error:
        raise RegionError(f"plasma: the handle cannot be read: {error}") from error
    # The vault sees what is in the handle only: it must be what the caller was told.
    if (handle.region.nonce, handle.region.num_bytes) != (source.nonce, source.num_bytes):
        raise RegionError("plasma: the handle is another region's than the one described")
    return handle


def _discard(task: asyncio.Future[Any]) -> None:
    """Cancel a task, and look at its outcome, whatever it is."""
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


def _tell_nobody(position: int, checksum: int | None = None, /) -> None:
    """Stand in for an `on_arrived` that the caller did not give."""
