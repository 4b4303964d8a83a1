"""A prefix as an Arrow file: written in pieces, read in pieces, and nothing in it trusted."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from cluster.prefix_file import PrefixFile, PrefixModel, PrefixPiece, schema_of, written
from kvcache.names import block_names, pack_tokens
from messages.errors import ConfigError
from transport.checksum import checksum

BLOCK_SIZE = 4
BLOCK_BYTES = 1000
MODEL = PrefixModel(b"\xab" * 32, BLOCK_SIZE, BLOCK_BYTES)
NUM_BLOCKS = 7
TOKENS = pack_tokens(range(100, 100 + NUM_BLOCKS * BLOCK_SIZE))
NAMES = block_names(MODEL.fingerprint, b"", TOKENS, BLOCK_SIZE)
DATA = random.Random(3).randbytes(NUM_BLOCKS * BLOCK_BYTES)


def piece_of(begin: int, end: int, **fields) -> PrefixPiece:
    data = DATA[begin * BLOCK_BYTES : end * BLOCK_BYTES]
    sums = [checksum(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]
    return PrefixPiece(
        layout_version=3,
        kernel_path="tiles",
        names=NAMES[16 * begin : 16 * end],
        token_bytes=TOKENS[16 * begin : 16 * end],
        checksums=np.array(sums, "<u8").tobytes(),
        data=data,
    )._replace(**fields)


def write(path: Path, pieces: list[PrefixPiece], num_rows: int = NUM_BLOCKS) -> None:
    async def given() -> AsyncIterator[PrefixPiece]:
        for piece in pieces:
            yield piece

    async def parts() -> list[bytes]:
        return [part async for part in written(MODEL, num_rows, given())]

    path.write_bytes(b"".join(asyncio.run(parts())))


def read(path: Path):
    """All that is in it, as it would be put in; None where it is refused."""
    prefix = PrefixFile(path)
    try:
        return [(*msgspec.structs.astuple(one)[:-1], bytes(one.data)) for one in prefix.pieces()]
    finally:
        prefix.close()


@pytest.fixture
def path(tmp_path) -> Path:
    write(tmp_path / "prefix.arrow", [piece_of(0, 3), piece_of(3, 4), piece_of(4, 7)])
    return tmp_path / "prefix.arrow"


def test_what_was_written_is_read_in_order_with_the_tokens_up_to_there(path):
    kind = (MODEL.fingerprint, 3, "tiles", BLOCK_SIZE, BLOCK_BYTES)
    assert read(path) == [
        (*kind, begin, TOKENS[: 16 * end], NAMES[16 * begin : 16 * end], piece.checksums, piece.data)
        for begin, end in ((0, 3), (3, 4), (4, 7))
        for piece in [piece_of(begin, end)]
    ]


def test_any_arrow_reader_opens_it(path):
    table = pa.ipc.open_file(path).read_all()
    table.validate(full=True)
    assert table.num_rows == NUM_BLOCKS == int(table.schema.metadata[b"num_rows"])
    assert b"".join(table["name"].to_pylist()) == NAMES
    assert [token for row in table["token_ids"].to_pylist() for token in row] == list(range(100, 128))
    assert b"".join(table["data"].to_pylist()) == DATA


def test_what_is_looked_at_first_has_no_blocks_bytes_and_then_one_batch_at_a_time_is_there(path):
    before = pa.total_allocated_bytes()
    prefix = PrefixFile(path)
    opened = pa.total_allocated_bytes()
    assert opened - before < 3 * BLOCK_BYTES
    for piece in prefix.pieces():
        del piece
        assert pa.total_allocated_bytes() - opened < 6 * BLOCK_BYTES
    prefix.close()


@pytest.mark.parametrize("left_bytes", [0, 1, 4000])
def test_a_file_cut_short_while_it_is_read_is_an_error_in_words(path, left_bytes):
    prefix = PrefixFile(path)
    os.truncate(path, left_bytes)
    with pytest.raises(ConfigError, match=r"prefix\.arrow was changed while it was read"):
        list(prefix.pieces())
    prefix.close()


def test_pieces_outlive_their_file(path):
    prefix = PrefixFile(path)
    pieces = list(prefix.pieces())
    prefix.close()
    path.unlink()
    assert b"".join(bytes(piece.data) for piece in pieces) == DATA


def test_large_batches_are_read_some_blocks_at_a_time(path, monkeypatch):
    monkeypatch.setattr("cluster.prefix_file.PIECE_BYTES", 2 * BLOCK_BYTES)
    pieces = read(path)
    assert [piece[5] for piece in pieces] == [0, 2, 3, 4, 6]
    assert b"".join(piece[-1] for piece in pieces) == DATA


def test_a_file_that_was_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for num_bytes in [0, 1, 7, 100, len(whole) // 2, *range(len(whole) - 400, len(whole), 7)]:
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(ConfigError, match=r"prefix\.arrow"):
            read(path)


def damage(path: Path, whole: bytes, wanted: list, seed: int) -> bool:
    """Alter a byte; tell whether it is refused. Else what is read is as it was: nothing read it."""
    draw = random.Random(seed)
    altered = bytearray(whole)
    altered[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(altered)
    try:
        assert read(path) == wanted
    except ConfigError:
        return True
    return False


@pytest.mark.slow
def test_an_altered_byte_is_refused_wherever_it_matters(path):
    whole, wanted = path.read_bytes(), read(path)
    assert sum(damage(path, whole, wanted, seed) for seed in range(200)) > 100


@pytest.mark.long
def test_many_more_altered_bytes(path):
    whole, wanted = path.read_bytes(), read(path)
    assert sum(damage(path, whole, wanted, 1000 + seed) for seed in range(20_000)) > 10_000


CASES: dict[str, tuple[list[PrefixPiece], int, str]] = {
    "too few rows": ([piece_of(0, 3)], 7, "has 3 rows, and says that it has 7"),
    "no rows": ([], 0, "it has no blocks"),
    "rows in another order": ([piece_of(3, 7), piece_of(0, 3)], 7, "row 0: its name is not that of the tokens"),
    "rows twice": ([piece_of(0, 3), piece_of(0, 3)], 6, "row 3: its name"),
    "others' tokens": ([piece_of(0, 7, token_bytes=TOKENS[:-4] + b"abcd")], 7, "row 6: its name is not that"),
    "others' bytes": ([piece_of(0, 7, data=DATA[1000:] + DATA[:1000])], 7, "row 0: its bytes do not have its checksum"),
    "two layouts": ([piece_of(0, 3), piece_of(3, 7, layout_version=4)], 7, "rows differ in their layout_version"),
    "two kernel paths": ([piece_of(0, 3), piece_of(3, 7, kernel_path="fma")], 7, "rows differ in their kernel_path"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_together_is_refused_with_the_reason(tmp_path, case):
    pieces, num_rows, words = CASES[case]
    write(tmp_path / "a.arrow", pieces, num_rows)
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "a.arrow")


def other_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = change(pa.ipc.open_file(path).read_all())
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def without_metadata(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata(None)


def with_a_null(table: pa.Table) -> pa.Table:
    names = pa.array([None, *table["name"].to_pylist()[1:]], pa.binary(16))
    return table.set_column(table.schema.names.index("name"), table.schema.field("name"), names)


def with_a_column(table: pa.Table) -> pa.Table:
    return table.append_column("more", pa.array([1] * NUM_BLOCKS)).replace_schema_metadata(table.schema.metadata)


def with_large_data(table: pa.Table) -> pa.Table:
    data = pa.array(table["data"].to_pylist(), pa.large_binary())
    return table.set_column(table.schema.names.index("data"), "data", data)


def with_partial_blocks(table: pa.Table) -> pa.Table:
    field = table.schema.field("num_tokens")
    return table.set_column(table.schema.names.index("num_tokens"), field, pa.array([3] * NUM_BLOCKS, pa.uint32()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_metadata, "its columns are"),
        (with_a_null, "prefix"),
        (with_a_column, "its columns are"),
        (with_large_data, "no columns `data` and `token_ids` of fixed sizes"),
        (with_partial_blocks, "a row has not 4 tokens"),
    ],
)
def test_another_table_is_refused(path, change, words):
    other_table(path, change)
    with pytest.raises(ConfigError, match=words):
        read(path)


def test_what_is_no_file_at_all_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        PrefixFile(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"cannot be read|no whole Arrow file"):
        PrefixFile(tmp_path)
    (tmp_path / "text").write_text("hello\n" * 100)
    with pytest.raises(ConfigError, match="is no whole Arrow file with a prefix"):
        PrefixFile(tmp_path / "text")


def test_the_columns_are_those_of_the_table(path):
    assert pa.ipc.open_file(path).schema.equals(schema_of(BLOCK_SIZE, BLOCK_BYTES))
