"""A thin layer over UCX: one worker, connections, tag messages. The only place that knows UCX and ucxx.

ucxx brings UCX, its context, its worker and the C++ thread in which the worker lives. The rest goes to UCX's own
library by ctypes (libucp, whose interface is public and stable), because ucxx's Python lacks what a safe end needs:

* Connections between listener and client. ucxx can listen on all addresses only. The alternative, endpoints made from
  worker addresses, needs no listener, but over tcp a process that closes such an endpoint while it sends soon writes
  to freed memory (UCX 1.21: `uct_tcp_cm_handle_conn_fin` frees what `uct_tcp_iface_handle_events` uses next; our
  fuzzing crashed within seconds, and never did with connections); and closing one of a pair that UCX did not pair
  with each other leaves late writes.
* Cancelling one receive.

Measured, and held by tests/transport/test_ucx.py: when a connection was closed by force, the receives matched from it
are over some milliseconds later, and nothing lands afterwards. Cancelling ends a receive only if nothing matched it.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import logging
import random
import re
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import psutil

from messages.errors import ConfigError

log = logging.getLogger(__name__)

SocketAddress: TypeAlias = tuple[str, int]

#: What nobody asked for, and more than any message of ours carries, stays where it is.
_MAX_STRAY_BYTES = 16 << 20
_MAX_TRANSPORTS = 32


class UcxError(Exception):
    """UCX refused or failed; the message is its own."""


class Transfer:
    """A request to UCX under way, and the buffer that UCX reads or writes until it is over."""

    __slots__ = ("_buffer", "_request", "_status")

    def __init__(self, request: int | None, buffer: object = None) -> None:
        """`request`: what an operation returned: null, a negative status, or a pointer."""
        self._buffer = buffer
        self._request = request or 0
        self._status = 0
        if self._request >= 2**64 - 100:
            self._status, self._request = self._request - 2**64, 0

    @property
    def is_over(self) -> bool:
        """Whether UCX is done with the buffer, well or badly."""
        if self._request:
            status: int = _quick().ucp_request_check_status(self._request)
            if status == _IN_PROGRESS:
                return False
            _ucp().ucp_request_free(self._request)
            self._request, self._buffer, self._status = 0, None, status
        return True

    @property
    def error(self) -> str | None:
        """What went wrong with a transfer that is over."""
        return status_text(self._status) if self._status else None

    def cancel(self, worker: int) -> None:
        """End it, if it is a receive that nothing has matched yet."""
        if self._request:
            _ucp().ucp_request_cancel(worker, self._request)


class Connection:
    """One end of a connection. `Worker.connect` and `Worker.accept` make them."""

    def __init__(self, worker: int, endpoint: int, errors: dict[int, str]) -> None:
        self._worker = worker
        self._endpoint = endpoint
        self._errors = errors  # of all endpoints, filled by UCX's thread

    @property
    def error(self) -> str | None:
        """Why it broke, once UCX found out; a peer that is stopped does not break it."""
        return "closed" if not self._endpoint else self._errors.get(self._endpoint)

    def send(self, buffer: object, num_bytes: int, tag: int) -> Transfer:
        """Send `buffer` as message `tag`."""
        owner, address = _address_of(buffer)
        return Transfer(_ucp().ucp_tag_send_nbx(self._endpoint, address, num_bytes, tag, _NO_PARAMETERS), owner)

    def local_address(self) -> SocketAddress:
        """This end's, as the other end sees it.

        Raises:
            UcxError: it is not known yet, or broken.
        """
        attributes = _EndpointAttributes(field_mask=_EP_LOCAL_SOCKADDR)
        _check(_ucp().ucp_ep_query(self._endpoint, ctypes.byref(attributes)))
        return _from_sockaddr(attributes.local_sockaddr)

    def carriers(self) -> str:
        """The transports it uses, e.g. "tcp" or "cuda_ipc,tcp"; "" where UCX does not tell."""
        entries = (_TransportEntry * _MAX_TRANSPORTS)()
        attributes = _EndpointAttributes(
            field_mask=_EP_TRANSPORTS,
            entries=entries,
            num_entries=_MAX_TRANSPORTS,
            entry_size=ctypes.sizeof(_TransportEntry),
        )
        if self.error is not None or _ucp().ucp_ep_query(self._endpoint, ctypes.byref(attributes)):
            return ""
        names = [entries[i].transport_name.decode() for i in range(attributes.num_entries)]
        return ",".join(dict.fromkeys(names))

    def close(self) -> Transfer:
        """Close by force: what is under way ends a moment later. The other end finds out by itself."""
        endpoint, self._endpoint = self._endpoint, 0
        transfer = Transfer(_ucp().ucp_ep_close_nbx(endpoint, _BY_FORCE) if endpoint else None)
        self._errors.pop(endpoint, None)
        return transfer


class Worker:
    """UCX's context and worker, its thread, and a listener. Methods may block for milliseconds while data streams."""

    def __init__(
        self,
        host: str,
        port_range: tuple[int, int],
        transports: str | None = None,
        devices: Sequence[str] = (),
        prepare_thread: Callable[[], None] | None = None,
    ) -> None:
        """Listen on `host`, an IP address of this node, on free ports of `port_range` (both ends included).

        `transports`: as in UCX_TLS; None: tcp, and what moves GPU memory where there is a GPU. `devices`: network
        devices beside that of `host`, e.g. mlx5_0:1. `prepare_thread` runs first in UCX's thread (the CUDA context).

        Raises:
            ConfigError: ucxx is missing, or UCX cannot do what is asked for.
        """
        ucx = _libucxx()
        self.version = ".".join(map(str, ucx.get_ucx_version()))
        interface = _interface_of(host)
        ports = _free_ports(host, port_range)
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
        self._errors: dict[int, str] = {}  # endpoint -> what broke it
        self._arrived: dict[SocketAddress, int] = {}  # client's address -> its request to be connected
        # UCX calls both from its thread, which waits for the interpreter meanwhile.
        self._on_error = _ERROR_CALLBACK(self._note_error)
        self._on_client = _CLIENT_CALLBACK(self._note_client)
        self._listener, self.port = self._listen(host, ports)
        # UCX takes an interface's first address, which may be another than the one asked for.
        listening = {ip for ip, _ in _listening(port_range) - before}
        if listening != {host}:
            raise ConfigError(f"UCX listens on {sorted(listening)} within {port_range}, wanted {host} alone")
        if prepare_thread is not None:
            self._worker.set_progress_thread_start_callback(prepare_thread)
        self._worker.start_progress_thread(polling_mode=False, epoll_timeout=1)

    def connect(self, address: SocketAddress) -> Connection:
        """Begin to connect to the listener at `address`, which must `accept` it.

        Raises:
            UcxError: there is no way to it.
        """
        sockaddr = _to_sockaddr(address)
        return self._connection(
            field_mask=_EP_ERR_MODE | _EP_ERR_HANDLER | _EP_SOCKADDR | _EP_FLAGS,
            flags=_EP_CLIENT_SERVER,
            sockaddr=ctypes.addressof(sockaddr),
            sockaddr_bytes=ctypes.sizeof(sockaddr),
        )

    def has_arrived(self, address: SocketAddress) -> bool:
        """Whether a client with that address has knocked."""
        return address in self._arrived

    def accept(self, address: SocketAddress) -> Connection:
        """Connect to the client with that address, which has arrived.

        Raises:
            UcxError: it is gone.
        """
        request = self._arrived.pop(address)
        return self._connection(
            field_mask=_EP_ERR_MODE | _EP_ERR_HANDLER | _EP_CONN_REQUEST | _EP_FLAGS,
            flags=_EP_NO_LOOPBACK,
            conn_request=request,
        )

    def refuse_all_but(self, addresses: set[SocketAddress]) -> None:
        """Send all other clients away."""
        for address in set(self._arrived) - addresses:
            _ucp().ucp_listener_reject(self._listener, self._arrived.pop(address))

    def receive(self, buffer: object, num_bytes: int, tag: int) -> Transfer:
        """Post `buffer` for the message `tag`, which must be as long, from whomever."""
        owner, address = _address_of(buffer)
        return Transfer(
            _ucp().ucp_tag_recv_nbx(self._handle, address, num_bytes, tag, 2**64 - 1, _NO_PARAMETERS), owner
        )

    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """End those that nothing has matched yet."""
        for transfer in transfers:
            transfer.cancel(self._handle)

    def take_strays(self) -> list[Transfer]:
        """Receive, to be forgotten, what arrived and nobody waits for: the remains of pulls that were given up."""
        strays = []
        info = _TagInfo()
        while _ucp().ucp_tag_probe_nb(self._handle, 0, 0, 0, ctypes.byref(info)) and info.num_bytes <= _MAX_STRAY_BYTES:
            message = _ucp().ucp_tag_probe_nb(self._handle, 0, 0, 1, ctypes.byref(info))
            owner, address = _address_of(bytearray(max(info.num_bytes, 1)))
            request = _ucp().ucp_tag_msg_recv_nbx(self._handle, address, info.num_bytes, message, _NO_PARAMETERS)
            strays.append(Transfer(request, owner))
        return strays

    def close(self) -> None:
        """Stop listening, and UCX's thread. All connections must have been closed before."""
        self.refuse_all_but(set())
        _ucp().ucp_listener_destroy(self._listener)
        self._worker.stop_progress_thread()
        self._worker = None

    def _listen(self, host: str, ports: Sequence[int]) -> tuple[int, int]:
        for port in ports:
            sockaddr = _to_sockaddr((host, port))
            parameters = _ListenerParameters(
                field_mask=_LISTENER_SOCKADDR | _LISTENER_CONN_HANDLER,
                sockaddr=ctypes.addressof(sockaddr),
                sockaddr_bytes=ctypes.sizeof(sockaddr),
                conn_callback=self._on_client,
            )
            listener = ctypes.c_void_p()
            status = _ucp().ucp_listener_create(self._handle, ctypes.byref(parameters), ctypes.byref(listener))
            if status == 0:
                return listener.value or 0, port
        raise ConfigError(f"UCX cannot listen on {host}: {status_text(status)}")

    def _connection(self, **parameters: object) -> Connection:
        endpoint = ctypes.c_void_p()
        made = _EndpointParameters(err_mode=_PEER_ERRORS, err_callback=self._on_error, **parameters)
        _check(_ucp().ucp_ep_create(self._handle, ctypes.byref(made), ctypes.byref(endpoint)))
        return Connection(self._handle, endpoint.value or 0, self._errors)

    def _note_error(self, _: int | None, endpoint: int | None, status: int) -> None:
        self._errors[endpoint or 0] = status_text(status)

    def _note_client(self, request: int | None, _: int | None) -> None:
        attributes = _ConnRequestAttributes(field_mask=_CONN_REQUEST_CLIENT)
        if request and not _ucp().ucp_conn_request_query(request, ctypes.byref(attributes)):
            self._arrived[_from_sockaddr(attributes.client_address)] = request


