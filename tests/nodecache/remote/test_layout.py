from __future__ import annotations

import pytest

from nodecache.remote import layout
from nodecache.remote.layout import HEADER_BYTES
from nodecache.store import StoreError
from tests.nodecache.remote.blocks import BLOCK_BYTES, MODEL, block_of, content_of

BLOCKS = [block_of(n) for n in range(3)]
SOURCES = [content_of(n) for n in range(3)]


@pytest.fixture
def data():
    return bytearray(layout.pack_object(MODEL, BLOCKS, SOURCES).tobytes())


def record(data, position):
    begin = position * MODEL.record_bytes
    return memoryview(data)[begin : begin + MODEL.record_bytes]


def copied(data, position, block, model=MODEL):
    target = bytearray(BLOCK_BYTES)
    is_whole = layout.copy_blocks(model, [(position, block)], [record(data, position)], [memoryview(target)])[0]
    assert not is_whole or target == SOURCES[position]
    return is_whole


def test_an_object_is_blocks_behind_headers_of_128_bytes(data):
    assert HEADER_BYTES == 128
    assert len(data) == 3 * (128 + BLOCK_BYTES)
    assert [copied(data, position, BLOCKS[position]) for position in range(3)] == [True] * 3


def test_every_flipped_bit_of_a_header_and_any_of_a_block_is_noticed(data):
    bits = [*range(8 * HEADER_BYTES), *range(8 * HEADER_BYTES, 8 * MODEL.record_bytes, 997)]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        assert not copied(data, 0, BLOCKS[0])
        data[bit // 8] ^= 1 << bit % 8
    assert copied(data, 0, BLOCKS[0])


def test_a_block_is_only_what_it_is_asked_for_as(data):
    assert not copied(data, 0, BLOCKS[1])
    assert not copied(data, 0, BLOCKS[0]._replace(num_tokens=1))
    assert not copied(data, 0, BLOCKS[0]._replace(checksum=1))
    assert not copied(data, 0, BLOCKS[0], MODEL._replace(kernel_path="other"))
    data[: MODEL.record_bytes] = record(data, 1)
    assert not copied(data, 0, BLOCKS[1])


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES, HEADER_BYTES + BLOCK_BYTES - 1])
def test_a_record_cut_short_is_noticed(data, length):
    target = memoryview(bytearray(BLOCK_BYTES))
    assert layout.copy_blocks(MODEL, [(0, BLOCKS[0])], [record(data, 0)[:length]], [target]) == [False]


def test_an_object_is_named_by_what_it_holds():
    digest = layout.object_digest(BLOCKS)
    assert digest == layout.object_digest(list(BLOCKS))
    others = [BLOCKS[::-1], BLOCKS[:2], [*BLOCKS[:2], BLOCKS[2]._replace(checksum=1)]]
    assert digest not in {layout.object_digest(other) for other in others}


def test_bytes_that_have_not_their_checksum_are_not_packed():
    with pytest.raises(StoreError, match=f"has checksum .* wanted {BLOCKS[2].checksum:x}"):
        layout.pack_object(MODEL, BLOCKS, [*SOURCES[:2], SOURCES[0]])


def test_a_description_is_read_as_it_was_written():
    data = layout.pack_description(MODEL)
    description = layout.unpack_description(data)
    assert description is not None
    assert (description.kernel_path, description.fingerprint) == (MODEL.kernel_path, MODEL.fingerprint.hex())
    for part in (b"", data[:30], b"\xff\xfe", b"[]"):
        assert layout.unpack_description(part) is None


def test_models_that_differ_in_anything_have_folders_of_their_own():
    models = [
        MODEL,
        MODEL._replace(fingerprint=b"\x01"),
        MODEL._replace(layout_version=2),
        MODEL._replace(block_bytes=1),
        MODEL._replace(kernel_path="other"),
    ]
    assert len({model.folder_name for model in models}) == len({model.digest for model in models}) == len(models)
