"""Prefill in one process, decode in another, on one GPU: is it exact, how fast does KV come, what does it add.

    python benchmarks/gpu/two_processes.py                 all of it, within two minutes
    python benchmarks/gpu/two_processes.py --probe         CUDA IPC alone, within a minute
    python benchmarks/gpu/two_processes.py --quick         8 k tokens instead of 32 k
    python benchmarks/gpu/two_processes.py --record        also append to benchmarks/results/two_processes_gpu.jsonl
    python benchmarks/gpu/two_processes.py --dry-run       the same code on this CPU, in tiny: no figures

First torch alone maps a tensor of this process into another one by CUDA IPC and copies it: where that does not work
nothing else can. Then blocks go over the road "shm", which maps the other's pool by CUDA IPC, and over "ucx" where ucxx
is installed (README.md beside this file), as workers pull them (transfer.py), and two real workers with the same drawn
8B-shaped weights hand prompts over. Each prompt is
asked twice, once handed over and once computed by the decode worker alone, under names of its own: same tokens. What
the handoff adds is the time from the end of the last prefill chunk to the second token, less the same of one process
(benchmarks/handoff.py); one inter-token latency (ITL) is the median gap between later tokens.
Goals: over the road half the rate of copies within one process; the handoff adds less than one ITL at 32 k tokens. What
cannot be measured is said: no error.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import queue
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for harness
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # where kvray is not installed

import torch
import torch.multiprocessing as processes
from harness.direct import DirectClient
from harness.drawn_worker import DRAWN_WORKER
from harness.prompts import draw_prompts
from harness.report import goal, hardware, parser, record
from harness.transport_cells import MIB, Cell
from harness.workers import WorkerProcess, running_worker

from cluster.bench.bare.shapes import SHAPES, write_shape
from engine.core import EngineOptions
from engine.cores import num_cores
from engine.worker import WorkerOptions
from messages.errors import ConfigError, first_line
from transport.channel import ChannelConfig
from transport.opening import RoadOptions
from transport.secret import ClusterSecret

K = 1024
PROBE_S = 50.0
PROBE_BYTES, DRY_PROBE_BYTES = 1 << 30, 1 << 20
REPEATS = 10
CHANNEL = ChannelConfig(lost_after_s=60.0)
NUM_OUTPUT_TOKENS = 12
NUM_PROMPTS = 3
AFTERMATH_S = 0.2  #: of a request: release, report
TIMEOUT_S = 100.0
MIN_OF_COPIES = 0.5
MAX_ITLS = 1.0
CELL = Cell(2 * MIB, 256)
RESULT_NAMES = ("apart_ms", "alone_ms", "added_ms", "itl_ms")


class Mapped(NamedTuple):
    """What the other process found of memory that it has mapped."""

    is_same: bool  #: its bytes were those that were written here
    mapped_bytes_per_s: float  #: copied out of it
    own_bytes_per_s: float  #: copied within the other process


# ------------------------------------------------------------------------------------------------ CUDA IPC, torch only


def probe(device: str, num_bytes: int) -> Mapped | str:
    """Have another process map a tensor of this one and copy it; a string says why it could not."""
    spawned = processes.get_context("spawn")
    there, back = spawned.Queue(), spawned.Queue()
    tensor = _pattern(device, num_bytes)
    process = spawned.Process(target=_map, args=(there, back), daemon=True)
    process.start()
    there.put(tensor)
    try:
        found: Mapped | str = back.get(timeout=PROBE_S)
    except queue.Empty:
        found = f"nothing came back within {PROBE_S:g} s"
    there.put(None)
    process.join(5)
    if process.is_alive():
        process.kill()
    return found


def _map(there: Any, back: Any) -> None:
    """Be the other process."""
    try:
        tensor = there.get()
        target, other = torch.empty_like(tensor), torch.zeros_like(tensor)
        mapped_s = _seconds(functools.partial(target.copy_, tensor), tensor.device)
        is_same = torch.equal(target, _pattern(str(tensor.device), tensor.nbytes))
        own_s = _seconds(lambda: target.copy_(other), tensor.device)
        back.put(Mapped(is_same, tensor.nbytes / mapped_s, tensor.nbytes / own_s))
        del tensor
        there.get()  # the tensor's owner has to outlive what is mapped of it
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        back.put(f"{type(error).__name__}: {first_line(error)}")


def _pattern(device: str, num_bytes: int) -> torch.Tensor:
    """Make bytes that are alike in both processes, `[num_bytes]` uint8."""
    return torch.arange(num_bytes, device=device, dtype=torch.int32).mul_(2654435761 % 2**31).to(torch.uint8)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of `work` on the device, after once that does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        _wait(device)
        begun_s = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - begun_s)
    return median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------------- two workers


def options_of(directory: Path, num_tokens: int, *, is_dry: bool) -> WorkerOptions:
    """Describe either worker; `directory` gets the model's configuration."""
    shape = "llama-tiny" if is_dry else "llama-8b"
    write_shape(directory, shape)
    sizes = SHAPES[shape]
    of_token = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * (4 if is_dry else 2)
    return WorkerOptions(
        model_dir=str(directory),
        dtype="float32" if is_dry else "bfloat16",
        device="cpu" if is_dry else "cuda",
        max_model_len=num_tokens + 64,
        num_threads=max(1, num_cores() // 2),
        engine=EngineOptions(
            kv_cache_bytes=(2 * NUM_PROMPTS + 1) * (num_tokens + K) * of_token,
            max_num_seqs=8,
            max_num_batched_tokens=8192,
        ),
        use_kernels=True,
        channel=CHANNEL,
        lease_s=60.0,
        stall_s=10.0,
        roads=RoadOptions(names=("shm",)),
    )


async def hand_over(options: WorkerOptions, num_tokens: int, vocab_size: int) -> dict[str, float]:
    """Hand prompts over and compute them in one process, in turn; medians in ms.

    Raises:
        SystemExit: tokens differ, or KV did not come from the other process.
    """
    secret = ClusterSecret.generate()
    script = (str(DRAWN_WORKER),)
    with (
        running_worker("prefill", options, secret, script=script, is_traced=True) as prefill,
        running_worker("decode", options, secret, script=script, is_traced=True) as decode,
    ):
        client = DirectClient(secret, decode.info.address, CHANNEL)
        for prompt in draw_prompts(1, 2, min(600, num_tokens), vocab_size):  # connects, probes roads
            await _ask(client, prompt, prefill, decode)
            await asyncio.sleep(0.5)
        await _ask(client, prompt, None, decode)
        apart: list[float] = []
        alone: list[float] = []
        gaps: list[float] = []
        for prompt in draw_prompts(2, NUM_PROMPTS, num_tokens, vocab_size):
            seconds, between = await _ask(client, prompt, prefill, decode)
            handed = list(client.token_ids)
            apart.append(seconds)
            gaps += between
            seconds, between = await _ask(client, prompt, None, decode)
            alone.append(seconds)
            gaps += between
            if handed != client.token_ids:
                raise SystemExit(f"handed over {handed}, in one process {client.token_ids}")
        client.close()
    return {
        "apart_ms": 1e3 * median(apart),
        "alone_ms": 1e3 * median(alone),
        "added_ms": 1e3 * (median(apart) - median(alone)),
        "itl_ms": 1e3 * median(gaps),
    }


async def _ask(
    client: DirectClient, prompt: list[int], prefill: WorkerProcess | None, decode: WorkerProcess
) -> tuple[float, list[float]]:
    """Measure seconds from the end of the last prefill chunk to the second token, and the gaps between later ones."""
    begun_s = time.monotonic()
    times_s = await client.token_times_s(
        prompt,
        None if prefill is None else prefill.info.address,
        max_tokens=NUM_OUTPUT_TOKENS,
        salt=b"" if prefill is not None else b"alone",
        timeout_s=TIMEOUT_S,
    )
    await asyncio.sleep(AFTERMATH_S)
    worker = prefill or decode
    ended_s = worker.last_said("prompt_ended_s")
    if ended_s < begun_s:
        raise SystemExit(f"the {worker.info.role} worker was to compute the prompt, and did not")
    return times_s[1] - ended_s, [later - sooner for sooner, later in itertools.pairwise(times_s[1:])]


# ---------------------------------------------------------------------------------------------------------------- all


def main() -> None:
    asked = parser(__doc__, "two_processes_gpu", quick="8 k tokens")
    asked.add_argument("--probe", action="store_true", help="CUDA IPC alone")
    asked.add_argument("--dry-run", action="store_true", help="the same code on this CPU, in tiny")
    args = asked.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device is there: nothing was measured")
        return
    num_tokens = 1500 if args.dry_run else (8 if args.quick else 32) * K
    device, num_bytes = ("cpu", DRY_PROBE_BYTES) if args.dry_run else ("cuda:0", PROBE_BYTES)
    print(hardware())
    results: dict[str, Any] = {}
    mapped = probe(device, num_bytes)
    lack = ""
    if isinstance(mapped, str):
        lack = f"CUDA IPC does not work between two processes here ({mapped})"
        if args.dry_run:
            raise SystemExit(lack)
        print(lack, flush=True)
    elif not mapped.is_same:
        raise SystemExit("the other process saw other bytes than were written")
    else:
        results["ipc"] = mapped._asdict()
        rates = [rate / 1e9 for rate in (mapped.mapped_bytes_per_s, mapped.own_bytes_per_s)]
        print(f"memory of another process: copied at {rates[0]:.1f} GB/s, its own at {rates[1]:.1f} GB/s", flush=True)
    if args.probe:
        return
    if not lack:
        if not args.dry_run:
            results["road"] = road_times()
        with tempfile.TemporaryDirectory() as directory:
            options = options_of(Path(directory), num_tokens, is_dry=args.dry_run)
            results |= asyncio.run(hand_over(options, num_tokens, vocab_size=500))
        figures = ", ".join(f"{name.removesuffix('_ms')} {results[name]:.2f}" for name in RESULT_NAMES)
        print(f"{num_tokens} tokens, ms: {figures}", flush=True)
    if args.dry_run:
        print("dry run: the same tokens handed over and in one process")
        return
    if lack:
        print("the handoff was not measured")
    elif args.record:
        record("two_processes_gpu", results, device=torch.cuda.get_device_name(), num_tokens=num_tokens)
    road = results.get("road", {})
    of_copies = road["copies"] / road["shm"] if "shm" in road else None
    print(goal(f"KV over shm, {CELL}, of copies within one process", of_copies, at_least=MIN_OF_COPIES, unit="x"))
    itls = results["added_ms"] / results["itl_ms"] if "itl_ms" in results else None
    print(goal(f"a handoff of {num_tokens} tokens adds, in ITLs", itls, under=MAX_ITLS))


def road_times() -> dict[str, float]:
    """Measure blocks over roads as workers pull them, beside copies: median seconds (transfer.py, beside this).

    Empty where no road moves them, which is said.
    """
    import transfer
    import uvloop

    try:
        times, _ = uvloop.run(transfer.run_all([CELL], budget_s=5.0))
    except ConfigError as error:
        print(f"{error.message}: no pulls measured", flush=True)
        return {}
    return dict(times[CELL])


if __name__ == "__main__":
    main()
