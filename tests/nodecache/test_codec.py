from __future__ import annotations

import tracemalloc

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from nodecache.codec import KNOWN, PLAIN, decode, encode, lossless_codec
from transport.checksum import checksum

CODECS = [codec for codec in KNOWN if codec != PLAIN]
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
