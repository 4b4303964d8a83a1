"""What workers and node caches hold as an Arrow table: a row for each block and tier. Imports pyarrow when asked.

Columns are laid over the bytes that they sent, without a copy, but for names of tiers, nodes and the like, which
are dictionaries. What a tier keeps nothing of is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvcache.names import NAME_BYTES
from messages.cache import BlocksListed
from messages.errors import WorkerError
from messages.fleet import WorkerInfo
from messages.tier import Tier

TableFormat: TypeAlias = Literal["arrow", "parquet", "json"]
MEDIA_TYPES: Final[dict[TableFormat, str]] = {
    "arrow": "application/vnd.apache.arrow.stream",
    "parquet": "application/vnd.apache.parquet",
    "json": "application/json",
}
ROW_COUNT: Final = "num_rows"  #: in the schema's metadata: a stream that was cut reads as a shorter table

_TEXT: Final = pa.dictionary(pa.int32(), pa.string())
_FINGERPRINT: Final = pa.dictionary(pa.int32(), pa.binary())
SCHEMA: Final = pa.schema(
    [
        pa.field("fingerprint", _FINGERPRINT, nullable=False),
        pa.field("layout_version", pa.uint32(), nullable=False),
        pa.field("tenant", pa.uint64()),  # 0: nobody in particular
        pa.field("tenant_name", _TEXT),  # where the configuration knows it
        pa.field("name", pa.binary(NAME_BYTES), nullable=False),
        pa.field("tier", _TEXT, nullable=False),
        pa.field("node", _TEXT, nullable=False),
        pa.field("holder", _TEXT, nullable=False),  # a worker or a node cache
        pa.field("place", pa.uint64(), nullable=False),  # block id in the arena; where in a store
        pa.field("num_tokens", pa.uint32(), nullable=False),
        pa.field("checksum", pa.uint64()),
        pa.field("num_pins", pa.int32()),  # readers right now
        pa.field("kept_s", pa.float64()),  # until its pin expires; 0: it has none; inf: for good
        pa.field("num_hits", pa.uint32()),
        pa.field("age_s", pa.float64()),  # since its last use
    ]
)
#: Columns that lie in a message: name, its field there, whether a tier may keep nothing of it.
_COLUMNS: Final = (
    ("name", "names", False),
    ("place", "places", False),
    ("num_tokens", "num_tokens", False),
    ("checksum", "checksums", True),
    ("tenant", "tenants", True),
    ("num_pins", "num_pins", True),
    ("kept_s", "kept_s", True),
    ("num_hits", "num_hits", True),
    ("age_s", "age_s", True),
)
_HEX: Final = ("fingerprint", "name")
_NUMBERS_AS_TEXT: Final = ("tenant", "checksum")  #: 64 bits are more than JSON's readers keep


class Listed(NamedTuple):
    """Some blocks of a tier of a worker or a node cache."""

    info: WorkerInfo
    tier: Tier
    listed: BlocksListed


class CacheTable:
    """A table of blocks. `batches` are made as they are asked for: some thousand rows each."""

    def __init__(self, parts: Sequence[Listed], tenants: Mapping[int, str] | None = None) -> None:
        """Take in what they listed; `tenants`: names by their numbers.

        Raises:
            WorkerError: a column has not as many values as there are blocks.
        """
        self._parts = [part for part in parts if part.listed.num_blocks]
        for part in self._parts:
            _check(part)
        self._tenants = dict(tenants or {})
        self.num_rows = sum(part.listed.num_blocks for part in self._parts)
        self.schema = SCHEMA.with_metadata({ROW_COUNT: str(self.num_rows)})
        self._words: dict[str, dict[Any, int]] = {
            column: {word: number for number, word in enumerate(dict.fromkeys(words))}
            for column, words in (
                ("fingerprint", [part.info.fingerprint for part in self._parts]),
                ("tier", [part.tier for part in self._parts]),
                ("node", [part.info.node_id for part in self._parts]),
                ("holder", [part.info.worker_id for part in self._parts]),
            )
        }

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Make the table, a batch for each part."""
        for part in self._parts:
            yield self._batch(part)

    def arrow_stream(self) -> Iterator[bytes]:
        """Write an Arrow IPC stream, a piece for each batch."""
        sink = ByteSink()
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), self.schema) as writer:
            for batch in self.batches():
                writer.write_batch(batch)
                yield sink.take()
        yield sink.take()

    def parquet(self) -> Iterator[bytes]:
        """Write a Parquet file, a row group at a time."""
        sink = ByteSink()
        with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), self.schema, compression="zstd") as writer:
            for batch in self.batches():
                writer.write_batch(batch)
                yield sink.take()
        yield sink.take()

    def json(self) -> Iterator[bytes]:
        """Write one JSON object; names are hexadecimal digits, numbers of 64 bits decimal ones in quotes."""
        yield b'{"num_rows":%d,"blocks":[' % self.num_rows
        separator = b""
        for batch in self.batches():
            yield separator + b",".join(msgspec.json.encode(row) for row in _json_rows(batch))
            separator = b","
        yield b"]}"

    def pieces(self, wanted: TableFormat) -> Iterator[bytes]:
        """Write the table in the form that is wanted."""
        return {"arrow": self.arrow_stream, "parquet": self.parquet, "json": self.json}[wanted]()

    def _batch(self, part: Listed) -> pa.RecordBatch:
        listed, count = part.listed, part.listed.num_blocks
        columns: dict[str, pa.Array] = {
            "fingerprint": self._same("fingerprint", part.info.fingerprint, count),
            "tier": self._same("tier", part.tier, count),
            "node": self._same("node", part.info.node_id, count),
            "holder": self._same("holder", part.info.worker_id, count),
            "layout_version": pa.array(np.full(count, listed.layout_version, np.uint32)),
            "tenant_name": self._tenant_names(listed),
        }
        for column, field, _ in _COLUMNS:
            data, kind = getattr(listed, field), SCHEMA.field(column).type
            columns[column] = (
                pa.Array.from_buffers(kind, count, [None, pa.py_buffer(data)]) if data else pa.nulls(count, kind)
            )
        return pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)

    def _tenant_names(self, listed: BlocksListed) -> pa.Array:
        numbers = np.frombuffer(listed.tenants, "<u8")
        indices = np.full(listed.num_blocks, -1, np.int32)
        for index, number in enumerate(self._tenants):
            indices[: len(numbers)][numbers == np.uint64(number)] = index
        words = pa.array(list(self._tenants.values()), pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(indices, mask=indices < 0), words)

    def _same(self, column: str, word: object, count: int) -> pa.Array:
        words = self._words[column]
        kind = SCHEMA.field(column).type
        indices = pa.array(np.full(count, words[word], np.int32))
        return pa.DictionaryArray.from_arrays(indices, pa.array(list(words), kind.value_type))


