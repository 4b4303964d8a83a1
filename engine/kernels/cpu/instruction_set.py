"""Keeps oneDNN, which computes packed linears, to instructions that give a row the same bits in every batch.

With AMX (Intel, Sapphire Rapids and later) it cuts a bfloat16 product by the number of rows, and each cut rounds anew.
"""

from __future__ import annotations

import os

import torch

#: oneDNN's own: https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
_VARIABLE = "ONEDNN_MAX_CPU_ISA"
_HIGHEST = "AVX512_CORE_BF16"
_LOWER = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})


def cap_onednn() -> str | None:
    """Where the CPU has AMX, make oneDNN do without it in this process and those it starts.

    oneDNN reads its cap once, when a process first calls it, importing torch does not (seen with torch 2.13): so this
    comes before anything is computed. A lower cap that is set already stays. May be called again.

    Returns:
        The instruction set that is the highest from now on; None where the CPU has no AMX, and nothing was changed.
    """
    if not torch.cpu._is_amx_tile_supported():  # noqa: SLF001  # the public form came with torch 2.13
        return None
    cap = os.environ.get(_VARIABLE, "").upper()
    if cap not in _LOWER:
        cap = os.environ[_VARIABLE] = _HIGHEST
    return cap
