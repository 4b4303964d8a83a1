"""A thin layer over UCX: one worker, its endpoints, tag messages. The only place that knows ucxx.

Built on ucxx's synchronous layer, `ucxx._lib.libucxx`: its name says that it may change, so ucxx is pinned to 0.52.*
and the tests of the ucx road cover it. Imported when the first worker is made: it takes 0.8 s and 250 MB of disk.

Two facts, measured with UCX 1.21, that everything rests on (tests/transport/test_ucx.py holds them):

* A receive posted on an endpoint is over, matched or not, when that endpoint was closed; nothing lands afterwards.
* That holds only if the sender's endpoint is the partner of the closed one. UCX pairs the endpoints of two workers by
  number: the first made here for that worker with the first made there for ours, and so on, whatever became of those
  before. With partners of different number, 440 of 512 MiB landed after the close. Hence `connect(address, number)`.
"""

from __future__ import annotations

import ctypes
import ipaddress
import logging
import random
import re
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from messages.errors import ConfigError

log = logging.getLogger(__name__)

#: Closing blocks at most twice as long, each; 1-60 ms measured, the longer ones while data streams in.
_CLOSE_PERIOD_NS = 100_000_000
_CLOSE_ATTEMPTS = 3
#: What nobody asked for, and more than any message of ours carries, stays where it is.
_MAX_STRAY_BYTES = 16 << 20
#: To get in step with a peer; about 1 ms each.
_MAX_SKIPPED = 1000
_MAX_TRANSPORTS = 32
_TRANSPORTS_FIELD = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS


class UcxError(Exception):
    """UCX refused or failed; the message is its own."""


class Transfer:
    """One tag message under way, and the buffer that UCX reads or writes until it is over."""

    __slots__ = ("_buffer", "_request")

    def __init__(self, request: Any, buffer: Any) -> None:
        self._request = request
        self._buffer = buffer

    @property
    def is_over(self) -> bool:
        """Whether UCX is done with the buffer, well or badly."""
        return bool(self._request.completed)

    def error(self) -> str | None:
        """What went wrong with a transfer that is over."""
        try:
            self._request.check_error()
        except _libucxx().UCXError as error:
            return str(error)
        return None


