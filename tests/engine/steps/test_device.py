"""What every StepDevice does; the GPU's where there is one."""

from __future__ import annotations

import pytest
import torch

from engine.steps.cuda import CudaSteps
from tests.engine.steps.emulator import Emulator


@pytest.fixture(params=["emulated", "cuda"])
def device(request):
    if request.param == "emulated":
        return Emulator()
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return CudaSteps(torch.device("cuda", torch.cuda.current_device()))


def test_copies_leave_pinned_memory_and_arrive_in_order(device):
    words, event = [device.pinned(3) for _ in range(2)], device.event()
    event.synchronize()
    target = torch.zeros(3, dtype=torch.int64, device=device.device)
    for number, each in enumerate(words):
        assert (each.shape, each.dtype, each.device.type) == ((3,), torch.int64, "cpu")
        each.fill_(number + 1)
        device.copy(target, each)
    event.record()
    event.synchronize()
    assert target.tolist() == [2, 2, 2]


def test_a_graph_runs_on_what_the_copies_before_it_brought(device):
    words = device.pinned(2)
    given, result = (torch.zeros(2, dtype=torch.int64, device=device.device) for _ in range(2))
    result.add_(1)  # whatever has to be made ready for that
    graph = device.capture(lambda: result.copy_(2 * given + 1))
    assert result.tolist() == [1, 1], "a capture does not run"
    words.copy_(torch.tensor([5, 6]))
    device.copy(given, words)
    graph.launch()
    assert result.tolist() == [11, 13]
    device.synchronize()


def test_what_waits_is_an_error_and_all_goes_on_after_it(device):
    given, result = (torch.ones(2, device=device.device) for _ in range(2))
    with pytest.raises(RuntimeError), device.forbid_waits():
        float(given.sum())
    with pytest.raises(RuntimeError):
        device.capture(lambda: result.mul_(float(given.sum())))
    device.synchronize()
    float(given.sum())
    graph = device.capture(lambda: result.copy_(given * 3))
    graph.launch()
    assert result.tolist() == [3, 3]
