"""A pool on a GPU is one aligned allocation of the driver's, which is given back once; what cannot be had is said."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess

import pytest

from engine.memory.pool_allocation import ALIGNMENT, CudaDriver, PeerAllocation, PoolAllocation
from messages.errors import ConfigError


class FakeDriver:
    """Memory of `capacity` bytes that begins at `base`."""

    def __init__(self, base: int = 0x7F00_0000_0100, capacity: int = 1 << 40, refusal: str = "") -> None:
        self.base = base
        self.capacity = capacity
        self.refusal = refusal
        self.sizes: dict[int, int] = {}
        self.exported: list[int] = []

    def allocate(self, num_bytes: int) -> tuple[str, int]:
        if num_bytes > self.capacity:
            return "CUDA_ERROR_OUT_OF_MEMORY", 0
        self.sizes[self.base] = num_bytes
        return "", self.base

    def free(self, address: int) -> str:
        del self.sizes[address]
        return ""

    def export(self, address: int) -> tuple[str, bytes]:
        self.exported.append(address)
        return self.refusal, b"handle"


@pytest.mark.parametrize("base", [0x7F00_0000_0100, 0x7F00_0020_0000])
def test_the_pool_is_aligned_and_lies_within_what_was_allocated(base):
    driver = FakeDriver(base)
    allocation = PoolAllocation(10_000_000, driver)
    assert allocation.address % ALIGNMENT == 0
    assert base <= allocation.address
    assert allocation.address + 10_000_000 <= base + driver.sizes[base]
    shown = allocation.__cuda_array_interface__
    assert (shown["shape"], shown["data"], shown["typestr"]) == ((10_000_000,), (allocation.address, False), "|u1")


def test_it_is_given_back_with_the_last_reference():
    driver = FakeDriver()
    allocation = PoolAllocation(1000, driver)
    assert driver.sizes
    del allocation
    gc.collect()
    assert driver.sizes == {}


def test_a_pool_that_does_not_fit_is_one_line_that_says_what_was_wanted():
    driver = FakeDriver(capacity=1000)
    with pytest.raises(ConfigError, match=r"5,000,000 bytes .* CUDA_ERROR_OUT_OF_MEMORY; lower engine.kv_cache_memory"):
        PoolAllocation(5_000_000, driver)
    gc.collect()  # nothing is given back that was not had


def test_a_pool_that_cannot_be_exported_is_one_line_that_says_what_would_help(caplog):
    driver = FakeDriver(refusal="CUDA_ERROR_NOT_SUPPORTED")
    PoolAllocation(1000, driver).check_export()
    (record,) = caplog.records
    assert "cannot be exported to other processes (CUDA_ERROR_NOT_SUPPORTED)" in record.message
    assert "what helps" in record.message


def test_nothing_is_said_of_a_pool_that_can_be_exported(caplog):
    driver = FakeDriver()
    allocation = PoolAllocation(1000, driver)
    allocation.check_export()
    assert driver.exported == [allocation.address]
    assert caplog.records == []


# ----------------------------------------------------------------------------------------------- the driver's own calls

#: A driver by the same names and in the same form, whose memory is the process's own; handles have the address in them.
LIBRARY = """
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long long CUdeviceptr;
typedef struct { char reserved[64]; } CUipcMemHandle;
static CUdeviceptr base; static size_t size;
int cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
    if (n > 1 << 30) return 2;
    *p = base = (CUdeviceptr)malloc(n); size = n; return 0;
}
int cuMemFree_v2(CUdeviceptr p) { if (p != base) return 1; free((void *)p); base = size = 0; return 0; }
int cuMemGetAddressRange_v2(CUdeviceptr *p, size_t *n, CUdeviceptr at) {
    if (at < base || at >= base + size) return 1;
    *p = base; *n = size; return 0;
}
int cuIpcGetMemHandle(CUipcMemHandle *h, CUdeviceptr at) {
    memset(h, 7, sizeof *h); memcpy(h->reserved + 56, &base, 8); return 0;
}
int cuIpcOpenMemHandle_v2(CUdeviceptr *p, CUipcMemHandle h, unsigned flags) {
    for (int i = 0; i < 56; i++) if (h.reserved[i] != 7) return 1;
    memcpy(p, h.reserved + 56, 8); return flags == 1 ? 0 : 1;
}
int cuIpcCloseMemHandle(CUdeviceptr p) { return p == base ? 0 : 1; }
int cuPointerGetAttribute(void *data, int attribute, CUdeviceptr at) {
    if (attribute != 9 || at < base || at >= base + size) return 1;
    *(int *)data = 3; return 0;
}
int cuGetErrorName(int error, const char **name) {
    if (error != 2) return 1;
    *name = "CUDA_ERROR_OUT_OF_MEMORY"; return 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> CudaDriver:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path_factory.mktemp("driver") / "driver.c"
    source.write_text(LIBRARY)
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return CudaDriver(ctypes.CDLL(str(library)))


def test_what_was_exported_is_mapped_at_its_place_in_the_allocation(driver):
    allocation = PoolAllocation(5_000_000, driver)
    error, handle = driver.export(allocation.address)
    assert (error, len(handle)) == ("", 72)
    peer = PeerAllocation(handle, 5_000_000, driver)
    assert peer.__cuda_array_interface__ == allocation.__cuda_array_interface__
    assert peer.ordinal == 3  # torch copies an array of whose device it is not told
    base = allocation._base
    assert driver.close(base) == ""
    del peer, allocation
    assert driver.free(base) != ""  # it was freed


def test_errors_have_the_drivers_names(driver):
    assert driver.allocate(1 << 40)[0] == "CUDA_ERROR_OUT_OF_MEMORY"
    assert driver.export(5)[0] == "error 1"
    with pytest.raises(OSError, match="error 1"):
        PeerAllocation(bytes(72), 100, driver)
