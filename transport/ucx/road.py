"""Between nodes, and between devices: UCX carries the bytes as tag messages, asked for over the link.

    UcxTransport   on the event loop                    this file
    Mover, Pull    the road's thread, and its work      mover.py, pull.py
    Worker         UCX, by way of ucxx and ctypes       worker.py, library.py
    Connect, ...   what the two sides say to each other wire.py

UCX authenticates nobody: who can open a connection to its port may write into this process. A network policy must
admit kvray's own pods only. Bytes are sent only in answer to a request that came over a link, and only to the client
whose address came over the same link: no address translation may lie between the two. They travel in the clear.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from messages.handoff import RegionInfo
from transport.protocol import Arrived, Copy, Link, RegionError, RegionMemory, TransferError, check_ranges
from transport.ucx.mover import Mover, call_soon
from transport.ucx.pull import Arrivals, Pull
from transport.ucx.wire import Connect, Handle, PullRefused, PullRequest, Refused, decode, encode, plan
from transport.ucx.worker import Worker

log = logging.getLogger(__name__)


class UcxTransport:
    """The `Transport` of road "ucx", for host and device memory. Belongs to one event loop; `Mover` is its thread."""

    road = "ucx"
    is_one_sided = False
    is_direct = True

    def __init__(
        self,
        host: str,
        *,
        port_range: tuple[int, int] = (20000, 20999),
        transports: str | None = None,
        devices: Sequence[str] = (),
        prepare_thread: Callable[[], None] | None = None,
    ) -> None:
        """Listen on `host`, an IP address of this node, and on nothing else; see `Worker` for the rest.

        Raises:
            ConfigError: ucxx is missing, or UCX cannot do what is asked for.
        """
        self._registered: dict[bytes, RegionMemory] = {}
        self._mover = Mover(
            lambda on_arrival: Worker(host, port_range, transports, devices, on_arrival, prepare_thread),
            self._registered,
            prepare_thread,
        )
        worker = self._mover.worker
        self._version = worker.version
        self._has_devices = worker.has_devices
        self._address = (host, worker.port)
        self._is_closed = False

    @property
    def num_unsettled(self) -> int:
        """Number of pulls that ended with an infinite quarantine: their targets are lost until the process restarts."""
        return self._mover.num_unsettled

    def can_fill(self, memory: RegionMemory) -> bool:
        """Tell whether it is host memory, or UCX moves that of devices."""
        return memory.is_host or self._has_devices

    def register(self, memory: RegionMemory) -> RegionInfo:
        """Make `memory` readable by peers; the answer describes it to them. Idempotent.

        Raises:
            RegionError: device memory where UCX cannot move it, or the transport is closed.
        """
        self._check_open()
        self._check_movable(memory)
        if memory.nonce not in self._registered and not memory.is_host:  # a host's pages would be locked, all of them
            self._mover.post(self._mover.keep_registered, memory)
        self._registered[memory.nonce] = memory
        handle = msgspec.msgpack.encode(Handle(self._version, memory.is_host, *self._address))
        return RegionInfo(road=self.road, handle=handle, num_bytes=memory.num_bytes, nonce=memory.nonce)

    async def pull(
        self,
        link: Link,
        source: RegionInfo,
        copies: Sequence[Copy],
        target: RegionMemory,
        stall_s: float,
        on_arrived: Arrived | None = None,
    ) -> None:
        """Carry out all copies; return when the last byte has landed. The first pull over a link connects, too.

        It counts as stalled when nothing arrives from that peer at all: as long as something does, it may be another
        pull's turn. Whatever ends a pull early, but for a refusal, ends the others from that peer.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: it failed, the peer was lost, or nothing arrived for `stall_s` seconds.
        """
        self._check_open()
        self._check_movable(target)
        handle = self._handle_of(source)
        check_ranges(copies, source.num_bytes, target.num_bytes)
        if link.is_lost:
            raise TransferError("ucx: the peer is lost")
        messages = plan(copies, can_gather=handle.is_host and target.is_host)
        arrivals = Arrivals(len(copies), messages, on_arrived)
        if not messages:
            return
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def tell(error: TransferError | None) -> None:
            call_soon(loop, _set, ended, error)

        pull = Pull(link, source, (handle.host, handle.port), messages, target, stall_s, arrivals, tell)
        self._mover.post(self._mover.begin, pull)
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._mover.post(self._mover.cancel, pull)
            error = await _outcome(ended)
            if isinstance(error, TransferError) and error.quarantine_s:
                # Whoever cancelled must learn that the target is not theirs yet.
                raise error from None
            raise

    def on_message(self, link: Link, body: bytes) -> None:
        """Handle what the same road at the peer sent over the link; junk is logged and dropped."""
        try:
            message = decode(body)
        except msgspec.DecodeError as error:
            log.warning("ucx: a peer sent %d bytes that are no message: %s", len(body), error)
            return
        if not self._is_closed:
            self._mover.post(self._mover.hear, asyncio.get_running_loop(), link, message)
        elif isinstance(message, PullRequest):
            link.send(self.road, encode(PullRefused(message.first_tag, "the transport is closed", is_region=True)))
        elif isinstance(message, Connect):
            link.send(self.road, encode(Refused(message.number, "the transport is closed", is_gone=True)))

    def on_link_lost(self, link: Link) -> None:
        """Forget a peer that is gone: its pulls fail at once, the connections are closed."""
        self._mover.post(self._mover.lose, link)

    def carriers(self, link: Link) -> str:
        """Return UCX's transports to that peer, e.g. "tcp" or "cuda_ipc,tcp"; "" before there is a connection."""
        return self._mover.carriers(link)

    def close(self) -> None:
        """Unregister everything; own pulls end with TransferError. The port is free some milliseconds later."""
        if self._is_closed:
            return
        self._is_closed = True
        self._registered.clear()
        self._mover.post(self._mover.close)

    def _check_open(self) -> None:
        if self._is_closed or self._mover.has_ended:
            raise RegionError("ucx: the transport is closed")

    def _check_movable(self, memory: RegionMemory) -> None:
        if not self.can_fill(memory):
            raise RegionError("ucx: device memory, but UCX found no cuda_copy here")

    def _handle_of(self, source: RegionInfo) -> Handle:
        if source.road != self.road:
            raise RegionError(f"ucx: a region of road {source.road!r} cannot be read")
        try:
            handle = msgspec.msgpack.decode(source.handle, type=Handle)
        except msgspec.DecodeError as error:
            raise RegionError(f"ucx: the handle cannot be read: {error}") from error
        if handle.version.split(".")[:2] != self._version.split(".")[:2]:
            raise RegionError(f"ucx: the peer has UCX {handle.version}, this is {self._version}")
        return handle


def _set(ended: asyncio.Future[None], error: TransferError | None) -> None:
    if error is None:
        ended.set_result(None)
    else:
        ended.set_exception(error)


async def _outcome(ended: asyncio.Future[None]) -> BaseException | None:
    """Wait for the pull's end, through further cancellations; return its error, None where it went well."""
    while not ended.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([ended])
    return ended.exception()
