"""Manifests: Arrow files that say which block lies in which object, and which are removed. Pure.

Each row is one block, kept or removed, and when; of several rows of one name the latest counts, so that rows may be
read in any order and any number of times. A manifest is named by the digest of its bytes, as Arrow files have none.
Where all blocks are plain and lie where their positions say, it has fewer columns, as before blocks were encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from blake3 import blake3

from messages.errors import first_line
from nodecache.codec import PLAIN
from nodecache.remote.layout import DIGEST_BYTES, FORMAT_VERSION, HEADER_BYTES, MAX_OBJECT_BYTES, Model, Record

SUFFIX: Final = ".arrow"
#: Longer ones are not read. As of objects: written in one request.
MAX_MANIFEST_BYTES: Final = 8 << 20
MAX_ROWS: Final = 100_000  #: of one manifest: 79 bytes each

#: Manifests below half the largest size are merged once there are so many, or some more: not all nodes at once.
MIN_MERGED: Final = 24
MAX_MERGED: Final = 48
#: For so long a row that says that a block is removed is kept: others find it by then, and older rows come no more.
REMEMBERED_US: Final = 3600 * 1_000_000
#: Once a quarter of all rows are such of before, and these are so many, everything is merged.
_MIN_FORGOTTEN: Final = 1000

#: V: bytes
ROW = np.dtype(
    [
        ("name", "V16"),
        ("object", "V16"),  # its digest
        ("position", "<u4"),  # of the block in it
        ("num_tokens", "<u4"),
        ("checksum", "<u8"),
        ("written_us", "<i8"),  # since 1970, by the writer's clock
        ("is_removed", "?"),  # then all but name and written_us are zero
        ("codec", "<u2"),
        ("offset", "<u4"),  # of its record in the object
        ("stored_bytes", "<u8"),
        ("tenant", "<u8"),  # 0: nobody's in particular
    ]
)
_MAX_TOKENS = 1 << 24
_MAX_WRITTEN_US = 1 << 53

_WIDE_VERSION = 2

Rows: TypeAlias = npt.NDArray[np.void]

_FIELDS = [
    pa.field("name", pa.binary(16), nullable=False),
    pa.field("object", pa.binary(16), nullable=False),
    pa.field("position", pa.uint32(), nullable=False),
    pa.field("num_tokens", pa.uint32(), nullable=False),
    pa.field("checksum", pa.uint64(), nullable=False),
    pa.field("written", pa.timestamp("us", "UTC"), nullable=False),
    pa.field("is_removed", pa.bool_(), nullable=False),
]
#: Of manifests of _WIDE_VERSION besides.
_WIDE_FIELDS = [
    pa.field("codec", pa.uint16(), nullable=False),
    pa.field("offset", pa.uint32(), nullable=False),
    pa.field("stored_bytes", pa.uint64(), nullable=False),
    pa.field("tenant", pa.uint64(), nullable=False),
]


class KnownManifest(NamedTuple):
    """What is remembered of a manifest that was read."""

    num_bytes: int
    changed_ns: int
    num_rows: int
    num_forgotten: int  #: rows of removals that were long ago when it was read
    is_whole: bool = True


def kept_rows(digest: bytes, records: Sequence[Record], written_us: Sequence[int]) -> Rows:
    """Return the rows that say that an object holds these records."""
    rows = np.zeros(len(records), ROW)
    rows["name"] = np.frombuffer(b"".join(record.block.name for record in records), "V16")
    rows["object"] = np.void(digest)
    rows["num_tokens"] = [record.block.num_tokens for record in records]
    rows["checksum"] = [record.block.checksum for record in records]
    rows["tenant"] = [record.block.tenant for record in records]
    rows["written_us"] = written_us
    for key in ("position", "codec", "offset", "stored_bytes"):
        rows[key] = [getattr(record, key) for record in records]
    return rows


def removed_rows(names: Sequence[bytes], written_us: Sequence[int]) -> Rows:
    """Return the rows that say that these blocks are removed."""
    rows = np.zeros(len(names), ROW)
    rows["name"] = np.frombuffer(b"".join(names), "V16")
    rows["written_us"] = written_us
    rows["is_removed"] = True
    return rows


def pack_manifest(model: Model, rows: Rows) -> tuple[str, memoryview]:
    """Return the file name and the bytes of a manifest."""
    num_rows = len(rows)
    columns = [
        _binary(rows["name"]),
        _binary(rows["object"]),
        *(pa.array(np.ascontiguousarray(rows[key])) for key in ("position", "num_tokens", "checksum")),
        pa.array(np.ascontiguousarray(rows["written_us"])).cast(_FIELDS[5].type),
        pa.array(np.ascontiguousarray(rows["is_removed"])),
    ]
    is_plain = (rows["codec"] == PLAIN) & (rows["offset"] == _plain_offsets(model, rows))
    is_wide = not bool((is_plain & (rows["tenant"] == 0)).all())
    if is_wide:
        columns += [pa.array(np.ascontiguousarray(rows[field.name])) for field in _WIDE_FIELDS]
    batch = pa.RecordBatch.from_arrays(columns, schema=_schema(model, is_wide=is_wide))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        if num_rows:
            writer.write_batch(batch)
    data = memoryview(sink.getvalue())
    return _file_name(data), data


def unpack_manifest(model: Model, file_name: str, data: bytes) -> Rows | str:
    """Return the rows of a manifest, or, in words, why they are not to be trusted."""
    if _file_name(data) != file_name:
        return "it has not the bytes that it is named by"
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"it is no Arrow file: {first_line(error)}"
    is_wide = len(table.schema) > len(_FIELDS)
    schema = _schema(model, is_wide=is_wide)
    if not table.schema.equals(schema, check_metadata=True):
        seen, wanted = (", ".join(f"{each.name} {each.type}" for each in one) for one in (table.schema, schema))
        return f"it has columns of {table.schema.metadata}, wanted {schema.metadata}: {seen}, wanted {wanted}"
    if any(column.null_count for column in table.columns):
        return "it has rows with nothing in them"
    rows = np.zeros(table.num_rows, ROW)
    for key, column in zip(schema.names, table.columns, strict=True):
        rows["written_us" if key == "written" else key] = _numbers(column)
    if not is_wide:
        rows["offset"] = _plain_offsets(model, rows)
        rows["stored_bytes"] = np.where(rows["is_removed"], 0, model.block_bytes)
    return _why_wrong(model, rows) or rows


def are_readable(model: Model, rows: Rows) -> npt.NDArray[np.bool_]:
    """Tell which rows are not of blocks that are encoded in a way that is not known, or not wanted, here."""
    return np.isin(rows["codec"], model.codecs)


def latest(rows: Rows) -> Rows:
    """Return the row that counts of each name."""
    names = np.ascontiguousarray(rows["name"]).view(">u8").reshape(-1, 2)
    # At one time a removal counts: what was removed is written anew at a later one.
    order = np.lexsort((rows["is_removed"], rows["written_us"], names[:, 1], names[:, 0]))
    rows, names = rows[order], names[order]
    is_last = np.ones(len(rows), np.bool_)
    is_last[:-1] = (names[1:] != names[:-1]).any(axis=1)
    return rows[is_last]


def are_forgotten(rows: Rows, now_us: int) -> npt.NDArray[np.bool_]:
    """Tell which rows are of removals long ago. They may go when no older row of their names is left anywhere."""
    are: npt.NDArray[np.bool_] = rows["is_removed"] & (rows["written_us"] < now_us - REMEMBERED_US)
    return are


def split_rows(rows: Rows) -> list[Rows]:
    """Cut rows into those of one manifest each."""
    return [rows[begin : begin + MAX_ROWS] for begin in range(0, len(rows), MAX_ROWS)]


def to_merge(known: Mapping[str, KnownManifest], min_merged: int) -> list[str]:
    """Say which manifests to merge, if any."""
    whole = {name: each for name, each in known.items() if each.is_whole}
    num_forgotten = sum(each.num_forgotten for each in whole.values())
    if num_forgotten >= _MIN_FORGOTTEN and 4 * num_forgotten >= sum(each.num_rows for each in whole.values()):
        return sorted(whole)
    small = sorted(name for name, each in whole.items() if each.num_bytes < MAX_MANIFEST_BYTES // 2)
    return small if len(small) >= min_merged else []


def _schema(model: Model, *, is_wide: bool) -> pa.Schema:
    version = _WIDE_VERSION if is_wide else FORMAT_VERSION
    metadata = {"kvray.format_version": str(version), "kvray.model": model.folder_name}
    return pa.schema(_FIELDS + _WIDE_FIELDS if is_wide else _FIELDS, metadata=metadata)


def _plain_offsets(model: Model, rows: Rows) -> npt.NDArray[np.int64]:
    """Return where records lie if those before them in their objects are plain; 0 for rows of what is removed."""
    offsets: npt.NDArray[np.int64] = rows["position"].astype(np.int64) * model.record_bytes
    return offsets


def _file_name(data: bytes | memoryview) -> str:
    return blake3(data).hexdigest(length=DIGEST_BYTES) + SUFFIX


def _binary(values: npt.NDArray[np.void]) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(values).tobytes())
    return pa.Array.from_buffers(pa.binary(values.dtype.itemsize), len(values), [None, buffer])


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.generic]:
    """Return a column's values as numpy has them."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        begin = array.offset * width
        data = memoryview(array.buffers()[1] or b"")[begin : begin + len(array) * width]
        return np.frombuffer(data, f"V{width}")
    if pa.types.is_timestamp(array.type):
        array = array.cast(pa.int64())
    numbers: npt.NDArray[np.generic] = array.to_numpy(zero_copy_only=False)
    return numbers


def _why_wrong(model: Model, rows: Rows) -> str | None:
    kept = rows[~rows["is_removed"]]
    known = kept[are_readable(model, kept)]
    if (kept["position"] >= model.blocks_per_object).any():
        return f"it has blocks at position {kept['position'].max()}; an object holds {model.blocks_per_object} at most"
    if ((kept["num_tokens"] < 1) | (kept["num_tokens"] > _MAX_TOKENS)).any():
        return f"it has blocks of {kept['num_tokens'].min()} to {kept['num_tokens'].max()} tokens"
    if ((rows["written_us"] < 0) | (rows["written_us"] > _MAX_WRITTEN_US)).any():
        return "it has rows of an impossible time"
    stored = known["stored_bytes"]
    if (
        (stored < 1) | (stored > model.block_bytes) | ((stored == model.block_bytes) != (known["codec"] == PLAIN))
    ).any():
        return (
            f"it has blocks stored as {stored.min()} to {stored.max()} bytes, "
            f"wanted {model.block_bytes} or, encoded, fewer"
        )
    ends = known["offset"] + stored + HEADER_BYTES
    if (ends > max(MAX_OBJECT_BYTES, model.record_bytes)).any():
        return f"it has blocks up to offset {ends.max()}"
    return None
