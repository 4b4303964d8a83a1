"""The HTTP server of an ingress: uvicorn's, and what one client, or all of them together, may hold of it.

An ingress stands alone on its port. uvicorn bounds idle connections, and buffers of a body that nobody reads; the rest
is here: the size of a request's head, the time for head and body, bodies that arrive, connections in all, answers that
nobody reads. Who is beyond a limit gets an error in OpenAI's form and is disconnected, in time, counted, and without a
trace in the others' latency: one look at all connections per second, no timer per request.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cluster.config import ConnectionsConfig
from cluster.openai.errors import error_headers, error_json
from cluster.openai.stream import DIRECT
from messages.errors import CapacityError, KvrayError, RequestError

_LOOK_S: Final = 1.0  #: between two looks at all connections
_LINGER_S: Final = 2.0  #: for a refused client to read why: with bytes of its own unread, closing would reset it
#: Of an answer, in our buffer, and in the kernel's before it is sent: what is beyond waits for the client. How much
#: lies unread at the client's end is its own affair, and not seen here.
_MAX_UNSENT_BYTES: Final = 16 * 2**10
#: Of Linux's tcp(7): the state of a connection that its other end has reset, the first byte of TCP_INFO.
_TCP_CLOSE: Final = 7
_ANSWER_S: Final = 0.05  #: for the other end of a connection to answer what it was sent
_PROBE: Final = b"HTTP/1.1 "  #: what every answer begins with
_MAX_PIPELINED: Final = 16  #: requests on one connection behind the one being answered
_UVICORN: Final[dict[str, Any]] = {
    "ws": "none",
    "lifespan": "off",
    "log_config": None,
    "log_level": "error",  # a warning per broken request is a log that clients write
    "access_log": False,
    "server_header": False,
}


def http_server(app: ASGIApp, limits: ConnectionsConfig, count: Callable[[str], None]) -> uvicorn.Server:
    """Make the server that answers with `app`; `serve(sockets=[...])` runs it.

    `count` is told of each connection that is ended, why: what was beyond its limit, or "invalid_http".
    """
    protocol: Any = partial(Connection, Connections(limits, count))
    return uvicorn.Server(uvicorn.Config(app, http=protocol, timeout_keep_alive=limits.idle_timeout_s, **_UVICORN))


class Connections:
    """All connections of one server, what they hold together, and who has to go. One event loop."""

    def __init__(
        self, limits: ConnectionsConfig, count: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.count = count
        self.clock = clock
        self._all: set[Connection] = set()
        self._receiving: dict[Connection, int] = {}  #: bytes so far of bodies that are not there as a whole
        self._num_receiving_bytes = 0
        self._is_watching = False

    def add(self, connection: Connection) -> bool:
        """Take a new connection; False where there is no room, and no other one that only waits."""
        is_full = len(self._all) >= self.limits.max_connections
        if is_full:
            waiting = [(each.waits_since_s, id(each), each) for each in self._all if each.waits_since_s is not None]
            if waiting:
                # Whoever fills the server with connections loses the oldest of them, and keeps nobody out.
                oldest = min(waiting)[2]
                self._all.discard(oldest)
                self.count("too_many_connections")
                oldest.drop()
                is_full = False
        self._all.add(connection)
        if not self._is_watching:
            self._is_watching = True
            connection.loop.call_later(_LOOK_S, self._look, connection.loop)
        return not is_full

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._all.discard(connection)
        self.end_body(connection)

    def add_body(self, connection: Connection, num_bytes: int) -> Connection | None:
        """Count bytes of a body; return the connection that has to give up its own: together they are too many.

        The one that holds most, so that requests of usual size pass beside any number of huge ones.
        """
        self._receiving[connection] = self._receiving.get(connection, 0) + num_bytes
        self._num_receiving_bytes += num_bytes
        if self._num_receiving_bytes <= self.limits.max_receiving_bytes:
            return None
        return max(self._receiving, key=self._receiving.__getitem__)

    def end_body(self, connection: Connection) -> None:
        """Count a connection's body no longer: it is there as a whole, or nobody waits for it."""
        self._num_receiving_bytes -= self._receiving.pop(connection, 0)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = self.clock()
        for connection in list(self._all):
            connection.look(now_s)
        self._is_watching = bool(self._all)
        if self._is_watching:
            loop.call_later(_LOOK_S, self._look, loop)


