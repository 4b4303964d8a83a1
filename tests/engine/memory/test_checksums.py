from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import xxhash
from hypothesis import given, settings

from engine.memory.checksums import ALGORITHMS, BlockChecksums, sum64
from engine.memory.kv_pool import KvPool, LayerSpec
from kvcache.pool import BlockPool

NUM_BLOCKS = 6
SPECS = [LayerSpec(2, 4, 4), LayerSpec(1, 3, 2)]
UNEVEN = [LayerSpec(1, 3, 2)]  # with blocks of 3 tokens of bfloat16: 30 bytes, no whole number of words
NUM_WORDS = 12
word = st.integers(0, 2**64 - 1)
words = st.lists(word, min_size=NUM_WORDS, max_size=NUM_WORDS)


class Pools:
    """A small pool of random bytes, its books and its checksums."""

    def __init__(self, specs=SPECS, block_size=4, dtype=torch.float32) -> None:
        self.kv = KvPool(specs, block_size, dtype, "cpu", num_blocks=NUM_BLOCKS)
        self.bytes = self.kv.data.view(torch.uint8)
        self.bytes.copy_(torch.randint(0, 256, self.bytes.shape, generator=torch.Generator().manual_seed(7)))
        self.pool = BlockPool(NUM_BLOCKS, block_size)
        self.checksums = BlockChecksums(self.pool, self.kv)

    def row(self, block_id: int) -> bytes:
        return self.bytes[block_id].numpy().tobytes()


@pytest.fixture
def pools() -> Pools:
    return Pools()


def sum_of(row: bytes) -> int:
    (value,) = sum64(torch.frombuffer(bytearray(row), dtype=torch.uint8)[None])
    return value


