"""A thin layer over UCX: one worker, connections, tag messages. The only place that knows UCX and ucxx.

ucxx brings UCX, its context, its worker and the C++ thread in which the worker lives. The rest goes to UCX's own
library by ctypes (libucp, whose interface is public and stable), because ucxx's Python lacks what a safe end needs:

* Connections between client and listener, the listener on one address: ucxx listens on all. The alternative, endpoints
  made from worker addresses, needs no listener, but with UCX 1.21 over tcp processes that used it crashed, and closing
  one did not always end its writes (docs/LOG.md).
* Cancelling one receive.

Measured, and held by tests/transport/test_ucx.py: when a connection was closed by force, the receives matched from it
are over 1-60 ms later, and nothing lands afterwards. Cancelling ends a receive only if nothing has matched it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import random
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil

from messages.errors import ConfigError
from transport.ucx.library import (
    BY_FORCE,
    CLIENT_CALLBACK,
    CONN_REQUEST_CLIENT,
    EP_CLIENT_SERVER,
    EP_CONN_REQUEST,
    EP_ERR_HANDLER,
    EP_ERR_MODE,
    EP_FLAGS,
    EP_LOCAL_SOCKADDR,
    EP_NO_LOOPBACK,
    EP_SOCKADDR,
    EP_TRANSPORTS,
    ERROR_CALLBACK,
    IN_PROGRESS,
    LISTENER_CONN_HANDLER,
    LISTENER_SOCKADDR,
    MEMORY_ADDRESS,
    MEMORY_LENGTH,
    NO_PARAMETERS,
    PEER_ERRORS,
    ConnRequestAttributes,
    EndpointAttributes,
    EndpointParameters,
    ListenerParameters,
    MemoryParameters,
    RequestMemory,
    SocketAddress,
    TagInfo,
    TransportEntry,
    from_sockaddr,
    quick,
    request_bytes_of,
    status_text,
    to_sockaddr,
    ucp,
    ucs,
)

log = logging.getLogger(__name__)

#: What nobody asked for, and more than any message of ours carries, stays where it is.
_MAX_STRAY_BYTES = 16 << 20
_MAX_TRANSPORTS = 32


class UcxError(Exception):
    """UCX refused or failed; the message is its own."""


class Transfer:
    """A request to UCX under way, and the buffer that UCX reads or writes until it is over."""

    __slots__ = ("_buffer", "_give_back", "_request", "_status")

    def __init__(self, request: int | None, buffer: object = None, give_back: Callable[[], None] | None = None) -> None:
        """Follow what an operation of UCX returned: null, a negative status, or a pointer to a request.

        `give_back` has the memory that the request lies in, and is called when it is over; None: the memory is UCX's.
        """
        self._buffer = buffer
        self._give_back = give_back
        self._request = request or 0
        self._status = 0
        if self._request >= 2**64 - 100:
            self._status, self._request = self._request - 2**64, 0

    @property
    def is_over(self) -> bool:
        """Whether UCX is done with the buffer, well or badly."""
        if self._request:
            status: int = quick().ucp_request_check_status(self._request)
            if status == IN_PROGRESS:
                return False
            if self._give_back is None:
                ucp().ucp_request_free(self._request)
            else:
                self._give_back()
            self._request, self._buffer, self._give_back, self._status = 0, None, None, status
        return True

    @property
    def error(self) -> str | None:
        """What went wrong with a transfer that is over; None where nothing did."""
        return status_text(self._status) if self._status else None

    def cancel(self, worker: int) -> None:
        """End the transfer, if it is a receive that nothing has matched yet."""
        if self._request:
            ucp().ucp_request_cancel(worker, self._request)


class Requests:
    """Begins transfers whose requests lie in memory of ours. One thread.

    A request in UCX's own memory would have to be given back, under the lock of the worker, which UCX's thread holds
    most of the time while data streams: whoever waits for it spins, on a core that the data needs. Over tcp, on two
    cores, pulls of 16 x 2 MiB to 256 x 512 KiB take 0.73 to 0.88 of the time (November 2026).

    UCX's thread marks a request as completed before it writes the status and looks at the flags once more, all under
    that lock. So memory of what is over stays until somebody else had the lock.
    """

    def __init__(self, request_bytes: int) -> None:
        """Begin requests of that size, which the context wants."""
        self._request_bytes = request_bytes
        self._over: list[RequestMemory] = []

    def begin(self, buffer: object, operation: Callable[..., int | None], *arguments: object) -> Transfer:
        """Call `operation`, which takes the lock of the worker; `buffer` keeps what it reads or writes."""
        memory = RequestMemory(self._request_bytes)
        request = operation(*arguments, memory.parameters)
        self._over.clear()
        return Transfer(request, buffer, partial(self._over.append, memory))


class Connection:
    """One end of a connection. `Worker.connect` and `Worker.accept` make them."""

    def __init__(self, endpoint: int, number: int, errors: dict[int, str], requests: Requests) -> None:
        self._endpoint = endpoint
        self._requests = requests
        self._number = number
        self._errors = errors  # of all connections, by number; filled by UCX's thread

    @property
    def error(self) -> str | None:
        """Why the connection broke, once UCX found out; None before. A peer that is stopped does not break it."""
        return "closed" if not self._endpoint else self._errors.get(self._number)

    def send(self, buffer: object, num_bytes: int, tag: int) -> Transfer:
        """Send `buffer` as message `tag`."""
        owner, address = _address_of(buffer)
        return self._requests.begin(owner, ucp().ucp_tag_send_nbx, self._endpoint, address, num_bytes, tag)

    def local_address(self) -> SocketAddress:
        """Return this end's address as the other end sees it.

        Raises:
            UcxError: the address is not known yet, or the connection is broken.
        """
        attributes = EndpointAttributes(field_mask=EP_LOCAL_SOCKADDR)
        _check(ucp().ucp_ep_query(self._endpoint, ctypes.byref(attributes)))
        return from_sockaddr(attributes.local_sockaddr)

    def carriers(self) -> str:
        """Return the transports that the connection uses, e.g. "tcp" or "cuda_ipc,tcp"; "" where UCX does not tell."""
        entries = (TransportEntry * _MAX_TRANSPORTS)()
        attributes = EndpointAttributes(
            field_mask=EP_TRANSPORTS,
            entries=entries,
            num_entries=_MAX_TRANSPORTS,
            entry_size=ctypes.sizeof(TransportEntry),
        )
        if self.error is not None or ucp().ucp_ep_query(self._endpoint, ctypes.byref(attributes)):
            return ""
        names = [entries[i].transport_name.decode() for i in range(attributes.num_entries)]
        return ",".join(dict.fromkeys(names))

    def close(self) -> Transfer:
        """Close by force: what is under way ends a moment later. The other end finds out by itself."""
        endpoint, self._endpoint = self._endpoint, 0
        transfer = Transfer(ucp().ucp_ep_close_nbx(endpoint, BY_FORCE) if endpoint else None)
        self._errors.pop(self._number, None)
        return transfer


class Worker:
    """UCX's context and worker, its thread, and a listener. Methods may block for milliseconds while data streams."""

    def __init__(
        self,
        host: str,
        port_range: tuple[int, int],
        transports: str | None,
        devices: Sequence[str],
        on_arrival: Callable[[], None],
        prepare_thread: Callable[[], None] | None = None,
    ) -> None:
        """Listen on `host`, an IP address of this node, on free ports of `port_range` (both ends included).

        `transports`: as in UCX_TLS; None: tcp, and what moves GPU memory where there is a GPU. `devices`: network
        devices beside that of `host`, e.g. mlx5_0:1. `on_arrival`, called by UCX's thread: a client has knocked.
        `prepare_thread` runs first in UCX's thread (the CUDA context).

        Raises:
            ConfigError: ucxx is missing, or UCX cannot do what is asked for.
        """
        ucx = _libucxx()
        self.version = ".".join(map(str, ucx.get_ucx_version()))
        interface = _interface_of(host)
        _free_ports(host, port_range, at_least=2)  # UCX itself would look for one for ever
        before = _listening(port_range)
        if transports is None:
            transports = "tcp,cuda_copy,cuda_ipc,self" if Path("/dev/nvidiactl").exists() else "tcp,self"
        settings = {
            "TLS": transports,
            "NET_DEVICES": ",".join((interface, *devices)),
            "TCP_AF_PRIO": "inet6" if ":" in host else "inet",
            "TCP_PORT_RANGE": f"{port_range[0]}-{port_range[1]}",
            "TCP_TX_SEG_SIZE": "1M",  # the default, 8K and 64K, halves the rate of large messages
            "TCP_RX_SEG_SIZE": "1M",
            "RNDV_THRESH": "8192",
            "RNDV_FRAG_MEM_TYPE": "host",
            "MAX_RNDV_RAILS": "1",
        }
        try:
            context = ucx.UCXContext(settings, (ucx.Feature.TAG, ucx.Feature.WAKEUP))
            found = _check_devices(context.info, (interface, *devices), transports)
            self._worker = ucx.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False)
        except ucx.UCXError as error:
            raise ConfigError(f"UCX {self.version} cannot be set up with {settings}: {error}") from error
        #: whether it can move GPU memory
        self.has_devices = "cuda_copy" in found
        self._handle: int = self._worker.handle
        self._context = context
        self._kept: list[tuple[object, ctypes.c_void_p]] = []  # registered memory, and UCX's handles of it
        self._requests = Requests(request_bytes_of(context.handle))
        self._num_connections = 0
        self._errors: dict[int, str] = {}  # number of a connection -> what broke it
        self._arrived: dict[SocketAddress, tuple[int, float]] = {}  # client's address -> its request, and when it came
        self._on_arrival = on_arrival
        # UCX calls both from its thread, which waits for the interpreter meanwhile.
        self._on_error = ERROR_CALLBACK(self._note_error)
        self._on_client = CLIENT_CALLBACK(self._note_client)
        self._listener, self.port = self._listen(host, _free_ports(host, port_range, at_least=1))
        # UCX takes an interface's first address, which may be another than the one asked for.
        listening = {ip for ip, _ in _listening(port_range) - before}
        if listening != {host}:
            ucp().ucp_listener_destroy(self._listener)
            raise ConfigError(f"UCX listens on {sorted(listening)} within {port_range}, wanted {host} alone")
        if prepare_thread is not None:
            self._worker.set_progress_thread_start_callback(prepare_thread)
        # With 1 ms it takes 2-5 % of a core when idle, with 20 ms 0.3 %; pulls took as long (2 cores, November 2026).
        self._worker.start_progress_thread(polling_mode=False, epoll_timeout=20)

    def connect(self, address: SocketAddress) -> Connection:
        """Begin to connect to the listener at `address`, which must `accept` it.

        Raises:
            UcxError: there is no way to it.
        """
        try:
            sockaddr = to_sockaddr(address)
        except (ValueError, struct.error) as error:
            raise UcxError(str(error)) from error
        return self._connection(
            field_mask=EP_ERR_MODE | EP_ERR_HANDLER | EP_SOCKADDR | EP_FLAGS,
            flags=EP_CLIENT_SERVER,
            sockaddr=ctypes.addressof(sockaddr),
            sockaddr_bytes=ctypes.sizeof(sockaddr),
        )

    @property
    def arrived(self) -> set[SocketAddress]:
        """Addresses of the clients that have knocked and wait."""
        return set(self._arrived)

    def accept(self, address: SocketAddress) -> Connection:
        """Connect to the client with that address, which has arrived.

        Raises:
            UcxError: it is gone.
        """
        request, _ = self._arrived.pop(address)
        return self._connection(
            field_mask=EP_ERR_MODE | EP_ERR_HANDLER | EP_CONN_REQUEST | EP_FLAGS,
            flags=EP_NO_LOOPBACK,
            conn_request=request,
        )

    def refuse_strangers(self, max_wait_s: float) -> None:
        """Send away the clients that nobody accepted for so long."""
        now_s = time.monotonic()
        for address, (request, since_s) in list(self._arrived.items()):
            if now_s >= since_s + max_wait_s:
                log.info("ucx: a client from %s:%d is sent away: no peer said that it would come", *address)
                del self._arrived[address]
                ucp().ucp_listener_reject(self._listener, request)

    def keep_registered(self, buffer: object, num_bytes: int) -> None:
        """Register memory with the devices that move it, until `close`: else UCX does so by message, as it comes to it.

        Raises:
            UcxError: they do not take it; messages still go.
        """
        owner, address = _address_of(buffer)
        parameters = MemoryParameters(field_mask=MEMORY_ADDRESS | MEMORY_LENGTH, address=address, num_bytes=num_bytes)
        handle = ctypes.c_void_p()
        status = ucp().ucp_mem_map(self._context.handle, ctypes.byref(parameters), ctypes.byref(handle))
        if status != 0:
            raise UcxError(status_text(status))
        self._kept.append((owner, handle))

    def receive(self, buffer: object, num_bytes: int, tag: int) -> Transfer:
        """Post `buffer` for the message `tag`, which must be as long, from whomever."""
        owner, address = _address_of(buffer)
        arguments = (self._handle, address, num_bytes, tag, 2**64 - 1)
        return self._requests.begin(owner, ucp().ucp_tag_recv_nbx, *arguments)

    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """End those of `transfers` that nothing has matched yet."""
        for transfer in transfers:
            transfer.cancel(self._handle)

    def take_strays(self) -> list[Transfer]:
        """Receive, to be forgotten, what arrived and nobody waits for: the remains of pulls that were given up."""
        strays = []
        info = TagInfo()
        while ucp().ucp_tag_probe_nb(self._handle, 0, 0, 0, ctypes.byref(info)) and info.num_bytes <= _MAX_STRAY_BYTES:
            message = ucp().ucp_tag_probe_nb(self._handle, 0, 0, 1, ctypes.byref(info))
            owner, address = _address_of(bytearray(max(info.num_bytes, 1)))
            request = ucp().ucp_tag_msg_recv_nbx(self._handle, address, info.num_bytes, message, NO_PARAMETERS)
            strays.append(Transfer(request, owner))
        return strays

    def close(self) -> None:
        """Stop listening, and UCX's thread. All connections must have been closed before."""
        self.refuse_strangers(0)
        ucp().ucp_listener_destroy(self._listener)
        self._worker.stop_progress_thread()
        while self._kept:
            owner, handle = self._kept.pop()
            ucp().ucp_mem_unmap(self._context.handle, handle)
            del owner  # whose memory is free from here on
        self._worker = self._context = None

    def _listen(self, host: str, ports: Sequence[int]) -> tuple[int, int]:
        for port in ports:
            sockaddr = to_sockaddr((host, port))
            parameters = ListenerParameters(
                field_mask=LISTENER_SOCKADDR | LISTENER_CONN_HANDLER,
                sockaddr=ctypes.addressof(sockaddr),
                sockaddr_bytes=ctypes.sizeof(sockaddr),
                conn_callback=self._on_client,
            )
            listener = ctypes.c_void_p()
            status = ucp().ucp_listener_create(self._handle, ctypes.byref(parameters), ctypes.byref(listener))
            if status == 0:
                return listener.value or 0, port
        raise ConfigError(f"UCX cannot listen on {host}: {status_text(status)}")

    def _connection(self, **parameters: object) -> Connection:
        self._num_connections += 1
        number = self._num_connections  # UCX uses the addresses of endpoints again
        endpoint = ctypes.c_void_p()
        made = EndpointParameters(err_mode=PEER_ERRORS, err_callback=self._on_error, err_argument=number, **parameters)
        _check(ucp().ucp_ep_create(self._handle, ctypes.byref(made), ctypes.byref(endpoint)))
        return Connection(endpoint.value or 0, number, self._errors, self._requests)

    def _note_error(self, number: int | None, _: int | None, status: int) -> None:
        self._errors[number or 0] = status_text(status)

    def _note_client(self, request: int | None, _: int | None) -> None:
        attributes = ConnRequestAttributes(field_mask=CONN_REQUEST_CLIENT)
        if request and not ucp().ucp_conn_request_query(request, ctypes.byref(attributes)):
            self._arrived[from_sockaddr(attributes.client_address)] = request, time.monotonic()
            self._on_arrival()


