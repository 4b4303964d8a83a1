import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.names import NAME_BYTES, BlockNamer, block_names, pack_tokens, split_names, tenant_of, unpack_tokens

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(TOKENS)
def test_tokens_survive_packing(token_ids: list[int]) -> None:
    packed = pack_tokens(token_ids)
    assert len(packed) == 4 * len(token_ids)
    assert unpack_tokens(packed) == token_ids


def test_tokens_are_packed_little_endian() -> None:
    assert pack_tokens([1, 0x01020304]) == b"\x01\x00\x00\x00\x04\x03\x02\x01"


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_a_token_that_needs_more_than_32_bits_is_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        pack_tokens([token_id])


def test_half_a_token_is_refused() -> None:
    with pytest.raises(ValueError):
        unpack_tokens(b"\x01\x02\x03")


@given(TOKENS, st.integers(1, 8), st.randoms())
def test_a_growing_sequence_gets_the_names_of_the_whole_one(
    token_ids: list[int], block_size: int, rng: random.Random
) -> None:
    whole = block_names(b"model", b"salt", pack_tokens(token_ids), block_size)
    assert len(whole) == len(token_ids) // block_size * NAME_BYTES
    namer = BlockNamer(b"model", b"salt", block_size)
    grown: list[bytes] = []
    begin = 0
    while begin < len(token_ids):
        end = rng.randint(begin + 1, len(token_ids))
        grown += namer.extend(pack_tokens(token_ids[begin:end]))
        begin = end
    assert grown == split_names(whole)


def test_a_name_depends_on_every_token_before_it_and_on_none_after() -> None:
    token_ids = list(range(64))
    names = split_names(block_names(b"model", b"", pack_tokens(token_ids), 16))
    for position in (0, 15, 16, 63):
        changed = [*token_ids[:position], 999, *token_ids[position + 1 :]]
        others = split_names(block_names(b"model", b"", pack_tokens(changed), 16))
        assert [a == b for a, b in zip(names, others, strict=True)] == [index < position // 16 for index in range(4)]


def test_model_tenant_adapter_and_block_size_each_give_other_names() -> None:
    tokens = pack_tokens(range(32))
    variants = [
        block_names(b"model", b"salt", tokens, 16),
        block_names(b"other", b"salt", tokens, 16),
        block_names(b"model", b"pepper", tokens, 16),
        block_names(b"models", b"alt", tokens, 16),  # the same bytes, cut elsewhere
        block_names(b"model", b"salt", tokens, 16, adapter=b"lora"),
        block_names(b"model", b"saltlora", tokens, 16),
    ]
    names = [name for variant in variants for name in split_names(variant)]
    names += split_names(block_names(b"model", b"salt", tokens, 32))
    assert len(set(names)) == len(names)


def test_names_stay_what_they_were() -> None:
    """Caches on disk and other workers hold blocks under these names: changing them throws all of that away."""
    assert block_names(b"model", b"salt", pack_tokens(range(16)), 16).hex() == "80dfceac0e8c632ef50b230c2940e6e8"


def test_a_long_prompt_is_named_in_milliseconds() -> None:
    tokens = pack_tokens(range(131_072))
    best_s = min(_timed_s(tokens) for _ in range(5))
    assert best_s < 0.2  # about 4 ms; the bound only tells linear from quadratic


def _timed_s(tokens: bytes) -> float:
    begin_s = time.perf_counter()
    block_names(b"model", b"", tokens, 16)
    return time.perf_counter() - begin_s


def test_a_tenant_is_a_number_by_salt_and_nobody_is_none() -> None:
    assert tenant_of(b"") == 0
    assert 0 < tenant_of(b"one") < 2**64
    assert tenant_of(b"one") != tenant_of(b"other")
