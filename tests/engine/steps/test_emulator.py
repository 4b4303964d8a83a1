"""The emulator notices what would go wrong on a GPU: what it lets pass is worth something."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.steps.emulator import Emulator
from tests.interpreted import triton_kernels


@pytest.fixture
def emulator() -> Emulator:
    return Emulator()


def test_what_a_copy_leaves_from_must_not_change_before_its_event(emulator):
    source, target, event = emulator.pinned(2), torch.zeros(2, dtype=torch.int64), emulator.event()
    source.fill_(1)
    emulator.copy(target, source)
    source.fill_(2)
    event.record()
    with pytest.raises(AssertionError, match="what copy 1 leaves from changed before it ran"):
        event.synchronize()


def test_an_event_tells_of_what_was_put_on_its_way_before_it_alone(emulator):
    first, second = emulator.pinned(1), emulator.pinned(1)
    target, event = torch.zeros(1, dtype=torch.int64), emulator.event()
    emulator.copy(target, first)
    event.record()
    emulator.copy(target, second)
    event.synchronize()
    first.fill_(5)
    second.fill_(5)
    with pytest.raises(AssertionError, match="what copy 2 leaves from"):
        emulator.synchronize()


def test_a_graph_runs_again_on_what_its_memory_holds_by_then_and_not_when_it_is_captured(emulator):
    given, result = torch.ones(3), torch.zeros(3)
    graph = emulator.capture(lambda: result.copy_(given[1:].sum() * given))
    assert result.tolist() == [0, 0, 0]
    given.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.launch()
    assert result.tolist() == [5, 10, 15]


def test_a_graph_does_not_see_what_the_host_has_learned_since(emulator):
    result, lens = torch.zeros(1, dtype=torch.int64), [3]
    graph = emulator.capture(lambda: result.add_(lens[0]))
    lens[0] = 100
    graph.launch()
    assert result.tolist() == [3]


def test_a_graph_does_not_follow_a_tensor_that_was_made_anew(emulator):
    places, result = {"table": torch.ones(2)}, torch.zeros(2)
    graph = emulator.capture(lambda: result.copy_(places["table"]))
    places["table"] = torch.full((2,), 7.0)
    with pytest.raises(AssertionError, match=r"memory was given back: torch.float32 \(2,\)"):
        graph.launch()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.long().repeat_interleave(x.long()),
        lambda x: torch.tensor([1.0, 2.0]) + x,
        lambda x: torch.from_numpy(np.ones(2)) + x,
        lambda x: bool((x > 0).all()),
    ],
    ids=["item", "mask", "nonzero", "repeat", "list", "array", "bool"],
)
def test_what_waits_for_the_device_is_an_error_in_a_capture_and_where_it_is_forbidden(emulator, wait):
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="the host waits for the device"):
        emulator.capture(lambda: wait(x))
    with pytest.raises(RuntimeError, match="the host waits for the device"), emulator.forbid_waits():
        wait(x)
    wait(x)


@pytest.mark.slow
def test_launches_of_triton_are_part_of_a_graph(emulator):
    kernels = triton_kernels()
    pool = torch.zeros(4, 1, 2, 16)
    key, at = torch.ones(1, 1, 16), torch.tensor([2, 1])
    graph = emulator.capture(lambda: kernels.write_kv(key, key, pool, pool, at[:1], at[1:]))
    key.fill_(3)
    at.copy_(torch.tensor([0, 0]))
    graph.launch()
    assert pool[0, 0, 0].tolist() == [3] * 16
