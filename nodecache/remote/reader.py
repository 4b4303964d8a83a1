"""Which parts of which objects are read for the blocks that are wanted, and what of these came. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nodecache.remote.index import Place
from nodecache.remote.layout import Model, copy_blocks

#: Blocks between wanted ones are read too, if they are no more than this: a request costs as much as some such.
_MAX_GAP_BYTES = 1 << 20


class Part(NamedTuple):
    """A part of an object that is read in one request."""

    object: bytes
    first_position: int  #: of a block in the object
    num_blocks: int
    wanted: list[tuple[int, Place]]  #: index in what was asked; where that block lies

    def offset(self, model: Model) -> int:
        """Return where it begins in the object."""
        return self.first_position * model.record_bytes

    def num_bytes(self, model: Model) -> int:
        """Return how long it is."""
        return self.num_blocks * model.record_bytes


def parts_of(places: Sequence[Place | None], model: Model) -> list[Part]:
    """Say what is to be read for the places that are there."""
    max_gap = _MAX_GAP_BYTES // model.record_bytes
    by_place = sorted(
        (place.object, place.position, index, place) for index, place in enumerate(places) if place is not None
    )
    parts: list[Part] = []
    for digest, position, index, place in by_place:
        last = parts[-1] if parts else None
        if last and last.object == digest and position <= last.first_position + last.num_blocks + max_gap:
            num_blocks = max(last.num_blocks, position + 1 - last.first_position)
            last.wanted.append((index, place))
            parts[-1] = last._replace(num_blocks=num_blocks)
        else:
            parts.append(Part(digest, position, 1, [(index, place)]))
    return parts


def copy_part(part: Part, data: bytes, targets: Sequence[memoryview], model: Model) -> list[bool]:
    """Copy what is wanted of a part into its targets, and tell of each, as in `wanted`, whether it came whole."""
    view, size = memoryview(data), model.record_bytes
    starts = [(place.position - part.first_position) * size for _, place in part.wanted]
    return copy_blocks(
        model,
        [(place.position, place.block) for _, place in part.wanted],
        [view[start : start + size] for start in starts],
        [targets[index] for index, _ in part.wanted],
    )
