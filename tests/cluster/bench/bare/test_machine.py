from __future__ import annotations

import pytest
import torch

from cluster.bench.bare.machine import measure_machine, torch_threads


def test_torch_has_as_many_threads_afterwards_as_before_whatever_happens():
    before = torch.get_num_threads()

    def fail() -> None:
        with torch_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_a_cpu_has_a_name_and_rates_that_can_be():
    before = torch.get_num_threads()
    machine = measure_machine(torch.device("cpu"), torch.float32, 1)
    assert machine.name
    assert machine.num_threads == 1
    assert 1e8 < machine.copy_bytes_per_s < 1e12
    assert 1e8 < machine.flops_per_s < 1e13
    assert torch.get_num_threads() == before
