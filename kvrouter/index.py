"""Which worker holds which block, and of several who keeps it; folded from what workers report (write path steps c, e).

A worker is a holder with each of its tiers. Along a prompt's names the holders seldom change: where a block has the
same ones as another far behind it, so has, nearly always, what lies between. So runs of blocks with the same holders
are found by galloping: tens of probes instead of one per block.

    names      0 1 2 3 4 5 6 7
    worker a   # # # # . . . .      runs [0, 2) at a and b, [2, 4) at a, [4, 6) at c
    worker b   # # . . . . . .
    worker c   . . . . # # . .

A worker that left or was cleared stops counting at once; its names are swept out by and by, and others are told of what
they are to keep in its stead as the sweep comes by.

There are two: `compiled_index`, for which memory and time are meant, and `plain_index`, where nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from messages.tier import Tier


class Holder(NamedTuple):
    """A worker that holds a block, and the tier where it has it."""

    worker_id: str
    tier: Tier = "device"


class Run(NamedTuple):
    """Blocks [begin, end) of a prompt have the same holders."""

    begin: int
    end: int
    holders: tuple[Holder, ...]


class Matches(NamedTuple):
    """The runs of a prompt, `num_runs` of them in a row from its head on, as arrays."""

    ends: npt.NDArray[np.int64]  #: `[num_runs]`: block number that each ends before
    is_held: npt.NDArray[np.bool_]  #: `[num_runs, num_columns]`
    holders: Sequence[Holder | None]  #: by column; the same object until they change


class Appointed(NamedTuple):
    """What one worker is told: concatenated names of blocks whose copy there is spare from now on, or not any more."""

    worker_id: str
    spare: bytes
    kept: bytes


class BlockIndex(Protocol):
    """The names that all workers hold. One thread."""

    def __len__(self) -> int:
        """Return how many names are held, those that are not swept yet included."""
        ...

    def num_held(self, worker_id: str) -> int:
        """Return how many names the worker holds; 0 for one that is unknown."""
        ...

    def num_held_by_tier(self, worker_id: str) -> dict[Tier, int]:
        """Return how many names the worker holds in each of its tiers; nothing for one that is unknown."""
        ...

    def num_spare(self, worker_id: str) -> int:
        """Return of how many blocks the worker's copy is spare; 0 for one that is unknown."""
        ...

    @property
    def num_shared(self) -> int:
        """Of how many blocks several have a copy at hand."""
        ...

    def fold(
        self, worker_id: str, tier: Tier = "device", *, stored: bytes = b"", removed: bytes = b"", is_use: bool = True
    ) -> list[Appointed]:
        """Apply one worker's change of one of its tiers: `stored` first, then `removed`; return who is told what.

        Names are concatenated. Storing what is held and removing what is not are both fine. An unknown worker becomes
        known. Sweeps on, too. `is_use`: who stored blocks uses them, and so keeps them; else who kept them goes on.

        Raises:
            ValueError: `stored` or `removed` is no whole number of names; nothing was applied.
        """
        ...

    def drop(self, worker_id: str) -> list[Appointed]:
        """Forget a worker and what it holds, in all its tiers: no run names it any more. Unknown ids are ignored."""
        ...

    @property
    def is_swept(self) -> bool:
        """Whether nothing is left of those who were dropped."""
        ...

    def sweep(self) -> list[Appointed]:
        """Free a piece, some milliseconds' worth, of what those had who were dropped; return who is told what."""
        ...

    def holders(self, name: bytes) -> tuple[Holder, ...]:
        """Return who holds this block."""
        ...

    def runs(self, names: bytes) -> list[Run]:
        """Divide a prompt with these concatenated names into runs with the same holders, up to the first without any.

        A change of holders between two blocks that have the same ones may be missed: a hint, as everything here.
        """
        ...

    def match(self, names: bytes, max_runs: int) -> Matches:
        """Return the same runs as arrays, at most `max_runs` of them."""
        ...

    def check_invariants(self) -> None:
        """Raise InvariantError where what is counted or kept twice does not agree."""
        ...


def check_names(stored: bytes, removed: bytes) -> None:
    """Raise ValueError unless both are whole names of 16 bytes."""
    if len(stored) % 16 or len(removed) % 16:
        raise ValueError(f"names come in 16 bytes each: saw {len(stored)} and {len(removed)} bytes")
