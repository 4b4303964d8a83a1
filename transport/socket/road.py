"""Authenticated TCP: the puller asks on a kept connection, the source answers with the bytes.

The protocol is drawn in `transport.socket.frames`, the source's side is `transport.socket.source`.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from messages.handoff import RegionInfo
from transport.memory import NONCE_BYTES, Memory, as_host_memory
from transport.protocol import Arrived, Copy, Link, RegionError, RegionMemory, TransferError, check_ranges
from transport.secret import ClusterSecret
from transport.socket.frames import (
    ANSWER,
    CHALLENGE_BYTES,
    CLAIM,
    HANDSHAKE_S,
    MAX_RANGES,
    RANGE,
    READ_BYTES,
    REPLY,
    REQUEST,
    Key,
    SourceHandle,
    Vectors,
    is_quiet,
    merged,
    proof_of,
    read_exactly,
    shut,
    socket_key,
    timeval,
)
from transport.socket.source import SocketSource, listen

logger = logging.getLogger(__name__)


class SocketTransport:
    """The `Transport` of road "socket". A pull that was given up has stopped writing: its connection is closed."""

    road = "socket"
    is_one_sided = False
    is_direct = True

    def __init__(
        self,
        secret: ClusterSecret,
        host: str,
        *,
        port_range: tuple[int, int] | None = None,
        send_timeout_s: float = 30.0,
    ) -> None:
        """Listen on `host`, an address of this node, on a free port (`port_range`: first and last allowed).

        `send_timeout_s`: a puller that reads nothing for so long is closed.

        Raises:
            ConfigError: nothing can be bound there.
        """
        self._secret = secret
        self._source = SocketSource(secret, listen(host, port_range), send_timeout_s)
        self._owners: dict[SourceHandle, _Owner] = {}
        self._pulls: set[_Pull] = set()
        self._ids = itertools.count()
        self._is_closed = False

    @property
    def num_refused(self) -> int:
        """Connections that ended without a proof of the cluster secret."""
        return self._source.num_refused

    def can_fill(self, memory: RegionMemory) -> bool:
        """Tell whether it is host memory."""
        return isinstance(memory, Memory)

    def register(self, memory: RegionMemory) -> RegionInfo:
        """Make `memory` readable by peers; the answer describes it to them. Idempotent.

        Raises:
            RegionError: it is not host memory, or the transport is closed.
        """
        if self._is_closed:
            raise RegionError("the transport is closed")
        self._source.regions[memory.nonce] = as_host_memory(memory, self.road)
        return RegionInfo(
            road=self.road,
            handle=msgspec.msgpack.encode(self._source.handle),
            num_bytes=memory.num_bytes,
            nonce=memory.nonce,
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
        """Carry out all copies, in order; pulls from one process wait for each other.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds; nothing was written.
            TransferError: it failed, the peer was lost, or nothing arrived for `stall_s` seconds.
        """
        if self._is_closed:
            raise RegionError("the transport is closed")
        memory, handle = as_host_memory(target, self.road), _handle_of(source)
        check_ranges(copies, source.num_bytes, target.num_bytes)
        if link.is_lost:
            raise TransferError("socket: the peer was lost")
        owner = self._owners.get(handle)
        if owner is None:
            common = self._secret.known_as(handle.key_id)
            if common is None:
                raise TransferError(f"socket: {handle.host} port {handle.port} has another cluster secret")
            owner = self._owners[handle] = _Owner(socket_key(common), handle)
        owner.links.add(link)
        pull = _Pull(next(self._ids), link, owner, source, copies, memory, stall_s, on_arrived)
        self._pulls.add(pull)
        try:
            await pull.run()
        finally:
            self._pulls.discard(pull)

    def on_message(self, link: Link, body: bytes) -> None:
        """Drop the message with a warning: the ends of this road say nothing over the link."""
        logger.warning("socket: a message of %d bytes that nobody wanted", len(body))

    def on_link_lost(self, link: Link) -> None:
        """End the pulls over `link`, and the connection if no other link leads to the same process."""
        for pull in tuple(self._pulls):
            if pull.link is link:
                pull.stop("the peer was lost")
        for handle, owner in tuple(self._owners.items()):
            if link in owner.links:
                owner.links.discard(link)
                if not owner.links:
                    self._owners.pop(handle).close()

    def carriers(self, link: Link) -> str:
        """Return "tcp", whoever the peer is."""
        return "tcp"

    def close(self) -> None:
        """Stop listening, end all connections; own pulls end with TransferError."""
        self._is_closed = True
        self._source.close()
        for pull in tuple(self._pulls):
            pull.stop("the transport was closed")
        for owner in self._owners.values():
            owner.close()
        self._owners.clear()


class _Pull:
    """One pull: waits its turn on the loop, is carried out by its owner's thread."""

    def __init__(
        self,
        pull_id: int,
        link: Link,
        owner: _Owner,
        source: RegionInfo,
        copies: Sequence[Copy],
        target: Memory,
        stall_s: float,
        on_arrived: Arrived | None,
    ) -> None:
        self.pull_id = pull_id
        self.link = link
        self.source = source
        self.copies = copies
        self.target = target
        self.stall_s = stall_s
        self.on_arrived = on_arrived
        self.stopped = ""  #: why
        self._owner = owner
        self._future: Future[None] | None = None

    async def run(self) -> None:
        """Carry the pull out: when this returns or raises, no thread works on it any more."""
        began_s = time.monotonic()
        self._future = self._owner.threads.submit(self._owner.carry_out, self)
        ended = asyncio.wrap_future(self._future)
        cancelled: asyncio.CancelledError | None = None
        while not ended.done():
            # Once it has begun, its thread keeps the deadline; here it is kept for those who wait for their turn.
            is_waiting = not self._future.running()
            left_s = max(began_s, self._owner.received_s) + self.stall_s - time.monotonic()
            if is_waiting and left_s <= 0:
                self.stop(f"not begun, and nothing arrived for others, for {self.stall_s:g} s")
            try:
                await asyncio.wait([ended], timeout=left_s if is_waiting else None)
            except asyncio.CancelledError as error:
                cancelled = error
                self.stop("cancelled")
        if cancelled is not None:
            if not ended.cancelled():
                ended.exception()  # looked at, or asyncio complains
            raise cancelled
        if ended.cancelled():
            raise TransferError(f"socket: {self.stopped}")
        ended.result()

    def stop(self, reason: str) -> None:
        """Make the pull end with TransferError; its thread does so at once."""
        self._owner.interrupt(self, reason)
        if self._future is not None:
            self._future.cancel()  # if no thread has begun it


