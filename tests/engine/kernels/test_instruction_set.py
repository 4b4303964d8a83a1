"""oneDNN reads its cap once a process, so each case has one of its own; its log tells what it then computes with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models import make_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the caps are those of CPUs with AVX512_BF16"),
]

#: What the CPU is said to have is settled before anything of ours is imported.
SCRIPT = """
import os, sys, torch
from pathlib import Path
torch.cpu._is_amx_tile_supported = lambda: {has_amx}
from engine.kernels.cpu import instruction_set
instruction_set._HIGHEST = "{highest}"
from engine.model.load import load_model
load_model(Path(sys.argv[1]), dtype="bfloat16", on_progress=lambda line: print("said", line))
print("cap", os.environ.get("ONEDNN_MAX_CPU_ISA"))
"""
BF16 = "Intel AVX-512 with Intel DL Boost and bfloat16 support"
CORE = "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def run(
    directory: Path, *, has_amx: bool, cap: str | None = None, highest: str = "AVX512_CORE_BF16"
) -> tuple[str, str, list[str]]:
    """A process loads a model: what oneDNN says it computes with, the cap that is set then, lines said about it."""
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    environment |= {"ONEDNN_VERBOSE": "1"} | ({} if cap is None else {"ONEDNN_MAX_CPU_ISA": cap})
    command = [sys.executable, "-c", SCRIPT.format(has_amx=has_amx, highest=highest), str(directory)]
    out = subprocess.check_output(command, text=True, cwd=Path(__file__).parents[3], env=environment)
    lines = out.splitlines()
    [used] = [line.partition(",isa:")[2] for line in lines if ",isa:" in line]
    [set_to] = [line.removeprefix("cap ") for line in lines if line.startswith("cap ")]
    return used, set_to, [line for line in lines if line.startswith("said ") and "oneDNN" in line]


def test_without_amx_nothing_is_set(directory):
    assert run(directory, has_amx=False)[1:] == ("None", [])


def test_with_amx_onednn_does_without_and_it_is_told_in_one_line(directory):
    line = "said keeping oneDNN to AVX512_CORE_BF16: with AMX the bits of a row would depend on its batch"
    assert run(directory, has_amx=True) == (BF16, "AVX512_CORE_BF16", [line])


def test_the_cap_is_in_effect_when_the_first_row_is_computed(directory):
    """On a CPU without AMX our cap changes nothing that can be seen; a lower one in its place does."""
    used, cap, said = run(directory, has_amx=True, highest="AVX512_CORE")
    assert (used, cap, len(said)) == (CORE, "AVX512_CORE", 1)


def test_a_lower_cap_of_the_operators_stays_and_a_higher_one_does_not(directory):
    assert run(directory, has_amx=True, cap="AVX512_CORE")[:2] == (CORE, "AVX512_CORE")
    assert run(directory, has_amx=True, cap="AVX512_CORE_AMX")[:2] == (BF16, "AVX512_CORE_BF16")
