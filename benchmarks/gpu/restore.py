"""A prompt of 128 k tokens on a GPU: computed, then brought back from the node's host memory, then from its disk.

    python benchmarks/gpu/restore.py                    8B-shaped, 128 k tokens (16 GiB of KV), within two minutes
    python benchmarks/gpu/restore.py --quick            32 k tokens
    python benchmarks/gpu/restore.py --shape llama-1b   another model (cluster/bench/bare/shapes.py)
    python benchmarks/gpu/restore.py --disk-dir DIR     where the disk tier lies; else with temporary files
    python benchmarks/gpu/restore.py --record           also append to benchmarks/results/restore_gpu.jsonl
    python benchmarks/gpu/restore.py --dry-run          the same code on this CPU, in tiny: no figures

A decode worker with drawn weights and the node cache, in processes of their own, without Ray and HTTP. Time is from
sending the prompt to its first token. Between two ways the worker's pool is cleared; for the disk the blocks are moved
there from host memory, and the kernel's page cache is emptied of them. Each answer is the same, token for token.
Goals: from host memory in a quarter of the time of computing, from disk in less. Without a GPU nothing is measured: no
error.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for harness
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # where kvray is not installed

import torch
from harness.direct import DirectClient
from harness.drawn_worker import DRAWN_WORKER
from harness.report import goal, hardware, parser, record
from harness.workers import WorkerProcess, running_worker

from cluster.bench.bare.shapes import SHAPES, write_shape
from engine.core import EngineOptions
from engine.cores import num_cores
from engine.worker import WorkerOptions
from kvcache.names import block_names, pack_tokens
from messages.cache import ClearBlocks, MoveBlocks, PieceDone
from messages.request import Copy, HeldRun
from messages.tier import Tier
from nodecache.process import CacheSettings
from transport.channel import ChannelConfig
from transport.opening import RoadOptions
from transport.secret import ClusterSecret

K = 1024
CHANNEL = ChannelConfig(lost_after_s=60.0)
NUM_OUTPUT_TOKENS = 8
WARM_TOKENS = 2048
DEADLINE_S = 110.0
HOST_SHARE, DISK_SHARE = 0.25, 1.0


def options_of(directory: Path, shape: str, num_tokens: int, disk_dir: Path, *, is_dry: bool) -> WorkerOptions:
    """Describe a worker in whose pool, arena and disk the prompt fits; `directory` gets the model's configuration."""
    write_shape(directory, shape)
    sizes = SHAPES[shape]
    of_token = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * (4 if is_dry else 2)
    num_bytes = (num_tokens + 4 * WARM_TOKENS) * of_token
    return WorkerOptions(
        model_dir=str(directory),
        dtype="float32" if is_dry else "bfloat16",
        device="cpu" if is_dry else "cuda",
        max_model_len=num_tokens + 64,
        num_threads=num_cores(),
        engine=EngineOptions(
            kv_cache_bytes=num_bytes, max_num_seqs=8, max_num_batched_tokens=8192, has_lower_tiers=True
        ),
        use_kernels=True,
        channel=CHANNEL,
        lease_s=60.0,
        stall_s=30.0,
        roads=RoadOptions(names=("shm",)),
        cache=CacheSettings(
            host_memory_bytes=num_bytes + num_bytes // 8, disk_dir=str(disk_dir), disk_capacity_bytes=2 * num_bytes
        ),
    )


