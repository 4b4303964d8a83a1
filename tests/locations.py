"""Packed block locations as tests look at them: one by one."""

from __future__ import annotations

from engine.scheduling.plan import PullBlocks
from kvcache.locations import BlockLocation, each_location


def pairs_of(pull: PullBlocks) -> list[tuple[BlockLocation, int]]:
    """Return each block of a pull with the block of the own pool that it goes to."""
    return list(zip(each_location(pull.blocks), pull.targets, strict=True))