def status_text(status: int) -> str:
    """UCX's words for it."""
    text: bytes = _ucs().ucs_status_string(status)
    return text.decode()


def _check(status: int) -> None:
    if status:
        raise UcxError(status_text(status))


# What follows is of ucp.h, ucp_def.h and status.h. UCX looks only at the fields that a mask names.

_IN_PROGRESS = 1
_PEER_ERRORS = 1
_EP_ERR_MODE, _EP_ERR_HANDLER, _EP_SOCKADDR, _EP_FLAGS, _EP_CONN_REQUEST = 1 << 1, 1 << 2, 1 << 4, 1 << 5, 1 << 6
_EP_CLIENT_SERVER, _EP_NO_LOOPBACK = 1 << 0, 1 << 1
_EP_LOCAL_SOCKADDR, _EP_TRANSPORTS = 1 << 1, 1 << 3
_LISTENER_SOCKADDR, _LISTENER_CONN_HANDLER = 1 << 0, 1 << 2
_CONN_REQUEST_CLIENT = 1 << 0

#: ucp_request_param_t begins with a mask of the fields that are set, and flags.
_NO_PARAMETERS = bytes(128)
_BY_FORCE = struct.pack("=II", 1 << 4, 1 << 0) + bytes(120)

_Status = ctypes.c_int8  # the enumeration is packed
_Storage = ctypes.c_uint8 * 128  # struct sockaddr_storage
_ERROR_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, _Status)
_CLIENT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class _TagInfo(ctypes.Structure):
    """ucp_tag_recv_info_t."""

    _fields_ = (("tag", ctypes.c_uint64), ("num_bytes", ctypes.c_size_t))


