"""Triton's attention over the paged pool on a GPU, beside torch's own on KV without pages, as shares of that device.

    python benchmarks/gpu/attention.py                    every cell, within two minutes
    python benchmarks/gpu/attention.py --quick            four cells of decode, one of prefill
    python benchmarks/gpu/attention.py --record           also append to benchmarks/results/attention_gpu.jsonl
    python benchmarks/gpu/attention.py --dry-run          the same code on this CPU, interpreted, in tiny: no figures

Heads as Llama 3 8B's (32, 8 for keys and values, of 128), bfloat16, blocks of 16 tokens in random order. First of all
the device's copy bandwidth (bytes read and written, alike) and matrix rate are measured; decode is told as a share of
the one (it reads all KV once), prefill of the other. Beside it in the same run: torch's scaled_dot_product_attention on
contiguous KV, and flex_attention with the same block table. Times are medians of launches captured in a CUDA graph,
caches flushed in between; every result is held against torch's. Without a GPU nothing is measured: no error.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for harness
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # where kvray is not installed

from harness.report import goal, parser, record

from engine.kernels.protocol import AttentionKernels, AttentionOptions, PrefillSpan, PrefillSpans
from messages.errors import first_line

BLOCK_SIZE = 16
K = 1024
MAX_KV_BYTES = 24 << 30  #: of a cell's pool: torch's own KV takes as much again
REPEATS = 15
SHARE = 0.85
OF_UNIFORM = 0.9


@dataclass(frozen=True)
class Heads:
    """Query heads, and those of keys and values."""

    num_heads: int = 32
    num_kv_heads: int = 8
    dim: int = 128

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, in bfloat16."""
        return 2 * self.num_kv_heads * self.dim * 2


@dataclass(frozen=True)
class Cell:
    """Decode rows by the keys they see."""

    name: str
    lens: tuple[int, ...]

    @classmethod
    def of(cls, context: int, batch: int) -> Cell:
        """Make a cell of rows that are all as long."""
        return cls(f"{context // K} k x {batch}", (context,) * batch)


CELLS = [
    *(Cell.of(context, batch) for context in (K, 8 * K, 32 * K, 128 * K) for batch in (1, 8, 64)),
    Cell("1 x 128 k + 31 x 4 k", (128 * K, *[4 * K] * 31)),
]
QUICK = [Cell.of(K, 1), Cell.of(8 * K, 8), Cell.of(8 * K, 64), CELLS[-1]]
GOAL_CELLS = {f"{context} k x {batch}" for context in (8, 32, 128) for batch in (8, 64)}


def timed(work: Callable[[], object], scratch: torch.Tensor | None) -> float:
    """Return the median seconds of `work`, captured, with cold caches; NaN after one call where `scratch` is None."""
    if scratch is None:
        work()
        return math.nan
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    seconds = []
    for _ in range(REPEATS):
        scratch.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return median(seconds)


