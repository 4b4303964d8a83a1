"""What is learned of queues that took longer than predicted."""

from __future__ import annotations

import pytest

from engine.scheduling.lateness import Lateness
from tests.engine.scheduling.scheduler_bench import Bench


def test_it_goes_to_how_much_longer_it_takes_and_back():
    lateness = Lateness()
    for _ in range(60):
        lateness.observe(2.0, 5.0)
    assert lateness.factor == pytest.approx(2.5, rel=0.01)
    for _ in range(60):
        lateness.observe(2.0, 1.5)
    assert lateness.factor == pytest.approx(1.0, rel=0.01)
    lateness.observe(0.001, 5.0)
    assert lateness.factor == pytest.approx(1.0, rel=0.01), "without a queue there is nothing to learn"
    for _ in range(100):
        lateness.observe(0.1, 500.0)
    assert lateness.factor <= 10


def test_a_first_token_is_compared_with_what_was_before_it_when_its_prompt_came():
    bench = Bench(num_blocks=400, max_model_len=2000, max_num_batched_tokens=400)
    bench.add("a", 400, max_tokens=1)  # a millisecond a token is assumed
    bench.add("b", 400, max_tokens=1)
    bench.now_s += 1.2
    bench.step()
    assert bench.scheduler.lateness.factor == pytest.approx(1 + 0.1 * (3 - 1))
    bench.now_s += 0.4
    bench.step()
    assert bench.scheduler.lateness.factor == pytest.approx(1.2 + 0.1 * (2 - 1.2))
