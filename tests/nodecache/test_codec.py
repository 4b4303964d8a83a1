from __future__ import annotations

import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from kvcache.region import BlockNumbers
from nodecache.codec import INT8, LOSSLESS, PLAIN, decode, encode, lossless_codec
from transport.checksum import checksum

CODECS = [codec for codec in LOSSLESS if codec != PLAIN]
BFLOAT16, FLOAT32 = lossless_codec(2), lossless_codec(4)


def kv(seed: int, num_bytes: int, element_bytes: int = 2) -> np.ndarray:
    """Numbers as KV has them: around zero, of all mantissas."""
    numbers = np.random.default_rng(seed).standard_normal(num_bytes // element_bytes, np.float32)
    return (numbers.view("<u4") >> np.uint32(32 - 8 * element_bytes)).astype(f"<u{element_bytes}").view(np.uint8)


def encoded(codec, plain) -> bytes:
    found = encode(codec, plain)
    assert found is not None
    return found.tobytes()


def decoded(codec, stored, num_bytes) -> bytes | None:
    found = decode(codec, memoryview(stored), num_bytes)
    return None if found is None else bytes(found)


@given(st.binary(max_size=300), st.integers(0, 40), st.sampled_from(CODECS))
def test_whatever_is_encoded_is_shorter_and_is_decoded_as_it_was(data, repeats, codec):
    plain = np.frombuffer(data * repeats, np.uint8)
    found = encode(codec, plain)
    if found is not None:
        assert len(found) < len(plain)
        assert decoded(codec, found.tobytes(), len(plain)) == plain.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, "bfloat16"])
@pytest.mark.parametrize("num_numbers", [512, 1000, 1 << 18])
def test_numbers_of_any_kind_come_back_to_the_bit(dtype, num_numbers):
    rng = np.random.default_rng(num_numbers)
    numbers = rng.standard_normal(num_numbers, np.float32)
    numbers[::64] = np.resize([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38], len(numbers[::64]))
    if dtype == "bfloat16":
        plain = (numbers.view("<u4") >> np.uint32(16)).astype("<u2").view(np.uint8)
    else:
        with np.errstate(over="ignore"):
            plain = numbers.astype(dtype).view(np.uint8)
    codec = BFLOAT16 if len(plain) == 2 * num_numbers else FLOAT32
    assert decoded(codec, encoded(codec, plain), len(plain)) == plain.tobytes()


def test_bytes_at_any_address_are_encoded():
    plain = kv(1, 4096)
    for offset in range(1, 9):
        moved = np.zeros(4096 + offset, np.uint8)[offset:]
        moved[:] = plain
        assert encoded(BFLOAT16, moved) == encoded(BFLOAT16, plain)


@pytest.mark.parametrize("codec", CODECS)
def test_what_would_not_be_shorter_is_not_encoded(codec):
    assert encode(codec, np.frombuffer(np.random.default_rng(1).bytes(4096), np.uint8)) is None
    assert encode(codec, kv(1, 4096)[:-1]) is None  # no whole number of numbers
    assert encode(codec, np.zeros(0, np.uint8)) is None
    assert encode(PLAIN, kv(1, 4096)) is None


def test_plain_bytes_are_as_they_are_and_of_their_length():
    assert decoded(PLAIN, b"1234", 4) == b"1234"
    assert decoded(PLAIN, b"1234", 3) is None
    assert decoded(PLAIN, b"1234", 5) is None


def test_kv_of_bfloat16_is_a_quarter_shorter():
    assert len(encoded(BFLOAT16, kv(1, 1 << 16))) < 0.75 * (1 << 16)
    assert lossless_codec(1) == lossless_codec(8) == PLAIN


@given(st.integers(0, 5), st.integers(0, 10**9), st.integers(0, 7), st.sampled_from(CODECS))
def test_no_altered_byte_passes_with_the_checksum_of_the_block(seed, at, bit, codec):
    plain = kv(seed, 2048, 2 if codec == BFLOAT16 else 4)
    stored = bytearray(encoded(codec, plain))
    stored[at % len(stored)] ^= 1 << bit
    found = decoded(codec, bytes(stored), len(plain))
    assert found is None or found == plain.tobytes() or checksum(found) != checksum(plain)


@given(st.integers(0, 5), st.integers(0, 10**9), st.binary(min_size=1, max_size=20), st.sampled_from(CODECS))
def test_what_was_cut_short_or_goes_on_is_not_decoded(seed, length, more, codec):
    plain = kv(seed, 2048, 2 if codec == BFLOAT16 else 4)
    stored = encoded(codec, plain)
    assert decoded(codec, stored[: length % len(stored)], len(plain)) is None
    found = decoded(codec, stored + more, len(plain))
    assert found is None or found == plain.tobytes()


@given(st.binary(max_size=400), st.integers(0, 400), st.sampled_from([*CODECS, 77]))
def test_bytes_of_anything_are_decoded_to_the_length_wanted_or_not_at_all(stored, num_bytes, codec):
    found = decoded(codec, stored, num_bytes)
    assert found is None or len(found) == num_bytes


@pytest.mark.parametrize("num_encoded", [2046, 2050])
def test_a_block_of_another_length_is_not_decoded(num_encoded):
    assert decoded(BFLOAT16, encoded(BFLOAT16, kv(1, num_encoded)), 2048) is None


@pytest.mark.parametrize("num_numbers", [1023, 1025, 1 << 24])
def test_a_frame_with_another_number_of_bytes_takes_no_more_memory_than_the_block(num_numbers):
    """Such as says to be of more than the block has, or of less, which most of Arrow's codecs would accept."""
    frame = pa.Codec("zstd").compress(bytes(num_numbers), asbytes=True)[:1023]
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    tracemalloc.start()
    assert decoded(BFLOAT16, bytes(1024) + frame, 2048) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 10
    assert pool.bytes_allocated() == before


