from __future__ import annotations

import random

import pytest

from engine.scheduling.plan import SequenceStep
from engine.scheduling.step_cost import ChunkBudget, StepCost, features


def part(kind: str, start: int, num_tokens: int) -> SequenceStep:
    return SequenceStep(
        seq_id="s",
        slot=0,
        kind=kind,
        start=start,
        num_tokens=num_tokens,
        is_sampled=True,
    )


def true_seconds(parts: list[SequenceStep]) -> float:
    """A worker: 4 ms a step, 20 us a prefill token, 50 us a decode row, 10 ns a KV token read, 2 ns a pair."""
    return sum(a * b for a, b in zip(features(parts), [4e-3, 5e-5, 1e-8, 2e-5, 2e-9], strict=True))


def random_step(rng: random.Random) -> list[SequenceStep]:
    parts = [part("decode", rng.randrange(4000), 1) for _ in range(rng.randrange(33))]
    if rng.random() < 0.5:
        parts.append(part("prefill", 256 * rng.randrange(10), 256 * rng.randint(1, 4)))
    return parts


def test_features_count_the_pairs_that_attention_meets() -> None:
    assert features([part("decode", 9, 1), part("prefill", 2, 3)]) == [1, 1, 10, 3, 3 + 4 + 5]


def test_a_replay_reads_what_its_rows_would_one_by_one() -> None:
    assert features([part("decode", 5, 3)]) == features([part("decode", i, 1) for i in (5, 6, 7)])


def test_prices_are_learned_from_mixed_steps() -> None:
    rng, cost = random.Random(1), StepCost()
    for _ in range(300):
        parts = random_step(rng)
        cost.observe(parts, true_seconds(parts) * rng.uniform(0.95, 1.05))
    for _ in range(50):
        parts = random_step(rng)
        if parts:
            assert cost.seconds(features(parts)) == pytest.approx(true_seconds(parts), rel=0.1)


def test_a_step_hangs_past_a_multiple_of_what_it_costs_but_not_before_half_a_minute() -> None:
    rng, cost = random.Random(1), StepCost()
    assert cost.bound_s([part("prefill", 0, 256)]) == 600.0
    for _ in range(300):
        parts = random_step(rng)
        cost.observe(parts, 1000 * true_seconds(parts))
    assert cost.bound_s([part("decode", 9, 1)]) > 30.0
    parts = [part("prefill", 0, 1024)]
    assert cost.bound_s(parts) == pytest.approx(20_000 * true_seconds(parts), rel=0.1)
    cost = StepCost()
    for _ in range(300):
        parts = random_step(rng)
        cost.observe(parts, true_seconds(parts))
    assert cost.bound_s(parts) == 30.0


def test_a_long_decode_phase_does_not_forget_what_prefill_costs() -> None:
    rng, cost = random.Random(2), StepCost()
    for _ in range(200):
        parts = random_step(rng)
        cost.observe(parts, true_seconds(parts))
    for _ in range(10_000):
        parts = [part("decode", 500, 1)] * 8
        cost.observe(parts, true_seconds(parts))
    parts = [*[part("decode", 500, 1)] * 8, part("prefill", 0, 1024)]
    assert cost.seconds(features(parts)) == pytest.approx(true_seconds(parts), rel=0.2)


def test_a_slow_first_step_is_soon_outweighed() -> None:
    cost = StepCost()
    parts = [part("prefill", 0, 512)]
    cost.observe(parts, 30.0)  # kernels compiled, pages touched
    for _ in range(5):
        cost.observe(parts, 0.02)
    assert cost.seconds(features(parts)) == pytest.approx(0.02, rel=0.1)


def test_rates_are_zero_before_they_are_measured() -> None:
    cost = StepCost()
    assert (cost.prefill_tokens_per_s, cost.decode_step_s, cost.is_prefill_measured) == (0, 0, False)
    cost.observe([part("prefill", 0, 256)], 0.0)  # a step without a time
    cost.observe([], 1.0)
    assert not cost.is_prefill_measured


