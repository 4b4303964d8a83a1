"""Between host and device with no wait: arrays go there in one copy, numbers come back in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  #: bytes: what each array begins at a multiple of


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Return the arrays as tensors on `device`, in one copy that what is launched there next finds done.

    The copy leaves from pinned memory, which torch keeps from reuse until it is over.
    """
    if not arrays:
        return []
    offsets = [0]
    for array in arrays:
        offsets.append(offsets[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    packed = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    view = packed.numpy()
    for array, offset in zip(arrays, offsets, strict=False):
        view[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[offset : offset + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, offset in zip(arrays, offsets, strict=False)
    ]


class Readback:
    """A tensor on its way from a device to the host."""

    def __init__(self, tensor: Tensor) -> None:
        """Begin to copy `tensor` behind what was launched on its device's current stream."""
        is_cuda = tensor.device.type == "cuda"
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.current_stream(tensor.device).record_event() if is_cuda else None

    def wait(self) -> NDArray[Any]:
        """Wait for the copy, and for nothing else; return it, valid as long as this object is."""
        if self._event is not None:
            self._event.synchronize()
        array: NDArray[Any] = self._host.numpy()
        return array