# ------------------------------------------------------------------------------------------------------------- a loss

GROUPS = ((4, 16), (1, 24), (3, 8))


def floats_of(plain, kind) -> np.ndarray:
    data = np.frombuffer(plain, np.uint8)
    match kind:
        case "bfloat16":
            return (data.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
        case "float16":
            return data.view("<f2").astype(np.float32)
        case _:
            return data.view("<f4")


def bytes_of(floats, kind) -> np.ndarray:
    match kind:
        case "bfloat16":
            return (floats.view("<u4") >> np.uint32(16)).astype("<u2").view(np.uint8)
        case "float16":
            return floats.astype("<f2").view(np.uint8)
        case _:
            return floats.view(np.uint8)


def lossy(plain, numbers) -> bytes | None:
    found = encode(INT8, plain, numbers)
    if found is None:
        return None
    again = decode(INT8, found.data, len(plain), numbers)
    assert again is not None
    assert len(again) == len(plain) > len(found)
    return bytes(again)


@given(
    st.integers(0, 1000),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.sampled_from([8, 16, 64]),
    st.sampled_from([1e-6, 1.0, 100.0]),
)
def test_no_number_is_further_off_than_half_a_step_of_its_channel_and_a_rounding(seed, kind, block_size, magnitude):
    numbers = BlockNumbers(kind, block_size, GROUPS)
    rng = np.random.default_rng(seed)
    channels = rng.lognormal(0, 2, numbers.num_channels).astype(np.float32)
    floats = rng.standard_normal((block_size, numbers.num_channels), np.float32) * channels * np.float32(magnitude)
    floats = np.clip(floats, -60_000, 60_000)
    floats[:, 3] = 0  # a channel of nothing
    parts, begin = [], 0
    for num_heads, dim in GROUPS:
        part = floats[:, begin : begin + num_heads * dim].reshape(block_size, num_heads, dim)
        parts.append(part.transpose(1, 0, 2).ravel())
        begin += num_heads * dim
    plain = bytes_of(np.concatenate(parts), kind)
    again = lossy(plain, numbers)
    assert again is not None
    before, after = floats_of(plain, kind), floats_of(again, kind)
    begin = 0
    for num_heads, dim in GROUPS:
        end = begin + num_heads * dim * block_size
        shape = (num_heads, block_size, dim)
        kv, kv_again = before[begin:end].reshape(shape), after[begin:end].reshape(shape)
        step = np.abs(kv).max(axis=1, keepdims=True) / 127 * 1.01
        relative, least = {"bfloat16": (2**-8, 0), "float16": (2**-11, 6e-8), "float32": (0, 0)}[kind]
        rounding = np.abs(kv_again) * relative + least
        assert (np.abs(kv_again - kv) <= step / 2 + rounding).all()
        begin = end


def test_what_is_decoded_is_the_same_everywhere():
    numbers = BlockNumbers("bfloat16", 4, ((1, 2),))
    scales = (np.array([1.0, 0.1], np.float32).view("<u4") >> np.uint32(16)).astype("<u2")
    steps = np.array([127, -127, 1, 5, 0, 3, -1, 77], np.int8)
    stored = memoryview(scales.tobytes() + steps.tobytes())
    found = floats_of(decode(INT8, stored, 16, numbers), "bfloat16")
    assert found.tolist() == [127.0, -12.625, 1.0, 0.498046875, 0.0, 0.298828125, -1.0, 7.65625]


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
def test_a_block_with_what_is_no_number_is_kept_plain(kind, worst):
    numbers = BlockNumbers(kind, 16, GROUPS)
    floats = np.ones(numbers.num_numbers, np.float32)
    floats[77] = worst
    assert lossy(bytes_of(floats, kind), numbers) is None


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_the_largest_numbers_do_not_become_infinite(kind):
    numbers = BlockNumbers(kind, 16, GROUPS)
    largest = {"bfloat16": 3.38e38, "float16": 65504.0, "float32": 3.4e38}[kind]
    plain = bytes_of(np.full(numbers.num_numbers, largest, np.float32), kind)
    again = lossy(plain, numbers)
    assert again is None or np.isfinite(floats_of(again, kind)).all()
    tiny = bytes_of(np.full(numbers.num_numbers, 1e-44, np.float32), kind)
    assert lossy(tiny, numbers) is not None


def test_blocks_of_another_length_or_of_unknown_numbers_are_not_encoded_nor_decoded():
    numbers = BlockNumbers("bfloat16", 16, GROUPS)
    plain = kv(1, 2 * numbers.num_numbers)
    stored = encode(INT8, plain, numbers)
    assert stored is not None
    assert encode(INT8, plain) is encode(INT8, plain[:-2], numbers) is None
    assert decode(INT8, stored.data, len(plain)) is decode(INT8, stored.data[:-1], len(plain), numbers) is None
    assert decode(INT8, stored.data, len(plain) - 2, numbers) is None


@given(st.integers(0, 5), st.integers(0, 10**9), st.integers(0, 7))
def test_no_altered_byte_of_a_lossy_block_passes_with_its_checksum(seed, at, bit):
    numbers = BlockNumbers("bfloat16", 16, GROUPS)
    plain = kv(seed, 2 * numbers.num_numbers)
    again = lossy(plain, numbers)
    stored = bytearray(encode(INT8, plain, numbers).tobytes())
    stored[at % len(stored)] ^= 1 << bit
    found = decode(INT8, memoryview(stored), len(plain), numbers)
    assert found is not None
    assert bytes(found) == again or checksum(found) != checksum(again)
