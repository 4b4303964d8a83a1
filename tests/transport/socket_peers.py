"""Ends of a connection of transport.socket that do what they should not, and a source in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import msgspec

from messages.handoff import RegionInfo
from transport.memory import Memory
from transport.secret import ClusterSecret
from transport.socket.frames import (
    ANSWER,
    CLAIM,
    RANGE,
    REPLY,
    REQUEST,
    SourceHandle,
    proof_of,
    read_exactly,
    socket_key,
)

#: What the bytes of an `owner_process` are, over and over.
PATTERN = bytes(range(251))

BLOCK = 64 << 10
NUM_BLOCKS = 512
SIZE = BLOCK * NUM_BLOCKS
HOST = "127.0.0.1"

_OWNER = """
import asyncio, sys, msgspec
from transport.memory import Memory
from transport.secret import ClusterSecret
from transport.socket.road import SocketTransport
secret, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
memory = Memory.allocate(size)
memory.view[:] = (bytes(range(251)) * (size // 251 + 1))[:size]
owner = SocketTransport(ClusterSecret.from_hex(secret), "127.0.0.1", port_range=(port, port) if port else None)
sys.stdout.buffer.write(msgspec.json.encode(owner.register(memory)) + b"\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@contextlib.contextmanager
def owner_process(
    secret: ClusterSecret, size: int, port: int = 0
) -> Iterator[tuple[subprocess.Popen[bytes], RegionInfo]]:
    """A process that registered `size` bytes of PATTERN, and the region's description; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, secret.hex(), str(port), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield process, msgspec.json.decode(process.stdout.readline(), type=RegionInfo)
    finally:
        process.kill()
        process.communicate()


def handle_of(region: RegionInfo) -> SourceHandle:
    return msgspec.msgpack.decode(region.handle, type=SourceHandle)


def connect_to(region: RegionInfo) -> socket.socket:
    handle = handle_of(region)
    return socket.create_connection((handle.host, handle.port), timeout=5)


def claim(secret: ClusterSecret, instance: bytes, challenge: bytes) -> tuple[bytes, bytes]:
    """A good claim, and the random bytes in it."""
    own = secrets.token_bytes(32)
    return CLAIM.pack(instance, own, proof_of(socket_key(secret), b"puller", instance, challenge, own)), own


def proven_connection(secret: ClusterSecret, region: RegionInfo) -> socket.socket:
    """A connection to the region's source, after the handshake."""
    connection = connect_to(region)
    connection.sendall(claim(secret, handle_of(region).instance, read_exactly(connection, 32))[0])
    read_exactly(connection, ANSWER.size)
    return connection


def request(region: RegionInfo, ranges: list[tuple[int, int]], pull_id: int = 7) -> bytes:
    packed = b"".join(RANGE.pack(*r) for r in ranges)
    return REQUEST.pack(pull_id, region.nonce, region.num_bytes, len(ranges)) + packed


class FakeSource:
    """Listens, shakes hands, reads requests, and answers as `answer(connection, pull_id, num_bytes)` does.

    `instance_key`: what it proves itself with; by default the cluster's key.
    """

    def __init__(
        self,
        secret: ClusterSecret,
        answer: Callable[[socket.socket, int, int], None],
        key: bytes | None = None,
    ) -> None:
        self._key = socket_key(secret) if key is None else key
        self._key_id = secret.key_id
        self._answer = answer
        self._instance = secrets.token_bytes(16)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.num_connections = 0
        self.is_over = threading.Event()  #: for answers that wait
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def describe(self, memory: Memory) -> RegionInfo:
        """A region of it that is not there."""
        handle = SourceHandle("127.0.0.1", self._listener.getsockname()[1], self._instance, self._key_id)
        return RegionInfo(
            road="socket", handle=msgspec.msgpack.encode(handle), num_bytes=memory.num_bytes, nonce=memory.nonce
        )

    def close(self) -> None:
        self.is_over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()
        self._listener.close()

    def _run(self) -> None:
        while not self.is_over.is_set():
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                self.num_connections += 1
                with connection:
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        challenge = secrets.token_bytes(32)
        connection.sendall(challenge)
        wanted, theirs, _ = CLAIM.unpack(read_exactly(connection, CLAIM.size))
        connection.sendall(ANSWER.pack(wanted, proof_of(self._key, b"source", wanted, challenge, theirs)))
        while True:
            pull_id, _, _, num_ranges = REQUEST.unpack(read_exactly(connection, REQUEST.size))
            ranges = RANGE.iter_unpack(read_exactly(connection, num_ranges * RANGE.size))
            self._answer(connection, pull_id, sum(length for _, length in ranges))


def grant(connection: socket.socket, pull_id: int, num_bytes: int) -> None:
    connection.sendall(REPLY.pack(pull_id, 0, num_bytes))


def expected(source, copies):
    whole = bytearray(SIZE)
    for source_offset, target_offset, length in copies:
        whole[target_offset : target_offset + length] = source.view[source_offset : source_offset + length]
    return bytes(whole)


def stall_after(num_sent):
    """An answer that grants, sends so many bytes 0xEE, and then nothing more."""

    def answer(connection, pull_id, num_bytes):
        grant(connection, pull_id, num_bytes)
        connection.sendall(b"\xee" * num_sent)
        while connection.recv(1):  # until the puller closes
            pass
        raise ConnectionError

    return answer


async def nothing_more_lands(target, after_s=0.2):
    target.view[:] = bytes([5]) * SIZE
    await asyncio.sleep(after_s)
    assert bytes(target.view) == bytes([5]) * SIZE
