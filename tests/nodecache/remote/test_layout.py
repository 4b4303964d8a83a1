from __future__ import annotations

import pytest

from nodecache.codec import PLAIN, lossless_codec
from nodecache.remote import layout
from nodecache.remote.layout import HEADER_BYTES
from nodecache.store import StoreError
from tests.nodecache.remote.blocks import BLOCK_BYTES, MODEL, block_of, content_of
from transport.checksum import checksum

BFLOAT16 = lossless_codec(2)
BLOCKS = [block_of(n) for n in range(4)]
SOURCES = [content_of(n) for n in range(4)]


@pytest.fixture(params=[PLAIN, BFLOAT16])
def packed(request):
    records, data = layout.pack_object(MODEL, BLOCKS, SOURCES, request.param)
    return records, bytearray(data.tobytes())


def part(data, record):
    return memoryview(data)[record.offset : record.end]


def came(data, record, model=MODEL):
    """Whether a record is what it is asked for as; if so, its bytes are the block's."""
    plain = layout.unpack_records(model, [record], [data])[0]
    is_whole = plain is not None and checksum(plain) == record.block.checksum
    assert not is_whole or plain == SOURCES[record.position]
    return is_whole


def test_an_object_is_blocks_behind_headers_of_128_bytes(packed):
    records, data = packed
    assert HEADER_BYTES == 128
    assert [record.offset for record in records] == [0, *(record.end for record in records[:-1])]
    assert records[-1].end == len(data)
    assert [came(part(data, record), record) for record in records] == [True] * 4


def test_blocks_are_encoded_where_that_makes_them_shorter():
    records, data = layout.pack_object(MODEL, BLOCKS, SOURCES, BFLOAT16)
    assert [record.codec for record in records] == [PLAIN, BFLOAT16, PLAIN, BFLOAT16]
    assert [record.stored_bytes == BLOCK_BYTES for record in records] == [True, False, True, False]
    plain, plain_data = layout.pack_object(MODEL, BLOCKS, SOURCES)
    assert {record.codec for record in plain} == {PLAIN}
    assert len(plain_data) == 4 * MODEL.record_bytes > 1.1 * len(data)


def test_every_flipped_bit_of_a_header_and_any_of_a_block_is_noticed(packed):
    records, data = packed
    record = records[1]
    bits = [*range(8 * HEADER_BYTES), *range(8 * HEADER_BYTES, 8 * record.num_bytes, 497)]
    for bit in bits:
        at = record.offset + bit // 8
        data[at] ^= 1 << bit % 8
        assert not came(part(data, record), record)
        data[at] ^= 1 << bit % 8
    assert came(part(data, record), record)


def test_a_block_is_only_what_it_is_asked_for_as(packed):
    records, data = packed
    record = records[1]
    changes = [
        {"block": BLOCKS[0]},
        {"block": BLOCKS[1]._replace(num_tokens=1)},
        {"block": BLOCKS[1]._replace(checksum=1)},
        {"position": 0},
        {"codec": BFLOAT16 if record.codec == PLAIN else PLAIN},
        {"codec": 77},
    ]
    for change in changes:
        assert not came(part(data, record), record._replace(**change))
    assert not came(part(data, record), record, MODEL._replace(kernel_path="other"))
    assert not came(part(data, records[2]), record)


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES, HEADER_BYTES + 100, -1])
def test_a_record_cut_short_is_noticed(packed, length):
    records, data = packed
    assert not came(part(data, records[1])[:length], records[1])


def test_an_object_is_named_by_what_it_holds(packed):
    digest = layout.object_digest(*packed)
    records, data = packed
    assert digest == layout.object_digest(list(records), data)
    other = records[2]._replace(block=BLOCKS[2]._replace(checksum=1))
    others = [records[::-1], records[:2], [*records[:2], other]]
    assert digest not in {layout.object_digest(each, data) for each in others}


def test_the_same_blocks_in_other_bytes_are_another_object():
    plain = layout.pack_object(MODEL, BLOCKS, SOURCES)
    records, data = layout.pack_object(MODEL, BLOCKS, SOURCES, BFLOAT16)
    changed = data.copy()
    changed[records[1].end - 1] ^= 1
    assert len({layout.object_digest(*each) for each in (plain, (records, data), (records, changed))}) == 3


def test_bytes_that_have_not_their_checksum_are_not_packed(packed):
    records, _ = packed
    with pytest.raises(StoreError, match=f"has checksum .* wanted {BLOCKS[2].checksum:x}"):
        layout.pack_object(MODEL, BLOCKS, [*SOURCES[:2], SOURCES[0], SOURCES[3]], records[1].codec)


def test_plain_objects_are_as_they_were_before_there_was_another_codec():
    """Their name and bytes: a bucket holds such, and they are written by older versions still."""
    records, data = layout.pack_object(MODEL, BLOCKS[::2], SOURCES[::2])
    assert layout.object_digest(records, data).hex() == "8a298df22e8ca7a1ba2e879f8fd909b6"
    assert f"{checksum(data):x}" == "2e31cd2fe5dd4189"


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
