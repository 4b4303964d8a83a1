"""What compression of blocks gains and costs: bytes, and megabytes a second in and out of one thread.

    python benchmarks/compression.py               all kinds of numbers, blocks of 16, 64 and 1,024 tokens
    python benchmarks/compression.py --quick       bfloat16 only, within 60 s
    python benchmarks/compression.py --record      also append to benchmarks/results/compression.jsonl

The blocks are KV that the demo model computes of this repository's texts, in each kind of number. The ways:
    kvray         as the remote store writes and reads them (nodecache/codec.py), checked copy included
    bytes X       codec X of Arrow over the bytes as they are
    planes X      over byte 0 of each number, then byte 1, ...
    copy          a checked copy, nothing else: what is spent anyhow
Rates are of plain bytes, medians over interleaved rounds, by the processor time of the one thread.
`pays up to`: the rate of a medium at which reading plain takes as long as reading compressed, if one thread reads a
block, then decodes it; the store has eight, which read and decode beside each other.
Goals: what the store does leaves less than 0.75 of bfloat16's bytes, and, of all kinds of numbers in blocks of 16 and
64 tokens, less than the next best way; with bfloat16 it pays at a network's 100 MB/s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from harness.models import DEMO
from harness.report import ROOT, goal, hardware, parser, record
from transformers import AutoModelForCausalLM, AutoTokenizer

from nodecache.codec import decode, encode, lossless_codec
from transport.checksum import copy_checked

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: The last ones, with as many bytes as those of a model of some billions, are for the rates: V of the first layer, an
#: eighth of the demo model's KV, depends on the token alone, and so many tokens repeat.
BLOCK_SIZES = (16, 64, 1024)
NUM_TOKENS = 2048
NUM_ROUNDS = 9
CODECS = {"lz4": ("lz4_raw", None), "zstd 1": ("zstd", 1), "zstd 3": ("zstd", 3)}

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Way:
    """How blocks are made fewer and back."""

    compress: Callable[[Bytes], bytes | memoryview]
    restore: Callable[[memoryview], Bytes | memoryview]
    stored: list[memoryview] = field(default_factory=list)
    in_s: list[float] = field(default_factory=list)
    out_s: list[float] = field(default_factory=list)


def blocks_of(kind: str, block_size: int) -> list[Bytes]:
    """Blocks as `engine.memory.kv_pool` lays them out: for each layer K `[heads, tokens, dim]`, then V."""
    texts = "".join((ROOT / name).read_text() for name in ("README.md", "docs/ARCHITECTURE.md", "CONTRIBUTING.md"))
    token_ids = AutoTokenizer.from_pretrained(DEMO)(texts, verbose=False)["input_ids"][:NUM_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=DTYPES[kind])
    with torch.no_grad():
        layers = model.model(torch.tensor([token_ids]), use_cache=True).past_key_values.layers
    kv = [tensor[0] for layer in layers for tensor in (layer.keys, layer.values)]  # [heads, tokens, dim] each
    return [
        torch.cat([one[:, begin : begin + block_size].reshape(-1) for one in kv]).view(torch.uint8).numpy()
        for begin in range(0, len(token_ids) - block_size + 1, block_size)
    ]


def compressed_by(arrow: pa.Codec, plain: Bytes) -> memoryview:
    """Compress by Arrow. A memoryview of its answer itself would be as long as the longest answer there could be."""
    return np.frombuffer(arrow.compress(plain), np.uint8).data


def ways_of(element_bytes: int, block_bytes: int) -> dict[str, Way]:
    """All ways, for blocks of such numbers."""
    codec = lossless_codec(element_bytes)

    def compressed(plain: Bytes) -> memoryview:
        encoded = encode(codec, plain)
        return memoryview(plain if encoded is None else encoded)

    def restored(stored: memoryview) -> memoryview:
        plain = decode(codec, stored, block_bytes)
        assert plain is not None
        return plain

    ways = {"copy": Way(memoryview, lambda stored: stored), "kvray": Way(compressed, restored)}
    for name, (arrow_name, level) in CODECS.items():
        arrow = pa.Codec(arrow_name, level)
        ways[f"bytes {name}"] = Way(
            lambda plain, arrow=arrow: compressed_by(arrow, plain),
            lambda stored, arrow=arrow: memoryview(arrow.decompress(stored, block_bytes)),
        )
        ways[f"planes {name}"] = Way(
            lambda plain, arrow=arrow: compressed_by(arrow, np.ascontiguousarray(plain.reshape(-1, element_bytes).T)),
            lambda stored, arrow=arrow: np.ascontiguousarray(
                np.frombuffer(arrow.decompress(stored, block_bytes), np.uint8).reshape(element_bytes, -1).T
            ).reshape(-1),
        )
    return ways


def measure(blocks: list[Bytes], element_bytes: int) -> dict[str, dict[str, float]]:
    """By way: the share of bytes that is left, MB/s of plain bytes in and out."""
    block_bytes = len(blocks[0])
    plain_bytes = len(blocks) * block_bytes
    target = np.empty(block_bytes, np.uint8)
    ways = ways_of(element_bytes, block_bytes)
    for _ in range(NUM_ROUNDS):
        for way in ways.values():
            begin_s = time.thread_time()
            way.stored = []
            for block in blocks:
                copy_checked(target, block)
                way.stored.append(way.compress(target) if way is not ways["copy"] else memoryview(block))
            middle_s = time.thread_time()
            for stored in way.stored:
                copy_checked(target, way.restore(stored))
            way.in_s.append(middle_s - begin_s)
            way.out_s.append(time.thread_time() - middle_s)
            assert target.tobytes() == blocks[-1].tobytes()
    results = {}
    for name, way in ways.items():
        share = sum(len(stored) for stored in way.stored) / plain_bytes
        out_mb_s = plain_bytes / median(way.out_s) / 1e6
        results[name] = {
            "share": share,
            "in_mb_s": plain_bytes / median(way.in_s) / 1e6,
            "out_mb_s": out_mb_s,
            "pays_up_to_mb_s": (1 - share) * out_mb_s,
        }
    return results


def main() -> None:
    """Measure, print, record."""
    options = parser(__doc__, "compression", quick="bfloat16 only").parse_args()
    kinds = ("bfloat16",) if options.quick else tuple(DTYPES)
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    print(hardware())
    print(
        f"{'numbers':9} {'tokens':>6} {'KiB':>5}  {'way':14} "
        f"{'left':>6} {'in MB/s':>8} {'out MB/s':>9} {'pays up to':>11}"
    )
    for kind in kinds:
        for block_size in BLOCK_SIZES:
            blocks = blocks_of(kind, block_size)
            found = measure(blocks, DTYPES[kind].itemsize)
            results.setdefault(kind, {})[str(block_size)] = found
            for name, one in found.items():
                print(
                    f"{kind:9} {block_size:6} {len(blocks[0]) / 1024:5.0f}  {name:14} {one['share']:6.3f} "
                    f"{one['in_mb_s']:8,.0f} {one['out_mb_s']:9,.0f} {one['pays_up_to_mb_s']:11,.0f}"
                )
    if options.record:
        record("compression", results)
    bfloat16 = results["bfloat16"]
    shares = [found["kvray"]["share"] for found in bfloat16.values()]
    margins = [
        min(way["share"] for name, way in found.items() if name != "kvray") - found["kvray"]["share"]
        for by_size in results.values()
        for found in (by_size[str(block_size)] for block_size in BLOCK_SIZES[:2])
    ]
    rates = [found["kvray"]["pays_up_to_mb_s"] for found in bfloat16.values()]
    print(goal("bytes left of bfloat16", max(shares), under=0.75))
    print(goal("share of bytes less than the next best way leaves", min(margins), at_least=0.01))
    print(goal("rate up to which it pays to read bfloat16 compressed", min(rates), at_least=100, unit=" MB/s"))


if __name__ == "__main__":
    main()
