from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from nodecache.codec import lossless_codec
from nodecache.remote import manifests
from nodecache.remote.layout import FORMAT_VERSION, HEADER_BYTES
from nodecache.remote.manifests import KnownManifest, are_forgotten, kept_rows, latest, removed_rows
from tests.nodecache.remote.blocks import BLOCK_BYTES, MODEL, name_of, records_of

DIGEST = b"d" * 16
BFLOAT16 = lossless_codec(2)
NOW_US = 1_700_000_000_000_000


@pytest.fixture
def wide():
    """Rows of an object: one block is encoded, the next one is not, the last one is so as nobody knows."""
    first, second, third = records_of(range(3))
    encoded = first._replace(codec=BFLOAT16, stored_bytes=3000)
    moved = second._replace(offset=encoded.end)
    unknown = third._replace(codec=77, offset=123_456, stored_bytes=2 * BLOCK_BYTES)
    kept = kept_rows(DIGEST, [encoded, moved, unknown], [NOW_US] * 3)
    return np.concatenate([kept, removed_rows([name_of(7)], [NOW_US])])


@pytest.fixture
def rows():
    kept = kept_rows(DIGEST, records_of(range(3)), [NOW_US + n for n in range(3)])
    return np.concatenate([kept, removed_rows([name_of(7)], [NOW_US])])


def repacked(rows, **columns):
    """A manifest with columns of one's own, named by its bytes as it should be."""
    _, data = manifests.pack_manifest(MODEL, rows)
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    for name, column in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, pa.field(name, column.type, nullable=False), column)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = bytes(sink.getvalue())
    return manifests._file_name(data), data


def test_rows_are_read_as_they_were_written(rows):
    name, data = manifests.pack_manifest(MODEL, rows)
    assert np.array_equal(manifests.unpack_manifest(MODEL, name, bytes(data)), rows)
    assert manifests.pack_manifest(MODEL, rows)[0] == name


def test_rows_of_encoded_blocks_are_read_as_they_were_written(wide):
    name, data = manifests.pack_manifest(MODEL, wide)
    assert np.array_equal(manifests.unpack_manifest(MODEL, name, bytes(data)), wide)
    assert manifests.are_readable(MODEL, wide).tolist() == [True, True, False, True]
    # Plain, but not where its position says: also of such rows alone, as after some were removed.
    name, data = manifests.pack_manifest(MODEL, wide[1:2])
    assert np.array_equal(manifests.unpack_manifest(MODEL, name, bytes(data)), wide[1:2])


def test_plain_rows_are_written_as_before_there_was_another_codec(rows):
    table = pa.ipc.open_file(pa.py_buffer(manifests.pack_manifest(MODEL, rows)[1])).read_all()
    assert table.schema.metadata[b"kvray.format_version"] == b"1"
    assert len(table.column_names) == 7


def test_whose_blocks_they_are_is_told_where_they_are_somebodys(rows):
    rows["tenant"][1] = 2**64 - 1
    name, data = manifests.pack_manifest(MODEL, rows)
    assert np.array_equal(manifests.unpack_manifest(MODEL, name, bytes(data)), rows)
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    assert (table.schema.metadata[b"kvray.format_version"], table["tenant"][1].as_py()) == (b"2", 2**64 - 1)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("stored_bytes", [0, BLOCK_BYTES, 1, 0], "blocks stored as 0 to 5000 bytes, wanted 5000 or, encoded, fewer"),
        ("stored_bytes", [BLOCK_BYTES, BLOCK_BYTES, 1, 0], "wanted 5000 or, encoded, fewer"),
        ("stored_bytes", [3000, 3000, 1, 0], "wanted 5000 or, encoded, fewer"),
        ("stored_bytes", [3000, 1 << 63, 1, 0], "wanted 5000 or, encoded, fewer"),
        ("offset", [8 << 20, 0, 0, 0], "up to offset 8391736"),
    ],
)
def test_places_that_cannot_be_are_told(wide, column, values, words):
    types = {"stored_bytes": pa.uint64(), "offset": pa.uint32()}
    found = manifests.unpack_manifest(MODEL, *repacked(wide, **{column: pa.array(values, types[column])}))
    assert words in found


def test_any_arrow_reader_opens_one(rows):
    table = pa.ipc.open_file(pa.py_buffer(manifests.pack_manifest(MODEL, rows)[1])).read_all()
    assert table.column_names == ["name", "object", "position", "num_tokens", "checksum", "written", "is_removed"]
    assert table["name"][0].as_py() == name_of(0)
    assert table["is_removed"].to_pylist() == [False, False, False, True]


def test_one_of_no_rows_is_one(rows):
    name, data = manifests.pack_manifest(MODEL, rows[:0])
    assert len(manifests.unpack_manifest(MODEL, name, bytes(data))) == 0


