"""A pool on an accelerator as roads see it (transport.protocol.RegionMemory)."""

from __future__ import annotations

import secrets

import torch

from engine.memory.copies import DeviceCopies
from transport.memory import NONCE_BYTES
from transport.protocol import Copies, CopyWatch, MappedRegion


class DeviceMemory:
    """A tensor's bytes as a `transport.protocol.RegionMemory`, for roads that reach device memory. Keeps the tensor."""

    is_host = False

    def __init__(self, rows: torch.Tensor, copies: DeviceCopies) -> None:
        """Wrap `rows`, `[num_rows, row_bytes]` uint8, contiguous, on the device of `copies`, which fills them."""
        self._rows = rows
        self._bytes = rows.view(-1)
        self._copies = copies
        self.num_bytes = self._bytes.numel()
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def slice(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Return a view `[num_bytes]` uint8 from `offset` on; it has `__cuda_array_interface__`."""
        return self._bytes[offset : offset + num_bytes]

    def fill(self, source: MappedRegion, copies: Copies, watch: CopyWatch) -> list[int]:
        """As `DeviceCopies.copy_in`. Fast where each copy is one row."""
        return self._copies.copy_in(self._rows, source, copies, watch)

    def prepare(self, source: MappedRegion) -> None:
        """Begin to lock the pages of `source`, on a thread of its own."""
        self._copies.page_locks.lock(source)

    def close(self) -> None:
        """Do nothing: whoever made the tensor frees it."""
