"""An engine's plans are values: whoever gets them in order computes the same, and forgets what is over."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable

import msgspec
import pytest
import torch

from engine.core import Engine, EngineOptions, EngineStep
from engine.cores import NodeCores
from engine.kernels.cpu.native import load_kernels
from engine.memory.kv_pool import KvPool
from engine.model.load import load_model
from engine.runner import Runner
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import (
    BlocksReleased,
    SequenceAdded,
    SequenceCancelled,
    SequenceSpec,
    StepPlan,
    StepResult,
)
from engine.step_threads import StepThreads
from messages.request import SamplingParams
from tests.models import DEEPSEEK, VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Wire = Callable[[StepPlan], StepPlan]
WIRES: dict[str, Wire] = {
    "msgspec": lambda plan: msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan),
    "pickle": lambda plan: pickle.loads(pickle.dumps(plan)),
}


class Follower:
    """A runner with a model and a pool of its own that gets an engine's plans over a wire."""

    def __init__(self, directory, engine: Engine, wire: Wire) -> None:
        loaded = load_model(directory)
        shape = (loaded.layer_specs, engine.options.block_size, loaded.dtype, loaded.device)
        self.pool = KvPool(*shape, num_blocks=engine.pool.num_blocks)
        self.runner = Runner(loaded, self.pool, Sampler(loaded.vocab_size, None))
        self._finish, self._wire = engine.finish, wire
        self.num_steps = 0

    def finish(self, step: EngineStep) -> StepResult:
        """In place of the engine's: both do it, and agree."""
        followed = self.runner.execute(self._wire(step.plan))
        result = self._finish(step)
        assert (followed.sampled, followed.prompt_logprobs) == (result.sampled, result.prompt_logprobs)
        self.num_steps += 1
        return result


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), eos_token_id=None, max_position_embeddings=256)


@pytest.fixture
def engine(directory):
    """With room for two long sequences, so that those who come later preempt and are preempted."""
    loaded = load_model(directory)
    num_bytes = 34 * 8 * loaded.dtype.itemsize * sum(spec.token_elements for spec in loaded.layer_specs)
    options = EngineOptions(block_size=8, kv_cache_bytes=num_bytes, max_num_batched_tokens=64, max_num_seqs=6)
    made = Engine.build(loaded, options)
    yield made
    made.close()


def add_at_random(engine: Engine, rng: random.Random, number: int) -> str:
    """A prompt that may begin as another does, sampled with or without what a sampler keeps of a sequence."""
    base = [rng.randrange(4, VOCAB_SIZE) for _ in range(rng.randint(1, 60))]
    prompt = [*(i % 40 + 4 for i in range(rng.choice([0, 24]))), *base]
    params = SamplingParams(
        max_tokens=rng.randint(1, 60),
        temperature=rng.choice([0.0, 0.9]),
        seed=number,
        repetition_penalty=rng.choice([1.0, 1.3]),
        logprobs=rng.choice([None, 2]),
        prompt_logprobs=rng.choice([None, None, 1]),
    )
    spec = SequenceSpec(
        seq_id=f"s{number}",
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        params=params,
        priority=rng.choice([0, 0, 1]),
        is_kept=rng.random() < 0.2,
    )
    engine.post(SequenceAdded(spec))
    return spec.seq_id


def step(engine: Engine) -> None:
    """A step, after which nobody wants what was kept for others."""
    for emitted in engine.step():
        if emitted.finish_reason is not None:
            engine.post(BlocksReleased(emitted.seq_id))


@pytest.mark.parametrize("wire", WIRES)
def test_a_second_runner_that_is_sent_the_plans_computes_the_same(directory, engine, wire, monkeypatch):
    follower = Follower(directory, engine, WIRES[wire])
    monkeypatch.setattr(Engine, "finish", lambda _, step: follower.finish(step))
    rng = random.Random(7)
    for number in range(60):
        seq_id = add_at_random(engine, rng, number)
        for _ in range(rng.randint(0, 8)):
            step(engine)
        if rng.random() < 0.2:
            engine.post(SequenceCancelled(seq_id))
    while engine.has_work():
        step(engine)
    assert follower.num_steps > 100
    assert engine.scheduler.stats()["num_preemptions"] > 5
    assert engine.scheduler.stats()["num_prompt_tokens_device"] > 100
    kept = torch.from_numpy(engine.checksums._host_rows).view(follower.pool.dtype)
    assert torch.equal(follower.pool.data, kept.view_as(follower.pool.data))


