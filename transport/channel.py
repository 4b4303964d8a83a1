"""One authenticated, encrypted, multiplexed socket per pair of processes that talk.

Messages are `messages.wire` documents over ZeroMQ with CURVE; both key pairs follow from the cluster secret, and the
server admits no other client key. Its address says by a key id which secret that is, as there may be two while one
follows another. Nothing here blocks; everything runs on the event loop (asyncio's or uvloop) that
was running when the object was made, and is to be called from there only.

    client                                    server
    Ping at once, and where it is idle --->   first message makes the peer known
    on_ready at the first answer       <---   Pong
    silence, disconnection, bad bytes: on_lost / on_peer_lost, once, for good

Silence is counted in one's own heartbeats: a process that was itself stopped for a while does not blame its peers.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import logging
import math
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from messages.errors import ConfigError
from messages.wire import Message, Ping, Pong, decode, encode
from transport.inbox import Inbox
from transport.secret import ClusterSecret

log = logging.getLogger(__name__)

PeerId: TypeAlias = bytes  #: a connection as its server knows it; a client that connects anew has another

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # fixed by ZeroMQ RFC 27
_ZAP_DOMAIN = b"kvray"
_LINGER_MS = 500  #: what was sent just before `close` still leaves
_PROBE_DELAYS_S = (0.005, 0.05)  #: the monitor reports a disconnection just before the socket knows of it
_NO_RECONNECT_MS = 24 * 3600 * 1000  #: -1 would drop what was received but not yet read
#: For a client three sockets of ZeroMQ, two of them to hear what becomes of its connection, and four descriptors. A
#: context has 1,023 sockets unless more are asked for, a process often 1,024 descriptors.
_MAX_SOCKETS = 65_535
_MAX_DESCRIPTORS = 131_072
#: Pings in the time for which a peer may be silent, at least, where nothing else goes both ways.
_PINGS_PER_SILENCE = 3
_PONG = encode(Pong())
_PING = encode(Ping())


@dataclass(frozen=True, slots=True)
class ChannelConfig:
    """Limits and times of a channel, either side."""

    heartbeat_s: float = 0.5
    lost_after_s: float = 3.0  #: of silence
    connect_timeout_s: float = 5.0  #: until the first answer
    max_queued_messages: int = 10_000  #: to one peer; beyond it the peer is lost
    max_message_bytes: int = 256 << 20

    @property
    def max_silent_beats(self) -> int:
        """How many own heartbeats may pass without a word from the peer."""
        return max(2, math.ceil(self.lost_after_s / self.heartbeat_s))

    @property
    def beats_per_ping(self) -> int:
        """Own heartbeats without a word from the one end or the other after which a Ping is sent."""
        return max(1, self.max_silent_beats // _PINGS_PER_SILENCE)


class ChannelServer:
    """The listening side. `on_message(peer, message)` and `on_peer_lost(peer)` are called on the loop.

    `on_peer_lost` comes once for each peer that sent a message, whatever ended it, except after `close`.
    """

    def __init__(
        self,
        secret: ClusterSecret,
        host: str,
        on_message: Callable[[PeerId, Message], None],
        on_peer_lost: Callable[[PeerId], None],
        config: ChannelConfig = ChannelConfig(),
    ) -> None:
        """Listen on a free port of `host`, an address of this node.

        Raises:
            ConfigError: nothing can be bound there.
        """
        _raise_limit()
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_peer_lost = on_peer_lost
        self._config = config
        self._silent_beats: dict[PeerId, int] = {}  # of every live peer
        self._dropped: set[PeerId] = set()  # given up but still connected: not listened to
        self.num_refused = 0  #: clients without the secret
        self._is_closed = False
        # A context of its own, because the gatekeeper (ZAP) stands at one fixed address per context.
        self._context = zmq.Context()
        self._gate = _listening_socket(self._context, zmq.REP, _ZAP_ENDPOINT)
        self._socket = self._context.socket(zmq.ROUTER)
        _configure(self._socket, config)
        keys = secret.server_keys()
        self._client_key = secret.client_keys().public
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        #: tcp://KEY_ID@host:port, for ChannelClient
        self.address = self._bind(host).replace("tcp://", f"tcp://{secret.key_id}@")
        self._inbox = Inbox(self._loop, self._socket, self._receive)
        self._inboxes = [
            self._inbox,
            Inbox(self._loop, self._gate, self._admit),
            Inbox(self._loop, self._monitor, self._notice_disconnection),
        ]
        self._beat_timer = self._loop.call_later(config.heartbeat_s, self._beat)

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """Ids of all live peers."""
        return tuple(self._silent_beats)

    def send(self, peer: PeerId, message: Message) -> bool:
        """Queue `message`; never blocks. False: the peer is lost (`on_peer_lost` was or will be called)."""
        if self._is_closed or peer not in self._silent_beats:
            return False
        return self._send(peer, encode(message))

    def drop(self, peer: PeerId) -> None:
        """Drop a peer, which notices by the silence. `on_peer_lost` follows; an unknown peer is ignored."""
        self._lose(peer)

    def close(self) -> None:
        """End all connections; what was sent before still leaves for half a second."""
        if self._is_closed:
            return
        self._is_closed = True
        self._beat_timer.cancel()
        for inbox in self._inboxes:
            inbox.close()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=_LINGER_MS)
        self._gate.close(linger=0)
        # Ending a context waits for the lingering bytes: not on the loop.
        threading.Thread(target=self._context.term, name="channel-close").start()

    def _bind(self, host: str) -> str:
        is_ipv6 = ":" in host
        # Only where it is asked for: with it, an IPv4 address would be shown in its IPv6 form.
        self._socket.setsockopt(zmq.IPV6, is_ipv6)
        literal = f"[{host}]" if is_ipv6 else host
        try:
            self._socket.bind(f"tcp://{literal}:*")
        except zmq.ZMQError as error:
            self._socket.disable_monitor()
            for opened in (self._monitor, self._socket, self._gate):
                opened.close(linger=0)
            self._context.term()
            raise ConfigError(f"host {host!r}: cannot listen there: {error}") from error
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _admit(self, frames: list[bytes]) -> None:
        """Answer ZeroMQ's question (ZAP, RFC 27) whether a client's key is known."""
        version, request_id, mechanism = frames[0], frames[1], frames[5]
        key = z85.encode(frames[6]) if mechanism == b"CURVE" and len(frames) > 6 else b""
        is_known = hmac.compare_digest(key, self._client_key)
        if not is_known:
            self.num_refused += 1
            if self.num_refused.bit_count() == 1:  # the 1st, 2nd, 4th, ...: whoever knocks does not fill the log
                who = frames[3].decode(errors="replace")
                log.warning("channel: refused %s, without the cluster secret (%d so far)", who, self.num_refused)
        verdict = (b"200", b"OK") if is_known else (b"400", b"unknown key")
        self._gate.send_multipart([version, request_id, *verdict, b"", b""])

    def _receive(self, frames: list[bytes]) -> None:
        peer = frames[0]
        if peer in self._dropped:
            return
        message = _decoded(frames[1:])
        is_new = peer not in self._silent_beats
        self._silent_beats[peer] = 0
        if message is None:
            log.warning("channel: a peer sent something that is no message: dropped")
            self._lose(peer)
        elif isinstance(message, Ping):
            self._send(peer, _PONG)
            if is_new:
                log.debug("channel: peer %s is here", peer.hex())
        else:
            self._on_message(peer, message)

    def _send(self, peer: PeerId, data: bytes) -> bool:
        outcome = self._push(peer, data)
        if outcome == "queued":
            self._inbox.poke()
            return True
        if outcome == "full":
            log.warning("channel: a peer does not read, %d messages wait: dropped", self._config.max_queued_messages)
        self._lose(peer)
        return False

    def _push(self, peer: PeerId, data: bytes) -> Literal["queued", "full", "gone"]:
        try:
            self._socket.send(peer, zmq.SNDMORE | zmq.DONTWAIT)
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return "gone"
        return "queued"

    def _lose(self, peer: PeerId) -> None:
        if self._silent_beats.pop(peer, None) is None:
            return
        self._dropped.add(peer)
        # Later, so that no caller of `send` finds its own state changed under its feet.
        self._loop.call_soon(self._tell_lost, peer)

    def _tell_lost(self, peer: PeerId) -> None:
        if not self._is_closed:
            self._on_peer_lost(peer)

    def _notice_disconnection(self, frames: list[bytes]) -> None:
        for delay_s in _PROBE_DELAYS_S:  # what it sent before it went comes first
            self._loop.call_later(delay_s, self._inbox.when_empty, self._probe)

    def _probe(self) -> None:
        """Find out which peers went: the socket refuses to send to them. An unasked Pong does no harm to the others."""
        for peer in tuple(self._silent_beats):
            self._send(peer, _PONG)
        self._dropped = {peer for peer in self._dropped if self._push(peer, _PONG) != "gone"}
        self._inbox.poke()

    def _beat(self) -> None:
        for peer, silent in tuple(self._silent_beats.items()):
            if silent >= self._config.max_silent_beats:
                log.warning("channel: a peer was silent for %.1f s: lost", silent * self._config.heartbeat_s)
                self._lose(peer)
            else:
                self._silent_beats[peer] = silent + 1
        self._beat_timer = self._loop.call_later(self._config.heartbeat_s, self._beat)


class ChannelClient:
    """The connecting side. `on_message`, `on_lost(reason)` and `on_ready` are called on the loop.

    `on_ready` comes once, at the server's first answer; `on_lost` once, except after `close`. Lost is for good: whoever
    wants the server back makes a new client, after a pause. So is what cannot be connected to, as where the process has
    too many peers already: its limits, and who ran into them, are in the reason.
    """

    def __init__(
        self,
        secret: ClusterSecret,
        address: str,
        on_message: Callable[[Message], None],
        on_lost: Callable[[str], None],
        on_ready: Callable[[], None] | None = None,
        config: ChannelConfig = ChannelConfig(),
    ) -> None:
        """Begin to connect to `address` (tcp://KEY_ID@host:port); messages may be sent at once."""
        self._loop = asyncio.get_running_loop()
        self.address = address
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_ready = on_ready
        self._config = config
        self._silent_beats = 0
        self._unsent_beats = 0  # own heartbeats since something was sent
        self._state: Literal["connecting", "ready", "lost", "closed"] = "connecting"
        self._is_disconnected = False  # lost as soon as what came before is read
        self._sockets: list[zmq.Socket[bytes]] = []
        self._inboxes: list[Inbox] = []
        self._connect_timer = self._loop.call_later(config.connect_timeout_s, self._give_up_connecting)
        self._beat_timer = self._loop.call_later(config.heartbeat_s, self._beat)
        key_id, _, endpoint = address.removeprefix("tcp://").rpartition("@")
        common = secret.known_as(key_id)
        if common is None and key_id:
            self._lose(f"it has another cluster secret (key id {key_id}, here {secret.key_id})")
            return
        try:
            self._open(common or secret, is_ipv6="[" in address)
        except zmq.ZMQError as error:
            self._lose(f"{error.strerror}: {_no_room()}")
            return
        try:
            self._socket.connect(f"tcp://{endpoint}")
        except zmq.ZMQError as error:
            self._lose(f"no address to connect to: {address!r} ({error})")
        else:
            self._send(_PING)

    def _open(self, secret: ClusterSecret, *, is_ipv6: bool) -> None:
        """Open the socket, and the one that tells what becomes of its connection."""
        _raise_limit()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)  # counts before its first socket
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._sockets.append(self._socket)
        _configure(self._socket, self._config)
        keys = secret.client_keys()
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, secret.server_keys().public)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _NO_RECONNECT_MS)
        self._socket.setsockopt(zmq.IPV6, is_ipv6)
        monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED
            | zmq.EVENT_CLOSED
            | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        self._sockets.append(monitor)
        self._inbox = Inbox(self._loop, self._socket, self._receive)
        self._inboxes += [self._inbox, Inbox(self._loop, monitor, self._notice_event)]

    @property
    def is_ready(self) -> bool:
        """Whether the server has answered and is not lost."""
        return self._state == "ready"

    def send(self, message: Message) -> bool:
        """Queue `message`; never blocks. False: the server is lost (`on_lost` was or will be called)."""
        return self._send(encode(message))

    def close(self) -> None:
        """End the connection; what was sent before still leaves for half a second. No callback comes any more."""
        if self._state != "closed":
            self._release()
            self._state = "closed"

    def _send(self, data: bytes) -> bool:
        if self._is_disconnected or self._state not in ("connecting", "ready"):
            return False
        try:
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            self._lose(f"it does not read: {self._config.max_queued_messages} messages are waiting")
            return False
        self._unsent_beats = 0
        self._inbox.poke()
        return True

    def _receive(self, frames: list[bytes]) -> None:
        message = _decoded(frames)
        if message is None:
            self._lose("it sent something that is no message")
            return
        self._silent_beats = 0
        if self._state == "connecting":
            self._state = "ready"
            self._connect_timer.cancel()
            if self._on_ready is not None:
                self._on_ready()
        if not isinstance(message, Pong):
            self._on_message(message)

    def _notice_event(self, frames: list[bytes]) -> None:
        event = parse_monitor_message(frames)["event"]
        if self._is_disconnected:
            return
        if event == zmq.EVENT_DISCONNECTED:
            self._is_disconnected = True
            self._inbox.when_empty(lambda: self._lose("disconnected"))  # what came before the end comes first
        elif event == zmq.EVENT_CLOSED:
            self._lose("connection refused")
        elif event == zmq.EVENT_CONNECT_RETRIED:  # alone: none was begun
            self._lose(f"no connection was begun: its name means no address, or {_no_room()}")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._lose("handshake failed: it hung up, without the same cluster secret, or room for another peer")
        else:
            self._lose("handshake failed: it does not have the same cluster secret")

    def _give_up_connecting(self) -> None:
        self._lose(f"no answer within {self._config.connect_timeout_s:g} s")

    def _beat(self) -> None:
        if self._state == "ready":
            self._silent_beats += 1
            if self._silent_beats > self._config.max_silent_beats:
                self._lose(f"silent for {self._config.lost_after_s:g} s")
                return
        self._unsent_beats += 1
        # Before the Ping, which may be what loses the peer: then nothing beats any more.
        self._beat_timer = self._loop.call_later(self._config.heartbeat_s, self._beat)
        if max(self._silent_beats, self._unsent_beats) >= self._config.beats_per_ping:
            self._send(_PING)

    def _lose(self, reason: str) -> None:
        if self._state in ("lost", "closed"):
            return
        self._release()
        self._state = "lost"
        self._loop.call_soon(self._tell_lost, reason)

    def _tell_lost(self, reason: str) -> None:
        if self._state == "lost":
            self._on_lost(reason)

    def _release(self) -> None:
        if self._state in ("lost", "closed"):
            return
        self._beat_timer.cancel()
        self._connect_timer.cancel()
        for inbox in self._inboxes:
            inbox.close()
        if len(self._sockets) > 1:
            self._socket.disable_monitor()
        for socket in reversed(self._sockets):
            socket.close(linger=_LINGER_MS if socket is self._socket else 0)


def _raise_limit() -> None:
    """Have the process allowed as many file descriptors as it may allow itself, and peers may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _no_room() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"this process has no room for another peer: each takes four of its {limit} file descriptors (ulimit -n)"
        f" and three of {_MAX_SOCKETS} sockets"
    )


def _configure(socket: zmq.Socket[bytes], config: ChannelConfig) -> None:
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, config.max_queued_messages)
    socket.setsockopt(zmq.RCVHWM, config.max_queued_messages)
    socket.setsockopt(zmq.MAXMSGSIZE, config.max_message_bytes)
    # ZeroMQ's own heartbeat frees what is queued for a peer whose process stopped; ours judges the event loop.
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(config.beats_per_ping * config.heartbeat_s * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(config.lost_after_s * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(config.connect_timeout_s * 1000))


def _listening_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.bind(endpoint)
    return socket


def _decoded(frames: list[bytes]) -> Message | None:
    """Return the message in `frames`, or None for bytes that are no message of ours."""
    if len(frames) != 1:
        return None
    try:
        return decode(frames[0])
    except msgspec.DecodeError:
        return None
