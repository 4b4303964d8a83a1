"""The engine on a GPU: an 8B-shaped model, 64 sequences, beside transformers' continuous batching, in one process.

    python benchmarks/gpu/engine.py                    64 sequences, 1 k in, 256 out, once, within two minutes
    python benchmarks/gpu/engine.py --repeats 3        for how far figures spread, where there is time
    python benchmarks/gpu/engine.py --quick            64 out
    python benchmarks/gpu/engine.py --alone            without transformers, whose side takes longer
    python benchmarks/gpu/engine.py --record           also append to benchmarks/results/engine_gpu.jsonl
    python benchmarks/gpu/engine.py --dry-run          the same code on this CPU, in tiny: no figures

What `kvray bench engine --shape llama-8b` does: weights are drawn on the device, bfloat16, the same for both; prompts
are random, decoding greedy. First of all the device's copy bandwidth and matrix rate are measured; the bound is what
the bytes and the operations take at these rates (cluster/bench/bare/work.py). Goals: tokens/s at least five times
transformers' `generate_batch`, or 80 % of the bound, whichever is lower; under 1 ms of the host's time for a decode
step, and under 5 % of it not hidden behind the device. Without a GPU nothing is measured: no error.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for harness
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # where kvray is not installed

import torch
from harness.report import goal, parser, record
from rich.console import Console

from cluster.bench.bare.measuring import Wanted, measure
from cluster.bench.bare.shapes import write_shape
from engine.cores import num_cores

OVER_PEER = 5.0
OF_BOUND = 0.8
MAX_HOST_MS = 1.0
MAX_IDLE_PERCENT = 5.0


def wanted(directory: Path, *, is_dry: bool, is_quick: bool, has_peer: bool, repeats: int) -> Wanted:
    """Describe the bench; `directory` gets the model's configuration."""
    shape = "llama-tiny" if is_dry else "llama-8b"
    write_shape(directory, shape)
    return Wanted(
        path=directory,
        name=shape,
        is_drawn=True,
        dtype="float32" if is_dry else "bfloat16",
        kv_cache_dtype="auto",
        device="cpu" if is_dry else "cuda",
        num_threads=num_cores(),
        batch_size=3 if is_dry else 64,
        input_len=40 if is_dry else 1024,
        output_len=12 if is_dry else 64 if is_quick else 256,
        repeats=repeats,
        seed=0,
        max_num_batched_tokens=64 if is_dry else 8192,
        has_peer=has_peer,
    )


def goals(document: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each goal."""
    figures = {
        engine["name"]: {name: spread["median"] for name, spread in engine["summary"].items()}
        for engine in document["engines"]
    }
    ours, theirs = figures["kvray"], figures.get("transformers")
    rate, bound = ours["output_tokens_per_s"], document["bound"]["output_tokens_per_s"]
    least = OF_BOUND * bound
    if theirs is not None:
        least = min(least, OVER_PEER * theirs["output_tokens_per_s"])
        yield f"tokens/s over transformers' generate_batch: {rate / theirs['output_tokens_per_s']:.2f}x"
    yield f"tokens/s of the bound: {rate / bound:.2f}"
    name = f"tokens/s, the lower of {OVER_PEER:g}x transformers and {OF_BOUND:.0%} of the bound"
    yield goal(name, None if theirs is None else rate, at_least=least)
    yield goal("host's time of a decode step", ours.get("host_ms"), under=MAX_HOST_MS, unit=" ms")
    idle = 100 * ours["idle_ms"] / ours["itl_ms_p50"] if "idle_ms" in ours else None
    yield goal("of a decode step the device waits for the host", idle, under=MAX_IDLE_PERCENT, unit=" %")


def main() -> None:
    asked = parser(__doc__, "engine_gpu", quick="64 tokens out")
    asked.add_argument("--repeats", type=int, default=1)
    asked.add_argument("--alone", action="store_true", help="without transformers")
    asked.add_argument("--dry-run", action="store_true", help="the same code on this CPU, in tiny")
    options = asked.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device is there: nothing was measured")
        return
    with tempfile.TemporaryDirectory() as directory:
        report = measure(
            wanted(
                Path(directory),
                is_dry=options.dry_run,
                is_quick=options.quick,
                has_peer=not options.alone,
                repeats=options.repeats,
            ),
            lambda line: print(line, flush=True),
            lambda name, number, part: print(f"{name}: repeat {number}, {part}", flush=True),
        )
    for line in report.lines():
        print(line)
    Console(width=110).print(report.table())
    document = report.document()
    if options.dry_run:
        if not options.alone and document.get("same_tokens", {}).get("sequences") != 3 * options.repeats:
            raise SystemExit(f"kvray and transformers gave different tokens, or none: {document.get('failures')}")
        print("dry run: it generates" if options.alone else "dry run: both give the same tokens")
        return
    if options.record:
        record("engine_gpu", document, device=report.machine.name)
    for line in goals(document):
        print(line)


if __name__ == "__main__":
    main()
