from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from nodecache.disk.files import ALIGN_BYTES
from nodecache.disk.layout import (
    RECORD_BYTES,
    Geometry,
    Model,
    pack_records,
    pack_segment_header,
    unpack_records,
    unpack_segment_header,
)
from tests.nodecache.disk.blocks import MODEL, block_of

NUM_ROWS = 40


def table_of(first_row: int, num_blocks: int) -> bytearray:
    table = bytearray(NUM_ROWS * RECORD_BYTES)
    blocks = [block_of(number) for number in range(num_blocks)]
    begin = first_row * RECORD_BYTES
    table[begin : begin + num_blocks * RECORD_BYTES] = pack_records(MODEL, 3, first_row, 100, blocks)
    return table


def test_no_header_lies_across_two_sectors():
    assert 512 % RECORD_BYTES == 0


@settings(deadline=None)
@given(block_bytes=st.integers(1, 1 << 22), num_bytes=st.integers(0, 1 << 28))
def test_places_are_aligned_and_do_not_overlap(block_bytes, num_bytes):
    geometry = Geometry.within(block_bytes, num_bytes)
    assert geometry.num_rows >= 4
    assert geometry.data_offset >= ALIGN_BYTES + geometry.num_rows * RECORD_BYTES
    assert geometry.data_offset % ALIGN_BYTES == geometry.record_bytes % ALIGN_BYTES == 0
    assert geometry.record_bytes >= block_bytes
    assert geometry.offset_of(geometry.num_rows) == geometry.num_bytes
    assert geometry.num_rows == 4 or geometry.num_bytes <= num_bytes + 2 * ALIGN_BYTES


def test_a_segment_header_tells_where_things_lie():
    page = pack_segment_header(MODEL, 3, NUM_ROWS)
    assert len(page) == ALIGN_BYTES
    assert unpack_segment_header(page, MODEL, 3) == Geometry(MODEL.block_bytes, NUM_ROWS)


@settings(deadline=None)
@given(position=st.integers(0, 180), bit=st.integers(0, 7))
def test_a_segment_header_with_a_flipped_bit_is_not_used(position, bit):
    page = bytearray(pack_segment_header(MODEL, 3, NUM_ROWS))
    page[position] ^= 1 << bit
    assert isinstance(unpack_segment_header(bytes(page), MODEL, 3), str)


def test_records_come_back_as_they_were_written():
    records, is_whole, is_damaged = unpack_records(bytes(table_of(2, 5)), MODEL, 3, NUM_ROWS)
    assert np.flatnonzero(is_whole).tolist() == [2, 3, 4, 5, 6]
    assert not is_damaged.any()
    found = records[is_whole]
    blocks = [block_of(number) for number in range(5)]
    assert [name.tobytes() for name in found["name"]] == [block.name for block in blocks]
    assert found["num_tokens"].tolist() == [block.num_tokens for block in blocks]
    assert found["checksum"].tolist() == [block.checksum for block in blocks]
    assert found["sequence"].tolist() == list(range(100, 105))


@settings(deadline=None)
@given(position=st.integers(0, 5 * RECORD_BYTES - 1), bit=st.integers(0, 7))
def test_a_record_header_with_a_flipped_bit_is_damaged_and_no_other(position, bit):
    table = table_of(2, 5)
    table[2 * RECORD_BYTES + position] ^= 1 << bit
    _, is_whole, is_damaged = unpack_records(bytes(table), MODEL, 3, NUM_ROWS)
    row = 2 + position // RECORD_BYTES
    assert np.flatnonzero(is_damaged).tolist() == [row]
    assert is_whole.sum() == 4


@pytest.mark.parametrize(
    ("model", "segment_id"),
    [(MODEL, 4), (MODEL._replace(layout_version=2), 3), (MODEL._replace(fingerprint=b"\x01" * 32), 3)],
)
def test_records_of_others_are_damaged(model, segment_id):
    _, is_whole, is_damaged = unpack_records(bytes(table_of(0, 2)), model, segment_id, NUM_ROWS)
    assert not is_whole.any()
    assert is_damaged.sum() == 2


def test_a_table_that_was_cut_is_free_from_there_on():
    _, is_whole, _ = unpack_records(bytes(table_of(0, 10)[: 4 * RECORD_BYTES]), MODEL, 3, NUM_ROWS)
    assert np.flatnonzero(is_whole).tolist() == [0, 1, 2, 3]


def test_a_directory_name_tells_its_model():
    assert Model.of_directory(MODEL.directory_name) == MODEL
    assert [Model.of_directory(name) for name in ("notes", "abc-1-2", "ab-1", "ab-1-x")] == [None] * 4
