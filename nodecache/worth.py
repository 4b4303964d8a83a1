"""What a block is worth, and which goes first: seconds of recomputing that it saves, times the chance of reuse.

All blocks have the same bytes, so worth per byte is worth. It is counted in levels:

    levels [clock] [clock + 1] ...     each a list, least recently placed first
             ^ the next to go: its worth has run out

A block is placed `worth` levels above the clock, which goes on with the blocks that room was wanted for, eight levels
while a whole arena's worth of them was: so worth fades with what happened since, and within a level the least recently
used goes first. A newcomer gets the room of a block on no higher level than its own. Every operation is O(1): a heap
would cost a comparison in Python for each of its storeys, and ten times the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache.price import ASSUMED_COMPUTE
from messages.price import ComputePrice
from nodecache.arena import BlockIds

Links: TypeAlias = npt.NDArray[np.int32]  #: `[2, blocks and sentinels]`: the next and the one before

NUM_LEVELS: Final = 64
MAX_PRIORITY: Final = 2
_TURN_LEVELS: Final = 8  #: that the clock goes on while room was wanted for as many blocks as there are
_MAX_SECONDS: Final = 4.0  #: the dearest block counts as so many of the first in a prompt, or it would never leave
_MAX_SIGHTS: Final = 3  #: blocks seen more often are one kind
#: Of blocks seen once, twice, more often: how many were wanted again, of so many. Assumed until more was seen.
_ASSUMED_AGAIN: Final = (0.25, 0.5, 0.75)
_ASSUMED_COUNT: Final = 256.0
_MAX_COUNT: Final = 1 << 16  #: then all counts are halved, so that the past fades


class Worth:
    """What blocks are worth, in levels, as far as can be known by what was seen of all."""

    def __init__(self, block_size: int, compute: ComputePrice | None = None) -> None:
        """Begin with what is assumed. `block_size` in tokens; `compute`: the price at the workers that compute."""
        price = compute if compute is not None and compute.token_s > 0 else ASSUMED_COMPUTE
        token_s = price.token_s + price.pair_s * block_size / 2
        self._slope = price.pair_s * block_size / token_s  #: by how much of the first block each further one costs more
        self._seen = np.full(_MAX_SIGHTS, _ASSUMED_COUNT)
        self._again = self._seen * _ASSUMED_AGAIN

    def chances(self) -> npt.NDArray[np.float64]:
        """Return the chance that a block seen once, twice, more often is wanted again: `[3]`."""
        chances: npt.NDArray[np.float64] = self._again / self._seen
        return chances

    def observe(self, num_sights: npt.NDArray[np.integer]) -> None:
        """Learn from blocks that were wanted just now: how often each was seen by now, this time included."""
        kinds = np.minimum(num_sights, _MAX_SIGHTS) - 1
        self._seen += np.bincount(kinds, minlength=_MAX_SIGHTS)
        before = np.minimum(num_sights[num_sights > 1] - 1, _MAX_SIGHTS) - 1
        self._again += np.bincount(before, minlength=_MAX_SIGHTS)
        if self._seen.max() > _MAX_COUNT:
            self._seen /= 2
            self._again /= 2

    def levels(
        self,
        index: npt.NDArray[np.integer],
        num_sights: npt.NDArray[np.integer],
        priority: npt.NDArray[np.integer],
    ) -> npt.NDArray[np.int64]:
        """Return each block's worth in levels, 1 to NUM_LEVELS - 1.

        Args:
            index: `[n]`, positions in their prefixes: a later block attends to more and costs more to recompute.
            num_sights: `[n]`, at least 1.
            priority: `[n]`, each step doubles or halves the worth.
        """
        seconds = np.minimum(1.0 + self._slope * index, _MAX_SECONDS)
        chance = self.chances()[np.minimum(num_sights, _MAX_SIGHTS) - 1]
        worth = chance * seconds * np.exp2(priority) * _TURN_LEVELS
        levels: npt.NDArray[np.int64] = np.clip(1 + worth.astype(np.int64), 1, NUM_LEVELS - 1)
        return levels


def no_links(num_blocks: int, num_orders: int = 1) -> Links:
    """Make the links of so many orders of the same blocks: circular lists through sentinels, which come after them.

    Each order has a sentinel for each level modulo NUM_LEVELS.
    """
    return np.full((2, num_blocks + num_orders * NUM_LEVELS), -1, np.int32)


class Levels:
    """The blocks that may be evicted, in the order in which they go."""

    def __init__(
        self, num_blocks: int, *, links: Links | None = None, number: int = 0, turn_blocks: int | None = None
    ) -> None:
        """Order blocks with ids below `num_blocks`.

        Args:
            num_blocks: all there are.
            links: of several orders beside each other, in no two of which a block is; None: of this one alone.
            number: of this one among them.
            turn_blocks: for how many the clock goes on by eight levels; None: for as many as there are.
        """
        self._num_turn_blocks = turn_blocks or num_blocks
        self._first_sentinel = num_blocks + number * NUM_LEVELS
        self._clock = 0
        self._num_wanted = 0  #: since the clock last went on
        if links is None:
            links = no_links(num_blocks)
        sentinels = np.arange(self._first_sentinel, self._first_sentinel + NUM_LEVELS, dtype=np.int32)
        links[:, sentinels] = sentinels
        self._next = memoryview(links[0])
        self._prev = memoryview(links[1])
        self.num_bytes = links.nbytes
        self.num_placed = 0

    def __contains__(self, block_id: int) -> bool:
        return self._next[block_id] >= 0

    def place(self, block_id: int, levels: int) -> None:
        """Put a block that is in no list `levels` above the clock, the last one to go there."""
        sentinel = self._sentinel(self._clock + levels)
        last = self._prev[sentinel]
        self._next[last] = self._prev[sentinel] = block_id
        self._next[block_id] = sentinel
        self._prev[block_id] = last
        self.num_placed += 1

    def remove(self, block_id: int) -> None:
        """Take a block out of its list."""
        before, after = self._prev[block_id], self._next[block_id]
        self._next[before] = after
        self._prev[after] = before
        self._next[block_id] = self._prev[block_id] = -1
        self.num_placed -= 1

    def lowest(self) -> tuple[int, int] | None:
        """Return the block that goes first and how many levels above the clock it lies; None where there is none."""
        if self.num_placed:
            for levels in range(NUM_LEVELS):
                sentinel = self._sentinel(self._clock + levels)
                first = self._next[sentinel]
                if first != sentinel:
                    return first, levels
        return None

    def in_order(self) -> Iterator[int]:
        """Yield the blocks, those that go first first. Nothing may change meanwhile."""
        for levels in range(NUM_LEVELS):
            sentinel = self._sentinel(self._clock + levels)
            block_id = self._next[sentinel]
            while block_id != sentinel:
                yield block_id
                block_id = self._next[block_id]

    def on_wanted(self, num_blocks: int) -> None:
        """Note that room was wanted for blocks, whether they got it or not: by that the clock goes on."""
        self._num_wanted += num_blocks * _TURN_LEVELS
        num_steps, self._num_wanted = divmod(self._num_wanted, self._num_turn_blocks)
        for _ in range(min(num_steps, NUM_LEVELS)):
            self._run_out(self._sentinel(self._clock), self._sentinel(self._clock + 1))
            self._clock += 1

    def _run_out(self, old: int, new: int) -> None:
        """Put the list of level `old` before that of level `new`."""
        first, last = self._next[old], self._prev[old]
        if first == old:
            return
        after = self._next[new]
        self._next[new], self._prev[first] = first, new
        self._next[last], self._prev[after] = after, last
        self._next[old] = self._prev[old] = old

    def _sentinel(self, level: int) -> int:
        return self._first_sentinel + level % NUM_LEVELS


class Ghosts:
    """Names of blocks that were wanted and are not held, as far as they were not overwritten: a table of tags.

    Four tags for each block of the arena, at least. What is in the table at its place was wanted before; one in four
    thousand million others seems so, too.
    """

    def __init__(self, num_blocks: int) -> None:
        self._mask = np.uint64((1 << (4 * num_blocks - 1).bit_length()) - 1)
        self._tags = np.zeros(int(self._mask) + 1, np.uint32)
        self.num_bytes = self._tags.nbytes

    def add(self, names: npt.NDArray[np.uint64]) -> None:
        """Remember names, `[n, 2]`: each takes the place of another one."""
        self._tags[names[:, 0] & self._mask] = names[:, 1].astype(np.uint32)

    def seen(self, names: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Tell of each of `names`, `[n, 2]`, whether it is remembered."""
        found: npt.NDArray[np.bool_] = self._tags[names[:, 0] & self._mask] == names[:, 1].astype(np.uint32)
        return found


def heads_last(index: npt.NDArray[np.integer], levels: npt.NDArray[np.int64]) -> tuple[BlockIds, npt.NDArray[np.int64]]:
    """Order blocks of a chain for `Levels.place`: positions in the arguments, tails first, and their levels.

    What comes before a block is worth as much at least: without it the block is of no use.
    """
    order = np.argsort(index, kind="stable")[::-1].astype(np.int32)
    return order, np.maximum.accumulate(levels[order])