def test_the_prefill_rate_counts_all_the_time_of_its_steps() -> None:
    cost = StepCost()
    for _ in range(20):
        cost.observe([part("decode", 5, 1), part("prefill", 0, 256)], 0.1)
        cost.observe([part("decode", 5, 1)], 0.01)
    assert cost.prefill_tokens_per_s == pytest.approx(2560)


def test_the_decode_step_is_a_median() -> None:
    cost = StepCost()
    for elapsed_s in (0.01, 0.01, 5.0, 0.02, 0.01):
        cost.observe([part("decode", 5, 1)], elapsed_s)
    assert cost.decode_step_s == 0.01


def learned(price_s: float) -> StepCost:
    """A worker where a prefill token costs `price_s` and nothing else costs anything."""
    cost = StepCost()
    for num_tokens in (256, 512, 1024, 2048) * 20:
        cost.observe([part("prefill", 0, num_tokens)], price_s * num_tokens)
    return cost


def budget(cost: StepCost, *, num_decodes: int, max_tokens: int = 2048, target_s: float = 0.1) -> ChunkBudget:
    rows = [part("decode", 10, 1)] * num_decodes
    return ChunkBudget(cost, max_tokens=max_tokens, quantum_tokens=256, decode_parts=rows, target_s=target_s)


def test_without_decodes_a_chunk_takes_what_the_budget_holds() -> None:
    assert budget(StepCost(), num_decodes=0).end_of(0, 10_000, 10_000) == 2048


def test_chunks_end_at_multiples_of_the_quantum_whatever_their_start() -> None:
    assert budget(StepCost(), num_decodes=0).end_of(16, 10_000, 10_000) == 2048
    assert budget(StepCost(), num_decodes=0, max_tokens=300).end_of(240, 10_000, 10_000) == 512
    assert budget(StepCost(), num_decodes=0, max_tokens=300).end_of(208, 300, 300) == 300


def test_decode_rows_come_off_the_budget() -> None:
    assert budget(learned(1e-9), num_decodes=10).end_of(0, 10_000, 10_000) == 2048 - 256


def test_one_chunk_fits_whatever_the_rows_take() -> None:
    assert budget(StepCost(), num_decodes=60, max_tokens=64).end_of(0, 10_000, 10_000) == 256


def test_beside_decodes_the_chunk_ends_where_the_step_would_be_late() -> None:
    assert budget(learned(1e-4), num_decodes=2).end_of(0, 10_000, 10_000) == 768  # 0.1 s hold 1,000 tokens
    assert budget(learned(1e-4), num_decodes=2, target_s=0.2).end_of(0, 10_000, 10_000) == 1792


def test_beside_decodes_one_quantum_progresses_even_if_it_is_late() -> None:
    assert budget(learned(1e-2), num_decodes=2).end_of(512, 10_000, 10_000) == 768


def test_before_the_first_measurement_one_quantum_is_tried() -> None:
    assert budget(StepCost(), num_decodes=2).end_of(0, 10_000, 10_000) == 256


def test_the_second_chunk_gets_only_what_the_first_left() -> None:
    chunks = budget(StepCost(), num_decodes=0, max_tokens=600)
    assert chunks.end_of(0, 300, 300) == 300
    chunks.spend(0, 300, 300)
    assert chunks.end_of(0, 10_000, 10_000) == 256
    chunks.spend(0, 256, 10_000)
    assert chunks.end_of(0, 10_000, 10_000) == 0


def test_a_second_late_chunk_waits() -> None:
    chunks = budget(learned(1e-2), num_decodes=1)
    chunks.spend(0, 256, 10_000)
    assert chunks.end_of(0, 10_000, 10_000) == 0


def test_a_replay_ends_anywhere_but_before_the_end_of_its_tokens() -> None:
    chunks = budget(StepCost(), num_decodes=0, max_tokens=300)
    assert chunks.end_of(100, 100, 170) == 170
    assert chunks.end_of(100, 100, 900) == 356


def test_a_prefill_chunk_never_enters_the_generated_tokens() -> None:
    assert budget(StepCost(), num_decodes=0).end_of(0, 300, 400) == 300
