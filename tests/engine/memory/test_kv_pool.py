import pytest
import torch

from engine.memory import kv_pool
from engine.memory.kv_pool import KvPool, LayerSpec, block_bytes, block_numbers, host_room, plan_num_blocks
from kvcache.region import BlockNumbers
from messages.errors import ConfigError

SPECS = [LayerSpec(2, 16, 16), LayerSpec(1, 24, 12), LayerSpec(4, 8, 32)]
CPU = torch.device("cpu")
PLAN = {"block_bytes": 1000, "block_size": 16, "max_model_len": 160}


def test_block_bytes_count_k_and_v_of_every_layer():
    assert block_bytes(SPECS, 16, torch.bfloat16) == 16 * (2 * 32 + 36 + 4 * 40) * 2


def test_a_block_is_one_run_of_bytes_k_then_v_per_layer_heads_outermost():
    pool = KvPool(SPECS, 4, torch.float32, "cpu", num_blocks=3)
    pool.data.copy_(torch.arange(pool.data.numel()).view_as(pool.data))
    offset = 0
    for spec, k, v in zip(SPECS, pool.k, pool.v, strict=True):
        for view, dim in ((k, spec.k_dim), (v, spec.v_dim)):
            size = spec.num_kv_heads * 4 * dim
            assert torch.equal(view, pool.data[:, offset : offset + size].view(3, spec.num_kv_heads, 4, dim))
            offset += size
    assert offset == pool.data.shape[1]


def test_a_blocks_numbers_are_told_by_groups_of_heads_of_one_dim():
    assert block_numbers(SPECS, 4, torch.bfloat16) == BlockNumbers(
        "bfloat16", 4, ((4, 16), (1, 24), (1, 12), (4, 8), (4, 32))
    )
    numbers = block_numbers([LayerSpec(2, 16, 16)] * 3, 4, torch.float32)
    assert numbers == BlockNumbers("float32", 4, ((12, 16),))
    assert numbers.num_numbers * numbers.element_bytes == block_bytes([LayerSpec(2, 16, 16)] * 3, 4, torch.float32)


def test_layers_do_not_overlap():
    pool = KvPool(SPECS, 4, torch.float32, "cpu", num_blocks=2)
    for number, view in enumerate([*pool.k, *pool.v]):
        view.fill_(number)
    for number, view in enumerate([*pool.k, *pool.v]):
        assert (view == number).all()
    assert sum(view.numel() for view in [*pool.k, *pool.v]) == pool.data.numel()


def test_the_pool_lies_in_the_memory_it_is_given():
    size = block_bytes(SPECS, 16, torch.bfloat16)
    memory = bytearray(5 * size)
    pool = KvPool(SPECS, 16, torch.bfloat16, "cpu", memoryview(memory))
    assert pool.num_blocks == 5
    pool.v[2][3].fill_(1)
    assert not any(memory[: 3 * size])
    assert any(memory[3 * size : 4 * size])
    assert not any(memory[4 * size :])


@pytest.mark.parametrize("num_bytes", [-1, 1, None])
def test_memory_that_is_no_whole_number_of_blocks_is_refused(num_bytes):
    size = 0 if num_bytes is None else 5 * block_bytes(SPECS, 16, torch.float32) + num_bytes
    with pytest.raises(ValueError, match="blocks of"):
        KvPool(SPECS, 16, torch.float32, "cpu", memoryview(bytearray(size)))


def test_memory_and_a_count_at_once_are_refused():
    memory = memoryview(bytearray(5 * block_bytes(SPECS, 16, torch.float32)))
    with pytest.raises(ValueError, match="either memory or a number"):
        KvPool(SPECS, 16, torch.float32, "cpu", memory, 4)


def test_a_pool_needs_memory_or_a_count():
    with pytest.raises(ValueError, match="number of blocks"):
        KvPool(SPECS, 16, torch.float32, "cpu")


def test_blocks_read_from_one_pool_can_be_written_into_another():
    torch.manual_seed(0)
    source = KvPool(SPECS, 16, torch.float32, "cpu", num_blocks=6)
    source.data.normal_()
    target = KvPool(SPECS, 16, torch.float32, "cpu", num_blocks=4)
    target.write_blocks([3, 0], source.read_blocks([1, 5]))
    for layer in range(len(SPECS)):
        assert torch.equal(target.k[layer][3], source.k[layer][1])
        assert torch.equal(target.v[layer][0], source.v[layer][5])
    assert not target.data[1].any()


def test_a_share_of_what_is_free_decides_where_no_size_is_given(monkeypatch):
    monkeypatch.setattr(kv_pool, "available_bytes", lambda: 100_999)
    assert host_room(kv_cache_bytes=None, kv_cache_share=0.5) == 50_499
    assert host_room(kv_cache_bytes=30_999, kv_cache_share=0.5) == 30_999
    assert plan_num_blocks(room_bytes=50_499, **PLAN) == 50
    assert plan_num_blocks(room_bytes=50_499, max_blocks=12, **PLAN) == 12


def test_a_pool_too_small_for_one_sequence_says_what_it_takes_and_what_would_do():
    with pytest.raises(
        ConfigError, match=r"160 tokens need 10000 bytes \(10 blocks of 1000\), .* pool gets 9000; .* to 144$"
    ):
        plan_num_blocks(room_bytes=9_999, **PLAN)
    with pytest.raises(ConfigError, match=r"the KV pool gets 0; give the pool more memory$"):
        plan_num_blocks(room_bytes=999, **PLAN)
    assert plan_num_blocks(room_bytes=10_000, **PLAN) == 10


def test_a_pool_larger_than_what_is_free_is_refused(monkeypatch):
    monkeypatch.setattr(kv_pool, "available_bytes", lambda: 20_000)
    with pytest.raises(ConfigError, match="of 20001 bytes was asked for and 20000 bytes are free"):
        host_room(kv_cache_bytes=20_001, kv_cache_share=0.5)
