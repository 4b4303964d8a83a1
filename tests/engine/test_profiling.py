"""The largest step is carried out by a real runner; a reader says what a device's memory would."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.memory.kv_pool import KvPool
from engine.model.load import load_model
from engine.profiling import Limits, largest_step, measured_room
from engine.runner import Runner
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import StepPlan
from messages.errors import ConfigError
from tests.engine.memory.test_device_room import GIB, FakeReader
from tests.models import make_tiny_model


@given(
    max_num_seqs=st.integers(1, 40),
    max_num_batched_tokens=st.integers(1, 500),
    block_size=st.integers(1, 32),
    max_model_len=st.integers(1, 200),
)
@settings(max_examples=200, deadline=None)
def test_the_largest_step_has_all_prompt_tokens_and_a_row_for_every_sequence(max_model_len, **limits):
    limits = Limits(**limits)
    plan, num_blocks = largest_step(limits, max_model_len)
    assert len(plan.parts) == limits.max_num_seqs
    assert {part.slot for part in plan.parts} == set(range(limits.max_num_seqs))
    assert all(part.is_sampled and part.end <= max_model_len for part in plan.parts)
    kinds = [part.kind for part in plan.parts]
    assert kinds == sorted(kinds), "decode parts come first"
    num_prompt_tokens = sum(part.num_tokens for part in plan.parts if part.kind == "prefill")
    assert num_prompt_tokens == min(limits.max_num_batched_tokens, limits.max_num_seqs * max_model_len)
    for part in plan.parts:
        assert len(part.new_block_ids) == -(-part.end // limits.block_size)
        assert max(part.new_block_ids) < num_blocks


@pytest.mark.slow
def test_a_runner_carries_it_out_and_its_peak_decides(tmp_path):
    loaded = load_model(make_tiny_model(tmp_path))
    limits = Limits(max_num_seqs=5, max_num_batched_tokens=70, block_size=16)
    reader, plans = FakeReader(), []

    def make_runner(pool: KvPool) -> Runner:
        runner = Runner(loaded, pool, Sampler(loaded.vocab_size, None))
        launch = runner.launch

        def spy(plan: StepPlan):
            plans.append(plan)
            reader.scratch = pool.block_bytes * pool.num_blocks
            reader.run(2 * GIB)
            return launch(plan)

        runner.launch = spy
        return runner

    def room(**options) -> int:
        return measured_room(loaded, limits, make_runner, reader, **{"kv_cache_bytes": None, **options})

    assert room(utilization=0.5) == (40 - 16 - 2) * GIB
    assert room(utilization=0.5, kv_cache_bytes=GIB) == GIB
    assert [sum(part.num_tokens for part in plan.parts) for plan in plans] == [70 + 4, 70 + 4]
    with pytest.raises(ConfigError, match=r"engine\.gpu_memory_utilization is 0\.2"):
        room(utilization=0.2)