class ByteSink:
    """A file to write to, whose bytes are taken out by and by."""

    closed = False

    def __init__(self) -> None:
        self._written: list[bytes] = []
        self._num_bytes = 0

    def write(self, data: bytes) -> int:
        """Take bytes in."""
        self._written.append(bytes(data))
        self._num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._num_bytes

    def flush(self) -> None:
        """Do nothing: what is written is there."""

    def close(self) -> None:
        """Do nothing: what was written is taken out still."""

    def take(self) -> bytes:
        """Take out what was written since the last call."""
        data = b"".join(self._written)
        self._written.clear()
        return data


def _check(part: Listed) -> None:
    for column, field, is_optional in _COLUMNS:
        wanted = part.listed.num_blocks * SCHEMA.field(column).type.bit_width // 8
        seen = len(getattr(part.listed, field))
        if seen != wanted and not (is_optional and seen == 0):
            raise WorkerError(
                f"{part.info.worker_id} listed {part.listed.num_blocks} blocks with {seen} bytes of {column}; "
                f"{wanted} are wanted"
            )


def _json_rows(batch: pa.RecordBatch) -> Iterable[dict[str, Any]]:
    columns: dict[str, list[Any]] = {name: batch.column(name).to_pylist() for name in batch.schema.names}
    for name in _HEX:
        columns[name] = [value.hex() for value in columns[name]]
    for name in _NUMBERS_AS_TEXT:
        columns[name] = [None if value is None else str(value) for value in columns[name]]
    columns["kept_s"] = ["inf" if value == np.inf else value for value in columns["kept_s"]]
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
