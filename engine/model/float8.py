"""KV in float8 (e4m3): four exponent and three mantissa bits, half the bytes of bfloat16.

Its numbers are exact to a sixteenth from 2^-6 to 448 and to 2^-10 below, so a scale only has to bring the numbers of a
layer into that range: one each for its keys and its values, a power of two, from the largest that a trial of the model
gave, with room above for larger ones. Scales are part of the model's fingerprint, and nothing of them is in a block. A
scale for each block or token is no better: what is lost is in the three bits (`docs/LOG.md`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from engine.kernels.protocol import KvScales, LayerUse

FLOAT8: Final = torch.float8_e4m3fn
#: What the trial's largest number is brought to, at most: 448 is 14 times as much.
_LARGEST: Final = 32.0


def scales_of(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> list[KvScales]:
    """Choose the scales of each layer by some of its keys and values."""
    return [KvScales(_scale(key), _scale(value)) for key, value in zip(keys, values, strict=True)]


def _scale(numbers: torch.Tensor) -> float:
    largest = float(numbers.abs().max())
    return 2.0 ** math.ceil(math.log2(largest / _LARGEST)) if 0.0 < largest < math.inf else 1.0


def kept_dtype(layers: Sequence[LayerUse], dtype: torch.dtype) -> torch.dtype:
    """Return what KV of a model in `dtype` is kept as, which is the same for all of its layers."""
    return dtype if layers[0].scales is None else FLOAT8
