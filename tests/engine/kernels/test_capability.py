from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.capability import CudaFacts, device_refusal, heads_refusal, use_refusal

ROOT = Path(__file__).parents[3]


def facts(**changed) -> CudaFacts:
    """An H100, its driver and a wheel that all fit."""
    fitting = {
        "torch": "2.11.0+cu130",
        "torch_cuda": "13.0",
        "driver": "580.65.06",
        "name": "NVIDIA H100",
        "capability": (9, 0),
        "architectures": ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0)),
    }
    return CudaFacts(**{**fitting, **changed})


def test_a_device_that_torch_sees_is_taken():
    assert device_refusal(facts()) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"torch": "2.13.0+cpu", "torch_cuda": ""},
            ["torch 2.13.0+cpu was built without CUDA", "NVIDIA's driver 580.65.06 is there", "install torch"],
        ),
        ({"torch_cuda": "", "driver": ""}, ["built without CUDA", "no NVIDIA driver is there either"]),
        ({"driver": ""}, ["torch 2.11.0+cu130 with CUDA 13.0", "no NVIDIA driver", "wanted a node with a GPU, or cpu"]),
        (
            {"driver": "570.124.06"},
            ["wants NVIDIA's driver 580 or newer, and 570.124.06 is there", "update the driver"],
        ),
        ({"driver": "525.1", "torch_cuda": "12.8"}, ["sees no CUDA device", "CUDA_VISIBLE_DEVICES", "gpus_per_worker"]),
        ({}, ["NVIDIA's driver 580.65.06 is there", "CUDA_VISIBLE_DEVICES"]),
        ({"torch_cuda": "14.1"}, ["CUDA_VISIBLE_DEVICES"]),  # of which no oldest driver is known
    ],
)
def test_why_there_is_no_device_is_said_in_one_line_with_what_would_help(changed, words):
    said = device_refusal(facts(name="", **changed))
    assert said is not None
    assert "\n" not in said
    assert [word for word in words if word not in said] == []


ANYTHING = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "use_kernels": True}


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 1)])
def test_a_new_device_does_for_everything(capability):
    assert use_refusal(facts(capability=capability), **ANYTHING) is None


@pytest.mark.parametrize(
    ("changed", "asked", "words"),
    [
        ({"capability": (7, 0)}, {}, ["compute capability 7.0", "code for 7.5, 8.0, 9.0, 10.0, 12.0", "another wheel"]),
        ({"capability": (11, 0)}, {}, ["compute capability 11.0", "another GPU"]),
        ({"capability": (7, 5)}, {}, ["the kernels want 8.0 or more", "engine.kernels: off"]),
        ({"capability": (7, 5)}, {"use_kernels": False}, ["bfloat16 wants 8.0 or more", "--dtype float16"]),
        ({"capability": (8, 0)}, {}, ["KV in float8 wants 8.9 or more", "--kv-cache-dtype auto"]),
    ],
)
def test_what_a_device_lacks_is_said_in_one_line_with_what_would_help(changed, asked, words):
    said = use_refusal(facts(**changed), **{**ANYTHING, **asked})
    assert said is not None
    assert said.startswith("NVIDIA H100 has compute capability")
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize(
    ("capability", "asked"),
    [
        ((8, 0), {"kv_cache_dtype": "auto"}),
        ((8, 6), {"use_kernels": False}),
        ((7, 5), {"use_kernels": False, "dtype": "float16"}),
    ],
)
def test_an_older_device_does_where_nothing_is_asked_that_it_lacks(capability, asked):
    assert use_refusal(facts(capability=capability), **{**ANYTHING, **asked}) is None


def test_code_that_later_devices_compile_runs_on_all_of_these():
    newer = facts(capability=(13, 0), virtual_architectures=((12, 0),))
    assert use_refusal(newer, **ANYTHING) is None
    assert use_refusal(facts(capability=(13, 0), virtual_architectures=((13, 1),)), **ANYTHING) is not None


def test_of_a_torch_that_lists_nothing_nothing_is_concluded():
    assert use_refusal(facts(architectures=()), **ANYTHING) is None


def test_the_first_layer_with_heads_too_large_is_named():
    assert heads_refusal([64, 576, 128], 576) is None
    said = heads_refusal([64, 577, 1024], 576)
    assert said is not None
    assert "layer 1 has heads of 577 numbers, the kernels take 576 at most" in said
    assert "engine.kernels: off" in said


def test_judging_a_device_takes_no_torch():
    code = "import sys, engine.kernels.capability; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "False\n"
