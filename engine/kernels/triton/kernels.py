"""`AttentionKernels` in Triton: the GPU's, or interpreted on a CPU."""

from __future__ import annotations

from typing import Final

import torch

from engine.kernels.protocol import AttentionKernels, LayerUse
from engine.kernels.triton.decode import decode_attention
from engine.kernels.triton.prefill import prefill_attention
from engine.kernels.triton.shapes import is_interpreted
from engine.kernels.triton.store import write_kv

#: Heads of more dimensions have no tiles that fit a multiprocessor.
MAX_HEAD_SIZE: Final = 576
#: CUDA's compute capability from which on there are products of bfloat16, and copies that go on beside them.
MIN_CAPABILITY: Final = (8, 0)


class TritonKernels:
    """The three operations, each a launch or two with no length read back from the device."""

    name = "triton-1"
    is_capturable = True

    write_kv = staticmethod(write_kv)
    decode_attention = staticmethod(decode_attention)
    prefill_attention = staticmethod(prefill_attention)

    def supports(self, layer: LayerUse, dtype: torch.dtype, device: torch.device) -> bool:
        """Take heads of at most MAX_HEAD_SIZE on a GPU that is new enough, and on a CPU where they run interpreted."""
        is_served = max(layer.spec.k_dim, layer.spec.v_dim) <= MAX_HEAD_SIZE
        is_served = is_served and dtype in (torch.float32, torch.bfloat16, torch.float16)
        if device.type != "cuda":
            return is_served and is_interpreted()
        return is_served and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


TRITON_KERNELS: Final[AttentionKernels] = TritonKernels()