class _Owner:
    """A process that is pulled from: its connection, made when needed, and the thread that uses it."""

    def __init__(self, key: Key, handle: SourceHandle) -> None:
        self._key = key
        self._handle = handle
        self._where = f"{handle.host} port {handle.port}"
        self._lock = threading.Lock()  # for the next two, which `interrupt` reads on the loop
        self._current: _Pull | None = None
        self._socket: socket.socket | None = None
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="socket-pull")
        self.links: set[Link] = set()
        self.received_s = -float("inf")  #: when the last bytes came

    def interrupt(self, pull: _Pull, reason: str) -> None:
        """Make `pull` end, whether it is its turn already or not."""
        with self._lock:
            pull.stopped = pull.stopped or reason
            if self._current is pull and self._socket is not None:
                shut(self._socket)

    def close(self) -> None:
        """Close the connection and let the thread end; all pulls were interrupted before."""
        self.threads.submit(self._disconnect)
        self.threads.shutdown(wait=False)

    def carry_out(self, pull: _Pull) -> None:
        """Carry out all of `pull`, in the thread. After anything but success or refusal the connection is closed."""
        is_usable = False
        try:
            with self._lock:
                self._current = pull
            connection = self._connected(pull)
            self._set_deadline(connection, pull.stall_s)
            for first in range(0, len(pull.copies) or 1, MAX_RANGES):
                refusal = self._carry_out_part(connection, pull, first)
                if refusal:
                    is_usable = True
                    # "Nothing was written" holds for the first part only.
                    raise (TransferError if first else RegionError)(f"socket: refused: {refusal}")
            is_usable = True
        except BlockingIOError:  # the kernel's way to say so
            raise TransferError(f"socket: nothing came from {self._where} for {pull.stall_s:g} s") from None
        except OSError as error:
            raise TransferError(f"socket: {pull.stopped or f'{self._where}: {error}'}") from error
        except TransferError:
            if pull.stopped:  # what went wrong then went wrong by that
                raise TransferError(f"socket: {pull.stopped}") from None
            raise
        finally:
            with self._lock:
                self._current = None
            if not is_usable:
                self._disconnect()

    def _connected(self, pull: _Pull) -> socket.socket:
        if self._socket is not None and not is_quiet(self._socket):
            self._disconnect()
        if self._socket is None:
            family = socket.AF_INET6 if ":" in self._handle.host else socket.AF_INET
            connection = socket.socket(family, socket.SOCK_STREAM)
            with self._lock:
                self._socket = connection
            self._check_stopped(pull)
            connection.settimeout(min(HANDSHAKE_S, pull.stall_s))
            connection.connect((self._handle.host, self._handle.port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._check_stopped(pull)
            self._shake_hands(connection)
            connection.settimeout(None)
        self._check_stopped(pull)
        return self._socket

    def _check_stopped(self, pull: _Pull) -> None:
        if pull.stopped:
            raise ConnectionAbortedError(pull.stopped)

    def _shake_hands(self, connection: socket.socket) -> None:
        challenge = read_exactly(connection, CHALLENGE_BYTES)
        own = secrets.token_bytes(CHALLENGE_BYTES)
        wanted = self._handle.instance
        connection.sendall(CLAIM.pack(wanted, own, proof_of(self._key, b"puller", wanted, challenge, own)))
        try:
            instance, proof = ANSWER.unpack(read_exactly(connection, ANSWER.size))
        except ConnectionError:
            raise TransferError(f"socket: {self._where} closed at our proof: another cluster secret?") from None
        if not hmac.compare_digest(proof, proof_of(self._key, b"source", instance, challenge, own)):
            raise TransferError(f"socket: {self._where} does not have the cluster secret")
        if instance != wanted:
            raise TransferError(f"socket: another process listens at {self._where}: the owner is gone")

    def _set_deadline(self, connection: socket.socket, stall_s: float) -> None:
        # The kernel's, not Python's: that costs a system call (poll) before each read.
        timeout = timeval(stall_s)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def _carry_out_part(self, connection: socket.socket, pull: _Pull, first: int) -> str:
        """Ask for and read the copies from `first` on, as many as one request holds; the text of a refusal, or ""."""
        copies = pull.copies[first : first + MAX_RANGES]
        ranges = merged((copy.source_offset, copy.num_bytes) for copy in copies)
        request = REQUEST.pack(pull.pull_id, pull.source.nonce, pull.source.num_bytes, len(ranges))
        connection.sendall(request + b"".join(itertools.starmap(RANGE.pack, ranges)))
        pull_id, text_bytes, num_bytes = REPLY.unpack(read_exactly(connection, REPLY.size))
        self.received_s = time.monotonic()
        if pull_id != pull.pull_id or (not text_bytes and num_bytes != sum(length for _, length in ranges)):
            raise ConnectionError("an answer to something else came")
        if text_bytes:
            return read_exactly(connection, text_bytes).decode(errors="replace").rstrip()
        self._read_payload(connection, pull, copies, first)
        return ""

    def _read_payload(self, connection: socket.socket, pull: _Pull, copies: Sequence[Copy], first: int) -> None:
        ends = list(itertools.accumulate(copy.num_bytes for copy in copies))
        runs = merged((copy.target_offset, copy.num_bytes) for copy in copies)
        vectors = Vectors([pull.target.slice(offset, length) for offset, length in runs], READ_BYTES)
        num_read = num_told = 0
        while num_told < len(ends):
            if num_read < ends[-1]:
                window = vectors.window()
                # The plain call costs less where one run fills it.
                num_new = connection.recv_into(window[0]) if len(window) == 1 else connection.recvmsg_into(window)[0]
                if num_new == 0:
                    raise ConnectionError(f"closed after {num_read} of {ends[-1]} bytes")
                vectors.advance(num_new)
                num_read += num_new
                self.received_s = time.monotonic()
            while num_told < len(ends) and ends[num_told] <= num_read:
                if pull.on_arrived is not None:
                    pull.on_arrived(first + num_told)
                num_told += 1

    def _disconnect(self) -> None:
        with self._lock:
            connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()


def _handle_of(source: RegionInfo) -> SourceHandle:
    if source.road != SocketTransport.road:
        raise RegionError(f"a region of road {source.road!r} cannot be read by socket")
    if len(source.nonce) != NONCE_BYTES or not 0 <= source.num_bytes < 1 << 64:
        raise RegionError(f"socket: no region has {source.num_bytes} bytes and a nonce of {len(source.nonce)}")
    try:
        return msgspec.msgpack.decode(source.handle, type=SourceHandle)
    except msgspec.DecodeError as error:
        raise RegionError(f"socket: the handle cannot be read: {error}") from error
