"""What a device's memory leaves for KV, by a reader that says what a device would."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch

from engine.memory.device_room import DeviceUse, check_weights_fit, device_room, measure
from messages.errors import ConfigError

GIB = 2**30


@dataclass
class FakeReader:
    """A device: what tensors hold, what others use, the peak of a step that `run` carries out."""

    total: int = 80 * GIB
    others: int = GIB  #: of other processes, and this one's own that no tensor holds
    weights: int = 16 * GIB
    unused: int = 0  #: held, in no tensor: given back when it settles
    scratch: int = GIB
    peak: int = 0
    told: list[str] = field(default_factory=list)

    def settle(self) -> None:
        self.unused = 0
        self.peak = self.weights
        self.told.append("settled")

    def free_and_total(self) -> tuple[int, int]:
        return self.total - self.others - self.held(), self.total

    def held(self) -> int:
        return self.weights + self.unused

    def peak_held(self) -> int:
        return self.peak

    def run(self, step: int, outside: int = 0) -> int:
        """A step of so many bytes, in a pool of its own; the first one loads what is no tensor's."""
        self.told.append("ran")
        self.peak = max(self.peak, self.weights + self.scratch + step)
        self.unused = self.scratch + step
        self.others += outside
        return self.scratch


def test_a_step_takes_what_its_peak_is_above_the_weights_and_the_pool_of_the_trial():
    reader = FakeReader(unused=5 * GIB, peak=70 * GIB)  # what loading left is none of it
    use = measure(reader, lambda: reader.run(3 * GIB, outside=GIB // 2))
    assert use == DeviceUse(
        total=80 * GIB, free=80 * GIB - 3 * GIB // 2 - 16 * GIB, held=16 * GIB, step=3 * GIB, outside=GIB // 2
    )
    assert reader.told == ["settled", "ran", "settled"]


def test_a_step_that_does_not_fit_says_what_there_is_and_what_would_help():
    reader = FakeReader(total=18 * GIB)

    def run() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory ...")

    with pytest.raises(ConfigError, match=r"they take 16\.00 GiB of the device's 18\.00 GiB, 1\.00 GiB are") as raised:
        measure(reader, run)
    assert "engine.max_num_batched_tokens" in raised.value.message
    assert "\n" not in raised.value.message


USE = DeviceUse(total=80 * GIB, free=62 * GIB, held=16 * GIB, step=3 * GIB, outside=GIB)


def test_kv_gets_what_weights_and_steps_leave_of_the_share():
    assert device_room(USE, kv_cache_bytes=None, memory_utilization=0.9) == (72 - 16 - 3 - 1) * GIB
    assert device_room(USE, kv_cache_bytes=None, memory_utilization=0.5) == (40 - 16 - 3 - 1) * GIB


def test_kv_gets_no_more_than_is_free_where_others_use_the_device_too():
    crowded = DeviceUse(total=80 * GIB, free=20 * GIB, held=16 * GIB, step=3 * GIB, outside=0)
    assert device_room(crowded, kv_cache_bytes=None, memory_utilization=0.9) == 17 * GIB


def test_two_workers_on_one_device_take_each_its_share():
    whole, weights, step = 80 * GIB, 16 * GIB, 2 * GIB
    alone = DeviceUse(total=whole, free=whole - weights, held=weights, step=step, outside=0)
    first = device_room(alone, kv_cache_bytes=None, memory_utilization=0.45)
    beside = DeviceUse(total=whole, free=whole - 2 * weights - first, held=weights, step=step, outside=0)
    assert device_room(beside, kv_cache_bytes=None, memory_utilization=0.45) == first
    assert 2 * (first + weights + step) <= whole


def test_an_explicit_size_counts_whatever_the_share_if_it_is_free_beside_a_step():
    assert device_room(USE, kv_cache_bytes=59 * GIB, memory_utilization=0.1) == 59 * GIB
    wanted = "a KV pool of 59.00 GiB was asked for, and 58.99 GiB of the device's 80.00 GiB are free beside"
    scarce = DeviceUse(total=80 * GIB, free=62 * GIB - 2**23, held=16 * GIB, step=3 * GIB, outside=0)
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        device_room(scarce, kv_cache_bytes=59 * GIB, memory_utilization=0.9)


@pytest.mark.parametrize(("free", "utilization"), [(62, 0.25), (2, 0.9)])
def test_where_nothing_is_left_a_line_says_who_has_it(free, utilization):
    use = DeviceUse(total=80 * GIB, free=free * GIB, held=16 * GIB, step=3 * GIB, outside=GIB)
    with pytest.raises(ConfigError, match=rf"weights take 16.00 GiB, the largest step 3.00 GiB, and {free}.00 GiB are"):
        device_room(use, kv_cache_bytes=None, memory_utilization=utilization)


def test_weights_that_do_not_fit_are_refused_before_they_are_moved():
    check_weights_fit(63 * GIB, FakeReader())
    with pytest.raises(ConfigError, match=r"weights take 140\.00 GiB, and 63\.00 GiB of the device's 80"):
        check_weights_fit(140 * GIB, FakeReader())