def _check(status: int) -> None:
    if status:
        raise UcxError(status_text(status))


def _address_of(buffer: Any) -> tuple[object, int]:
    """Return what keeps the buffer where it is, and its address."""
    interface = getattr(buffer, "__cuda_array_interface__", None)
    if interface is not None:
        return buffer, interface["data"][0]
    first = ctypes.c_char.from_buffer(buffer)
    return first, ctypes.addressof(first)


@cache
def _libucxx() -> Any:
    try:
        from ucxx._lib import libucxx
    except (ImportError, OSError) as error:
        raise ConfigError(f"the ucx road needs the extra kvray[ucx-cu12] or kvray[ucx-cu13]: {error}") from error
    _tame()
    return libucxx


def _tame() -> None:
    """Undo what loading UCX does to a process (variables could, too, but only if set before it is loaded)."""
    library = ucs()
    level = ctypes.create_string_buffer(32)
    with contextlib.suppress(AttributeError):  # another version of UCX may lack the functions: then its ways stay
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
        if any(address.address == host for address in addresses):
            return name
    has = ", ".join(f"{name} {a.address}" for name, addresses in found.items() for a in addresses if "." in a.address)
    raise ConfigError(f"host {host!r}: no interface of this node has that address ({has})")


def _free_ports(host: str, port_range: tuple[int, int], at_least: int) -> list[int]:
    """Return some free ports of the range, ten at most, in random order; ConfigError for fewer than `at_least`."""
    first, last = port_range
    if not 0 < first <= last < 65536:
        raise ConfigError(f"port range {first}-{last}: two ports in order wanted")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    free: list[int] = []
    for port in random.sample(range(first, last + 1), last + 1 - first):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, port))
            free.append(port)
        if len(free) == 10:
            break
    if len(free) < at_least:
        raise ConfigError(f"port range {first}-{last}: {len(free)} ports of {host} are free, the ucx road needs 2")
    return free


def _check_devices(info: str, devices: Sequence[str], transports: str) -> set[str]:
    """Return the transports that UCX found; ConfigError where a device gave none, which is no error to UCX."""
    seen = re.findall(r"resource \d+ .* (\S+)/(\S+)$", info, flags=re.MULTILINE)
    missing = [device for device in devices if device not in {name for _, name in seen}]
    if missing:
        has = ", ".join("/".join(pair) for pair in seen)
        raise ConfigError(f"UCX has no transport of {transports!r} on {missing}, only {has or 'none'}")
    return {transport for transport, _ in seen}


def _listening(port_range: tuple[int, int]) -> set[SocketAddress]:
    """Return the addresses within the range that this process listens on."""
    sockets = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return {(address.ip, address.port) for address in sockets if port_range[0] <= address.port <= port_range[1]}