class Connection(HttpToolsProtocol):
    """One client's connection, within limits."""

    def __init__(
        self,
        connections: Connections,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._connections = connections
        self._limits = connections.limits
        #: since when no request of it runs: seconds of the clock; None: one does
        self.waits_since_s: float | None = None
        self._ends_s: float | None = None  #: what it owes us must be there by then
        self._is_late = False
        self._has_begun = False  #: a request whose end is not there yet
        self._num_field_bytes = 0  #: of the request's target, headers and trailers
        self._num_raw_bytes = 0  #: that came since the request's begin or the last piece of its body
        self._unread: tuple[int, float] | None = None  #: bytes that wait for the client to read, and since when
        self._refusal: KvrayError | None = None
        self._is_refused = False
        self.resumed: Callable[[], None] | None = None  #: told when the client has read what waited for it
        self._answered: RequestResponseCycle | None = None  #: the request that runs, or ran last; `cycle` came last
        self._is_half_closed = False  #: the client sends nothing more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Wait for a request, if there is room for one more connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_MAX_UNSENT_BYTES)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connected = transport.get_extra_info("socket")
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES)
        self.waits_since_s = self._connections.clock()
        self._ends_s = self.waits_since_s + self._limits.header_timeout_s
        if not self._connections.add(self):
            self.refuse(
                CapacityError(
                    "too many connections, want fewer", status=503, code="too_many_connections", retry_after_s=1
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back all that was held, and tell whoever answers; uvicorn tells only who would answer last."""
        self._connections.remove(self)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless the client was refused already."""
        if self._is_refused:
            return
        self._num_raw_bytes += len(data)
        super().data_received(data)
        if self._has_begun and self._num_raw_bytes > self._limits.max_header_bytes and not self._is_refused:
            self.refuse(self._too_large())

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's always closes
        """Go on with what was asked: whoever sends nothing more may still read. One that is gone looks the same.

        What is sent to that one is answered with a reset, so that something is, which the answer would begin with in
        any case, or go on with: a chunk's size may have zeros before it.
        """
        running = self._answered
        if running is None or running.response_complete or self.cycle.more_body or self._is_refused:
            return False  # it waits for nothing
        self._is_half_closed = True
        self.cycle.keep_alive = False
        if not running.response_started:
            answer = _AnswerTransport(self)
            answer.write = partial(self._write_after_probe, answer)
            running.transport = answer  # type: ignore[assignment]
            self.transport.write(_PROBE)
        elif running.chunked_encoding:
            self.transport.write(b"0")
        self.loop.call_later(_ANSWER_S, self._drop_if_reset)
        return True

    def _write_after_probe(self, answer: _AnswerTransport, data: bytes) -> None:
        answer.write = self.transport.write
        answer.write(data.removeprefix(_PROBE))

    def _drop_if_reset(self) -> None:
        """Drop a client that turned out to be gone. Nothing is read of it any more, so that no loop tells of it."""
        if self.transport.is_closing():
            return
        connected = self.transport.get_extra_info("socket")
        if connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            self.drop()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or what a callback below raised a refusal for."""
        self.refuse(self._refusal or RequestError(f"connection: {msg}", code="invalid_http"))

    def on_message_begin(self) -> None:
        """Expect a request's head within the time for it."""
        super().on_message_begin()
        self._has_begun = True
        self._num_field_bytes = self._num_raw_bytes = 0
        self._expect(self._limits.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        """Count a part of the target."""
        self._add_fields(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header or trailer."""
        self._add_fields(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Run the request, and expect its body within the time for it."""
        if len(self.pipeline) >= _MAX_PIPELINED:
            error = CapacityError("too many requests at once on one connection", status=503, code="too_many_pipelined")
            self._refuse_here(error)
        super().on_headers_complete()
        self.cycle.transport = _AnswerTransport(self)  # type: ignore[assignment]  # all that a cycle does with one
        if self.scope["http_version"] == "1.0":
            self.cycle.send = _UnframedSender(self.cycle)  # type: ignore[method-assign]
        else:
            self.scope["extensions"] = {DIRECT: _DirectWriter(self, self.cycle)}  # type: ignore[dict-item]  # ASGI: any
        self.waits_since_s = None
        self._num_raw_bytes = 0
        self._expect(self._limits.body_timeout_s)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body, if all bodies together are not too many bytes."""
        self._num_raw_bytes = 0
        super().on_body(body)
        if self.cycle.response_complete:
            return  # it was not kept
        heaviest = self._connections.add_body(self, len(body))
        if heaviest is None:
            return
        refusal = CapacityError(
            "too many bytes of bodies arrive at once, want fewer", status=503, code="too_many_bytes", retry_after_s=1
        )
        if heaviest is self:
            self._refuse_here(refusal)
        heaviest.refuse(refusal)

    def on_message_complete(self) -> None:
        """The request is there as a whole: nothing is owed."""
        super().on_message_complete()
        self._has_begun = False
        self._ends_s = None
        self._connections.end_body(self)

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of a body that nobody wants."""
        super().on_response_complete()
        self.resumed = None
        self._connections.end_body(self)
        if self.cycle.response_complete:
            self.waits_since_s = self._connections.clock()
            if not self._has_begun:
                # uvicorn's own timer ends with any byte, even one that begins no request.
                self._expect(self._limits.idle_timeout_s)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def look(self, now_s: float) -> None:
        """Refuse the client if what it owes is late, or if it does not read what it asked for.

        Twice seen late, for the loop itself may have been.
        """
        self._look_for_reader(now_s)
        if self._is_half_closed:
            self._drop_if_reset()
        if self._ends_s is None or self.transport.is_closing():
            return
        if self.flow.read_paused:
            self._ends_s += _LOOK_S  # it is not the client that holds up
        elif now_s < self._ends_s:
            self._is_late = False
        elif not self._is_late:
            self._is_late = True
        elif self._is_refused or not self._has_begun:
            if not self._is_refused:
                self._connections.count("idle")
            self.drop()  # a client that asked nothing would take an answer for that to its next request
        else:
            self.refuse(RequestError("the request did not arrive in time", code="request_timeout", status=408))

    def resume_writing(self) -> None:
        """Go on with an answer: the client has read what waited for it."""
        self._unread = None
        super().resume_writing()
        if self.resumed is not None:
            self.resumed()

    def _look_for_reader(self, now_s: float) -> None:
        if not self.flow.write_paused and not self.transport.is_closing():
            return
        num_bytes = self.transport.get_write_buffer_size()  # nothing is added while it is paused, or is to close
        if self._unread is None or num_bytes < self._unread[0]:
            self._unread = (num_bytes, now_s)
        elif now_s - self._unread[1] >= self._limits.unread_timeout_s:
            self._connections.count("unread")
            self.drop()  # what runs for it hears that the client left

    def refuse(self, error: KvrayError) -> None:
        """Answer with `error`, unless another answer has begun, and disconnect; counted by the error's code."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._connections.count(error.code or type(error).__name__)
        self.waits_since_s = self._connections.clock()
        self._unset_keepalive_if_required()
        self._connections.end_body(self)
        has_begun = self.cycle and self.cycle.response_started and not self.cycle.response_complete
        if self.pipeline or has_begun or self._is_half_closed:
            self.drop()
            return
        if self.cycle and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its handler hears that the client left
            self.cycle.message_event.set()
        body = error_json(error)
        headers = error_headers(error) | {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self._end_writing()

    def close(self) -> None:
        """Disconnect after an answer; first discard the rest of its request for a while if that still arrives.

        Closing would reset the connection, and a client that sends on would not get to read why it was refused.
        """
        if not self._has_begun or self.pipeline or self.transport.is_closing():
            self.transport.close()
            return
        self._is_refused = True
        self._end_writing()

    def drop(self) -> None:
        """Disconnect at once, without a word."""
        self.transport.abort()

    def _end_writing(self) -> None:
        """Say nothing more, and give the client a while to read what was said."""
        self.transport.write_eof()
        self.flow.resume_reading()
        self._expect(_LINGER_S)

    def _expect(self, within_s: float) -> None:
        self._ends_s = self._connections.clock() + within_s
        self._is_late = False

    def _add_fields(self, num_bytes: int) -> None:
        self._num_field_bytes += num_bytes
        if self._num_field_bytes > self._limits.max_header_bytes:
            self._refuse_here(self._too_large())

    def _refuse_here(self, refusal: KvrayError) -> None:
        """Refuse from inside the parser, which stops at an exception."""
        self._refusal = refusal
        raise refusal

    def _too_large(self) -> RequestError:
        want = f"want at most {self._limits.max_header_bytes} bytes"
        return RequestError(f"headers: too large, {want}", code="headers_too_large", status=431)


class _UnframedSender:
    """Sends an answer to a client of HTTP/1.0, which knows no chunks: what has no length ends with the connection."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._has_length = False

    async def __call__(self, message: Any) -> None:
        """Send a part of it, as ASGI."""
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not self._has_length:
                self._cycle.chunked_encoding = False
        elif not self._has_length:
            self._cycle.expected_content_length += len(message.get("body", b""))  # as if it had said so
        await self._send(message)


class _AnswerTransport:
    """What uvicorn writes an answer to, and closes after it: a connection, which knows how to close."""

    def __init__(self, connection: Connection) -> None:
        self.close = connection.close
        self.write: Callable[[bytes], None] = connection.transport.write
        self.is_closing = connection.transport.is_closing


class _DirectWriter:
    """A connection lent to the answer of one request: `cluster.openai.stream.DirectWriter`."""

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle
        self._flow = connection.flow
        self._write = connection.transport.write

    @property
    def is_paused(self) -> bool:
        return self._flow.write_paused

    def write(self, data: bytes) -> None:
        if not self._cycle.disconnected:
            self._write(b"%x\r\n%b\r\n" % (len(data), data))  # one chunk, as uvicorn frames what has no length

    def on_resume(self, callback: Callable[[], None]) -> None:
        self._connection.resumed = callback
