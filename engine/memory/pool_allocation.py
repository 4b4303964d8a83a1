"""The memory of a pool on a GPU: one plain allocation, which the driver can give other processes a handle of.

Not torch's allocator: with `expandable_segments` it gives memory that has no such handle, and without it a pool may be
a part of a larger piece, all of which would be given away. The driver's cuMemAlloc has neither.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any, Protocol

import torch

from messages.errors import ConfigError

logger = logging.getLogger(__name__)

ALIGNMENT = 2 << 20  #: bytes: the pages of a GPU, and what cuda_ipc and RDMA register as one
_IPC_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: also memory of another GPU
_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


class _IpcHandle(ctypes.Structure):
    """The driver's CUipcMemHandle, which is passed by value."""

    _fields_ = (("data", ctypes.c_char * _IPC_HANDLE_BYTES),)


class Driver(Protocol):
    """What of CUDA's driver this takes. Each call answers with the driver's name of an error, "" where it went well."""

    def allocate(self, num_bytes: int) -> tuple[str, int]:
        """Allocate in the calling thread's context; also return the address."""
        ...

    def free(self, address: int) -> str:
        """Free what `allocate` gave."""
        ...

    def export(self, address: int) -> tuple[str, bytes]:
        """Make a handle for other processes of the allocation that `address` lies in, and where in it that is."""
        ...


class CudaDriver:
    """The driver itself, libcuda, by its stable C interface."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        size, pointer = ctypes.c_size_t, ctypes.c_uint64
        library.cuMemAlloc_v2.argtypes = [ctypes.POINTER(pointer), size]
        library.cuMemFree_v2.argtypes = [pointer]
        library.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_IpcHandle), pointer]
        library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(pointer), _IpcHandle, ctypes.c_uint]
        library.cuIpcCloseMemHandle.argtypes = [pointer]
        library.cuMemGetAddressRange_v2.argtypes = [ctypes.POINTER(pointer), ctypes.POINTER(size), pointer]
        library.cuPointerGetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, pointer]
        library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]

    def allocate(self, num_bytes: int) -> tuple[str, int]:
        """Call cuMemAlloc."""
        address = ctypes.c_uint64()
        status = self._library.cuMemAlloc_v2(ctypes.byref(address), num_bytes)
        return self._name(status), address.value

    def free(self, address: int) -> str:
        """Call cuMemFree."""
        return self._name(self._library.cuMemFree_v2(address))

    def export(self, address: int) -> tuple[str, bytes]:
        """Call cuIpcGetMemHandle; the handle is that of the whole allocation."""
        base, num_bytes, handle = ctypes.c_uint64(), ctypes.c_size_t(), _IpcHandle()
        status = self._library.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(num_bytes), address)
        status = status or self._library.cuIpcGetMemHandle(ctypes.byref(handle), address)
        return self._name(status), bytes(handle) + (address - base.value).to_bytes(8, "little")

    def open(self, handle: bytes) -> tuple[str, int, int]:
        """Call cuIpcOpenMemHandle for what `export` gave in another process; also return the base and the address."""
        base = ctypes.c_uint64()
        memory = _IpcHandle.from_buffer_copy(handle)
        status = self._library.cuIpcOpenMemHandle_v2(ctypes.byref(base), memory, _LAZY_ENABLE_PEER_ACCESS)
        return self._name(status), base.value, base.value + int.from_bytes(handle[_IPC_HANDLE_BYTES:], "little")

    def ordinal(self, address: int) -> tuple[str, int]:
        """Call cuPointerGetAttribute; also return the number, in this process, of the GPU whose memory that is."""
        found = ctypes.c_int()
        status = self._library.cuPointerGetAttribute(ctypes.byref(found), _DEVICE_ORDINAL, address)
        return self._name(status), found.value

    def close(self, base: int) -> str:
        """Call cuIpcCloseMemHandle."""
        return self._name(self._library.cuIpcCloseMemHandle(base))

    def _name(self, status: int) -> str:
        if status == 0:
            return ""
        name = ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(name))
        return name.value.decode() if name.value else f"error {status}"


@functools.cache
def cuda_driver() -> CudaDriver:
    """Return this machine's driver.

    Raises:
        OSError: there is none.
    """
    return CudaDriver(ctypes.CDLL("libcuda.so.1"))


class PoolAllocation:
    """Aligned bytes of a GPU, which torch takes for an array of its own. Freed with the last tensor over it."""

    def __init__(self, num_bytes: int, driver: Driver) -> None:
        """Allocate in the calling thread's context.

        Raises:
            ConfigError: there is not that much memory.
        """
        self._driver = driver
        # The driver promises 256 bytes; what it gives of this size is aligned to pages, but that is its own business.
        error, self._base = driver.allocate(num_bytes + ALIGNMENT)
        if error:
            raise ConfigError(
                f"a KV pool of {num_bytes:,} bytes could not be allocated on the GPU: {error}; "
                "lower engine.kv_cache_memory or engine.gpu_memory_utilization, or end what else uses this GPU's memory"
            )
        self.address = -(-self._base // ALIGNMENT) * ALIGNMENT
        #: by which torch takes the bytes; whoever does keeps this object
        self.__cuda_array_interface__ = _array_interface(self.address, num_bytes)

    def check_export(self) -> None:
        """Log one line where other processes cannot be given this memory."""
        error, _ = self._driver.export(self.address)
        if error:
            logger.warning(
                "the KV pool cannot be exported to other processes (%s): workers of this node will not pull from it "
                "over cuda_ipc; what helps: Linux itself (not WSL), GPUs that are not cut up by MIG, containers that "
                "share their IPC namespace",
                error,
            )

    def __del__(self) -> None:
        if getattr(self, "_base", 0):
            error = self._driver.free(self._base)
            if error:
                logger.warning("the memory of a KV pool is not given back: %s", error)


def allocate_pool(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Allocate a pool, `[num_bytes]` uint8, zeroed; its memory is no part of what torch counts as its own.

    Raises:
        ConfigError: there is not that much memory.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.empty_cache()  # what loading the model left behind is the pool's now
    torch.zeros(1, device=device)  # the thread's context is there, whoever calls the driver
    allocation = PoolAllocation(num_bytes, cuda_driver())
    allocation.check_export()
    pool: torch.Tensor = torch.as_tensor(allocation, device=device)
    pool.zero_()
    torch.cuda.synchronize(device)  # other streams than this one will use it
    return pool


class PeerAllocation:
    """Another process's allocation on a GPU, mapped here; torch takes it for an array. Closed with the last tensor."""

    def __init__(self, handle: bytes, num_bytes: int, driver: CudaDriver) -> None:
        """Map what `Driver.export` described in the calling thread's context.

        Raises:
            OSError: the driver refuses.
        """
        self._driver = driver
        error, self._base, address = driver.open(handle)
        if error:
            raise OSError(error)
        error, self.ordinal = driver.ordinal(address)
        if error:
            raise OSError(error)
        self.__cuda_array_interface__ = _array_interface(address, num_bytes)

    def __del__(self) -> None:
        if getattr(self, "_base", 0):
            error = self._driver.close(self._base)
            if error:
                logger.warning("a peer's pool stays mapped: %s", error)


def _array_interface(address: int, num_bytes: int) -> dict[str, Any]:
    """Describe bytes on a GPU, as numba does."""
    return {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}
