"""Host memory that what a step brings leaves from, while what the next one brings is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.steps.device import DeviceEvent, StepDevice


@dataclass(slots=True)
class _Buffer:
    words: torch.Tensor  #: [room] int64, pinned
    left: DeviceEvent  #: the last copy out of it is over


class Staging:
    """Two buffers in turn: one is written while what is in the other may still be on its way.

        step n      written, sent ----------> on its way ...... left
        step n + 1      the other: written, sent --------------> on its way
        step n + 2                                   waits until it left; written, sent

    Room for more is made by doubling.
    """

    def __init__(self, device: StepDevice, num_words: int = 1) -> None:
        """Make both buffers, with room for `num_words` each."""
        self._device = device
        self._buffers = [_Buffer(device.pinned(num_words), device.event()) for _ in range(2)]
        self._turn = 0

    def bring(
        self, num_words: int, write: Callable[[npt.NDArray[np.int64]], None], target: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Let `write` write `[num_words]` int64 on the host, and put them on their way to the device.

        Args:
            num_words: how many.
            write: fills in what it is given, and keeps nothing of it.
            target: where they go; None: to a new tensor.

        Returns:
            The target, which what is put on its way behind this call may read.
        """
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        buffer.left.synchronize()
        if len(buffer.words) < num_words:
            buffer.words = self._device.pinned(1 << (num_words - 1).bit_length())
        words = buffer.words[:num_words]
        write(words.numpy())
        if target is None:
            target = torch.empty(num_words, dtype=torch.int64, device=self._device.device)
        self._device.copy(target, words)
        buffer.left.record()
        return target
