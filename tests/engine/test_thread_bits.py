"""The same request gives the same bits with any number of threads: logits, tokens, and the KV that others load."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

import engine.model.load
from engine.core import Engine, EngineOptions
from engine.kernels.cpu.native import NativeKernels, load_kernels
from engine.model.load import LoadedModel
from engine.scheduling.plan import RunStep, SequenceAdded, SequenceSpec, StepEnded, StepWanted
from messages.request import SamplingParams
from tests.engine.test_core import SHAPES
from tests.models import VOCAB_SIZE, make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

DTYPES = ("float32", "bfloat16", "float16")
#: Of linears in bfloat16, those of the compiled kernels; "off": without these kernels.
PATHS = ("tiles", "dot", "fma", "off")


def _paths() -> list[tuple[str, str]]:
    native = [(dtype, "native") for dtype in ("float32", "float16")] + [("bfloat16", path) for path in PATHS[:3]]
    return native + [(dtype, "off") for dtype in DTYPES]


def requests() -> list[SequenceSpec]:
    """Greedy, drawn, and with penalties; one prompt is cut into chunks, and goes on beside those that generate."""
    rng = random.Random(3)
    specs = []
    for number, length in enumerate((700, 5, 130)):
        prompt = [rng.randrange(4, VOCAB_SIZE) for _ in range(length)]
        params = SamplingParams(
            max_tokens=12, temperature=0.9 * (number > 0), seed=number, logprobs=3, repetition_penalty=1 + 0.2 * number
        )
        specs.append(SequenceSpec(seq_id=f"s{number}", token_ids=prompt, num_prompt_tokens=length, params=params))
    return specs


def compute(loaded: LoadedModel, before_layer: Callable[[], None]) -> list[torch.Tensor | list[object]]:
    """All logits, all that was emitted and the whole pool, of these requests, all of which are there at once."""
    options = EngineOptions(kv_cache_bytes=1 << 24, max_num_batched_tokens=512, itl_target_s=1e9)
    made = Engine.build(loaded, options)
    made.runner._on_layer = None  # how many threads there are is told here
    logits: list[torch.Tensor] = []
    hooks = [loaded.model.register_forward_hook(lambda _module, _args, output: logits.append(output.logits.clone()))]
    hooks += [
        module.register_forward_pre_hook(lambda *_: before_layer())
        for name, module in loaded.model.named_modules()
        if name.rsplit(".", 1)[-1].isdigit()
    ]
    emitted: list[object] = []
    for spec in requests():
        made.decide(SequenceAdded(spec))
    try:
        while made.has_work():
            for plan in [item.plan for item in made.decide(StepWanted()) if isinstance(item, RunStep)]:
                result = made.runner.execute(plan)
                emitted.append((result.sampled, result.errors))
                made.decide(StepEnded(result))
        return [*logits, emitted, torch.from_numpy(made.checksums._host_rows.copy())]
    finally:
        for hook in hooks:
            hook.remove()
        made.close()


@pytest.mark.parametrize(("dtype", "path"), _paths())
@pytest.mark.parametrize("shape", ["dense", "qwen3_moe", "deepseek_v3"])
def test_a_request_has_the_same_bits_with_one_to_four_threads_and_where_they_change_within_a_step(
    tmp_path, monkeypatch, shape, dtype, path
):
    kernels = load_kernels()
    if path != "off":
        if kernels is None:
            pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
        kernels = NativeKernels(kernels._module)
        if dtype == "bfloat16":
            if path not in kernels._module.linear_paths.split():
                pytest.skip(f"this CPU has no linears by {path}")
            kernels.linear_path = path
        monkeypatch.setattr(engine.model.load, "load_kernels", lambda: kernels)
    family, entries = SHAPES[shape]
    directory = make_tiny_model(tmp_path, family, eos_token_id=None, num_hidden_layers=3, **entries)
    loaded = engine.model.load.load_model(directory, dtype=dtype, use_kernels=path != "off")
    try:
        one = compute(loaded, lambda: None)
        assert len(one) > 12
        rng = random.Random(1)
        for threads in (2, 3, 4, None):
            torch.set_num_threads(threads or 4)
            again = compute(loaded, (lambda: None) if threads else (lambda: torch.set_num_threads(rng.randint(1, 4))))
            assert len(again) == len(one)
            for a, b in zip(one, again, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    finally:
        torch.set_num_threads(1)
