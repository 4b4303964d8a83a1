"""Triton's fused operators, interpreted on this CPU, against torch's, and the bits they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.protocol import KvScales
from engine.kernels.reference import TORCH_KERNELS
from engine.memory.kv_pool import KvPool, LayerSpec
from tests.interpreted import triton_kernels

pytestmark = pytest.mark.slow

DTYPES = st.sampled_from([torch.float32, torch.float16])
NEAR = {torch.float32: {"atol": 2e-6, "rtol": 2e-6}, torch.float16: {"atol": 2e-3, "rtol": 2e-3}}
SIZES = st.sampled_from([1, 12, 16, 48, 80, 128, 200, 1100])


@pytest.fixture(scope="module")
def operators():
    triton_kernels()
    from engine.kernels.triton.operators import TRITON_OPERATORS

    return TRITON_OPERATORS


def drawn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normed(x, weight, eps, *, adds_one, rounds_first):
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        return (x.float() * root).to(x.dtype) * (1 + weight if adds_one else weight)
    return (x.float() * root * (weight.float() + adds_one)).to(x.dtype)


@settings(max_examples=10, deadline=None)
@given(
    num_rows=st.integers(1, 90),
    size=SIZES,
    dtype=DTYPES,
    how=st.sampled_from([(False, True), (False, False), (True, False)]),
    is_added=st.booleans(),
)
def test_norms_are_torchs_and_a_row_has_the_same_bits_alone(operators, num_rows, size, dtype, how, is_added):
    x, residual, weight = (drawn(n, size, dtype=dtype, seed=n) for n in (num_rows, num_rows, 1))
    options = {"adds_one": how[0], "rounds_first": how[1]}
    one = num_rows // 2
    if is_added:
        total, alone = x.clone(), x[one : one + 1].clone()
        got = operators.add_rms_norm(residual, total, weight[0], 1e-5, **options)
        by_itself = operators.add_rms_norm(residual[one : one + 1], alone, weight[0], 1e-5, **options)
        assert torch.equal(total, residual + x)
        wanted = normed(total, weight[0], 1e-5, **options)
    else:
        got = operators.rms_norm(x, weight[0], 1e-5, **options)
        by_itself = operators.rms_norm(x[one : one + 1], weight[0], 1e-5, **options)
        wanted = normed(x, weight[0], 1e-5, **options)
    torch.testing.assert_close(got, wanted, **NEAR[dtype])
    assert torch.equal(got[one : one + 1], by_itself)


@settings(max_examples=8, deadline=None)
@given(num_rows=st.integers(1, 40), size=SIZES, dtype=DTYPES, is_gelu=st.booleans())
def test_gates_are_torchs_and_a_row_has_the_same_bits_alone(operators, num_rows, size, dtype, is_gelu):
    gate, up = (drawn(num_rows, size, dtype=dtype, seed=n) for n in (0, 1))
    activation = torch.nn.GELU(approximate="tanh") if is_gelu else torch.nn.functional.silu
    got = operators.gate(gate.clone(), up, is_gelu=is_gelu)
    torch.testing.assert_close(got, activation(gate) * up, **NEAR[dtype])
    assert torch.equal(operators.gate(gate[:1].clone(), up[:1], is_gelu=is_gelu), got[:1])


def turned(rows, cosine, sine):
    half = cosine.shape[-1] // 2
    front = rows[..., : 2 * half]
    behind = torch.cat([-front[..., half:], front[..., :half]], -1)
    return torch.cat([front * cosine[:, None] + behind * sine[:, None], rows[..., 2 * half :]], -1)


@settings(max_examples=10, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    sizes=st.sampled_from([(8, 8, 2), (8, 40, 4), (24, 8, 12), (64, 64, 32), (64, 64, 12), (80, 40, 20), (80, 80, 40)]),
    dtype=DTYPES,
    scales=st.sampled_from([None, KvScales(0.25, 2.0)]),
)
def test_rotation_alone_and_with_the_kv_write_is_torchs(operators, num_tokens, kv_heads, group, sizes, dtype, scales):
    k_dim, v_dim, half = sizes
    query = drawn(num_tokens, kv_heads * group, k_dim + 8, dtype=dtype)[..., :k_dim]  # slices of something wider
    key = drawn(num_tokens, kv_heads, k_dim + 8, dtype=dtype, seed=1)[..., :k_dim]
    value = drawn(kv_heads, num_tokens, v_dim, dtype=dtype, seed=2).transpose(0, 1)
    cosine, sine = drawn(2, num_tokens, 2 * half, dtype=dtype, seed=3)
    wanted_query, wanted_key = turned(query, cosine, sine), turned(key, cosine, sine)
    alone = query.clone()
    operators.rotate(alone, cosine[None], sine[None])
    assert torch.equal(alone, wanted_query)

    kept = dtype if scales is None else torch.float8_e4m3fn
    spec = LayerSpec(key.shape[1], key.shape[2], value.shape[2])
    ours, theirs = (KvPool([spec, spec], 4, kept, "cpu", num_blocks=7) for _ in range(2))
    places = torch.randperm(28, generator=torch.Generator().manual_seed(5))[: len(query)]
    blocks, offsets = places // 4, places % 4
    together, before = query.clone(), key.clone()
    write = operators.rotating_write(cosine[None], sine[None])
    write(together, key, value, ours.k[1], ours.v[1], blocks, offsets, scales)
    TORCH_KERNELS.write_kv(wanted_key, value, theirs.k[1], theirs.v[1], blocks, offsets, scales)
    assert torch.equal(together, wanted_query)
    assert torch.equal(key, before)
    assert torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))


def test_a_token_without_a_block_is_rotated_and_stored_nowhere(operators):
    query, key, value = (drawn(3, 2, 16, dtype=torch.float32, seed=n) for n in range(3))
    cosine, sine = drawn(2, 3, 16, dtype=torch.float32, seed=3)
    pool = KvPool([LayerSpec(2, 16, 16)], 4, torch.float32, "cpu", num_blocks=2)
    wanted = turned(query, cosine, sine)
    nowhere = torch.tensor([-1, -1, -1])
    write = operators.rotating_write(cosine, sine)
    write(query, key, value, pool.k[0], pool.v[0], nowhere, torch.zeros(3, dtype=torch.int64), None)
    assert torch.equal(query, wanted)
    assert not pool.data.any()


def test_every_number_becomes_the_nearest_of_float8_as_torch_rounds_it(operators):
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[exact.isfinite()].sort().values
    between = (exact[1:] + exact[:-1]) / 2  # ties, and what is a little off them
    numbers = torch.cat([exact, between, between * 1.0001, between * 0.9999, torch.tensor([1e9, -1e9, 460.0, -1e-9])])
    key = torch.cat([numbers, numbers[: -len(numbers) % 8]]).view(-1, 1, 8)
    at = torch.arange(len(key))
    ours, theirs = (KvPool([LayerSpec(1, 8, 8)], 16, torch.float8_e4m3fn, "cpu", num_blocks=20) for _ in range(2))
    for kernels, pool in ((triton_kernels(), ours), (TORCH_KERNELS, theirs)):
        kernels.write_kv(key * 4, key / 2, pool.k[0], pool.v[0], at // 16, at % 16, KvScales(4.0, 0.5))
    assert torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))
    assert torch.equal(ours.k[0][0, 0, 0].float(), exact[:8])


@pytest.mark.parametrize("wrong", [torch.float16, torch.bfloat16])
def test_other_dtypes_than_a_rotations_or_a_norms_are_refused(operators, wrong):
    rows, weight = drawn(3, 2, 16, dtype=torch.float32), drawn(16, dtype=wrong)
    with pytest.raises(TypeError, match="wanted one dtype"):
        operators.rms_norm(rows, weight, 1e-5, adds_one=False, rounds_first=True)
    with pytest.raises(ValueError, match="a rotation"):
        operators.rotate(rows, drawn(3, 16, dtype=wrong), drawn(3, 16, dtype=wrong))
    with pytest.raises(TypeError, match="a gate of"):
        operators.gate(rows, rows.to(wrong), is_gelu=False)


def test_a_rotation_wider_than_heads_is_refused(operators):
    rows, turns = drawn(3, 2, 8, dtype=torch.float32), drawn(3, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="16 numbers of heads of 8"):
        operators.rotate(rows, turns, turns)