class Device:
    """Where cells run, and what it can do at best."""

    def __init__(self, *, is_dry: bool) -> None:
        self.is_dry = is_dry
        self.device = torch.device("cpu" if is_dry else "cuda")
        self.dtype = torch.float32 if is_dry else torch.bfloat16
        self.scratch = None if is_dry else torch.empty(256 << 20, dtype=torch.uint8, device=self.device)

    def randn(self, *shape: int) -> torch.Tensor:
        """Draw a tensor."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def copy_bytes_per_s(self) -> float:
        """Measure a large copy: bytes read and bytes written."""
        source = torch.empty((1 << 16) if self.is_dry else (2 << 30), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / timed(lambda: target.copy_(source), self.scratch)

    def flops_per_s(self) -> float:
        """Measure a large product."""
        size = 64 if self.is_dry else 8192
        a, b = self.randn(size, size), self.randn(size, size)
        return 2 * size**3 / timed(lambda: a @ b, self.scratch)


class Pool:
    """Sequences in random blocks, and what they are without blocks."""

    def __init__(self, device: Device, lens: tuple[int, ...], heads: Heads) -> None:
        counts = [-(-length // BLOCK_SIZE) for length in lens]
        total = sum(counts)
        per_head = BLOCK_SIZE * heads.dim
        self.data = torch.empty(total, 2 * heads.num_kv_heads * per_head, device=device.device, dtype=device.dtype)
        self.data[: min(total, K)] = device.randn(min(total, K), self.data.shape[1])
        for begin in range(K, total, K):  # random enough, and made in no time
            self.data[begin : begin + K] = self.data[: min(K, total - begin)]
        shape = (total, heads.num_kv_heads, BLOCK_SIZE, heads.dim)
        strides = (self.data.shape[1], per_head, heads.dim, 1)
        self.k = self.data.as_strided(shape, strides, 0)
        self.v = self.data.as_strided(shape, strides, heads.num_kv_heads * per_head)
        order = torch.randperm(total, device=device.device).int()
        self.tables = torch.zeros(len(lens), max(counts), dtype=torch.int32, device=device.device)
        begin = 0
        for row, count in enumerate(counts):
            self.tables[row, :count] = order[begin : begin + count]
            begin += count
        self.lens = torch.tensor(lens, dtype=torch.int32, device=device.device)
        self.slots = torch.arange(len(lens), device=device.device)

    def contiguous(self, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a sequence's keys and values, `[num_kv_heads, length, dim]`."""
        blocks = self.tables[row, : -(-length // BLOCK_SIZE)].long()
        return tuple(view[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for view in (self.k, self.v))


def decode_cell(device: Device, cell: Cell, heads: Heads, kernels: AttentionKernels) -> dict[str, float]:
    """Measure one mixture of lengths; seconds by contender, and the largest difference to torch's result."""
    pool = Pool(device, cell.lens, heads)
    query = device.randn(len(cell.lens), heads.num_heads, heads.dim)
    options = AttentionOptions(heads.dim**-0.5)
    work = (query, pool.k, pool.v, pool.tables, pool.slots, pool.lens, max(cell.lens), options)
    result = kernels.decode_attention(*work)
    worst = 0.0
    for row in {0, len(cell.lens) - 1}:
        keys, values = pool.contiguous(row, cell.lens[row])
        wanted = F.scaled_dot_product_attention(query[row][None, :, None], keys[None], values[None], enable_gqa=True)
        worst = max(worst, float((result[row].float() - wanted[0, :, 0].float()).abs().max()))
    found = {"kvray": timed(lambda: kernels.decode_attention(*work), device.scratch), "error": worst}
    if len(set(cell.lens)) == 1:
        each = [pool.contiguous(row, cell.lens[0]) for row in range(len(cell.lens))]
        whole = [torch.stack(some) for some in zip(*each, strict=True)]
        del each
        rows = query[:, :, None]
        found["sdpa"] = timed(lambda: F.scaled_dot_product_attention(rows, *whole, enable_gqa=True), device.scratch)
        del whole
    try:
        found["flex"] = timed(flex_decode(pool, query, cell.lens, heads), device.scratch)
    except Exception as error:  # noqa: BLE001 - a peer that does not run is said, and is no fault of ours
        print(f"{cell.name}: flex_attention does not run: {type(error).__name__}: {first_line(error)}")
    return found


def flex_decode(pool: Pool, query: torch.Tensor, lens: tuple[int, ...], heads: Heads) -> Callable[[], torch.Tensor]:
    """Return flex_attention over the pool's blocks as pages, by the same block table."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if pool.data.device.type != "cuda":
        raise RuntimeError("it wants a GPU")
    num_rows, _most = pool.tables.shape
    counts = torch.tensor([-(-length // BLOCK_SIZE) for length in lens], dtype=torch.int32, device=pool.tables.device)
    owner = torch.full((len(pool.data),), -1, dtype=torch.int32, device=pool.tables.device)  # block -> place in its row
    for row in range(num_rows):
        blocks = pool.tables[row, : int(counts[row])].long()
        owner[blocks] = torch.arange(len(blocks), dtype=torch.int32, device=owner.device)
    limits = pool.lens

    def is_seen(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        return owner[kv // BLOCK_SIZE] * BLOCK_SIZE + kv % BLOCK_SIZE < limits[b]

    mask = BlockMask.from_kv_blocks(
        counts[:, None, None], pool.tables[:, None, None, :], BLOCK_SIZE=(128, BLOCK_SIZE), mask_mod=is_seen
    )
    keys, values = (view.transpose(0, 1).reshape(1, heads.num_kv_heads, -1, heads.dim) for view in (pool.k, pool.v))
    keys, values = keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1)
    compiled = torch.compile(flex_attention)
    rows = query[:, :, None]
    return lambda: compiled(rows, keys, values, block_mask=mask, enable_gqa=True)


def prefill_cell(device: Device, num_tokens: int, heads: Heads, kernels: AttentionKernels) -> dict[str, float]:
    """Measure a whole prompt; seconds by contender, and the largest difference to torch's result."""
    pool = Pool(device, (num_tokens,), heads)
    query = device.randn(num_tokens, heads.num_heads, heads.dim)
    spans = PrefillSpans.of([PrefillSpan(0, num_tokens, num_tokens, 0)], device.device)
    work = (query, pool.k, pool.v, pool.tables, spans, AttentionOptions(heads.dim**-0.5))
    keys, values = (tensor[None].contiguous() for tensor in pool.contiguous(0, num_tokens))
    rows = query.transpose(0, 1)[None].contiguous()

    def torchs() -> torch.Tensor:
        return F.scaled_dot_product_attention(rows, keys, values, is_causal=True, enable_gqa=True)

    error = (kernels.prefill_attention(*work).transpose(0, 1).float() - torchs()[0].float()).abs().max()
    return {
        "kvray": timed(lambda: kernels.prefill_attention(*work), device.scratch),
        "sdpa": timed(torchs, device.scratch),
        "error": float(error),
    }


def main() -> None:
    """Measure, print a line for each cell, then the goals."""
    made = parser(__doc__, "attention_gpu", quick="five cells")
    made.add_argument("--dry-run", action="store_true", help="on this CPU, interpreted, in tiny")
    options = made.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no CUDA device is there: nothing was measured")
        return
    from engine.kernels.triton.kernels import TRITON_KERNELS as kernels  # noqa: N811 - interpreted or not by now

    device = Device(is_dry=options.dry_run)
    heads = Heads(4, 2, 32) if options.dry_run else Heads()
    cells = [Cell("dry", (40, 40)), Cell("dry, mixed", (300, 17))] if options.dry_run else CELLS
    prompts = [50] if options.dry_run else [8 * K, 32 * K]
    if options.quick and not options.dry_run:
        cells, prompts = QUICK, prompts[:1]
    bandwidth, rate = device.copy_bytes_per_s(), device.flops_per_s()
    name = "this CPU" if options.dry_run else torch.cuda.get_device_name()
    print(f"{name}: copies at {bandwidth / 1e12:.2f} TB/s, bfloat16 products at {rate / 1e12:.0f} TFLOP/s")
    results: dict[str, dict[str, float]] = {"device": {"bytes_per_s": bandwidth, "flops_per_s": rate}}
    shares: dict[str, float] = {}
    for cell in cells:
        num_bytes = sum(cell.lens) * heads.token_bytes
        if num_bytes > MAX_KV_BYTES:
            print(f"decode {cell.name}: {num_bytes / 2**30:.0f} GiB of KV, left out")
            continue
        found = results[f"decode {cell.name}"] = decode_cell(device, cell, heads, kernels)
        shares[cell.name] = num_bytes / found["kvray"] / bandwidth
        peers = ", ".join(f"{peer} {1e3 * found[peer]:.3f} ms" for peer in ("sdpa", "flex") if peer in found)
        ours = f"{1e3 * found['kvray']:.3f} ms, {shares[cell.name]:.2f} of copies"
        print(f"decode {cell.name}: {ours}; {peers}; error {found['error']:.1e}", flush=True)
    for num_tokens in prompts:
        found = results[f"prefill {num_tokens}"] = prefill_cell(device, num_tokens, heads, kernels)
        flops = 2 * 2 * heads.num_heads * heads.dim * num_tokens**2 / 2
        ours = f"{1e3 * found['kvray']:.2f} ms, {flops / found['kvray'] / rate:.2f} of products"
        print(
            f"prefill {num_tokens}: {ours}; sdpa {1e3 * found['sdpa']:.2f} ms; error {found['error']:.1e}", flush=True
        )
    limit = 1e-4 if options.dry_run else 2e-2
    wrong = {cell: found["error"] for cell, found in results.items() if not found.get("error", 0.0) < limit}
    if wrong:
        raise SystemExit(f"results differ from torch's: {wrong}")
    if options.dry_run:
        print("dry run: every result is torch's")
        return
    if options.record:
        record("attention_gpu", results, device=name)
    uniform = [share for cell, share in shares.items() if cell in GOAL_CELLS]
    mixed = shares.get(CELLS[-1].name)
    print(goal("decode, 8 k x 8 and more, least share of copies", min(uniform, default=None), at_least=SHARE))
    ratio = None if mixed is None or not uniform else mixed / median(uniform)
    print(goal("decode, 1 x 128 k + 31 x 4 k, of that share", ratio, at_least=OF_UNIFORM))
    for num_tokens in prompts:
        found = results[f"prefill {num_tokens}"]
        print(
            goal(f"prefill {num_tokens}, over sdpa on KV without pages", found["sdpa"] / found["kvray"], at_least=1.0)
        )


if __name__ == "__main__":
    main()
