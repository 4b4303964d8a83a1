"""What goes over a connection of `transport.socket`, and how it is read and written.

    puller                                            source
    connect                                    --->   accept: few without proof at a time, none for long
                                               <---   32 random bytes
    whom it wants, 32 random bytes, its proof  --->   wrong: closed
    wrong: closed                              <---   who it is, its proof
    pull id, region, ranges                    --->
                                               <---   pull id, and why not; or pull id and the bytes in order

A proof is a MAC over both sides' random bytes under a key that follows from the cluster secret. What comes after it is
neither encrypted nor signed: whoever can change packets on the way can change blocks.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, TypeAlias

import msgspec
from blake3 import blake3

from transport.secret import ClusterSecret

#: All that a source sends is a multiple of it, so that blocks lie in the kernel's buffers as aligned as in memory: with
#: a reply of 18 bytes a block of 2 MiB took 1.4 ms, with one of 64 bytes 0.85 ms (2 cores, loopback, November 2026).
ALIGNMENT = 64
CHALLENGE_BYTES = 32
CLAIM = struct.Struct("<16s32s32s")  # instance wanted, random bytes, the puller's proof
ANSWER = struct.Struct("<16s32s48x")  # instance, the source's proof
REQUEST = struct.Struct("<Q16sQI")  # pull id, the region's nonce and size, how many ranges follow
RANGE = struct.Struct("<QQ")  # offset, length
REPLY = struct.Struct("<QHQ46x")  # pull id, bytes of text (0: granted), bytes of payload; then the one or the other
HANDSHAKE_S = 5.0
MAX_UNPROVEN = 32  #: connections
MAX_RANGES = 32768  #: in one request; half a MiB
MAX_VECTORS = 1024  # the kernel's UIO_MAXIOV
#: For one call. Reading: small, so that a block is told while it is in the cache. Writing: so that few calls do.
READ_BYTES = 1 << 20
WRITE_BYTES = 8 << 20

Key: TypeAlias = bytes


class SourceHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where the source listens, with which secret, and which of those that listened there it is."""

    host: str
    port: Annotated[int, msgspec.Meta(gt=0, lt=65536)]
    instance: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    key_id: str  #: `ClusterSecret.key_id`


def socket_key(secret: ClusterSecret) -> Key:
    """Derive the key that both sides' proofs are made with."""
    return blake3(b"kvray socket road 1", key=secret.key).digest()


def proof_of(key: Key, role: bytes, instance: bytes, challenge: bytes, nonce: bytes) -> bytes:
    """Prove that `role` (b"puller" or b"source") knows the key; all arguments but `role` are of fixed length."""
    return blake3(role + instance + challenge + nonce, key=key).digest()


class Vectors:
    """Runs of memory that are filled or sent in order, as many at a time as make about `window_bytes`."""

    def __init__(self, views: list[memoryview], window_bytes: int) -> None:
        self._views = views
        self._next = 0
        mean_bytes = sum(len(view) for view in views) // (len(views) or 1)
        self._width = min(max(window_bytes // (mean_bytes or 1), 1), MAX_VECTORS)

    def window(self) -> list[memoryview]:
        """Return the runs that come next; none at the end."""
        return self._views[self._next : self._next + self._width]

    def advance(self, num_bytes: int) -> None:
        """Drop the first `num_bytes` of the window, which are done."""
        while self._next < len(self._views) and num_bytes >= len(self._views[self._next]):
            num_bytes -= len(self._views[self._next])
            self._next += 1
        if num_bytes:
            self._views[self._next] = self._views[self._next][num_bytes:]


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same bytes in the same order as (offset, length), without empty ones, neighbours as one."""
    merged: list[tuple[int, int]] = []
    for offset, length in ranges:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        elif length:
            merged.append((offset, length))
    return merged


def read_exactly(connection: socket.socket, num_bytes: int, ends_s: float | None = None) -> bytes:
    """Read exactly `num_bytes`, by `ends_s` if given; ConnectionError if the connection closes before."""
    data = bytearray()
    while len(data) < num_bytes:
        if ends_s is not None:
            connection.settimeout(max(ends_s - time.monotonic(), 0.001))
        new = connection.recv(num_bytes - len(data))
        if not new:
            raise ConnectionError(f"closed after {len(data)} of {num_bytes} bytes of a message")
        data += new
    return bytes(data)


def is_quiet(connection: socket.socket) -> bool:
    """Tell whether a kept connection is still good: nothing has come, not even its end."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def timeval(seconds: float) -> bytes:
    """Pack a time as SO_RCVTIMEO and SO_SNDTIMEO want it."""
    whole, fraction = divmod(min(max(seconds, 0.001), 1e6), 1)  # 0 would be for ever
    return struct.pack("@ll", int(whole), int(fraction * 1e6))


def shut(connection: socket.socket) -> None:
    """Wake the threads that read, write or accept there; they find the connection closed."""
    with suppress(OSError):  # it was, already
        connection.shutdown(socket.SHUT_RDWR)
