"""Our engine and transformers', on a tiny model: the same tokens, and times that can be."""

from __future__ import annotations

import contextlib
import itertools
import time

import pytest
import torch

from cluster.bench.bare import theirs as theirs_module
from cluster.bench.bare.batch import Batch, Workload
from cluster.bench.bare.ours import KvrayEngine, Model, pool_bytes
from cluster.bench.bare.shapes import write_shape
from cluster.bench.bare.steps import DeviceWatch
from cluster.bench.bare.theirs import TransformersEngine
from messages.errors import ConfigError, WorkerError

pytestmark = pytest.mark.slow

WORKLOAD = Workload(batch_size=3, input_len=40, output_len=6, vocab_size=500)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    directory = tmp_path_factory.mktemp("shape")
    write_shape(directory, "llama-tiny")
    return Model(
        path=directory, drawn_seed=3, dtype="float32", kv_cache_dtype="auto", device=torch.device("cpu"), num_threads=1
    )


@pytest.fixture(scope="module")
def ours(model) -> KvrayEngine:
    with contextlib.closing(KvrayEngine(model, WORKLOAD, 128, lambda _: None)) as engine:
        yield engine


def test_the_engine_is_warmed_up_as_a_workers_is(model):
    with contextlib.closing(KvrayEngine(model, WORKLOAD, 128, lambda _: None)) as fresh:
        assert fresh._engine.scheduler.cost.price is not None


def check_times(batch: Batch, num_tokens: int) -> None:
    assert [len(output) for output in batch.outputs] == [num_tokens] * 3
    for times in batch.token_times_s:
        assert len(times) == num_tokens
        assert all(sooner <= later for sooner, later in itertools.pairwise([batch.begun_s, *times]))


def test_both_give_the_same_tokens(model, ours):
    with contextlib.closing(TransformersEngine(model, WORKLOAD, torch.float32)) as theirs:
        for part, num_tokens in (("prefill", 1), ("whole", 6)):  # its manager goes on with the second
            prompts, num_threads = WORKLOAD.prompts(0, part), torch.get_num_threads()
            found = [engine.generate(prompts, num_tokens) for engine in (ours, theirs)]
            assert found[0].outputs == found[1].outputs
            assert torch.get_num_threads() == num_threads  # our engine counts on having set them
            for batch in found:
                check_times(batch, num_tokens)


def test_prompts_are_computed_in_as_few_steps_as_may_be_and_each_tells_the_hosts_time(ours):
    batch = ours.generate(WORKLOAD.prompts(1, "whole"), 6)
    assert len(batch.steps) == 1 + 5  # 120 tokens of prompts, 128 in a step
    assert all(0 < step.host_s < 1 and step.idle_s >= 0 for step in batch.steps)
    assert batch.decode.num_steps == 5


class HostEvent:
    """An event of a device that is the host: whatever was launched is done."""

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.at_s - self.at_s)


def test_who_stands_between_the_engine_and_its_steps_changes_no_token(ours):
    prompts = WORKLOAD.prompts(3, "whole")
    wanted = ours.generate(prompts, 6).outputs
    own, watch = ours._watch, DeviceWatch(ours._engine, HostEvent)
    ours._watch = watch
    try:
        batch = ours.generate(prompts, 6)
    finally:
        watch.close()
        ours._watch = own
    assert batch.outputs == wanted
    assert batch.steps[0].idle_s == 0.0
    assert all(step.idle_s > 0 for step in batch.steps[1:])
    assert ours.generate(prompts, 6).outputs == wanted


def test_no_batch_finds_what_another_left(ours):
    prompts = WORKLOAD.prompts(2, "whole")
    before = ours._engine.scheduler.stats()
    first, second = (ours.generate(prompts, 6) for _ in range(2))
    after = ours._engine.scheduler.stats()
    assert first.outputs == second.outputs
    counts = [f"num_prompt_tokens_{source}" for source in ("device", "computed")]
    assert [after[name] - before[name] for name in counts] == [0, 2 * 120]


def test_a_batch_for_which_there_is_no_memory_is_refused_in_a_line(ours):
    with pytest.raises(ConfigError, match=r"^60000 sequences of 262000 \+ 6 tokens want [\d,.]+ GB of KV, .* are free"):
        pool_bytes(ours.loaded, Workload(batch_size=60_000, input_len=262_000, output_len=6, vocab_size=500))


def test_who_has_enough_does_not_wait_for_all_that_was_asked_for(model, monkeypatch):
    with contextlib.closing(TransformersEngine(model, WORKLOAD, torch.float32)) as theirs:
        prompts = WORKLOAD.prompts(0, "whole")
        theirs.generate(prompts, 1)
        asked, managers = theirs_module._asked, []

        def ask_and_leave(manager, some, num_tokens):
            if num_tokens == 1:
                return asked(manager, some, num_tokens)
            manager.add_requests(some, max_new_tokens=400)
            managers.append(manager)
            raise KeyboardInterrupt

        monkeypatch.setattr(theirs_module, "_asked", ask_and_leave)
        with pytest.raises(KeyboardInterrupt):
            theirs.generate(prompts, 6)
        assert not managers[0].is_running()
        results = list(managers[0].output_router.output_queue.queue)
        assert all(result.error for result in results), "they were generated to the end"


def test_a_model_that_transformers_cannot_load_is_a_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    model = Model(
        path=tmp_path, drawn_seed=None, dtype="auto", kv_cache_dtype="auto", device=torch.device("cpu"), num_threads=1
    )
    theirs = TransformersEngine(model, WORKLOAD, torch.float32)
    with pytest.raises(WorkerError, match=r"^transformers failed: OSError: ") as raised:
        theirs.generate([[1]], 1)
    theirs.close()
    assert "\n" not in raised.value.message
