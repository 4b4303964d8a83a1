"""UCX's own C interface, as far as transport.ucx.worker uses it: of ucp.h, ucp_def.h and status.h of UCX 1.21.

The interface is public and kept compatible: UCX looks only at the fields of a structure that its mask names. The
libraries are those that ucxx has loaded, which must have happened before.
"""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import struct
from functools import cache
from typing import TypeAlias

SocketAddress: TypeAlias = tuple[str, int]

IN_PROGRESS = 1
PEER_ERRORS = 1
EP_ERR_MODE, EP_ERR_HANDLER, EP_SOCKADDR, EP_FLAGS, EP_CONN_REQUEST = 1 << 1, 1 << 2, 1 << 4, 1 << 5, 1 << 6
EP_CLIENT_SERVER, EP_NO_LOOPBACK = 1 << 0, 1 << 1
EP_LOCAL_SOCKADDR, EP_TRANSPORTS = 1 << 1, 1 << 3
LISTENER_SOCKADDR, LISTENER_CONN_HANDLER = 1 << 0, 1 << 2
CONN_REQUEST_CLIENT = 1 << 0
MEMORY_ADDRESS, MEMORY_LENGTH = 1 << 0, 1 << 1

#: ucp_request_param_t begins with a mask of the fields that are set, flags, and where the request lies.
NO_PARAMETERS = bytes(128)
BY_FORCE = struct.pack("=II", 1 << 4, 1 << 0) + bytes(120)
_CACHE_LINE_BYTES = 64

Status = ctypes.c_int8  # the enumeration is packed
Storage = ctypes.c_uint8 * 128  # struct sockaddr_storage
ERROR_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, Status)
CLIENT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)


class TagInfo(ctypes.Structure):
    """UCX's ucp_tag_recv_info_t."""

    _fields_ = (("tag", ctypes.c_uint64), ("num_bytes", ctypes.c_size_t))