class _TransportEntry(ctypes.Structure):
    """ucp_transport_entry_t."""

    _fields_ = (("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p))


class _EndpointAttributes(ctypes.Structure):
    """ucp_ep_attr_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", _Storage),
        ("remote_sockaddr", _Storage),
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


class _EndpointParameters(ctypes.Structure):
    """ucp_ep_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("err_mode", ctypes.c_int),
        ("err_callback", _ERROR_CALLBACK),
        ("err_argument", ctypes.c_void_p),
        ("user_data", ctypes.c_void_p),
        ("flags", ctypes.c_uint),
        ("sockaddr", ctypes.c_void_p),
        ("sockaddr_bytes", ctypes.c_uint32),
        ("conn_request", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("local_sockaddr", ctypes.c_void_p),
        ("local_sockaddr_bytes", ctypes.c_uint32),
    )


class _ListenerParameters(ctypes.Structure):
    """ucp_listener_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("sockaddr", ctypes.c_void_p),
        ("sockaddr_bytes", ctypes.c_uint32),
        ("accept_callback", ctypes.c_void_p),
        ("accept_argument", ctypes.c_void_p),
        ("conn_callback", _CLIENT_CALLBACK),
        ("conn_argument", ctypes.c_void_p),
    )


class _ConnRequestAttributes(ctypes.Structure):
    """ucp_conn_request_attr_t."""

    _fields_ = (("field_mask", ctypes.c_uint64), ("client_address", _Storage), ("client_id", ctypes.c_uint64))


def _to_sockaddr(address: SocketAddress) -> ctypes.Array[ctypes.c_uint8]:
    packed = ipaddress.ip_address(address[0]).packed
    family, padding = (socket.AF_INET, 8) if len(packed) == 4 else (socket.AF_INET6, 4)
    flow = b"" if len(packed) == 4 else bytes(4)
    raw = struct.pack("=H", family) + struct.pack("!H", address[1]) + flow + packed + bytes(padding)
    return (ctypes.c_uint8 * len(raw)).from_buffer_copy(raw)


def _from_sockaddr(storage: ctypes.Array[ctypes.c_uint8]) -> SocketAddress:
    raw = bytes(storage)
    (port,) = struct.unpack_from("!H", raw, 2)
    is_ipv4 = struct.unpack_from("=H", raw)[0] == socket.AF_INET
    return str(ipaddress.ip_address(raw[4:8] if is_ipv4 else raw[8:24])), port


def _address_of(buffer: Any) -> tuple[object, int]:
    """What keeps the buffer where it is, and where that is."""
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


@cache
def _ucp() -> ctypes.CDLL:
    """By this name the library that ucxx has loaded is found."""
    library = ctypes.CDLL("libucp.so.0")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    tag = ctypes.c_uint64
    for name, result, arguments in (
        ("ucp_tag_send_nbx", pointer, (pointer, pointer, size, tag, ctypes.c_char_p)),
        ("ucp_tag_recv_nbx", pointer, (pointer, pointer, size, tag, tag, ctypes.c_char_p)),
        ("ucp_tag_probe_nb", pointer, (pointer, tag, tag, ctypes.c_int, pointer)),
        ("ucp_tag_msg_recv_nbx", pointer, (pointer, pointer, size, pointer, ctypes.c_char_p)),
        ("ucp_request_free", None, (pointer,)),
        ("ucp_request_cancel", None, (pointer, pointer)),
        ("ucp_ep_create", _Status, (pointer, pointer, pointer)),
        ("ucp_ep_query", _Status, (pointer, pointer)),
        ("ucp_ep_close_nbx", pointer, (pointer, ctypes.c_char_p)),
        ("ucp_listener_create", _Status, (pointer, pointer, pointer)),
        ("ucp_listener_reject", _Status, (pointer, pointer)),
        ("ucp_listener_destroy", None, (pointer,)),
        ("ucp_conn_request_query", _Status, (pointer, pointer)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _quick() -> ctypes.PyDLL:
    """For what neither blocks nor takes UCX's lock: giving up the interpreter for it would cost more than it does."""
    library = ctypes.PyDLL("libucp.so.0")
    library.ucp_request_check_status.restype = _Status
    library.ucp_request_check_status.argtypes = [ctypes.c_void_p]
    return library


@cache
def _ucs() -> ctypes.CDLL:
    library = ctypes.CDLL("libucs.so.0")
    library.ucs_status_string.restype = ctypes.c_char_p
    library.ucs_status_string.argtypes = [_Status]
    return library


def _tame() -> None:
    """Undo what loading UCX does to a process. Its variables could, too, if they are set before it is loaded."""
    library = _ucs()
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


def _free_ports(host: str, port_range: tuple[int, int]) -> list[int]:
    """Some free ports, in random order. UCX itself would look for one for ever."""
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
    if len(free) < 2:
        raise ConfigError(f"port range {first}-{last}: {len(free)} ports of {host} are free, UCX needs two")
    return free


def _check_devices(info: str, devices: Sequence[str], transports: str) -> set[str]:
    """The transports that UCX found. An unknown device is no error to it."""
    seen = re.findall(r"resource \d+ .* (\S+)/(\S+)$", info, flags=re.MULTILINE)
    missing = [device for device in devices if device not in {name for _, name in seen}]
    if missing:
        has = ", ".join("/".join(pair) for pair in seen)
        raise ConfigError(f"UCX has no transport of {transports!r} on {missing}, only {has or 'none'}")
    return {transport for transport, _ in seen}


def _listening(port_range: tuple[int, int]) -> set[SocketAddress]:
    """This process's sockets within the range."""
    sockets = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return {(address.ip, address.port) for address in sockets if port_range[0] <= address.port <= port_range[1]}