def test_checksums_of_what_is_published_are_those_of_the_sequences_own_blocks(engine):
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for seq_id in ("first", "second"):  # so that slots and block ids are not the same numbers
        prompt = [len(seq_id) + i for i in range(100)]
        spec = SequenceSpec(seq_id=seq_id, token_ids=prompt, num_prompt_tokens=100, params=params, is_kept=True)
        engine.post(SequenceAdded(spec))
    while engine.has_work():
        engine.step()
    for seq_id in ("first", "second"):
        table = engine.scheduler._ledger.sequences[seq_id].block_table
        computed = engine.checksums.compute(table)
        assert [engine.checksums.known(block_id) for block_id in table] == computed
        assert engine.checksums.published(table).tolist() == computed


def test_nothing_is_kept_for_sampling_a_sequence_that_is_over(engine):
    rng = random.Random(1)
    for number in range(12):
        add_at_random(engine, rng, number)
    seen = 0
    while engine.has_work():
        step(engine)
        seen = max(seen, len(engine.runner._sampler._sampler._penalties))
    assert seen > 2
    add_at_random(engine, rng, 12)
    engine.step()
    assert engine.runner._sampler._sampler._penalties.keys() <= {"s12"}


# ------------------------------------------------------------------------------------ the same request, the same tokens

#: Wide enough that one rounding differently shows: family, entries of its configuration.
SHAPES = {
    "dense": ("llama", {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 32}),
    "gpt_oss": (
        "gpt_oss",
        {"hidden_size": 256, "intermediate_size": 704, "num_local_experts": 8, "num_experts_per_tok": 4},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"hidden_size": 256, "moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 4},
    ),
    "mixtral": ("mixtral", {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 8}),
    "qwen2_moe, shared": (
        "qwen2_moe",
        {
            "hidden_size": 256,
            "moe_intermediate_size": 704,
            "shared_expert_intermediate_size": 512,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        DEEPSEEK | {"hidden_size": 256, "n_routed_experts": 8, "moe_intermediate_size": 704},
    ),
}
NUM_REQUESTS = 10


def seeded(number: int) -> SequenceSpec:
    """A sampled request; every other one begins as one before it does, so that blocks of it are there already."""
    rng = random.Random(number // 2)
    prompt = [rng.randrange(4, VOCAB_SIZE) for _ in range(40 + 9 * number)]
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=number, logprobs=1)
    return SequenceSpec(seq_id=f"s{number}", token_ids=prompt, num_prompt_tokens=len(prompt), params=params)


def answers(engine: Engine, numbers: list[int]) -> dict[int, list]:
    """Tokens and logprobs of these requests, all of which are there at once."""
    found: dict[str, list] = {}
    for number in numbers:
        engine.post(SequenceAdded(seeded(number)))
    while engine.has_work():
        for emitted in engine.step():
            assert emitted.error is None
            found.setdefault(emitted.seq_id, []).extend(zip(emitted.token_ids, emitted.logprobs, strict=True))
    return {number: found[f"s{number}"] for number in numbers}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_seeded_request_gives_the_same_alone_beside_others_and_on_blocks_cached_by_either(tmp_path, shape, dtype):
    if load_kernels() is None:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
    family, entries = SHAPES[shape]
    loaded = load_model(
        make_tiny_model(tmp_path, family, eos_token_id=None, num_hidden_layers=3, **entries), dtype=dtype
    )
    assert "batch-dependent" not in loaded.kernel_path
    engine = Engine.build(loaded, EngineOptions(kv_cache_bytes=1 << 25, max_num_batched_tokens=512))
    numbers = list(range(NUM_REQUESTS))
    try:
        alone: dict[int, list] = {}
        for number in numbers:
            engine.pool.clear()
            alone |= answers(engine, [number])
        assert all(len(tokens) == 24 for tokens in alone.values())
        assert all(
            answers(engine, [number])[number] == alone[number] for number in numbers
        )  # on blocks of others alone
        engine.pool.clear()
        assert answers(engine, numbers) == alone
        assert answers(engine, numbers[::-1]) == alone  # on blocks that were computed beside others
        engine.threads = StepThreads(2, NodeCores(2, tmp_path / "cores"))
        engine.pool.clear()
        assert answers(engine, numbers[3:]) == {number: alone[number] for number in numbers[3:]}
        assert answers(engine, [5]) == {5: alone[5]}
        assert engine.scheduler.stats()["num_prompt_tokens_device"] > 500
    finally:
        torch.set_num_threads(1)
        engine.close()
