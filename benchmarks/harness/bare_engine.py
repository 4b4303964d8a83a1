"""The engine alone, in a process of its own, which the whole path is compared with.

`BareEngine` is the measuring side. This file run as a program is the other: options in its argument, one JSON request
per line on standard input, one JSON answer per line on standard output. Idle, it takes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from engine.cores import OMP_ENVIRONMENT
from harness.prompts import draw_prompts
from harness.report import ROOT


class BareRun(NamedTuple):
    """The times and tokens of a batch of prompts, all there at once."""

    first_token_s: float  #: from the first prompt's arrival to the first token of any
    elapsed_s: float  #: to the last token of all
    outputs: list[list[int]]  #: token ids


class BareEngine:
    """An engine as a worker would build it, with the defaults of `kvray serve`. Closed at the end of a `with`."""

    def __init__(self, model_dir: Path, *, num_threads: int, kv_cache_bytes: int) -> None:
        """Start loading; the first `run` waits for it."""
        options = {"model_dir": str(model_dir), "num_threads": num_threads, "kv_cache_bytes": kv_cache_bytes}
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", **OMP_ENVIRONMENT},
        )

    def __enter__(self) -> BareEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, seed: int, num: int, num_tokens: int, vocab_size: int, *, max_tokens: int) -> BareRun:
        """Generate `max_tokens` tokens, greedily, for each of the prompts that `draw_prompts` gives. Blocks.

        Raises:
            RuntimeError: the engine's process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"draw": [seed, num, num_tokens, vocab_size], "max_tokens": max_tokens}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("["):
                return BareRun(*json.loads(line))
        raise RuntimeError("the bare engine ended")


def _serve() -> None:
    from cluster.config import EngineSection
    from engine.core import Engine, EngineOptions
    from engine.model.load import load_model

    job = json.loads(sys.argv[1])
    defaults = EngineSection()
    options = EngineOptions(
        block_size=defaults.block_size,
        kv_cache_bytes=job["kv_cache_bytes"],
        max_num_seqs=defaults.max_num_seqs,
        max_num_batched_tokens=defaults.max_num_batched_tokens,
        itl_target_s=defaults.itl_target_ms / 1000,
    )
    engine = Engine.build(load_model(Path(job["model_dir"]), num_threads=job["num_threads"]), options)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_run(engine, draw_prompts(*request["draw"]), request["max_tokens"])), flush=True)


def _run(engine: Any, prompts: list[list[int]], max_tokens: int) -> BareRun:
    from engine.scheduling.plan import SequenceAdded, SequenceSpec
    from messages.request import SamplingParams

    outputs: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    begin_s = time.perf_counter()
    first_token_s = 0.0
    for seq_id, prompt in zip(outputs, prompts, strict=True):
        spec = SequenceSpec(seq_id=seq_id, token_ids=prompt, num_prompt_tokens=len(prompt), params=params)
        engine.post(SequenceAdded(spec))
    while engine.has_work():
        for emitted in engine.step():
            outputs[emitted.seq_id] += emitted.token_ids
            first_token_s = first_token_s or time.perf_counter() - begin_s
    return BareRun(first_token_s, time.perf_counter() - begin_s, list(outputs.values()))


if __name__ == "__main__":
    _serve()