def joined(values: list[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


# ------------------------------------------------------------------------------------------------------ the algorithms


@pytest.mark.parametrize(
    ("specs", "block_size", "dtype"),
    [(SPECS, 4, torch.float32), (SPECS, 4, torch.bfloat16), (UNEVEN, 3, torch.bfloat16)],
)
def test_each_algorithm_is_that_of_a_blocks_bytes_whatever_their_type(specs, block_size, dtype):
    pools = Pools(specs, block_size, dtype)
    block_ids = [4, 0, 2]
    rows = [pools.row(block_id) for block_id in block_ids]
    assert len(rows[0]) == pools.kv.block_bytes
    assert pools.checksums.compute(block_ids, "xxh3_64") == [xxhash.xxh3_64_intdigest(row) for row in rows]
    assert pools.checksums.compute(block_ids, "sum64") == [sum_of(row) for row in rows]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_blocks_have_no_checksums(pools, algorithm):
    assert pools.checksums.compute([], algorithm) == []
    assert pools.checksums.published([]) == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_checksums_fit_into_64_bits_and_fill_them(algorithm):
    pools = Pools()
    seen = 0
    for seed in range(20):
        pools.bytes.copy_(torch.randint(0, 256, pools.bytes.shape, generator=torch.Generator().manual_seed(seed)))
        values = pools.checksums.compute(range(NUM_BLOCKS), algorithm)
        assert all(type(value) is int and 0 <= value < 2**64 for value in values)
        for value in values:
            seen |= value
    assert seen == 2**64 - 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_bytes_have_equal_checksums_wherever_they_lie(algorithm):
    source, target = Pools(), Pools()
    target.bytes.zero_()
    target.kv.write_blocks([5, 1], source.kv.read_blocks([0, 3]))
    assert target.checksums.compute([5, 1], algorithm) == source.checksums.compute([0, 3], algorithm)


def test_a_pool_in_host_memory_publishes_xxh3(pools):
    assert pools.checksums.algorithm == "xxh3_64"
    assert pools.checksums.published([3]) == [xxhash.xxh3_64_intdigest(pools.row(3))]


def test_a_pool_in_given_memory_is_read_where_it_lies():
    size = Pools().kv.block_bytes
    memory = bytearray(range(256)) * -(-2 * size // 256)
    memory = memory[: 2 * size]
    kv = KvPool(SPECS, 4, torch.float32, "cpu", memoryview(memory))
    sums = BlockChecksums(BlockPool(2, 4), kv)
    memory[size] ^= 1
    assert sums.compute([1, 0], "xxh3_64") == [
        xxhash.xxh3_64_intdigest(bytes(memory[size:])),
        xxhash.xxh3_64_intdigest(bytes(memory[:size])),
    ]


# ------------------------------------------------------------------------------------------------- what is remembered


def test_a_published_checksum_is_remembered_until_the_block_is_reused(pools):
    block_id, *_ = pools.pool.allocate(NUM_BLOCKS)
    first = pools.checksums.published([block_id])
    before = pools.row(block_id)
    pools.bytes[block_id].add_(1)
    assert pools.checksums.published([block_id]) == first == [xxhash.xxh3_64_intdigest(before)]
    pools.pool.unpin([block_id])
    assert pools.pool.allocate(1) == [block_id]
    assert pools.checksums.published([block_id]) == [xxhash.xxh3_64_intdigest(pools.row(block_id))] != first


def test_only_what_is_not_known_is_computed_and_answers_come_in_order(pools, monkeypatch):
    asked: list[list[int]] = []
    compute = BlockChecksums.compute

    def counted(self, block_ids, algorithm):
        asked.append(list(block_ids))
        return compute(self, block_ids, algorithm)

    monkeypatch.setattr(BlockChecksums, "compute", counted)
    expected = {block_id: xxhash.xxh3_64_intdigest(pools.row(block_id)) for block_id in range(NUM_BLOCKS)}
    for block_ids in ([2, 4], [4, 1, 2, 0], [0, 1, 2, 4], [2, 2]):
        assert pools.checksums.published(block_ids) == [expected[block_id] for block_id in block_ids]
    assert [block_ids for block_ids in asked if block_ids] == [[2, 4], [1, 0]]


def test_a_published_checksum_does_not_hide_what_the_block_holds_now(pools):
    published = pools.checksums.published([2])
    pools.bytes[2].add_(1)
    now = pools.checksums.compute([2], "xxh3_64")
    assert now == [xxhash.xxh3_64_intdigest(pools.row(2))] != published


def test_a_generation_of_zero_is_not_taken_for_a_known_one():
    kv = KvPool(SPECS, 4, torch.float32, "cpu", num_blocks=1)
    sums = BlockChecksums(BlockPool(1, 4, first_generation=0), kv)
    assert sums.published([0]) == [xxhash.xxh3_64_intdigest(bytes(kv.block_bytes))]


# --------------------------------------------------------------------------------------------------- what sum64 notices


@given(values=words, bit=st.integers(0, 64 * NUM_WORDS - 1))
@settings(max_examples=200, deadline=None)
def test_sum64_notices_any_flipped_bit(values, bit):
    flipped = list(values)
    flipped[bit // 64] ^= 1 << bit % 64
    assert sum_of(joined(flipped)) != sum_of(joined(values))


def test_sum64_notices_each_single_bit_of_a_block_with_a_torn_last_word():
    row = bytearray(Pools(UNEVEN, 3, torch.bfloat16).row(0))
    assert len(row) % 8
    rows = torch.frombuffer(row, dtype=torch.uint8).repeat(8 * len(row), 1)
    for bit in range(8 * len(row)):
        rows[bit, bit // 8] ^= 1 << bit % 8
    values = sum64(rows)
    assert sum_of(bytes(row)) not in values
    assert len(set(values)) == len(values)


@given(values=words, where=st.lists(st.integers(0, NUM_WORDS - 1), min_size=2, max_size=2, unique=True))
@settings(max_examples=200, deadline=None)
def test_sum64_notices_two_words_with_their_top_bits_flipped(values, where):
    flipped = list(values)
    for index in where:  # in a plain weighted sum these two cancel: 2^63 times any odd number is 2^63
        flipped[index] ^= 1 << 63
    assert sum_of(joined(flipped)) != sum_of(joined(values))


@given(
    values=words,
    where=st.lists(st.integers(0, NUM_WORDS - 1), min_size=2, max_size=2, unique=True),
    bit=st.integers(0, 63),
)
@settings(max_examples=200, deadline=None)
def test_sum64_notices_the_same_bit_flipped_in_two_words(values, where, bit):
    flipped = list(values)
    for index in where:
        flipped[index] ^= 1 << bit
    assert sum_of(joined(flipped)) != sum_of(joined(values))


@given(values=words, where=st.lists(st.integers(0, NUM_WORDS - 1), min_size=2, max_size=2, unique=True))
@settings(max_examples=200, deadline=None)
def test_sum64_notices_two_swapped_words(values, where):
    i, j = where
    swapped = list(values)
    swapped[i], swapped[j] = values[j], values[i]
    assert (sum_of(joined(swapped)) == sum_of(joined(values))) == (values[i] == values[j])


@given(values=words, others=words)
@settings(max_examples=100, deadline=None)
def test_sum64_notices_swapped_halves_of_two_blocks(values, others):
    half = NUM_WORDS // 2
    rows = [values, others, values[:half] + others[half:], others[:half] + values[half:], values[half:] + values[:half]]
    sums = [sum_of(joined(row)) for row in rows]
    for i, row in enumerate(rows):
        for j in range(i):
            assert (sums[i] == sums[j]) == (row == rows[j])


@given(row=st.binary(min_size=1, max_size=40), filler=st.integers(0, 255), length=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_sum64_notices_a_tail_that_did_not_arrive(row, filler, length):
    cut = row[: max(0, len(row) - length)]
    torn = cut + bytes([filler]) * (len(row) - len(cut))
    assert (sum_of(torn) == sum_of(row)) == (torn == row)


@given(number=st.integers(1, 40), row=st.binary(min_size=1, max_size=24))
@settings(max_examples=50, deadline=None)
def test_sum64_of_a_row_does_not_depend_on_the_rows_beside_it(number, row):
    rows = torch.frombuffer(bytearray(row), dtype=torch.uint8).repeat(number, 1)
    assert sum64(rows) == [sum_of(row)] * number


def test_sum64_tells_nearly_empty_rows_apart():
    assert sum_of(joined([0, 4, 0, 0])) != sum_of(joined([0, 0, 0, 2]))
    rows = torch.zeros(8 * 64 * 4, 64 * 8, dtype=torch.uint8)  # a single small byte somewhere
    for index in range(rows.shape[0]):
        rows[index, index // 4] = 1 + index % 4
    values = sum64(rows)
    assert len(set(values)) == len(values)


def test_sum64_of_zeros_depends_on_their_number():
    sums = [sum_of(bytes(8 * number)) for number in (1, 2, 3, 64)]
    assert len(set(sums)) == len(sums)
    assert 0 not in sums


def test_the_two_algorithms_are_known_by_name():
    assert ALGORITHMS == ("xxh3_64", "sum64")  # part of what peers tell each other (RegionsDescribed.checksum)
