"""A long prompt that a prefill worker holds, and a decode worker does not: what handing it over costs their loops.

As a script it is either worker's process, as `harness.worker_process`, but that its steps compute nothing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent))  # after it: files there are named like rooms

from decode.worker import DecodeWorker
from engine.core import EngineOptions
from engine.scheduling.plan import (
    BlocksReleased,
    EmitTokens,
    Event,
    Instruction,
    Sampled,
    SequenceAdded,
    StepPlan,
    StepResult,
)
from engine.worker import WorkerOptions
from harness import worker_process
from harness.direct import DirectClient
from harness.models import model_directory
from harness.turn_loop import TurnLoop
from harness.worker_process import say
from harness.workers import WorkerProcess, running_worker
from prefill.worker import PrefillWorker
from transport.channel import ChannelConfig
from transport.opening import RoadOptions
from transport.secret import ClusterSecret

_STEP_S = 0.02  #: until then whoever plans a step has done all that comes before it
_OVER_S = 0.3  #: after a request: released, told


def handed_over_ms(num_tokens: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Hand `repeats` prompts over; return by role the longest turn and all turns of its loop, in ms, for each.

    Counted is what comes after the last step at prefill, after the question to prefill at decode, until the blocks are
    given back: before that each has to hash the tokens, as for any prompt.
    """
    secret = ClusterSecret.from_hex("5c" * 32)
    options = _options(num_tokens, repeats + 1)
    with (
        running_worker("prefill", options, secret, script=(__file__,)) as prefill,
        running_worker("decode", options, secret, script=(__file__,)) as decode,
    ):
        return asyncio.run(_hand_over(prefill, decode, secret, num_tokens, repeats))


async def _hand_over(
    prefill: WorkerProcess, decode: WorkerProcess, secret: ClusterSecret, num_tokens: int, repeats: int
) -> dict[str, list[dict[str, float]]]:
    holder, asker = DirectClient(secret, prefill.info.address), DirectClient(secret, decode.info.address)
    figures: dict[str, list[dict[str, float]]] = {"prefill": [], "decode": []}
    for repeat in range(repeats + 1):  # the first one connects
        prompt = [(number * (repeat + 1)) % 251 for number in range(num_tokens)]
        await holder.hold(prompt)
        await asyncio.sleep(_OVER_S)
        await asker.token_times_s(prompt, prefill.info.address, max_tokens=2)
        assert asker.sources is not None
        assert asker.sources.peer == num_tokens // 16 * 16, f"not handed over: {asker.sources}"
        await asyncio.sleep(_OVER_S)
        for worker in (prefill, decode) if repeat else ():
            figures[worker.info.role].append({name: worker.last_said(name) for name in ("longest", "all")})
    holder.close()
    asker.close()
    return figures


def _options(num_tokens: int, num_prompts: int) -> WorkerOptions:
    num_bytes = num_prompts * (num_tokens + 1024) * 64  # of keys and values of a token of the model
    return WorkerOptions(
        model_dir=str(model_directory("long")),
        dtype="bfloat16",
        device="cpu",
        max_model_len=None,
        num_threads=1,
        engine=EngineOptions(kv_cache_bytes=num_bytes, max_num_seqs=8),
        use_kernels=True,
        channel=ChannelConfig(),
        lease_s=60.0,
        stall_s=10.0,
        roads=RoadOptions(names=("shm",)),
    )


def _compute_nothing(worker: PrefillWorker | DecodeWorker) -> PrefillWorker | DecodeWorker:
    """Have the worker's steps take in their plans and hash what is published, and say what its turns took."""
    engine, loop = worker._worker.engine, asyncio.get_running_loop()
    assert isinstance(loop, TurnLoop)

    def end() -> None:
        say({"longest": loop.longest_ms, "all": loop.total_ms})

    class Idle(type(engine)):  # type: ignore[misc]  # the engine is slotted: its class is where a method can go
        __slots__ = ()

        def decide(self, event: Event, now_s: float | None = None) -> list[Instruction]:
            if isinstance(event, SequenceAdded) and isinstance(worker, DecodeWorker):
                loop.call_soon(loop.watch)
            wanted = super().decide(event, now_s)
            has_ended = any(isinstance(item, EmitTokens) and item.finish_reason for item in wanted)
            if isinstance(event, BlocksReleased) or (has_ended and isinstance(worker, DecodeWorker)):
                loop.call_soon(end)
            return wanted

        def launch(self, plan: StepPlan) -> StepResult:
            self.runner._tables.take_in(plan)
            if kept := self._kept_blocks(plan, ()):
                self.checksums.launched(kept)
                loop.call_soon_threadsafe(loop.watch)
            time.sleep(_STEP_S)
            sampled = {part.seq_id: Sampled(7) for part in plan.parts if part.is_sampled}
            return StepResult(sampled=sampled, elapsed_s=0.01)

        def finish(self, step: StepResult) -> StepResult:
            self.checksums.finished()
            return step

    engine.__class__ = Idle
    return worker


if __name__ == "__main__":
    # typed as the class that is made; a function that makes one does as well
    worker_process.WORKERS["prefill"] = lambda *options: _compute_nothing(PrefillWorker(*options))  # type: ignore[assignment]
    worker_process.WORKERS["decode"] = lambda *options: _compute_nothing(DecodeWorker(*options))  # type: ignore[assignment]
    with asyncio.Runner(loop_factory=TurnLoop) as runner:
        runner.run(worker_process.main())