class Restore:
    """The prompt, its worker and its node cache."""

    def __init__(
        self, worker: WorkerProcess, client: DirectClient, cache: DirectClient, cache_address: str, num_tokens: int
    ) -> None:
        """Draw a prompt of `num_tokens`."""
        self.info = worker.info
        self._client, self._cache, self._cache_address = client, cache, cache_address
        draw = random.Random(7)
        self._prompt = [draw.randrange(5, 500) for _ in range(num_tokens)]
        self.num_blocks = (num_tokens - 1) // self.info.block_size  # one token at least is computed
        names = block_names(self.info.fingerprint, b"", pack_tokens(self._prompt), self.info.block_size)
        self._names = names[: 16 * self.num_blocks]
        self._ids = itertools.count()

    async def warm_up(self) -> None:
        """Compute another prompt: what happens once has happened."""
        await self._client.token_times_s(list(range(5, 5 + WARM_TOKENS // 8)) * 4, None, max_tokens=4)

    async def ask(self, tier: Tier | None) -> tuple[float, list[int]]:
        """Send the prompt, whose blocks lie in `tier`; return the seconds to its first token, and all tokens.

        Raises:
            RuntimeError: less than nearly all of it came from there.
        """
        held = () if tier is None else (HeldRun(0, self.num_blocks, (Copy(self._cache_address, tier),)),)
        begun_s = time.monotonic()
        times_s = await self._client.token_times_s(
            self._prompt,
            None,
            max_tokens=NUM_OUTPUT_TOKENS,
            held=held,
            kind="compute" if tier is None else "load",  # what is measured is loading, not whether it is worth it
            timeout_s=DEADLINE_S,
        )
        sources = self._client.sources
        assert sources is not None
        came = sources.computed if tier is None else getattr(sources, tier)
        if came < 0.95 * len(self._prompt):
            raise RuntimeError(f"{came} of {len(self._prompt)} tokens came from {tier or 'computing'}: {sources}")
        return times_s[0] - begun_s, list(self._client.token_ids)

    async def offloaded_s(self) -> float:
        """Wait until the prompt's blocks lie in host memory; return the seconds."""
        begun_s = time.monotonic()
        async with asyncio.timeout(DEADLINE_S):
            while (await self._cache.values())["kvray_cache_blocks_held"] < self.num_blocks:  # noqa: ASYNC110 - another process is asked
                await asyncio.sleep(0.05)
        return time.monotonic() - begun_s

    async def clear_device(self) -> None:
        """Drop what the worker's pool holds."""
        cursor: int | None = 0
        while cursor is not None:
            question = ClearBlocks(query_id=str(next(self._ids)), tier="device", is_dry_run=False, cursor=cursor)
            cursor = await self._next_cursor(self._client, question)

    async def move_to_disk(self) -> float:
        """Move the prompt's blocks from host memory to disk; return the seconds."""
        begun_s = time.monotonic()
        cursor: int | None = 0
        while cursor is not None:
            question = MoveBlocks(
                query_id=str(next(self._ids)), tier="host", target="disk", names=self._names, cursor=cursor
            )
            cursor = await self._next_cursor(self._cache, question)
        return time.monotonic() - begun_s

    async def _next_cursor(self, owner: DirectClient, question: ClearBlocks | MoveBlocks) -> int | None:
        done = await owner.answer(question)
        assert isinstance(done, PieceDone)
        return done.next_cursor


def drop_page_cache(directory: Path) -> None:
    """Have the kernel forget what it holds of the files there."""
    for path in directory.rglob("*.segment"):
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


async def measure(options: WorkerOptions, num_tokens: int, disk_dir: Path) -> dict[str, float]:
    """Measure the three ways, in seconds, and say what is done meanwhile."""
    secret = ClusterSecret.generate()
    begun_s = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - begun_s:7.1f} s  {what}", flush=True)

    with running_worker("decode", options, secret, script=(str(DRAWN_WORKER),)) as worker:
        client = DirectClient(secret, worker.info.address, CHANNEL)
        async with asyncio.timeout(60):
            while not any("cache" in line for line in worker.said):  # noqa: ASYNC110 - a thread hears it
                await asyncio.sleep(0.05)
        address = str(next(line["cache"] for line in worker.said if "cache" in line))
        cache = DirectClient(secret, address, CHANNEL)
        restore = Restore(worker, client, cache, address, num_tokens)
        await restore.warm_up()
        found = {"kv_bytes": float(restore.num_blocks * worker.info.block_bytes)}
        say(f"worker and node cache are up: {worker.info.kernel_path}")
        found["computed_s"], wanted = await restore.ask(None)
        say(f"computed in {found['computed_s']:.3f} s")
        found["offloaded_s"] = await restore.offloaded_s()
        say(f"in host memory {found['offloaded_s']:.3f} s later")
        for tier in ("host", "disk"):
            await restore.clear_device()
            if tier == "disk":
                found["moved_s"] = await restore.move_to_disk()
                say(f"moved to disk in {found['moved_s']:.3f} s")
                drop_page_cache(disk_dir)
            found[f"{tier}_s"], tokens = await restore.ask(tier)
            rate = found["kv_bytes"] / found[f"{tier}_s"] / 1e9
            say(f"restored from {tier} in {found[f'{tier}_s']:.3f} s: {rate:.2f} GB/s")
            if tokens != wanted:
                raise SystemExit(f"other tokens came with KV from {tier}: {tokens}, wanted {wanted}")
        client.close()
        cache.close()
    return found


def main() -> None:
    asked = parser(__doc__, "restore_gpu", quick="32 k tokens")
    asked.add_argument("--shape", choices=list(SHAPES), default="llama-8b")
    asked.add_argument("--disk-dir", type=Path, help="where the disk tier lies")
    asked.add_argument("--dry-run", action="store_true", help="the same code on this CPU, in tiny")
    args = asked.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device is there: nothing was measured")
        return
    shape = "llama-tiny" if args.dry_run else args.shape
    num_tokens = 2 * K if args.dry_run else (32 if args.quick else 128) * K
    print(f"{hardware()}; {shape}, {num_tokens} tokens")
    with tempfile.TemporaryDirectory(dir=args.disk_dir) as kept, tempfile.TemporaryDirectory() as directory:
        options = options_of(Path(directory), shape, num_tokens, Path(kept), is_dry=args.dry_run)
        found = asyncio.run(measure(options, num_tokens, Path(kept)))
    if args.dry_run:
        print("dry run: the same tokens from host memory and from disk")
        return
    device = torch.cuda.get_device_name()
    if args.record:
        record("restore_gpu", found, device=device, shape=shape, num_tokens=num_tokens)
    print(goal("from host memory, of computing", found["host_s"] / found["computed_s"], under=HOST_SHARE, unit="x"))
    print(goal("from disk, of computing", found["disk_s"] / found["computed_s"], under=DISK_SHARE, unit="x"))


if __name__ == "__main__":
    main()
