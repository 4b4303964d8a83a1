"""Which parts of which objects are read for the blocks that are wanted, and what of these came. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nodecache.remote.index import Place
from nodecache.remote.layout import Model, unpack_records
from transport.checksum import copy_checked

#: Blocks between wanted ones are read too, if they are no more than this: a request costs as much as some such.
_MAX_GAP_BYTES = 1 << 20


class Part(NamedTuple):
    """A part of an object that is read in one request."""

    object: bytes
    offset: int
    num_bytes: int
    wanted: list[tuple[int, Place]]  #: index in what was asked; where that block lies


def parts_of(places: Sequence[Place | None]) -> list[Part]:
    """Say what is to be read for the places that are there."""
    by_place = sorted(
        (place.object, place.record.offset, index, place) for index, place in enumerate(places) if place is not None
    )
    parts: list[Part] = []
    for digest, offset, index, place in by_place:
        last = parts[-1] if parts else None
        if last and last.object == digest and offset <= last.offset + last.num_bytes + _MAX_GAP_BYTES:
            num_bytes = max(last.num_bytes, place.record.end - last.offset)
            last.wanted.append((index, place))
            parts[-1] = last._replace(num_bytes=num_bytes)
        else:
            parts.append(Part(digest, offset, place.record.num_bytes, [(index, place)]))
    return parts


def unpack_part(part: Part, data: bytes, model: Model) -> list[memoryview | None]:
    """Return the plain bytes of each block of a part that is wanted, their checksum not yet compared; None: damaged."""
    records = [place.record for _, place in part.wanted]
    view = memoryview(data)
    return unpack_records(
        model, records, [view[record.offset - part.offset : record.end - part.offset] for record in records]
    )


def copy_part(part: Part, plain: Sequence[memoryview | None], targets: Sequence[memoryview]) -> list[bool]:
    """Copy what is wanted of a part into its targets, and tell of each, as in `wanted`, whether it is whole."""
    return [
        block is not None and copy_checked(targets[index], block) == place.record.block.checksum
        for (index, place), block in zip(part.wanted, plain, strict=True)
    ]
