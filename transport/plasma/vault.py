"""A vault reads its node's regions for pullers elsewhere (`transport.plasma.road`). No Ray here; and a fake of all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from messages.handoff import RegionInfo
from transport.checksum import Bytes
from transport.plasma.road import SEGMENT_BYTES, Range
from transport.protocol import Copy, RegionError, TransferError, check_ranges
from transport.shm import open_region

_MAX_RANGES = 65536  #: of one export


@dataclass(frozen=True, slots=True)
class VaultLimits:
    """How much a vault holds, and for how long."""

    max_bytes: int = 256 << 20  #: in segments, of all pullers
    max_wait_s: float = 2.0  #: for others to release theirs
    hold_s: float = 60.0  #: segments that nobody released
    idle_s: float = 60.0  #: then it ends


DEFAULT_LIMITS = VaultLimits()


@dataclass(slots=True)
class _Hold:
    """An export that was not released."""

    num_bytes: int
    ends_s: float
    references: list[object] = field(default_factory=list)


class Vault:
    """Reads regions of its node on demand, and holds what it read until it is released. Blocks; any thread may call."""

    def __init__(self, put: Callable[[Bytes], object], limits: VaultLimits) -> None:
        """Make a vault; `put` stores a segment for as long as what it returns lives."""
        self._put = put
        self._limits = limits
        self._holds: dict[bytes, _Hold] = {}
        self._changed = threading.Condition()

    @property
    def num_held_bytes(self) -> int:
        """Bytes of all segments that were not released."""
        with self._changed:
            return self._num_held_bytes()

    @property
    def num_holds(self) -> int:
        """Number of exports that were not released, expected ones included."""
        return len(self._holds)

    def expect(self, export_id: bytes) -> None:
        """Announce an export, which can be released from now on. Never blocks."""
        with self._changed:
            self._holds[export_id] = _Hold(0, time.monotonic() + self._limits.hold_s)

    def export(self, export_id: bytes, region: RegionInfo, segments: Sequence[Sequence[Range]]) -> list[object]:
        """Read the ranges of each segment from a region of this node; return what refers to the segments.

        The export must have been announced by `expect`; one that was released meanwhile is not read.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds.
            TransferError: too much is held, and was not released within `max_wait_s`.
        """
        references: list[object] = []
        is_whole = False
        try:
            num_bytes = _checked_size(region, segments)
            opened = open_region(region)
            self._reserve(export_id, num_bytes)
            whole = np.frombuffer(opened.view, dtype=np.uint8)
            for ranges in segments:
                if export_id not in self._holds:
                    break
                parts = [whole[offset : offset + length] for offset, length in ranges]
                references.append(self._put(parts[0] if len(parts) == 1 else np.concatenate(parts)))
            with self._changed:
                if export_id in self._holds:
                    self._holds[export_id].references = references
            is_whole = True
        finally:
            if not is_whole:
                self.release(export_id)
        return references

    def release(self, export_id: bytes) -> None:
        """Forget an export and what it holds; unknown ids are ignored."""
        with self._changed:
            self._holds.pop(export_id, None)
            self._changed.notify_all()

    def expire(self, now_s: float) -> None:
        """Forget the exports that should have been released by `now_s`."""
        with self._changed:
            for export_id in [export_id for export_id, hold in self._holds.items() if hold.ends_s <= now_s]:
                del self._holds[export_id]
            self._changed.notify_all()

    def _reserve(self, export_id: bytes, num_bytes: int) -> None:
        limit = self._limits.max_bytes
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._num_held_bytes() + num_bytes <= limit, timeout=self._limits.max_wait_s
            ):
                held = self._num_held_bytes()
                raise TransferError(
                    f"plasma: the vault holds {held:,} of {limit:,} bytes: no room for {num_bytes:,}", code="vault_full"
                )
            if export_id in self._holds:
                self._holds[export_id].num_bytes = num_bytes

    def _num_held_bytes(self) -> int:
        return sum(hold.num_bytes for hold in self._holds.values())


def _checked_size(region: RegionInfo, segments: Sequence[Sequence[Range]]) -> int:
    """Return the bytes of all segments; RegionError unless they can be read."""
    ranges = [range_ for segment in segments for range_ in segment]
    if len(ranges) > _MAX_RANGES:
        raise RegionError(f"plasma: {len(ranges)} ranges in one export, at most {_MAX_RANGES} wanted")
    check_ranges([Copy(offset, 0, length) for offset, length in ranges], region.num_bytes, region.num_bytes)
    sizes = [sum(length for _, length in segment) for segment in segments]
    if not all(0 < size <= SEGMENT_BYTES for size in sizes):
        raise RegionError(f"plasma: segments of {sizes} bytes, 1 to {SEGMENT_BYTES} wanted")
    return sum(sizes)


class LocalVaults:
    """The fake `transport.plasma.road.Vaults`: vaults in this process.

    `fail_after`, `stall_after`: the vault dies, or delivers nothing more, after so many segments; None: never.
    """

    def __init__(self, node_id: str = "local", limits: VaultLimits = DEFAULT_LIMITS) -> None:
        self.node_id = node_id
        self.fail_after: int | None = None
        self.stall_after: int | None = None
        self._limits = limits
        self.vaults: dict[str, Vault] = {}  #: by node

    async def export(
        self, node_id: str, export_id: bytes, region: RegionInfo, segments: Sequence[Sequence[Range]]
    ) -> list[object]:
        """Export from the vault that stands for `node_id`'s, which is made if there is none."""
        vault = self.vaults.setdefault(node_id, Vault(lambda segment: segment.copy(), self._limits))
        vault.expect(export_id)
        return await asyncio.to_thread(vault.export, export_id, region, segments)

    async def segment(self, reference: object) -> Bytes:
        """Return a segment's bytes, unless a fault is due."""
        await asyncio.sleep(0)
        if self.stall_after is not None:
            self.stall_after -= 1
            if self.stall_after < 0:
                await asyncio.get_running_loop().create_future()
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                self.fail_after = None
                self.vaults.clear()  # the next export finds a new one
                raise TransferError("plasma: the vault died")
        return cast("Bytes", reference)

    def release(self, node_id: str, export_id: bytes) -> None:
        """Release the export at once."""
        vault = self.vaults.get(node_id)
        if vault is not None:
            vault.release(export_id)