class TransportEntry(ctypes.Structure):
    """UCX's ucp_transport_entry_t."""

    _fields_ = (("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p))


class EndpointAttributes(ctypes.Structure):
    """UCX's ucp_ep_attr_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", Storage),
        ("remote_sockaddr", Storage),
        ("entries", ctypes.POINTER(TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


class EndpointParameters(ctypes.Structure):
    """UCX's ucp_ep_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("err_mode", ctypes.c_int),
        ("err_callback", ERROR_CALLBACK),
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


class ListenerParameters(ctypes.Structure):
    """UCX's ucp_listener_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("sockaddr", ctypes.c_void_p),
        ("sockaddr_bytes", ctypes.c_uint32),
        ("accept_callback", ctypes.c_void_p),
        ("accept_argument", ctypes.c_void_p),
        ("conn_callback", CLIENT_CALLBACK),
        ("conn_argument", ctypes.c_void_p),
    )


class ConnRequestAttributes(ctypes.Structure):
    """UCX's ucp_conn_request_attr_t."""

    _fields_ = (("field_mask", ctypes.c_uint64), ("client_address", Storage), ("client_id", ctypes.c_uint64))


class MemoryParameters(ctypes.Structure):
    """UCX's ucp_mem_map_params_t."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("num_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_uint),
        ("protection", ctypes.c_uint),
        ("memory_type", ctypes.c_int),
        ("exported", ctypes.c_void_p),
    )


class ContextAttributes(ctypes.Structure):
    """The first fields of UCX's ucp_context_attr_t; there is room for the others."""

    _fields_ = (("field_mask", ctypes.c_uint64), ("request_bytes", ctypes.c_size_t), ("others", Storage))


class RequestMemory:
    """Memory of ours for one request of UCX, which has it until the request is over, and a moment longer."""

    __slots__ = ("_memory", "parameters")

    def __init__(self, request_bytes: int) -> None:
        """Allocate it; UCX wants `request_bytes` before the place that `parameters` name."""
        self._memory = ctypes.create_string_buffer(request_bytes + 2 * _CACHE_LINE_BYTES)
        end = ctypes.addressof(self._memory) + request_bytes + _CACHE_LINE_BYTES
        place = end // _CACHE_LINE_BYTES * _CACHE_LINE_BYTES
        self.parameters = struct.pack("=IIQ", 1 << 0, 0, place) + bytes(112)


def request_bytes_of(context: int) -> int:
    """Return how large a request of this context (ucp_context_h) is."""
    attributes = ContextAttributes(field_mask=1 << 0)
    status = ucp().ucp_context_query(context, ctypes.byref(attributes))
    assert status == 0, status_text(status)
    num_bytes: int = attributes.request_bytes
    return num_bytes


def to_sockaddr(address: SocketAddress) -> ctypes.Array[ctypes.c_uint8]:
    """Return the address in its C form, struct sockaddr_in or sockaddr_in6."""
    packed = ipaddress.ip_address(address[0]).packed
    family, padding = (socket.AF_INET, 8) if len(packed) == 4 else (socket.AF_INET6, 4)
    flow = b"" if len(packed) == 4 else bytes(4)
    raw = struct.pack("=H", family) + struct.pack("!H", address[1]) + flow + packed + bytes(padding)
    return (ctypes.c_uint8 * len(raw)).from_buffer_copy(raw)


def from_sockaddr(storage: ctypes.Array[ctypes.c_uint8]) -> SocketAddress:
    """Return the address, as Python has it, in a `sockaddr_storage` that `to_sockaddr` or UCX filled."""
    raw = bytes(storage)
    (port,) = struct.unpack_from("!H", raw, 2)
    is_ipv4 = struct.unpack_from("=H", raw)[0] == socket.AF_INET
    return str(ipaddress.ip_address(raw[4:8] if is_ipv4 else raw[8:24])), port


@cache
def ucp() -> ctypes.CDLL:
    """Return UCX's own library (libucp), the one that ucxx has loaded."""
    library = ctypes.CDLL("libucp.so.0")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    tag = ctypes.c_uint64
    for name, result, arguments in (
        ("ucp_tag_send_nbx", pointer, (pointer, pointer, size, tag, ctypes.c_char_p)),
        ("ucp_tag_recv_nbx", pointer, (pointer, pointer, size, tag, tag, ctypes.c_char_p)),
        ("ucp_tag_probe_nb", pointer, (pointer, tag, tag, ctypes.c_int, pointer)),
        ("ucp_tag_msg_recv_nbx", pointer, (pointer, pointer, size, pointer, ctypes.c_char_p)),
        ("ucp_context_query", Status, (pointer, pointer)),
        ("ucp_mem_map", Status, (pointer, pointer, pointer)),
        ("ucp_mem_unmap", Status, (pointer, pointer)),
        ("ucp_request_free", None, (pointer,)),
        ("ucp_request_cancel", None, (pointer, pointer)),
        ("ucp_ep_create", Status, (pointer, pointer, pointer)),
        ("ucp_ep_query", Status, (pointer, pointer)),
        ("ucp_ep_close_nbx", pointer, (pointer, ctypes.c_char_p)),
        ("ucp_listener_create", Status, (pointer, pointer, pointer)),
        ("ucp_listener_reject", Status, (pointer, pointer)),
        ("ucp_listener_destroy", None, (pointer,)),
        ("ucp_conn_request_query", Status, (pointer, pointer)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def quick() -> ctypes.PyDLL:
    """Return UCX's library for calls that neither block nor take its lock: these keep the GIL, which is cheaper."""
    library = ctypes.PyDLL("libucp.so.0")
    library.ucp_request_check_status.restype = Status
    library.ucp_request_check_status.argtypes = [ctypes.c_void_p]
    return library


@cache
def ucs() -> ctypes.CDLL:
    """Return UCX's library of services (libucs), below libucp."""
    library = ctypes.CDLL("libucs.so.0")
    library.ucs_status_string.restype = ctypes.c_char_p
    library.ucs_status_string.argtypes = [Status]
    return library


def status_text(status: int) -> str:
    """Return UCX's words for a status."""
    text: bytes = ucs().ucs_status_string(status)
    return text.decode()
