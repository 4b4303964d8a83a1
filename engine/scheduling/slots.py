"""Slots: the places that running sequences have at the runner, and how much it was told of who is in them."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(slots=True)
class Slot:
    """One running sequence's place. A sequence that comes back gets a new one, of which nothing was told."""

    index: int
    num_told_tokens: int = 0
    num_told_blocks: int = 0


class SlotPool:
    """Gives out the lowest free index, so that the runner's tables are as short as the most that ran at once."""

    def __init__(self) -> None:
        self._num_slots = 0
        self._free: list[int] = []  # a heap
        self._freed: set[int] = set()  # since the last plan

    def take(self) -> Slot:
        """Take a slot for a sequence that begins to run."""
        if not self._free:
            heappush(self._free, self._num_slots)
            self._num_slots += 1
        return Slot(heappop(self._free))

    def give_back(self, slot: Slot) -> None:
        """Give back the slot of a sequence that runs no more."""
        heappush(self._free, slot.index)
        self._freed.add(slot.index)

    def take_freed(self) -> tuple[int, ...]:
        """Return the indexes of the slots given back since the last call, whoever has them now."""
        freed = tuple(sorted(self._freed))
        self._freed.clear()
        return freed

    def is_whole(self, held: list[int]) -> bool:
        """Tell whether every slot is free or one of `held`, each once."""
        return sorted([*self._free, *held]) == list(range(self._num_slots))
