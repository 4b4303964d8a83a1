"""A pool on a GPU is one aligned allocation of the driver's, which is given back once; what cannot be had is said."""

from __future__ import annotations

import gc

import pytest

from engine.memory.pool_allocation import ALIGNMENT, PoolAllocation
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
    with pytest.raises(ConfigError, match=r"5,000,000 bytes .* CUDA_ERROR_OUT_OF_MEMORY; give it fewer"):
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
