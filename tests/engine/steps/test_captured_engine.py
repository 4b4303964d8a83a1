"""Captured steps of whole models on the emulator: token for token what the CPU's way through the runner gives."""

from __future__ import annotations

import dataclasses
import logging
import random

import pytest
import torch

from engine import runner
from engine.core import Engine, EngineOptions
from engine.kernels.reference import TORCH_KERNELS
from engine.model.load import load_model
from engine.runner import Accelerator
from engine.sampling.device_sampler import DeviceSampler
from engine.scheduling.plan import SequenceAdded, SequenceSpec, StepPlan
from messages.errors import InvariantError
from messages.request import SamplingParams
from tests.engine.steps.emulator import Emulator
from tests.engine.steps.padded_kernels import PaddedKernels
from tests.interpreted import triton_kernels
from tests.models import VOCAB_SIZE, make_tiny_model
from tests.steps import Bench

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NUM_BLOCKS = 64
MAX_NUM_SEQS = 6
MAX_MODEL_LEN = 200


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = make_tiny_model(tmp_path_factory.mktemp("model"), eos_token_id=None, num_hidden_layers=2)
    return load_model(directory, dtype="float32", use_kernels=False)


def prompt_of(length, seed=0):
    generator = random.Random(seed)
    return [generator.randrange(4, VOCAB_SIZE) for _ in range(length)]


def on_emulator(loaded, kernels, max_num_seqs=MAX_NUM_SEQS) -> Bench:
    loaded = dataclasses.replace(loaded, kernels=(kernels,) * len(loaded.kernels))
    bench = Bench(loaded, NUM_BLOCKS, accelerator=Accelerator(Emulator(), max_num_seqs))
    bench.runner.capture()
    return bench


def emulator_of(bench: Bench) -> Emulator:
    return bench.runner._accelerator.device


def num_launches(bench: Bench) -> int:
    """Of steps: each graph is launched once as it is captured."""
    done = emulator_of(bench).done
    return done.count("launch") - done.count("capture")


def answers(bench: Bench, num_output=9):
    """Of prompts of unlike lengths that come in chunks, so that steps are mixed, then of 6, 5, ... and 1 row."""
    sequences = [bench.add(f"s{number}", prompt_of(3 + 11 * number, number)) for number in range(MAX_NUM_SEQS)]
    for number, sequence in enumerate(sequences):
        bench.run([sequence], number, max_step_tokens=24)
    return [bench.run([sequence, *sequences[:number]], num_output)[0] for number, sequence in enumerate(sequences)]


def test_tokens_are_those_of_the_cpu_whatever_bucket_they_come_from(loaded):
    bench = on_emulator(loaded, PaddedKernels())
    assert answers(bench) == answers(Bench(loaded, NUM_BLOCKS))
    assert num_launches(bench) > 20
    emulator_of(bench).synchronize()


def test_tokens_of_triton_s_kernels_are_those_of_the_cpu_and_padding_leaves_all_other_blocks_alone(loaded, monkeypatch):
    monkeypatch.setattr(runner, "buckets", lambda max_rows: (max_rows,))  # all are interpreted, and take their time
    outputs = []
    for bench in (on_emulator(loaded, triton_kernels(), max_num_seqs=4), Bench(loaded, NUM_BLOCKS)):
        sequences = [bench.add(f"s{number}", prompt_of(14 + 4 * number, number)) for number in range(3)]
        bench.run(sequences, 1, max_step_tokens=64)
        bench.pool.data[bench.free] = 7
        free = set(bench.free)
        outputs.append(bench.run(sequences, 4))
        free &= set(bench.free)
        assert (bench.pool.data[list(free)] == 7).all()
    assert outputs[0] == outputs[1]


def test_a_step_that_samples_nothing_is_waited_for_too(loaded):
    bench = on_emulator(loaded, PaddedKernels())
    sequence = bench.add("s", prompt_of(40))
    emulator = emulator_of(bench)
    launched = bench.runner.launch(StepPlan((bench.part(sequence, 20),)))
    last_copy = emulator.num_copies
    before = len(emulator.done)
    assert bench.runner.finish(launched).sampled == {}
    assert f"wait {last_copy}" in emulator.done[before:]


