"""A pool on an accelerator as roads see it (transport.protocol.RegionMemory)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.memory.copies import DeviceCopies
from transport.memory import Memory, SharedView
from transport.protocol import Copies, CopyWatch, MappedRegion, RegionError


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class MappedPool:
    """Another process's device memory as it is mapped here, a `transport.protocol.MappedRegion`."""

    view: torch.Tensor  #: [num_bytes] uint8
    header: SharedView  #: tells whether its owner still publishes it

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.view.numel()

    def is_current(self) -> bool:
        """Tell whether its owner still publishes it."""
        return self.header.is_current()

    def populate(self) -> None:
        """Do nothing: a device's memory is mapped as a whole."""


class DeviceMemory:
    """A tensor's bytes as a `transport.protocol.RegionMemory`, for roads that reach device memory. Keeps the tensor."""

    is_host = False

    def __init__(self, rows: torch.Tensor, copies: DeviceCopies) -> None:
        """Wrap `rows`, `[num_rows, row_bytes]` uint8, contiguous, on the device of `copies`, which fills them."""
        self._rows = rows
        self._bytes = rows.view(-1)
        self._copies = copies
        self.num_bytes = self._bytes.numel()
        #: host memory of no use but to tell peers of this node that what they mapped is still published
        self.header = Memory.allocate(1)
        self.nonce = self.header.nonce

    def slice(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Return a view `[num_bytes]` uint8 from `offset` on; it has `__cuda_array_interface__`."""
        return self._bytes[offset : offset + num_bytes]

    def fill(self, source: MappedRegion, copies: Copies, watch: CopyWatch) -> list[int]:
        """As `DeviceCopies.copy_in`. Fast where each copy is one row."""
        return self._copies.copy_in(self._rows, source, copies, watch)

    def prepare(self, source: MappedRegion) -> None:
        """Begin to lock the pages of `source`, on a thread of its own; a device's needs no locking."""
        if not isinstance(source, MappedPool):
            self._copies.page_locks.lock(source)

    def export(self) -> bytes:
        """Describe the memory to other processes of this node.

        Raises:
            RegionError: it cannot be exported.
        """
        try:
            return self._copies.device.export(self._bytes)
        except OSError as error:
            raise RegionError(f"the device's memory cannot be exported: {error}") from error

    def open(self, handle: bytes, num_bytes: int, header: SharedView) -> MappedPool:
        """Map what another process's `export` described, `num_bytes` of it.

        Raises:
            RegionError: this device does not reach it.
        """
        try:
            return MappedPool(self._copies.device.open(handle, num_bytes), header)
        except OSError as error:
            raise RegionError(f"the peer's device memory cannot be mapped: {error}") from error

    def close(self) -> None:
        """Withdraw the memory; whoever made the tensor frees it."""
        self.header.close()
