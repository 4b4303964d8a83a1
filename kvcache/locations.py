"""Where blocks lie in their owner's pool: rows of an array, packed for messages and between decider and doer.

A handoff may have thousands of blocks. As an object each, whatever is done with them costs a microsecond a block, time
and again; here it is done with all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from kvcache.names import NAME_BYTES

#: A row, little-endian without gaps, 52 bytes (messages.handoff.LOCATION_BYTES); its columns are BlockLocation's.
LOCATION = np.dtype(
    [
        ("index", "<u4"),
        ("block_id", "<u4"),
        ("generation", "<u8"),
        ("name", f"V{NAME_BYTES}"),
        ("num_tokens", "<u4"),
        ("checksum", "<u8"),
        ("tenant", "<u8"),
    ]
)
#: `[n]` LOCATION.
Locations: TypeAlias = npt.NDArray[Any]
MAX_INDEX = 2**32 - 1
_NO_NAME = bytes(NAME_BYTES)  #: of a partial last block


class BlockLocation(msgspec.Struct, frozen=True):
    """One block in its owner's pool. A reader trusts only bytes that have the checksum.

    A block that was reused since it was published has another generation, and other bytes.
    """

    index: int  #: position in the sequence: tokens [index * block_size, ...)
    block_id: int  #: in the owner's pool
    generation: int
    name: bytes  #: digest of the prefix up to its end; b"" for a partial last block
    num_tokens: int  #: valid tokens, block_size unless partial
    checksum: int = 0  #: of all its bytes, 64 bits (transport.checksum)
    tenant: int = 0  #: whose it is, 64 bits, for an asker that knows only its name; 0: nobody's in particular


def pack_locations(blocks: Iterable[BlockLocation]) -> bytes:
    """Pack a few blocks, given one by one."""
    return np.array([msgspec.structs.astuple(block) for block in blocks], LOCATION).tobytes()


def each_location(blocks: bytes) -> list[BlockLocation]:
    """Return packed blocks one by one; for few of them, and for people."""
    rows = [BlockLocation(*row) for row in unpack_locations(blocks).tolist()]
    return [msgspec.structs.replace(row, name=b"") if row.name == _NO_NAME else row for row in rows]


def unpack_locations(blocks: bytes) -> Locations:
    """Return packed blocks as rows, read-only, over the same bytes."""
    return np.frombuffer(blocks, LOCATION)


def with_checksums(blocks: bytes, checksums: Callable[[npt.NDArray[np.uint32]], npt.NDArray[np.uint64]]) -> bytes:
    """Return packed blocks with their checksums, which `checksums` gives by block ids."""
    rows = unpack_locations(blocks).copy()
    rows["checksum"] = checksums(rows["block_id"])
    return rows.tobytes()


def num_locations(blocks: bytes) -> int:
    """Count packed blocks."""
    return len(blocks) // LOCATION.itemsize


def name_column(names: Sequence[bytes]) -> npt.NDArray[Any]:
    """Return names as a column `[n]` of rows, over fresh memory."""
    return np.frombuffer(b"".join(names), LOCATION["name"])


def chosen(rows: Locations, is_chosen: Callable[[Locations], npt.NDArray[np.bool_]]) -> Locations:
    """Return the rows for which that is so; without a copy where it is so for all, as it mostly is."""
    which = is_chosen(rows)
    return rows if which.all() else rows[which]


def is_of_prefix(rows: Locations, first_index: int, names: Sequence[bytes], block_size: int) -> npt.NDArray[np.bool_]:
    """Tell which rows are whole blocks of a prefix: `names` are those of its blocks from `first_index` on."""
    expected = name_column(names)
    offset = rows["index"].astype(np.int64) - first_index
    is_known: npt.NDArray[np.bool_] = (offset >= 0) & (offset < len(expected)) & (rows["num_tokens"] == block_size)
    is_known[is_known] = expected[offset[is_known]] == rows["name"][is_known]
    return is_known


def is_partial(rows: Locations, index: int, num_tokens: int) -> npt.NDArray[np.bool_]:
    """Tell which rows are the partial last block of a prefix, with `num_tokens` in it, and so no name."""
    nameless = rows["name"] == np.zeros((), LOCATION["name"])
    result: npt.NDArray[np.bool_] = (rows["index"] == index) & (rows["num_tokens"] == num_tokens) & nameless
    return result
