"""One request with many choices of a long prompt: the longest turn of an event loop, at its ingress and at its worker.

As a script it is the worker's process, as `harness.worker_process`, but that its steps compute nothing.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent))  # after it: files there are named like rooms

from cluster.dispatch import Dispatcher, DispatchOptions
from decode.worker import DecodeWorker
from engine.core import EngineOptions
from engine.scheduling.plan import Sampled, StepPlan, StepResult
from engine.worker import WorkerOptions
from harness import worker_process
from harness.models import model_directory
from harness.turn_loop import TurnLoop
from harness.worker_process import say
from harness.workers import WorkerProcess, running_worker
from kvcache.names import pack_tokens
from messages.request import GenerateRequest, SamplingParams
from messages.stream import TokenChunk
from transport.channel import ChannelConfig
from transport.opening import RoadOptions
from transport.secret import ClusterSecret


def choices_ms(num_choices: int, num_tokens: int) -> dict[str, float]:
    """Have a worker answer one request; return the longest turn of each loop, in ms."""
    secret = ClusterSecret.from_hex("5c" * 32)
    with running_worker("decode", _options(num_choices), secret, script=(__file__,)) as worker:
        with asyncio.Runner(loop_factory=TurnLoop) as runner:
            runner.run(_ask(worker, secret, num_choices, num_tokens))
            loop = runner.get_loop()
            assert isinstance(loop, TurnLoop)
        return {"worker's": worker.last_said("turn_ms"), "ingress'": loop.longest_ms}


async def _ask(worker: WorkerProcess, secret: ClusterSecret, num_choices: int, num_tokens: int) -> None:
    options = DispatchOptions(
        ingress_id="i", secret=secret, channel=ChannelConfig(), request_timeout_s=600.0, max_ttft_s=1e9
    )
    dispatcher = Dispatcher(options)
    dispatcher.set_workers("decode", [worker.info])
    prompt = pack_tokens([number % 251 for number in range(num_tokens)])
    await asyncio.sleep(0)
    num_given = 0
    requests = [
        GenerateRequest(
            request_id=f"r-{choice}",
            token_ids=prompt,
            num_prompt_tokens=num_tokens,
            params=SamplingParams(max_tokens=8, temperature=0.0, choice=choice),
        )
        for choice in range(num_choices)
    ]
    chunks: asyncio.Queue[TokenChunk | None] = asyncio.Queue()
    dispatcher.start(requests, chunks.put_nowait)
    while (chunk := await chunks.get()) is not None:
        assert chunk.error is None, chunk.error
        num_given += len(chunk.token_ids)
    assert num_given == 8 * num_choices
    dispatcher.close()


def _options(num_choices: int) -> WorkerOptions:
    return WorkerOptions(
        model_dir=str(model_directory("long")),
        dtype="bfloat16",
        device="cpu",
        max_model_len=None,
        num_threads=1,
        engine=EngineOptions(kv_cache_bytes=1 << 25, max_num_seqs=num_choices),
        use_kernels=True,
        channel=ChannelConfig(),
        lease_s=60.0,
        stall_s=10.0,
        roads=RoadOptions(names=("shm",)),
    )


def _compute_nothing(worker: DecodeWorker) -> DecodeWorker:
    """Have the worker's steps take in their plans, and give made-up tokens."""
    engine = worker._worker.engine

    class Idle(type(engine)):  # type: ignore[misc]  # the engine is slotted: its class is where a method can go
        __slots__ = ()

        def launch(self, plan: StepPlan) -> StepResult:
            self.runner._tables.take_in(plan)
            sampled = {part.seq_id: Sampled(7) for part in plan.parts if part.is_sampled}
            return StepResult(sampled=sampled, elapsed_s=0.01)

        def finish(self, step: StepResult) -> StepResult:
            return step

    engine.__class__ = Idle
    loop = asyncio.get_running_loop()
    assert isinstance(loop, TurnLoop)
    loop.call_soon(loop.watch, lambda turn_ms: say({"turn_ms": turn_ms}))  # in this turn the worker was made
    return worker


if __name__ == "__main__":
    # typed as the class that is made; a function that makes one does as well
    worker_process.WORKERS["decode"] = lambda *options: _compute_nothing(DecodeWorker(*options))  # type: ignore[assignment]
    with asyncio.Runner(loop_factory=TurnLoop) as runner:
        runner.run(worker_process.main())