class Endpoint:
    """A connection to one worker, as made by `UcxWorker.connect`."""

    def __init__(self, endpoint: Any) -> None:
        self._endpoint = endpoint
        self._is_closed = False

    @property
    def is_alive(self) -> bool:
        """False once UCX found out that the other side is gone; a stopped process is not."""
        return not self._is_closed and bool(self._endpoint.alive)

    def receive(self, buffer: object, tag: int) -> Transfer:
        """Post `buffer` for the message `tag`, which must be as long; ends at the latest when this is closed."""
        return self._begin(self._endpoint.tag_recv, buffer, tag)

    def send(self, buffer: object, tag: int) -> Transfer:
        """Send `buffer` as message `tag`."""
        return self._begin(self._endpoint.tag_send, buffer, tag)

    def error(self) -> str:
        """Why it is not alive, as far as UCX says."""
        try:
            self._endpoint.raise_on_error()
        except _libucxx().UCXError as error:
            return str(error)
        return "closed"

    def carriers(self) -> str:
        """The transports it uses, e.g. "tcp" or "cuda_ipc,tcp"; "" where UCX does not tell."""
        handle = 0 if self._is_closed else self._endpoint.handle
        entries = (_TransportEntry * _MAX_TRANSPORTS)()
        attributes = _EndpointAttributes(
            field_mask=_TRANSPORTS_FIELD,
            entries=entries,
            num_entries=_MAX_TRANSPORTS,
            entry_size=ctypes.sizeof(_TransportEntry),
        )
        if not handle or _libucp().ucp_ep_query(handle, ctypes.byref(attributes)) != 0:
            return ""
        names = [entries[i].transport_name.decode() for i in range(attributes.num_entries)]
        return ",".join(dict.fromkeys(names))

    def close(self) -> None:
        """Close by force: what is under way ends a moment later, see `Transfer.is_over`. The other side is not told."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._endpoint.close_blocking(_CLOSE_PERIOD_NS, _CLOSE_ATTEMPTS)
        except _libucxx().UCXError as error:
            log.debug("ucx: closing an endpoint: %s", error)

    def _begin(self, operation: Callable[..., Any], buffer: object, tag: int) -> Transfer:
        from ucxx._lib.arr import Array

        ucx = _libucxx()
        array = Array(buffer)
        try:
            return Transfer(operation(array, ucx.UCXXTag(tag)), array)
        except ucx.UCXError as error:
            raise UcxError(str(error)) from error


class UcxWorker:
    """UCX's context and worker, with the thread in which UCX works. Its methods may block for some milliseconds."""

    def __init__(
        self,
        host: str,
        port_range: tuple[int, int],
        transports: str | None = None,
        devices: Sequence[str] = (),
        prepare_thread: Callable[[], None] | None = None,
    ) -> None:
        """Listen on `host`, an IP address of this node, on a free port of `port_range` (both ends included).

        `transports`: as in UCX_TLS; None: tcp, and what moves GPU memory where there is a GPU. `devices`: network
        devices beside that of `host`, e.g. mlx5_0:1. `prepare_thread` runs first in UCX's thread (the CUDA context).

        Raises:
            ConfigError: ucxx is missing, or UCX cannot do what is asked for.
        """
        ucx = _libucxx()
        self.version = ".".join(map(str, ucx.get_ucx_version()))
        interface = _interface_of(host)
        _check_port_free(host, port_range)
        before = _listening(port_range)
        if transports is None:
            transports = "tcp,cuda_copy,cuda_ipc,self" if Path("/dev/nvidiactl").exists() else "tcp,self"
        settings = {
            "TLS": transports,
            "NET_DEVICES": ",".join((interface, *devices)),
            "TCP_AF_PRIO": "inet6" if ipaddress.ip_address(host.partition("%")[0]).version == 6 else "inet",
            "TCP_PORT_RANGE": f"{port_range[0]}-{port_range[1]}",
            "TCP_TX_SEG_SIZE": "1M",  # the default, 8K and 64K, halves the rate of large messages
            "TCP_RX_SEG_SIZE": "1M",
            "RNDV_THRESH": "8192",
            "RNDV_FRAG_MEM_TYPE": "host",
            "MAX_RNDV_RAILS": "1",
        }
        try:
            context = ucx.UCXContext(settings, (ucx.Feature.TAG, ucx.Feature.WAKEUP))
            #: whether it can move GPU memory
            self.has_devices = "cuda_copy" in _check_devices(context.info, (interface, *devices), transports)
            self._worker = ucx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        except ucx.UCXError as error:
            raise ConfigError(f"UCX {self.version} cannot be set up with {settings}: {error}") from error
        # UCX takes an interface's first address, which may be another than the one asked for.
        listening = {ip for ip, _ in _listening(port_range) - before}
        if listening != ({host.partition("%")[0]} if "tcp" in transports.split(",") else set()):
            raise ConfigError(f"UCX listens on {sorted(listening) or 'nothing'} within {port_range}, wanted {host}")
        if prepare_thread is not None:
            self._worker.set_progress_thread_start_callback(prepare_thread)
        self._worker.start_progress_thread(polling_mode=False, epoll_timeout=1)
        #: How peers reach it. Not a secret, but who has it may send to this process: goes over the channel only.
        self.address = bytes(self._worker.address)
        self._num_made: dict[bytes, int] = {}  # endpoints, per address
        self._own: Endpoint | None = None

    def next_number(self, address: bytes) -> int:
        """The number that the next endpoint to that worker has."""
        return self._num_made.get(address, 0)

    def connect(self, address: bytes, number: int) -> Endpoint:
        """Make endpoint `number` to the worker at `address`: not below `next_number`; those between are used up.

        Raises:
            UcxError: it cannot be reached. The number is used up all the same.
        """
        if number > self.next_number(address) + _MAX_SKIPPED:
            raise UcxError(f"endpoint {number} wanted, number {self.next_number(address)} is next")
        while self.next_number(address) < number:
            self._connect(address).close()
        return self._connect(address)

    def complete_with_nothing(self, tags: Sequence[int]) -> list[Transfer]:
        """End receives that nothing was sent for: by messages of no bytes to oneself. There is no other way to end one.

        Raises:
            UcxError: that failed.
        """
        if self._own is None or not self._own.is_alive:
            self._own = self._connect(self.address)
        return [self._own.send(b"", tag) for tag in tags]

    def take_strays(self) -> list[Transfer]:
        """Receive, to be forgotten, what arrived and nobody waits for: the remains of pulls that were given up.

        Raises:
            UcxError: that failed.
        """
        from ucxx._lib.arr import Array

        ucx = _libucxx()
        anything = (ucx.UCXXTag(0), ucx.UCXXTagMask(0))
        strays = []
        try:
            while (found := self._worker.tag_probe(*anything)) and found.length <= _MAX_STRAY_BYTES:
                found = self._worker.tag_probe(*anything, remove=True)
                buffer = Array(bytearray(max(found.length, 1)))
                strays.append(Transfer(self._worker.tag_recv_with_handle(buffer, found), buffer))
        except ucx.UCXError as error:
            raise UcxError(str(error)) from error
        return strays

    def close(self) -> None:
        """Stop UCX's thread; the socket goes with the last reference. All endpoints must have been closed before."""
        if self._own is not None:
            self._own.close()
            self._own = None
        self._worker.stop_progress_thread()
        self._worker = None

    def _connect(self, address: bytes) -> Endpoint:
        ucx = _libucxx()
        # UCX ends the process on an address of another format (the low half of the first byte).
        if len(address) < 2 or (address[0] ^ self.address[0]) & 0xF:
            raise UcxError(f"no worker address of UCX {self.version}: {address[:4].hex()}..., {len(address)} bytes")
        self._num_made[address] = self.next_number(address) + 1
        try:
            parsed = ucx.UCXAddress.create_from_buffer(address)
            return Endpoint(ucx.UCXEndpoint.create_from_worker_address(self._worker, parsed, True))
        except ucx.UCXError as error:
            raise UcxError(str(error)) from error


