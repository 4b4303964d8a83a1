"""Triton's fused operators, the KV write, float8 KV and copies of blocks on a GPU, beside torch's own operators.

    python benchmarks/gpu/operators.py               every cell, within two minutes
    python benchmarks/gpu/operators.py --quick       decode's 64 rows alone
    python benchmarks/gpu/operators.py --record      also append to benchmarks/results/operators_gpu.jsonl
    python benchmarks/gpu/operators.py --dry-run     the same code on this CPU, interpreted, in tiny: no figures

Sizes are Llama 3 8B's. Each cell is told in microseconds, and as a share of the device's copy bandwidth by the bytes
that it must read and write; beside it what transformers' modules do, one torch operator after the other. Results are
held to torch's, and to themselves: a row alone must have the bits that it has among others. Of float8 KV decode
attention over it is told beside the same over bfloat16. Without a GPU nothing is measured: no error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent))  # for attention
sys.path.append(str(Path(__file__).resolve().parent.parent))  # for harness
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # where kvray is not installed

from attention import BLOCK_SIZE, Device, timed
from harness.report import goal, parser, record

from engine.kernels.protocol import AttentionKernels, AttentionOptions, KvScales
from engine.kernels.reference import TORCH_KERNELS
from engine.memory.kv_pool import KvPool, LayerSpec

ROWS = (64, 8192)
HIDDEN, INNER, HEADS, KV_HEADS, DIM = 4096, 14336, 32, 8, 128
CONTEXTS = ((8192, 8), (8192, 64))
BLOCKS = (256, 2 << 20)  #: copied at a time, and the bytes of each
SCALES = KvScales(0.125, 0.125)


class Cells:
    """Measures one thing after the other."""

    def __init__(self, device: Device, bytes_per_s: float) -> None:
        from engine.kernels.triton.kernels import TRITON_KERNELS  # late: interpreted or not by now
        from engine.kernels.triton.operators import TRITON_OPERATORS
        from engine.model.fused import agree

        self.device = device
        self.bytes_per_s = bytes_per_s
        self.operators, self.kernels, self.agree = TRITON_OPERATORS, TRITON_KERNELS, agree
        self.found: dict[str, dict[str, float]] = {}
        self.wrong: list[str] = []

    def hold(self, name: str, *, is_right: bool) -> None:
        """Note a result that is not what it should be."""
        if not is_right:
            self.wrong.append(name)

    def tell(self, name: str, num_bytes: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
        """Time both, and print a line."""
        seconds, torchs = timed(ours, self.device.scratch), timed(theirs, self.device.scratch)
        share = num_bytes / seconds / self.bytes_per_s
        self.found[name] = {"kvray_s": seconds, "torch_s": torchs, "share": share}
        print(f"{name}: {1e6 * seconds:.1f} us, {share:.2f} of copies; torch {1e6 * torchs:.1f} us", flush=True)

    def norms(self, num_rows: int, size: int) -> None:
        """RMS norm, and with a residual's add."""
        x, residual, weight = (self.device.randn(n, size) for n in (num_rows, num_rows, 1))
        weight = weight[0]
        how = {"adds_one": False, "rounds_first": True}

        def plain(rows: torch.Tensor) -> torch.Tensor:
            numbers = rows.float()
            return weight * (numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + 1e-5)).to(rows.dtype)

        got = self.operators.rms_norm(x, weight, 1e-5, **how)
        self.hold(f"norm of {size}", is_right=self.agree(got, plain(x)))
        alone = self.operators.rms_norm(x[1:2].contiguous(), weight, 1e-5, **how)
        self.hold(f"norm of {size}, a row alone", is_right=torch.equal(alone, got[1:2]))
        total = x.clone()
        got = self.operators.add_rms_norm(residual, total, weight, 1e-5, **how)
        self.hold(
            f"norm of a sum of {size}", is_right=torch.equal(total, residual + x) and self.agree(got, plain(total))
        )
        row = x.element_size() * num_rows * size
        self.tell(
            f"norm, {num_rows} x {size}",
            2 * row,
            lambda: self.operators.rms_norm(x, weight, 1e-5, **how),
            lambda: plain(x),
        )
        scratch = x.clone()
        self.tell(
            f"sum and norm, {num_rows} x {size}",
            4 * row,
            lambda: self.operators.add_rms_norm(residual, scratch, weight, 1e-5, **how),
            lambda: plain(residual + x),
        )

    def gates(self, num_rows: int, size: int) -> None:
        """The gate of a gated MLP."""
        gate, up = self.device.randn(num_rows, size), self.device.randn(num_rows, size)
        got = self.operators.gate(gate.clone(), up, is_gelu=False)
        self.hold("silu's gate", is_right=self.agree(got, F.silu(gate) * up))
        alone = self.operators.gate(gate[1:2].clone(), up[1:2].contiguous(), is_gelu=False)
        self.hold("silu's gate, a row alone", is_right=torch.equal(alone, got[1:2]))
        gelu = self.operators.gate(gate.clone(), up, is_gelu=True)
        self.hold("gelu's gate", is_right=self.agree(gelu, F.gelu(gate, approximate="tanh") * up))
        scratch = gate.clone()
        self.tell(
            f"gate, {num_rows} x {size}",
            3 * gate.element_size() * gate.numel(),
            lambda: self.operators.gate(scratch, up, is_gelu=False),
            lambda: F.silu(gate) * up,
        )

    def writes(self, num_rows: int, heads: int, kv_heads: int, dim: int, scales: KvScales | None) -> None:
        """Rotation of queries and keys, and the KV write."""
        query, key, value = (self.device.randn(num_rows, n, dim) for n in (heads, kv_heads, kv_heads))
        cosine, sine = self.device.randn(num_rows, dim), self.device.randn(num_rows, dim)
        kept = query.dtype if scales is None else torch.float8_e4m3fn
        spec = LayerSpec(kv_heads, dim, dim)
        num_blocks = -(-num_rows // BLOCK_SIZE)
        ours, theirs = (KvPool([spec], BLOCK_SIZE, kept, self.device.device, num_blocks=num_blocks) for _ in range(2))
        at = torch.randperm(num_blocks * BLOCK_SIZE, device=self.device.device)[:num_rows]
        places = at // BLOCK_SIZE, at % BLOCK_SIZE

        def turned(rows: torch.Tensor) -> torch.Tensor:
            behind = torch.cat([-rows[..., dim // 2 :], rows[..., : dim // 2]], -1)
            return rows * cosine[:, None] + behind * sine[:, None]

        def plain() -> torch.Tensor:
            TORCH_KERNELS.write_kv(turned(key), value, theirs.k[0], theirs.v[0], *places, scales)
            return turned(query)

        write = self.operators.rotating_write(cosine, sine)
        assert write is not None
        rotated = query.clone()
        write(rotated, key, value, ours.k[0], ours.v[0], *places, scales)
        name = "rotation and KV write" + (", float8" if scales else "")
        is_same = torch.equal(rotated, plain()) and torch.equal(
            ours.data.view(torch.uint8), theirs.data.view(torch.uint8)
        )
        self.hold(name, is_right=is_same)
        scratch = query.clone()
        read = query.element_size() * (query.numel() + key.numel() + value.numel() + 2 * cosine.numel())
        written = query.element_size() * query.numel() + kept.itemsize * 2 * key.numel()
        self.tell(
            f"{name}, {num_rows} rows",
            read + written,
            lambda: write(scratch, key, value, ours.k[0], ours.v[0], *places, scales),
            plain,
        )

    def float8(self, context: int, batch: int, heads: int, kv_heads: int, dim: int) -> None:
        """Decode attention over KV in float8, beside the same in the model's dtype."""
        blocks_each = -(-context // BLOCK_SIZE)
        spec = LayerSpec(kv_heads, dim, dim)
        kept = (self.device.dtype, torch.float8_e4m3fn)
        pools = [
            KvPool([spec], BLOCK_SIZE, dtype, self.device.device, num_blocks=batch * blocks_each) for dtype in kept
        ]
        for begin in range(0, batch * context, 1 << 17):  # a piece at a time: together they take what a pool takes
            at = torch.arange(begin, min(batch * context, begin + (1 << 17)), device=self.device.device)
            rows = (self.device.randn(len(at), kv_heads, dim), self.device.randn(len(at), kv_heads, dim))
            for pool, scales in zip(pools, (None, SCALES), strict=True):
                self.kernels.write_kv(*rows, pool.k[0], pool.v[0], at // BLOCK_SIZE, at % BLOCK_SIZE, scales)
        order = torch.randperm(batch * blocks_each, device=self.device.device)
        tables = order.int().view(batch, blocks_each)
        lens = torch.full((batch,), context, dtype=torch.int32, device=self.device.device)
        slots = torch.arange(batch, device=self.device.device)
        query = self.device.randn(batch, heads, dim)

        def attend(number: int, kernels: AttentionKernels) -> torch.Tensor:
            pool, scales = pools[number], (KvScales(1.0, 1.0), SCALES)[number]
            options = AttentionOptions(dim**-0.5 * scales.k, value_scale=scales.v)
            return kernels.decode_attention(query, pool.k[0], pool.v[0], tables, slots, lens, context, options)

        got, wanted = attend(1, self.kernels).float(), attend(1, TORCH_KERNELS).float()
        self.hold("attention over float8", is_right=bool((got - wanted).abs().max() < 1e-2 * wanted.abs().max()))
        self.tell(
            f"decode over float8, {context} x {batch} (beside: the same over {str(kept[0]).removeprefix('torch.')})",
            2 * batch * context * kv_heads * dim,
            lambda: attend(1, self.kernels),
            lambda: attend(0, self.kernels),
        )

    def copies(self, num_blocks: int, block_bytes: int) -> None:
        """Whole blocks out of a pool and into it, by few programs and by as many as fit."""
        from engine.memory.triton_blocks import NUM_PROGRAMS, gather_blocks, scatter_blocks

        pool = torch.randint(256, (2 * num_blocks, block_bytes), dtype=torch.uint8, device=self.device.device)
        ids = torch.randperm(2 * num_blocks, device=self.device.device)[:num_blocks]
        out, back = torch.empty_like(pool[:num_blocks]), torch.zeros_like(pool)
        gather_blocks(pool, ids, out)
        scatter_blocks(back, ids, out)
        self.hold("blocks", is_right=torch.equal(out, pool[ids]) and torch.equal(back[ids], out))
        for programs in (NUM_PROGRAMS, 8 * NUM_PROGRAMS):
            self.tell(
                f"{num_blocks} blocks gathered by {programs} programs",
                2 * out.numel(),
                lambda programs=programs: gather_blocks(pool, ids, out, programs),  # type: ignore[misc]  # a default has no type
                lambda: torch.index_select(pool, 0, ids, out=out),
            )


def main() -> None:
    """Measure, print a line for each cell, then the goals."""
    made = parser(__doc__, "operators_gpu", quick="decode's rows alone")
    made.add_argument("--dry-run", action="store_true", help="on this CPU, interpreted, in tiny")
    options = made.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no CUDA device is there: nothing was measured")
        return
    device = Device(is_dry=options.dry_run)
    cells = Cells(device, device.copy_bytes_per_s())
    if options.dry_run:
        cells.norms(3, 48)
        cells.gates(3, 80)
        for scales in (None, SCALES):
            cells.writes(20, 4, 2, 16, scales)
        cells.float8(40, 2, 4, 2, 16)
        cells.copies(3, 4096)
    else:
        for num_rows in ROWS[:1] if options.quick else ROWS:
            cells.norms(num_rows, HIDDEN)
            cells.norms(num_rows * HEADS, DIM)
            cells.gates(num_rows, INNER)
            for scales in (None, SCALES):
                cells.writes(num_rows, HEADS, KV_HEADS, DIM, scales)
        for context, batch in CONTEXTS[:1] if options.quick else CONTEXTS:
            cells.float8(context, batch, HEADS, KV_HEADS, DIM)
        cells.copies(*BLOCKS)
    if cells.wrong:
        raise SystemExit(f"results are not what they should be: {', '.join(cells.wrong)}")
    if options.dry_run:
        print("dry run: every result is torch's")
        return
    if options.record:
        record("operators_gpu", cells.found, device=torch.cuda.get_device_name())
    gains = [found["torch_s"] / found["kvray_s"] for name, found in cells.found.items() if "blocks" not in name]
    print(goal("operators and float8, the least gain over torch and bfloat16", min(gains), at_least=1.0))


if __name__ == "__main__":
    main()