def test_steps_launched_ahead_find_their_tokens_on_the_device(loaded):
    outputs = []
    for bench in (on_emulator(loaded, PaddedKernels()), Bench(loaded, NUM_BLOCKS)):
        sequences = [bench.add(f"s{number}", prompt_of(9 + number, number)) for number in range(3)]
        launched = []
        for number in range(8):
            parts = []
            for sequence in sequences:
                count = sequence.num_prompt_tokens if number == 0 else 1
                part = bench.part(sequence, count)
                if number:
                    part = dataclasses.replace(part, awaits_token=True, is_sampled=True)
                    sequence.slot.num_told_tokens += 1
                sequence.num_computed = part.end
                parts.append(part)
            launched.append(bench.runner.launch(StepPlan(tuple(parts))))
            if number:
                result = bench.runner.finish(launched.pop(0))
                outputs.append({seq_id: sampled.token_id for seq_id, sampled in result.sampled.items()})
    assert outputs[:7] == outputs[7:]


def test_replayed_tokens_go_through_a_bucket_and_go_on_the_same(loaded):
    bench = on_emulator(loaded, PaddedKernels(), max_num_seqs=12)
    moving = bench.add("moving", prompt_of(30))
    [wanted] = bench.run([moving], 14)
    for rows_per_step in (9, 40):  # in a bucket of 12, and more than any bucket has
        away = on_emulator(loaded, PaddedKernels(), max_num_seqs=12)
        replay = away.add("replay", moving.token_ids[:30])
        away.run_parts([(replay, away.part(replay, 30))])
        replay.token_ids = moving.token_ids[:40]
        while replay.num_computed < 40:
            away.run_parts([(replay, away.part(replay, min(rows_per_step, 40 - replay.num_computed)))])
        assert away.run([replay], 14)[0] == wanted


def test_layers_whose_kernels_read_lengths_on_the_host_are_not_captured_and_one_line_says_so(loaded, caplog):
    with caplog.at_level(logging.INFO, "engine.runner"):
        bench = on_emulator(loaded, TORCH_KERNELS)
    assert [record.getMessage() for record in caplog.records] == [
        "llama: no decode step is captured, all take longer than they could: "
        "attention of some layers is by torch-2, which reads lengths on the host"
    ]
    assert answers(bench, 3) == answers(Bench(loaded, NUM_BLOCKS), 3)
    assert "launch" not in emulator_of(bench).done


