from __future__ import annotations

import pytest
import torch

from engine.model import devices
from engine.model.devices import check_device, choose_device, cuda_facts
from messages.errors import ConfigError

DRIVER = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 02:08:09 UTC 2025
GCC version:  gcc version 12.2.0
"""
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)  Sun Jul 27\n"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


@pytest.fixture(params=[(DRIVER, "570.124.06"), (OPEN_DRIVER, "580.65.06")], ids=["closed", "open"])
def driver(request, tmp_path, monkeypatch):
    text, version = request.param
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "version")
    return version


def test_the_drivers_version_is_read_where_it_tells_it(driver):
    assert cuda_facts(torch.device("cuda")).driver == driver


def test_a_cuda_device_that_is_not_there_is_refused_with_what_is_there(driver):
    with pytest.raises(ConfigError, match=rf"device cuda:1 was asked for: torch .*{driver} is there"):
        choose_device("cuda:1", print)


def test_the_cpu_that_is_taken_for_want_of_a_working_gpu_is_said(driver):
    said = []
    assert choose_device("auto", said.append) == torch.device("cpu")
    assert len(said) == 1
    assert said[0].startswith("computing on the CPU: torch ")


def test_whoever_wants_a_cpu_has_no_gpu_opened(monkeypatch):
    monkeypatch.setattr(devices, "cuda_facts", lambda _: pytest.fail("a GPU was looked at"))
    assert choose_device("cpu", print) == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_where_there_is_no_driver_nothing_is_said(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "none")
    said = []
    assert choose_device(wanted, said.append) == torch.device("cpu")
    assert said == []


def test_a_cpu_does_for_everything():
    check_device(torch.device("cpu"), torch.bfloat16, "fp8", use_kernels=True)


def test_a_device_that_lacks_something_is_refused(monkeypatch):
    facts = devices.CudaFacts(torch="2.11", torch_cuda="13.0", driver="580", name="NVIDIA A100", capability=(8, 0))
    monkeypatch.setattr(devices, "cuda_facts", lambda _: facts)
    check_device(torch.device("cuda"), torch.bfloat16, "auto", use_kernels=True)
    with pytest.raises(ConfigError, match=r"NVIDIA A100 has compute capability 8\.0, KV in float8 wants 8\.9"):
        check_device(torch.device("cuda"), torch.bfloat16, "fp8", use_kernels=True)


def test_what_torch_lists_is_told_apart_by_kind():
    listed = ["sm_75", "sm_90a", "sm_120", "compute_120", "gfx90a"]
    assert devices._architectures(listed, "sm") == ((7, 5), (9, 0), (12, 0))
    assert devices._architectures(listed, "compute") == ((12, 0),)
