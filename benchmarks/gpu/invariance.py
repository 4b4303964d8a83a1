"""Does a token have the same bits whatever its step? On a GPU: alone and in each bucket, captured and eager.

    python benchmarks/gpu/invariance.py [--quick] [--record] [--dry-run]

A sequence of 2,000 tokens decodes its next one, over and over: alone, beside others up to each bucket's rows, with
padding in place of the others, and in steps that are not captured; logits and the KV that it stores are compared bit
for bit. Then its prompt is computed whole and in two chunks. The model is random, of an 8B's width, two layers deep.
Without a GPU nothing is measured: no error.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for harness
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # where kvray is not installed

from harness.models import model_directory
from harness.report import goal, parser, record

from cluster.bench.bare.shapes import write_shape
from engine.memory.kv_pool import KvPool
from engine.model.load import LoadedModel, load_model
from engine.runner import Accelerator, Runner
from engine.sampling.row import LaunchedSamples, SamplingRow
from engine.sampling.sampler import Sampler
from engine.scheduling.plan import SequenceStep, SlotBegins, StepPlan
from engine.steps.device import StepDevice
from kvcache.names import pack_tokens
from messages.request import SamplingParams

BLOCK_SIZE = 16
PARAMS = SamplingParams(max_tokens=1 << 20, temperature=0.0)


class Watched(Sampler):
    """A sampler that keeps the logits of its last step's first row."""

    def launch(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> LaunchedSamples:
        """Keep them, and sample."""
        self.seen = logits[0].clone()
        return super().launch(logits, rows)


class Sequences:
    """Sequences of random tokens, the first of them long, each in its slot and its own blocks, prompts computed."""

    def __init__(self, loaded: LoadedModel, device: StepDevice, lengths: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths = lengths
        self._tokens = [torch.randint(4, loaded.num_embeddings, (n,), generator=generator).tolist() for n in lengths]
        counts = [n // BLOCK_SIZE + 1 for n in lengths]
        self._blocks = torch.randperm(1 + sum(counts), generator=generator).split([1, *counts])[1:]
        self._pool = KvPool(loaded.layer_specs, BLOCK_SIZE, loaded.kv_dtype, loaded.device, num_blocks=1 + sum(counts))
        self._sampler = Watched(loaded.vocab_size, None)
        self.runner = Runner(loaded, self._pool, self._sampler, None, Accelerator(device, len(lengths)))
        self.runner.capture()
        for slot, length in enumerate(lengths):
            self.runner.execute(StepPlan((self._part(slot, 0, length - 1, "prefill", begins=True),)))

    def _part(self, slot: int, start: int, end: int, kind: Any, *, begins: bool = False) -> SequenceStep:
        told: dict[str, Any] = {}
        if begins:
            told["begins"] = SlotBegins(num_prompt_tokens=self.lengths[slot] - 1, params=PARAMS)
            told["new_token_ids"] = pack_tokens(self._tokens[slot])
            told["new_block_ids"] = tuple(self._blocks[slot].tolist())
        is_sampled = kind == "decode"
        return SequenceStep(
            seq_id=f"s{slot}", slot=slot, kind=kind, start=start, num_tokens=end - start, is_sampled=is_sampled, **told
        )

    def decode(self, num_rows: int) -> list[torch.Tensor]:
        """Decode the last token of the first `num_rows` sequences; return the first one's logits and its last block."""
        parts = tuple(
            self._part(slot, self.lengths[slot] - 1, self.lengths[slot], "decode") for slot in range(num_rows)
        )
        self.runner.execute(StepPlan(parts))
        return [self._sampler.seen, self._pool.data[int(self._blocks[0][-1])].clone()]

    def prefill(self, cuts: Sequence[int]) -> list[torch.Tensor]:
        """Compute the first sequence's prompt in chunks that end at `cuts`; return its KV."""
        self._pool.data[self._blocks[0].to(self._pool.device)] = 0
        start = 0
        for cut in cuts:
            self.runner.execute(StepPlan((self._part(0, start, cut, "prefill"),)))
            start = cut
        return [self._pool.data[self._blocks[0].to(self._pool.device)[: start // BLOCK_SIZE]].clone()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def compared(sequences: Sequences) -> dict[str, dict[int, bool]]:
    """Compare the token's bits with those that it has alone, in its captured step, by the rows of its step."""
    runner = sequences.runner
    captured = runner._captured
    if captured is None:
        raise SystemExit("no step was captured: the line above says why")
    alone = sequences.decode(1)
    found: dict[str, dict[int, bool]] = {"beside others": {}, "beside padding": {}, "captured as eager": {}}
    for size in captured.sizes:
        full = sequences.decode(size)
        if size > 1:  # alone it is alone
            found["beside others"][size] = same(full, alone)
            sizes, captured.sizes = captured.sizes, (size,)
            found["beside padding"][size] = same(sequences.decode(1), full)
            captured.sizes = sizes
        runner._captured = None
        found["captured as eager"][size] = same(sequences.decode(size), full)
        runner._captured = captured
    return found


def main() -> None:
    """Compare, print a line for each way, then the goals."""
    made = parser(__doc__, "invariance_gpu", quick="up to 16 rows")
    made.add_argument("--dry-run", action="store_true", help="on this CPU, interpreted, in tiny")
    options = made.parse_args()
    device: StepDevice
    if options.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":  # which triton's import decides, and that is over by now
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
        from engine.kernels.triton.kernels import TRITON_KERNELS
        from tests.engine.steps.emulator import Emulator

        loaded = load_model(model_directory("long"), dtype="float32", use_kernels=False, max_model_len=256)
        loaded = dataclasses.replace(loaded, kernels=(TRITON_KERNELS,) * len(loaded.kernels))
        device, lengths, name = Emulator(), [70, 17, 9, 5], "this CPU"
    elif torch.cuda.is_available():
        from engine.steps.cuda import CudaSteps

        with tempfile.TemporaryDirectory() as directory:
            write_shape(Path(directory), "llama-8b", num_hidden_layers=2)
            loaded = load_model(Path(directory), device="cuda", max_model_len=4096, drawn_seed=0)
        device, name = CudaSteps(loaded.device), torch.cuda.get_device_name()
        lengths = [2000, *(100 + 37 * number for number in range(15 if options.quick else 63))]
    else:
        print("no CUDA device is there: nothing was measured")
        return
    begun_s = time.perf_counter()
    sequences = Sequences(loaded, device, lengths)
    found = compared(sequences)
    half = lengths[0] // 2 // BLOCK_SIZE * BLOCK_SIZE
    whole = sequences.prefill([lengths[0] - 1])
    chunks = same(sequences.prefill([half, lengths[0] - 1]), whole)
    captured = sequences.runner._captured
    assert captured is not None
    print(f"{name}: {loaded.kernel_path}, {time.perf_counter() - begun_s:.1f} s; {captured.summary}")
    for way, by_size in found.items():
        others = [size for size, is_same in by_size.items() if not is_same]
        print(f"{way}: the same bits in {len(by_size) - len(others)} of {len(by_size)} sizes; others in {others}")
    print(f"prompt in two chunks: {'the same' if chunks else 'other'} bits")
    if options.dry_run:
        print("dry run: every way was compared")
        return
    if options.record:
        record("invariance_gpu", {**found, "two chunks": chunks}, device=name)
    for way, by_size in found.items():
        print(goal(f"{way}, share of sizes with the same bits", sum(by_size.values()) / len(by_size), at_least=1.0))
    print(goal("prompt in two chunks, the same bits", float(chunks), at_least=1.0))


if __name__ == "__main__":
    main()
