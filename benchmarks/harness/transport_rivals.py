"""The rivals that roads are measured against: each one's two ends, one beside the pool and one that pulls.

memcpy is one process and needs no other end; tcp is a plain socket on loopback; flight is Arrow Flight, a record batch
per block; ray is Ray's put and get, a list of blocks in one object. None of them verifies, authenticates or encrypts.
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from transport.memory import Memory
from transport.protocol import Copy

_COUNT = struct.Struct("<Q")
_RANGE = struct.Struct("<QQ")  # offset, length
_MAX_VECTORS = 64


class Rival(Protocol):
    """One way to fill a target pool; blocks the caller."""

    def pull(self, copies: Sequence[Copy]) -> None:
        """Carry out all copies."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class MemcpyRival:
    """Copies block by block between two pools of this process."""

    def __init__(self, source: Memory, target: Memory) -> None:
        self._source = np.frombuffer(source.view, np.uint8)
        self._target = np.frombuffer(target.view, np.uint8)

    def pull(self, copies: Sequence[Copy]) -> None:
        """Copy block by block."""
        for source, target, length in copies:
            self._target[target : target + length] = self._source[source : source + length]

    def close(self) -> None:
        """Do nothing: nothing is open."""


# ---------------------------------------------------------------------------------------------------------- raw socket


class TcpRival:
    """Asks for all ranges in one message, and receives each block where it belongs (recv_into)."""

    def __init__(self, port: str, target: Memory) -> None:
        self._target = target
        self._connection = socket.create_connection(("127.0.0.1", int(port)))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pull(self, copies: Sequence[Copy]) -> None:
        """Pull by one request and one answer."""
        self._connection.sendall(request_of(copies))
        for _, target, length in copies:
            fill(self._connection, self._target.slice(target, length))

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def serve_tcp(memory: Memory) -> str:
    """Serve ranges of `memory` to one connection, on a thread; the answer is the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while ranges := read_request(connection):
                for first in range(0, len(ranges), _MAX_VECTORS):
                    send(connection, [memory.slice(*one) for one in ranges[first : first + _MAX_VECTORS]])

    threading.Thread(target=serve, name="tcp-rival", daemon=True).start()
    return str(listener.getsockname()[1])


def request_of(copies: Sequence[Copy]) -> bytes:
    """Pack the ranges wanted into one message."""
    ranges = [(copy.source_offset, copy.num_bytes) for copy in copies]
    return _COUNT.pack(len(ranges)) + b"".join(itertools.starmap(_RANGE.pack, ranges))


def read_request(connection: socket.socket) -> list[tuple[int, int]]:
    """Read the ranges that `request_of` packed; empty when the other side is gone."""
    head = bytearray(_COUNT.size)
    if not fill(connection, memoryview(head)):
        return []
    body = bytearray(_COUNT.unpack(head)[0] * _RANGE.size)
    return list(_RANGE.iter_unpack(body)) if fill(connection, memoryview(body)) else []


def fill(connection: socket.socket, view: memoryview) -> bool:
    """Receive until `view` is full; False: the other side closed."""
    while view:
        num_read = connection.recv_into(view, len(view), socket.MSG_WAITALL)
        if num_read == 0:
            return False
        view = view[num_read:]
    return True


def send(connection: socket.socket, views: list[memoryview]) -> None:
    """Call sendmsg until all is out."""
    while views:
        num_sent = connection.sendmsg(views)
        while views and num_sent >= len(views[0]):
            num_sent -= len(views.pop(0))
        if num_sent:
            views[0] = views[0][num_sent:]


# --------------------------------------------------------------------------------------------------------------- Flight


class FlightRival:
    """Reads a stream of record batches, one per block, each copied into place as it comes."""

    def __init__(self, location: str, target: Memory) -> None:
        import pyarrow.flight as flight

        self._flight = flight
        self._target = np.frombuffer(target.view, np.uint8)
        self._client = flight.connect(location)

    def pull(self, copies: Sequence[Copy]) -> None:
        """Pull by one do_get."""
        reader = self._client.do_get(self._flight.Ticket(request_of(copies)))
        for copy in copies:
            block = reader.read_chunk().data.column(0).to_numpy()  # [num_bytes] uint8, no copy
            self._target[copy.target_offset : copy.target_offset + copy.num_bytes] = block

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def serve_flight(memory: Memory) -> str:
    """Serve ranges of `memory` on threads of Flight's own; the answer is the location."""
    import pyarrow as pa
    import pyarrow.flight as flight

    schema = pa.schema([("block", pa.uint8())])

    class Server(flight.FlightServerBase):
        def do_get(self, context: object, ticket: flight.Ticket) -> flight.RecordBatchStream:
            batches = []
            for offset, length in _RANGE.iter_unpack(ticket.ticket[_COUNT.size :]):
                values = pa.Array.from_buffers(pa.uint8(), length, [None, pa.py_buffer(memory.slice(offset, length))])
                batches.append(pa.record_batch([values], schema=schema))
            return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, batches))

    server = Server("grpc+tcp://127.0.0.1:0")
    threading.Thread(target=server.serve, name="flight-rival", daemon=True).start()
    return f"grpc+tcp://127.0.0.1:{server.port}"


#: By name, those that need an end beside the pool. Given the pool, they say where they serve it.
SERVERS: dict[str, Callable[[Memory], str]] = {"tcp": serve_tcp, "flight": serve_flight}