def test_the_longest_is_within_its_bounds():
    names = np.random.default_rng(1).bytes(16 * manifests.MAX_ROWS)
    rows = removed_rows([names[at : at + 16] for at in range(0, len(names), 16)], [NOW_US] * manifests.MAX_ROWS)
    rows["codec"] = BFLOAT16  # with every column
    _, data = manifests.pack_manifest(MODEL, rows)
    assert len(data) <= manifests.MAX_MANIFEST_BYTES
    parts = manifests.split_rows(np.concatenate([rows, rows[:5]]))
    assert [len(part) for part in parts] == [manifests.MAX_ROWS, 5]


def test_every_changed_byte_is_noticed(rows):
    name, data = manifests.pack_manifest(MODEL, rows)
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 0x40
        assert manifests.unpack_manifest(MODEL, name, bytes(changed)) == "it has not the bytes that it is named by"


@given(st.binary(max_size=200))
def test_bytes_that_are_no_arrow_file_are_said_to_be_none(data):
    assert "no Arrow file" in manifests.unpack_manifest(MODEL, manifests._file_name(data), data)


def test_a_file_cut_anywhere_and_named_anew_is_told_or_has_no_rows(rows):
    _, data = manifests.pack_manifest(MODEL, rows)
    for end in range(0, len(data), 3):
        cut = bytes(data[:end])
        assert isinstance(manifests.unpack_manifest(MODEL, manifests._file_name(cut), cut), str)


def test_one_of_another_model_is_told(rows):
    other = MODEL._replace(layout_version=2)
    name, data = manifests.pack_manifest(other, rows)
    assert f"wanted {{b'kvray.format_version': b'{FORMAT_VERSION}', b'kvray.model': b'{MODEL.folder_name}'}}" in (
        manifests.unpack_manifest(MODEL, name, bytes(data))
    )


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("position", pa.array([0, 1, 5000, 0], pa.uint32()), "blocks at position 5000; an object holds 1635 at most"),
        ("num_tokens", pa.array([16, 0, 16, 0], pa.uint32()), "blocks of 0 to 16 tokens"),
        ("num_tokens", pa.array([16, 1 << 31, 16, 0], pa.uint32()), "blocks of 16 to 2147483648 tokens"),
        ("written", pa.array([1, 2, -3, 4], pa.timestamp("us", "UTC")), "rows of an impossible time"),
        ("written", pa.array([1, 2, 1 << 62, 4], pa.timestamp("us", "UTC")), "rows of an impossible time"),
        ("position", pa.array([0, 1, 2, 3], pa.uint64()), "position uint64, "),
        ("position", pa.array([0, 1, None, 3], pa.uint32()), "nothing in them"),
    ],
)
def test_rows_that_cannot_be_are_told(rows, column, values, words):
    assert MODEL.blocks_per_object == (8 << 20) // (HEADER_BYTES + MODEL.block_bytes) == 1635
    assert words in manifests.unpack_manifest(MODEL, *repacked(rows, **{column: values}))


def test_rows_in_several_batches_are_read(rows):
    _, data = manifests.pack_manifest(MODEL, rows)
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    data = bytes(sink.getvalue())
    assert np.array_equal(manifests.unpack_manifest(MODEL, manifests._file_name(data), data), rows)


def test_the_latest_row_of_a_name_counts_whatever_the_order():
    rows = np.concatenate(
        [
            kept_rows(DIGEST, records_of([1, 2, 3]), [10, 10, 10]),
            removed_rows([name_of(1), name_of(2), name_of(3)], [9, 10, 11]),
            kept_rows(b"e" * 16, records_of([3]), [12]),
        ]
    )
    rng = np.random.default_rng(1)
    for _ in range(10):
        counted = latest(rows[rng.permutation(len(rows))])
        by_name = {row["name"].item(): row for row in counted}
        assert len(counted) == 3
        assert not by_name[name_of(1)]["is_removed"]
        assert by_name[name_of(2)]["is_removed"]
        assert by_name[name_of(3)]["object"].item() == b"e" * 16


def test_only_removals_long_ago_are_forgotten(rows):
    assert not are_forgotten(rows, NOW_US + manifests.REMEMBERED_US).any()
    assert are_forgotten(rows, NOW_US + manifests.REMEMBERED_US + 1).tolist() == [False, False, False, True]


def known(num_bytes=1000, num_rows=10, num_forgotten=0, *, is_whole=True):
    return KnownManifest(num_bytes, 0, num_rows, num_forgotten, is_whole)


def test_small_manifests_are_merged_once_they_are_many():
    small = {f"small-{n}": known() for n in range(5)}
    others = {"large": known(manifests.MAX_MANIFEST_BYTES - 1), "damaged": known(is_whole=False)}
    assert manifests.to_merge({**small, **others}, 6) == []
    assert manifests.to_merge({**small, **others}, 5) == sorted(small)


def test_everything_is_merged_once_much_of_it_is_forgotten():
    large = known(manifests.MAX_MANIFEST_BYTES - 1, num_rows=4000, num_forgotten=999)
    assert manifests.to_merge({"a": large}, 6) == []
    both = {"a": large, "b": known(num_rows=0, num_forgotten=1)}
    assert manifests.to_merge(both, 6) == ["a", "b"]
    assert manifests.to_merge({**both, "c": known(num_rows=1)}, 6) == []
