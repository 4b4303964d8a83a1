"""A prefill or decode worker as a process of its own, without Ray: for benchmarks and tests that need real processes.

    python benchmarks/harness/worker_process.py < job.json

One JSON line comes in: {"role": "prefill", "worker_id": ..., "host": ..., "options": engine.worker.WorkerOptions,
"secret": 64 hexadecimal digits}. Out comes one line with its WorkerInfo, then, with "is_traced", one for each step that
ends a prompt: when it ended (seconds of the machine's monotonic clock). It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from decode.worker import DecodeWorker
from engine.core import EngineStep
from engine.scheduling.plan import StepResult
from engine.worker import WorkerOptions
from prefill.worker import PrefillWorker
from transport.secret import ClusterSecret

WORKERS: dict[str, type[PrefillWorker | DecodeWorker]] = {"prefill": PrefillWorker, "decode": DecodeWorker}


def say(document: Any) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def trace_prompts(worker: PrefillWorker | DecodeWorker) -> None:
    """Let `worker` say when each step ended that computed the last of a prompt."""
    engine = worker._worker.engine
    finish = engine.finish

    class Traced(type(engine)):  # type: ignore[misc]  # the engine is slotted: its class is where a method can go
        __slots__ = ()

        def finish(self, step: EngineStep) -> StepResult:
            result = finish(step)
            if any(part.kind == "prefill" and part.is_sampled for part in step.plan.parts):
                say({"prompt_ended_s": time.monotonic()})
            return result

    engine.__class__ = Traced


async def main() -> None:
    job = json.loads(sys.stdin.readline())
    options = msgspec.convert(job["options"], WorkerOptions)
    secret = ClusterSecret.from_hex(job["secret"])
    worker = WORKERS[job["role"]](job["worker_id"], job["host"], options, secret, lambda _error: os._exit(70))
    if job.get("is_traced"):
        trace_prompts(worker)
    info = await worker.start()
    gc.collect()
    gc.freeze()  # as engine.actor
    say(msgspec.to_builtins(info))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await worker.close()
    gc.unfreeze()


if __name__ == "__main__":
    asyncio.run(main())
