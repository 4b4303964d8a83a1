"""A pool on an accelerator as roads see it (transport.protocol.RegionMemory)."""

from __future__ import annotations

import secrets

import torch

from transport.memory import NONCE_BYTES


class DeviceMemory:
    """A tensor's bytes as a `transport.protocol.RegionMemory`, for roads that reach device memory. Keeps the tensor."""

    is_host = False

    def __init__(self, tensor: torch.Tensor) -> None:
        """Wrap `tensor`, which is contiguous and on a CUDA device."""
        self._bytes = tensor.view(torch.uint8).view(-1)
        self.num_bytes = self._bytes.numel()
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def slice(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Return a view `[num_bytes]` uint8 from `offset` on; it has `__cuda_array_interface__`."""
        return self._bytes[offset : offset + num_bytes]

    def close(self) -> None:
        """Do nothing: whoever made the tensor frees it."""
