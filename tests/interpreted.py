"""Triton's kernels as they run on a CPU: interpreted."""

from __future__ import annotations

import pytest

from engine.kernels.protocol import AttentionKernels


def triton_kernels() -> AttentionKernels:
    """Return the kernels, which tests/conftest.py lets run interpreted; skip the test where triton is not installed."""
    pytest.importorskip("triton", reason="triton is not installed")
    from engine.kernels.triton.kernels import TRITON_KERNELS

    return TRITON_KERNELS
