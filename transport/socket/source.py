"""The listening side of `transport.socket`: proves itself, and sends ranges to pullers that proved themselves."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import logging
import random
import secrets
import socket
import threading
import time

from messages.errors import ConfigError
from transport.memory import Memory
from transport.secret import ClusterSecret
from transport.socket.frames import (
    ALIGNMENT,
    ANSWER,
    CHALLENGE_BYTES,
    CLAIM,
    HANDSHAKE_S,
    MAX_RANGES,
    MAX_UNPROVEN,
    RANGE,
    REPLY,
    REQUEST,
    WRITE_BYTES,
    SourceHandle,
    Vectors,
    proof_of,
    read_exactly,
    shut,
    socket_key,
    timeval,
)

logger = logging.getLogger(__name__)


class SocketSource:
    """Sends ranges of registered memory: a thread that accepts, and one for each connection."""

    def __init__(self, secret: ClusterSecret, listener: socket.socket, send_timeout_s: float) -> None:
        host, port = listener.getsockname()[:2]
        self.handle = SourceHandle(host, port, secrets.token_bytes(16), secret.key_id)
        self.regions: dict[bytes, Memory] = {}  #: by nonce
        self.num_refused = 0
        self._key = socket_key(secret)
        self._listener = listener
        self._send_timeout_s = send_timeout_s
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._unproven: dict[socket.socket, None] = {}  # oldest first
        self._is_closed = False
        threading.Thread(target=self._accept, name="socket-accept", daemon=True).start()

    def close(self) -> None:
        """Stop listening and sending; no thread is waited for."""
        with self._lock:
            self._is_closed = True
            self.regions = {}
            for connection in (self._listener, *self._connections):
                shut(connection)  # its thread wakes up, and closes it

    def _accept(self) -> None:
        with self._listener:
            while not self._is_closed:
                try:
                    connection, address = self._listener.accept()
                except OSError as error:  # no more files, perhaps: some may be closed by and by
                    if not self._is_closed:
                        logger.warning("socket: cannot accept: %s", error)
                        time.sleep(0.1)
                    continue
                self._admit(connection, address[0])

    def _admit(self, connection: socket.socket, who: str) -> None:
        with self._lock:
            if self._is_closed:
                connection.close()
                return
            self._connections.add(connection)
            self._unproven[connection] = None
            if len(self._unproven) > MAX_UNPROVEN:
                # The oldest: an honest peer needs a millisecond, so a crowd of silent strangers does not keep it out.
                oldest = next(iter(self._unproven))
                del self._unproven[oldest]
                shut(oldest)
        try:
            threading.Thread(target=self._serve, args=(connection, who), name="socket-serve", daemon=True).start()
        except RuntimeError as error:  # no more threads
            logger.warning("socket: cannot serve %s: %s", who, error)
            self._forget(connection)

    def _serve(self, connection: socket.socket, who: str) -> None:
        try:
            is_proven = self._check_proof(connection)
        except OSError:
            is_proven = False
        with self._lock:
            self._unproven.pop(connection, None)
        if not is_proven and not self._is_closed:
            self._count_refused(who)
        try:
            while is_proven and self._answer(connection):
                pass
        except OSError as error:
            if not self._is_closed:
                logger.info("socket: the connection of %s ends: %s", who, error)
        finally:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._unproven.pop(connection, None)
            self._connections.discard(connection)
        connection.close()

    def _count_refused(self, who: str) -> None:
        with self._lock:
            self.num_refused += 1
        if self.num_refused.bit_count() == 1:  # the 1st, 2nd, 4th, ...: whoever knocks does not fill the log
            logger.warning("socket: refused %s, without the cluster secret (%d so far)", who, self.num_refused)

    def _check_proof(self, connection: socket.socket) -> bool:
        ends_s = time.monotonic() + HANDSHAKE_S
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        connection.settimeout(HANDSHAKE_S)
        connection.sendall(challenge)
        wanted, theirs, proof = CLAIM.unpack(read_exactly(connection, CLAIM.size, ends_s))
        if not hmac.compare_digest(proof, proof_of(self._key, b"puller", wanted, challenge, theirs)):
            return False
        own = self.handle.instance  # perhaps not the one wanted: the puller then goes
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(ANSWER.pack(own, proof_of(self._key, b"source", own, challenge, theirs)))
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(self._send_timeout_s))
        # A host that vanished leaves no trace but this: a source does not know whose link a connection belongs to.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        return True

    def _answer(self, connection: socket.socket) -> bool:
        """Answer one request; False when the puller has closed."""
        head = connection.recv(1)
        if not head:
            return False
        pull_id, nonce, num_bytes, num_ranges = REQUEST.unpack(head + read_exactly(connection, REQUEST.size - 1))
        if num_ranges > MAX_RANGES:
            raise ConnectionError(f"a request of {num_ranges} ranges, at most {MAX_RANGES} wanted")
        ranges = list(RANGE.iter_unpack(read_exactly(connection, num_ranges * RANGE.size)))
        region = self.regions.get(nonce)
        if region is None or region.num_bytes != num_bytes:
            seen = "no such region" if region is None else f"it has {region.num_bytes} bytes, {num_bytes} are described"
            self._refuse(connection, pull_id, seen)
        elif any(offset + length > num_bytes for offset, length in ranges):
            self._refuse(connection, pull_id, f"a range is out of bounds: {num_bytes} bytes")
        else:
            header = REPLY.pack(pull_id, 0, sum(length for _, length in ranges))
            views = [region.slice(offset, length) for offset, length in ranges if length]
            vectors = Vectors([memoryview(header), *views], WRITE_BYTES)
            while window := vectors.window():
                vectors.advance(connection.sendmsg(window))
        return True

    def _refuse(self, connection: socket.socket, pull_id: int, text: str) -> None:
        logger.warning("socket: a pull is refused: %s", text)
        encoded = text.encode()
        encoded += b" " * (-len(encoded) % ALIGNMENT)
        connection.sendall(REPLY.pack(pull_id, len(encoded), 0) + encoded)


def listen(host: str, port_range: tuple[int, int] | None) -> socket.socket:
    """Open a listening socket on `host`, on any free port or one within `port_range` (both ends included).

    Raises:
        ConfigError: no port of the range is free, or `host` is no address of this node.
    """
    first, last = port_range or (0, 0)
    if not 0 <= first <= last < 65536:
        raise ConfigError(f"ports {first} to {last}: two of 1 to 65535 are wanted, the lower one first")
    seen: OSError | None = None
    for port in random.sample(range(first, last + 1), last + 1 - first):
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            if ipaddress.ip_address(address[0]).is_unspecified:
                raise ConfigError(f"host {host!r}: an address that peers can connect to is wanted")
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                # Connections of a former process may linger on the port.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(128)
            except OSError:
                listener.close()
                raise
            return listener
        except OSError as error:
            seen = error
            if error.errno != errno.EADDRINUSE:
                break
    where = "any port" if port_range is None else f"a port of {first} to {last}"
    raise ConfigError(f"host {host!r}: cannot listen on {where}: {seen}") from seen
