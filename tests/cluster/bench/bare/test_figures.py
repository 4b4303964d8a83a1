from __future__ import annotations

import pytest

from cluster.bench.bare.batch import Batch, StepTimes, Workload
from cluster.bench.bare.figures import bound_s, figures, num_same
from cluster.bench.bare.machine import Machine
from cluster.bench.bare.work import ModelWork, Weights
from engine.kernels.protocol import LayerUse
from engine.memory.kv_pool import LayerSpec

MACHINE = Machine("made up", None, copy_bytes_per_s=1000.0, flops_per_s=10_000.0)
#: A weight of 90 numbers for all tokens and one of 10 for logits; a key of 2 bytes and 4 operations.
WORK = ModelWork(
    Weights(body=90, experts=0, head=10, chosen_share=1.0, vectors=0, total=100),
    [LayerUse(LayerSpec(1, 1, 1), 1)],
    1,
    1,
)
WORKLOAD = Workload(batch_size=2, input_len=4, output_len=3, vocab_size=10)


def batches() -> tuple[Batch, Batch]:
    prefill = Batch(0.0, [[2.0], [2.0]], [[1], [1]])
    times = [[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]]
    steps = [StepTimes(2.0, 0.5, 0.0), StepTimes(3.0, 0.1, 0.01), StepTimes(4.0, 0.2, 0.03)]
    return prefill, Batch(0.0, times, [[1, 2, 3], [1, 2, 3]], steps)


def test_prefill_and_decode_are_told_apart_and_as_shares_of_what_the_machine_can():
    found = figures(*batches(), WORKLOAD, WORK, MACHINE).values
    assert found["seconds"] == 4.0
    assert found["output_tokens_per_s"] == 6 / 4
    assert found["prefill_tokens_per_s"] == 8 / 2
    prompt_flops = 2 * (8 * 90 + 2 * 10) + 2 * (1 + 2 + 3 + 4) * 4
    assert found["prefill_of_rate"] == pytest.approx(prompt_flops / 2 / 10_000)
    assert found["decode_tokens_per_s"] == 4 / 2
    num_keys = 2 * (5 + 6)
    assert found["decode_of_bandwidth"] == pytest.approx((2 * 100 + num_keys * 2) / 2 / 1000)
    assert found["decode_of_rate"] == pytest.approx((2 * 4 * 100 + num_keys * 4) / 2 / 10_000)
    assert (found["ttft_ms_p50"], found["itl_ms_p90"]) == (2000.0, 1000.0)


def test_the_hosts_time_is_that_of_steps_that_only_decode():
    found = figures(*batches(), WORKLOAD, WORK, MACHINE).values
    assert (found["host_ms"], found["idle_ms"]) == (pytest.approx(150.0), pytest.approx(20.0))
    prefill, whole = batches()
    whole.steps = []
    assert not {"host_ms", "idle_ms"} & set(figures(prefill, whole, WORKLOAD, WORK, MACHINE).values)


def test_the_bound_is_prompts_at_once_and_then_a_step_for_each_token():
    prompts_s = (2 * (8 * 90 + 2 * 10) + 2 * 10 * 4) / 10_000
    steps_s = sum((100 + 2 * keys * 2) / 1000 for keys in (5, 6))
    assert bound_s(WORKLOAD, WORK, MACHINE) == pytest.approx(prompts_s + steps_s)
    found = figures(*batches(), WORKLOAD, WORK, MACHINE).values
    assert found["of_bound"] == pytest.approx((prompts_s + steps_s) / 4.0)


def test_without_steps_that_only_decode_nothing_is_told_of_them():
    prefill, whole = batches()
    whole.token_times_s = [[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]
    found = figures(prefill, whole, WORKLOAD, WORK, MACHINE).values
    assert not [name for name in found if name.startswith("decode")]
    assert found["output_tokens_per_s"] == 6 / 7


def test_sequences_with_the_same_tokens_are_counted():
    _, one = batches()
    _, other = batches()
    other.outputs = [[1, 2, 3], [1, 2, 4]]
    assert num_same([one, one], [one, other]) == (3, 4)
