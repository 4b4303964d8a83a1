"""A prompt's blocks as one Arrow IPC file: a row for each block, head first, with its bytes. Imports pyarrow.

Columns are those of the table of blocks (cluster.cache_table) as far as they mean something elsewhere, and `token_ids`
and `data`. `name` is the one without a salt, so that a reader can tell that the tokens are the block's, and whoever
takes it in names it with a salt of their own. What computes the bytes is in it, too: other kernels give other bits.
The number of rows is in the schema's metadata.

A file is read a batch at a time, of which all but the blocks' bytes are looked at first. It is not mapped: one that is
cut short meanwhile would end the process that has it mapped, where a read that comes short is an error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from cluster.cache_table import ROW_COUNT, SCHEMA, ByteSink
from cluster.openai.cache_protocol import ImportRequest
from kvcache.names import NAME_BYTES, TOKEN_BYTES, BlockNamer
from messages.cache import PIECE_BYTES
from messages.errors import ConfigError
from transport.checksum import checksum

MEDIA_TYPE: Final = "application/vnd.apache.arrow.file"
_FORMAT: Final = {b"format": b"kvray prefix 1"}


class PrefixModel(NamedTuple):
    """Whose blocks a file holds."""

    fingerprint: bytes
    block_size: int  #: tokens
    block_bytes: int


class PrefixPiece(NamedTuple):
    """Some consecutive blocks of a prompt, and what their bytes are."""

    layout_version: int
    kernel_path: str
    names: bytes  #: without a salt, 16 bytes each
    token_bytes: bytes
    checksums: bytes  #: uint64, little endian
    data: bytes


def schema_of(block_size: int, block_bytes: int) -> pa.Schema:
    """Return the columns for blocks of so many tokens and bytes."""
    same = ("layout_version", "name", "num_tokens", "checksum")
    return pa.schema(
        [
            pa.field("fingerprint", pa.binary(), nullable=False),
            pa.field("kernel_path", pa.string(), nullable=False),
            *(pa.field(name, SCHEMA.field(name).type, nullable=False) for name in same),
            pa.field("token_ids", pa.list_(pa.field("item", pa.uint32(), nullable=False), block_size), nullable=False),
            pa.field("data", pa.binary(block_bytes), nullable=False),
        ]
    )


async def written(model: PrefixModel, num_rows: int, pieces: AsyncIterator[PrefixPiece]) -> AsyncIterator[bytes]:
    """Write a file of `num_rows` blocks, a batch for each piece, as the pieces come."""
    schema = schema_of(model.block_size, model.block_bytes)
    sink = ByteSink()
    metadata = {**_FORMAT, ROW_COUNT.encode(): str(num_rows).encode()}
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema.with_metadata(metadata)) as writer:
        async for piece in pieces:
            writer.write_batch(_batch(schema, model, piece))
            yield sink.take()
    yield sink.take()


def _batch(schema: pa.Schema, model: PrefixModel, piece: PrefixPiece) -> pa.RecordBatch:
    count = len(piece.names) // NAME_BYTES

    def laid_over(data: bytes, kind: pa.DataType, length: int = count) -> pa.Array:
        return pa.Array.from_buffers(kind, length, [None, pa.py_buffer(data)])

    token_ids = laid_over(piece.token_bytes, pa.uint32(), count * model.block_size)
    columns: dict[str, pa.Array] = {
        "fingerprint": pa.array([model.fingerprint] * count, pa.binary()),
        "kernel_path": pa.array([piece.kernel_path] * count, pa.string()),
        "layout_version": pa.array(np.full(count, piece.layout_version, np.uint32)),
        "name": laid_over(piece.names, schema.field("name").type),
        "num_tokens": pa.array(np.full(count, model.block_size, np.uint32)),
        "checksum": laid_over(piece.checksums, pa.uint64()),
        "token_ids": pa.FixedSizeListArray.from_arrays(token_ids, type=schema.field("token_ids").type),
        "data": laid_over(piece.data, schema.field("data").type),
    }
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


class PrefixFile:
    """A file that was written so, by whomever; nothing in it is trusted. Close it at last."""

    def __init__(self, path: Path) -> None:
        """Open it, and look at all of it but the blocks' bytes.

        Raises:
            ConfigError: it cannot be read, is no such file, or not whole; names the first row that is wrong.
        """
        self.path = path
        try:
            self._file = pa.OSFile(str(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
        try:
            self._reader = pa.ipc.open_file(self._file)
            self._check()
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            self.close()
            raise ConfigError(f"{path} is no whole Arrow file with a prefix: {_first_line(error)}") from None
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; what `pieces` gave stays valid."""
        self._file.close()

    def pieces(self) -> Iterator[ImportRequest]:
        """Yield the blocks, some MiB or one of them at a time.

        Raises:
            ConfigError: a block's bytes do not have its checksum, or the file was changed meanwhile.
        """
        max_rows = max(1, PIECE_BYTES // self.model.block_bytes)
        first_block = 0
        for number in range(self._reader.num_record_batches):
            try:
                batch = self._batch(self._reader, number)
            except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
                raise ConfigError(f"{self.path} was changed while it was read: {_first_line(error)}") from None
            for begin in range(0, batch.num_rows, max_rows):
                end = min(begin + max_rows, batch.num_rows)
                piece = self._piece(batch, begin, end, first_block)
                self._verify(piece)
                yield piece
                first_block += end - begin

    def _check(self) -> None:
        schema = self._reader.schema
        metadata = schema.metadata or {}
        told = metadata.get(ROW_COUNT.encode(), b"")
        data, tokens = (schema.field(name).type if name in schema.names else None for name in ("data", "token_ids"))
        if not isinstance(data, pa.FixedSizeBinaryType) or not isinstance(tokens, pa.FixedSizeListType):
            raise self._wrong("it has no columns `data` and `token_ids` of fixed sizes")
        if tokens.list_size < 1 or data.byte_width < 1:
            raise self._wrong(f"its blocks have {tokens.list_size} tokens and {data.byte_width} bytes")
        wanted = schema_of(tokens.list_size, data.byte_width)
        if {key: metadata.get(key) for key in _FORMAT} != _FORMAT or not schema.equals(wanted):
            raise self._wrong(f"its columns are {', '.join(f'{field}' for field in schema)}")
        beside_data = [number for number, name in enumerate(schema.names) if name != "data"]
        reader = pa.ipc.open_file(self._file, options=pa.ipc.IpcReadOptions(included_fields=beside_data))
        first: dict[str, Any] = {}
        token_bytes: list[bytes] = []
        namer: BlockNamer | None = None
        num_rows = 0
        for number in range(reader.num_record_batches):
            batch = self._batch(reader, number)
            if not batch.num_rows:
                continue
            for name in ("fingerprint", "kernel_path", "layout_version"):
                values = set(batch.column(name).to_pylist())
                if values != {first.setdefault(name, next(iter(values)))}:
                    raise self._wrong(f"rows differ in their {name}, all of a file have one")
            namer = namer or BlockNamer(first["fingerprint"], b"", tokens.list_size)
            token_bytes.append(_token_bytes(batch))
            names = namer.extend(token_bytes[-1])
            if set(batch.column("num_tokens").to_pylist()) != {tokens.list_size}:
                raise self._wrong(f"a row has not {tokens.list_size} tokens, which are a whole block")
            for row, (seen, wanted_name) in enumerate(zip(batch.column("name").to_pylist(), names, strict=True)):
                if seen != wanted_name:
                    raise self._wrong(f"row {num_rows + row}: its name is not that of the tokens up to there")
            num_rows += batch.num_rows
        if told != str(num_rows).encode():
            raise self._wrong(f"it has {num_rows} rows, and says that it has {told.decode(errors='replace') or 'none'}")
        if not num_rows:
            raise self._wrong("it has no blocks")
        self.num_rows = num_rows
        self.model = PrefixModel(first["fingerprint"], tokens.list_size, data.byte_width)
        self._layout_version, self._kernel_path = first["layout_version"], first["kernel_path"]
        self._token_bytes = b"".join(token_bytes)

    def _batch(self, reader: pa.ipc.RecordBatchFileReader, number: int) -> pa.RecordBatch:
        batch = reader.get_batch(number)
        batch.validate(full=True)
        if any(column.null_count for column in batch.columns):
            raise self._wrong("it has nulls")
        return batch

    def _piece(self, batch: pa.RecordBatch, begin: int, end: int, first_block: int) -> ImportRequest:
        size = self.model.block_bytes
        rows = batch.slice(begin, end - begin)
        data = rows.column("data")
        return ImportRequest(
            fingerprint=self.model.fingerprint,
            layout_version=self._layout_version,
            kernel_path=self._kernel_path,
            block_size=self.model.block_size,
            block_bytes=size,
            first_block=first_block,
            token_bytes=self._token_bytes[: (first_block + end - begin) * self.model.block_size * TOKEN_BYTES],
            names=b"".join(rows.column("name").to_pylist()),
            checksums=np.array(rows.column("checksum").to_pylist(), "<u8").tobytes(),
            data=memoryview(data.buffers()[1])[data.offset * size :][: len(data) * size],
        )

    def _verify(self, piece: ImportRequest) -> None:
        data, size = piece.data, self.model.block_bytes
        for row, wanted in enumerate(np.frombuffer(piece.checksums, "<u8").tolist()):
            if checksum(data[row * size : (row + 1) * size]) != wanted:
                raise self._wrong(f"row {piece.first_block + row}: its bytes do not have its checksum")

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"{self.path} holds no prefix that can be taken in: {why}")


def _token_bytes(batch: pa.RecordBatch) -> bytes:
    tokens = batch.column("token_ids").flatten()
    return bytes(tokens.to_numpy(zero_copy_only=True).astype("<u4").tobytes())


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).splitlines() or [type(error).__name__]
    return lines[0]