def test_a_model_that_looks_at_the_host_is_not_captured_and_one_line_says_so(loaded, caplog, monkeypatch):
    forward = loaded.model.forward

    def looks(*args, position_ids, **kwargs):
        assert int(position_ids.max()) < 1024
        return forward(*args, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", looks)
    with caplog.at_level(logging.INFO, "engine.runner"):
        bench = on_emulator(loaded, PaddedKernels())
    assert [record.getMessage() for record in caplog.records] == [
        "llama: no decode step is captured, all take longer than they could: "
        "RuntimeError: the host waits for the device: aten.item.default"
    ]
    assert answers(bench, 3) == answers(Bench(loaded, NUM_BLOCKS), 3)


def test_what_is_captured_is_said_in_one_line(loaded, caplog):
    with caplog.at_level(logging.INFO, "engine.runner"):
        on_emulator(loaded, PaddedKernels())
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("llama: decode steps of up to 6 rows are captured, 4 sizes in ")


def test_a_trial_captures_the_largest_alone_and_says_nothing(loaded, caplog):
    loaded = dataclasses.replace(loaded, kernels=(PaddedKernels(),) * len(loaded.kernels))
    emulator = Emulator()
    bench = Bench(loaded, NUM_BLOCKS, accelerator=Accelerator(emulator, MAX_NUM_SEQS))
    with caplog.at_level(logging.INFO, "engine.runner"):
        bench.runner.capture(is_trial=True)
    assert not caplog.records
    assert emulator.done.count("capture") == 1
    assert bench.runner._captured.sizes == (MAX_NUM_SEQS,)


def test_a_cpu_captures_nothing(loaded, caplog):
    bench = Bench(loaded, NUM_BLOCKS)
    with caplog.at_level(logging.INFO, "engine.runner"):
        bench.runner.capture()
    assert not caplog.records


def test_steps_run_where_the_model_is(loaded):
    elsewhere = Emulator(device=torch.device("meta"))
    with pytest.raises(InvariantError, match="llama is on cpu, and its steps are to run on meta"):
        Bench(loaded, accelerator=Accelerator(elsewhere, 4))
    with pytest.raises(InvariantError, match="llama is on meta, and its steps are to run on cpu"):
        Bench(dataclasses.replace(loaded, device=torch.device("meta")))


# ----------------------------------------------------------------------------------------------------- a whole engine


def requests():
    rng = random.Random(0)
    for number in range(14):
        prompt = [*prompt_of(20, number // 3), *prompt_of(rng.randint(1, 40), number)]
        params = SamplingParams(
            max_tokens=rng.randint(1, 20),
            temperature=rng.choice([0.0, 0.8]),
            seed=number,
            repetition_penalty=rng.choice([1.0, 1.3]),
            logprobs=rng.choice([None, 1]),
            prompt_logprobs=rng.choice([None, None, 1]),
        )
        yield SequenceSpec(seq_id=f"s{number}", token_ids=prompt, num_prompt_tokens=len(prompt), params=params)
    params = SamplingParams(max_tokens=MAX_MODEL_LEN, temperature=0.0)
    yield SequenceSpec(seq_id="longest", token_ids=prompt_of(185), num_prompt_tokens=185, params=params)


def served(loaded, *, plans_ahead: bool) -> dict[str, list[int]]:
    """Tokens of requests that come one after the other, in a pool that is too small for all of them at once."""
    num_bytes = 30 * 8 * loaded.dtype.itemsize * sum(spec.token_elements for spec in loaded.layer_specs)
    options = EngineOptions(
        block_size=8, kv_cache_bytes=num_bytes, max_num_batched_tokens=48, max_num_seqs=5, plans_ahead=plans_ahead
    )
    engine = Engine.build(dataclasses.replace(loaded, max_model_len=MAX_MODEL_LEN), options)
    engine.warm_up()
    tokens: dict[str, list[int]] = {}
    coming = list(requests())
    while coming or engine.has_work():
        if coming:
            engine.post(SequenceAdded(coming.pop(0)))
        for emitted in engine.step():
            assert emitted.error is None
            tokens.setdefault(emitted.seq_id, []).extend(emitted.token_ids)
    engine.close()
    return tokens


@pytest.mark.parametrize("plans_ahead", [False, True])
def test_an_engine_on_a_device_gives_each_request_the_tokens_of_one_on_a_cpu(loaded, plans_ahead, monkeypatch):
    wanted = served(loaded, plans_ahead=False)
    emulator = Emulator()
    kernels = (PaddedKernels(),) * len(loaded.kernels)

    def on_device(loaded, pool, sampler, on_layer, accelerator):
        loaded = dataclasses.replace(loaded, kernels=kernels)
        sampler._sampler = DeviceSampler(loaded.vocab_size, sampler._masks, emulator.device)
        return runner.Runner(loaded, pool, sampler, on_layer, Accelerator(emulator, 5))

    monkeypatch.setattr("engine.core.Runner", on_device)
    tokens = served(loaded, plans_ahead=plans_ahead)
    assert tokens == wanted
    assert len(tokens) == 15
    assert len(tokens["longest"]) == MAX_MODEL_LEN - 185
    assert emulator.done.count("launch") - emulator.done.count("capture") > 30
    emulator.synchronize()