class _TransportEntry(ctypes.Structure):
    """ucp_transport_entry_t of ucp_def.h."""

    _fields_ = (("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p))


class _EndpointAttributes(ctypes.Structure):
    """ucp_ep_attr_t of ucp.h. UCX touches only the fields that the mask names."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_uint64 * 16),
        ("remote_sockaddr", ctypes.c_uint64 * 16),
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


@cache
def _libucxx() -> Any:
    try:
        from ucxx._lib import libucxx
    except (ImportError, OSError) as error:
        raise ConfigError(f"the ucx road needs the extra kvray[ucx-cu12] or kvray[ucx-cu13]: {error}") from error
    _tame()
    return libucxx


@cache
def _libucp() -> Any:
    library = ctypes.CDLL("libucp.so.0")  # by this name the one that ucxx has loaded is found
    library.ucp_ep_query.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.ucp_ep_query.restype = ctypes.c_int
    return library


def _tame() -> None:
    """Undo what loading UCX does to a process. Its variables could, too, if they are set before it is loaded."""
    with suppress(OSError, AttributeError):  # another version of UCX may lack the functions: then its ways stay
        library = ctypes.CDLL("libucs.so.0")
        level = ctypes.create_string_buffer(32)
        library.ucs_global_opts_get_value(b"LOG_LEVEL", level, len(level))
        if level.value == b"WARN":  # the default: nobody asked for it
            library.ucs_global_opts_set_value(b"LOG_LEVEL", b"error")
        library.ucs_global_opts_set_value(b"WARN_UNUSED_ENV_VARS", b"n")
        # ucxx sets the variable, as the allocators of torch and others need it, but after UCX has read it.
        library.ucs_global_opts_set_value(b"MEMTYPE_CACHE", b"n")
        # UCX takes SIGHUP for its debugger: the process would survive a hang-up.
        library.ucs_debug_disable_signal(int(signal.SIGHUP))


def _interface_of(host: str) -> str:
    found = psutil.net_if_addrs()
    for name, addresses in found.items():
        if any(address.address.partition("%")[0] == host.partition("%")[0] for address in addresses):
            return name
    has = ", ".join(f"{name} {a.address}" for name, addresses in found.items() for a in addresses if "." in a.address)
    raise ConfigError(f"host {host!r}: no interface of this node has that address ({has})")


def _check_port_free(host: str, port_range: tuple[int, int]) -> None:
    """UCX itself tries for ever."""
    first, last = port_range
    if not 0 < first <= last < 65536:
        raise ConfigError(f"port range {first}-{last}: two ports in order wanted")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(range(first, last + 1), last + 1 - first):
        with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, port))
            return
    raise ConfigError(f"port range {first}-{last}: no port of {host} is free")


def _check_devices(info: str, devices: Sequence[str], transports: str) -> set[str]:
    """The transports that UCX found. An unknown device is no error to it."""
    seen = re.findall(r"resource \d+ .* (\S+)/(\S+)$", info, flags=re.MULTILINE)
    missing = [device for device in devices if device not in {name for _, name in seen}]
    if missing:
        has = ", ".join("/".join(pair) for pair in seen)
        raise ConfigError(f"UCX has no transport of {transports!r} on {missing}, only {has or 'none'}")
    return {transport for transport, _ in seen}


def _listening(port_range: tuple[int, int]) -> set[tuple[str, int]]:
    """This process's sockets within the range."""
    sockets = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return {(address.ip, address.port) for address in sockets if port_range[0] <= address.port <= port_range[1]}
