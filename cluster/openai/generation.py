"""One client request below HTTP: its sequences, started together, read as deltas, closed together."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from msgspec import UNSET

from cluster.openai.backend import Backend
from cluster.openai.metrics import HttpMetrics, RequestClock
from cluster.openai.replies import (
    KvrayExtras,
    PlannedLoad,
    PromptPlanReply,
    PromptSourceCounts,
    PromptTokensDetails,
    Usage,
)
from cluster.openai.transcript import Delta, Transcript
from messages.errors import KvrayError, WorkerError
from messages.request import GenerateRequest


class Generation:
    """The sequences of one request and what they have given so far.

    `transcripts` go with `requests`, one each. Choices of the same prompt are neighbours, `num_choices` of them.
    """

    def __init__(
        self,
        backend: Backend,
        metrics: HttpMetrics,
        requests: Sequence[GenerateRequest],
        transcripts: Sequence[Transcript],
        num_choices: int,
    ) -> None:
        self.requests = requests
        self.transcripts = transcripts
        self.num_choices = num_choices
        self._backend = backend
        self._metrics = metrics
        self._ttft_s: dict[int, float] = {}  # by choice index
        self._index = {request.request_id: index for index, request in enumerate(requests)}

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield (choice index, what it got) until every choice has its finish_reason. Closing it stops the work.

        Raises:
            KvrayError: a sequence was refused or failed; the others are stopped.
        """
        clock = RequestClock(self._metrics, len(self.requests))
        reason, began_s = "abandoned", time.perf_counter()
        try:
            async with aclosing(self._backend.generate(self.requests)) as chunks:
                num_open = len(self.requests)
                async for chunk in chunks:
                    index = self._index.get(chunk.request_id)
                    if index is None or self.transcripts[index].is_finished:
                        continue
                    if chunk.sources is not None:
                        clock.sources(chunk.sources)
                        self._ttft_s.setdefault(index, time.perf_counter() - began_s)
                    delta = self.transcripts[index].take(chunk)
                    clock.chunk(index, len(delta.token_ids))
                    if delta.finish_reason is not None:
                        num_open -= 1
                        clock.finish(delta.finish_reason)
                        if chunk.finish_reason is None and num_open:  # a stop string: only we know that it is over
                            self._backend.cancel(chunk.request_id)
                    yield index, delta
                    if num_open == 0:
                        return
            raise WorkerError(
                f"{num_open} of {len(self.requests)} sequences ended without a last token", code="stream_ended"
            )
        except KvrayError:
            reason = "error"
            raise
        finally:
            clock.end(reason)

    def usage(self) -> Usage:
        """Count the tokens so far. A prompt with several choices counts once, by its first choice."""
        prompt_tokens = sum(request.num_prompt_tokens for request in self.requests[:: self.num_choices])
        cached_tokens = sum(t.sources.cached for t in self.transcripts[:: self.num_choices] if t.sources is not None)
        completion_tokens = sum(transcript.num_tokens for transcript in self.transcripts)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens),
        )

    def extras(self) -> KvrayExtras:
        """Return where the prompts' tokens came from, counted as `usage` counts them."""
        sources = [t.sources for t in self.transcripts[:: self.num_choices] if t.sources is not None]
        told = [
            (index, transcript.plan)
            for index, transcript in enumerate(self.transcripts)
            if index % self.num_choices == 0 and transcript.plan is not None
        ]
        plans = [
            PromptPlanReply(
                ttft_s=round(self._ttft_s.get(index, 0.0), 6),
                predicted_ttft_s=plan.predicted_ttft_s,
                moved_bytes=plan.num_moved_bytes,
                predicted_load_s=plan.load_s,
                predicted_compute_s=plan.compute_s,
                is_mixed=plan.is_mixed,
                handed_over_by=plan.handed_over_by,
                loads=[PlannedLoad(*msgspec.structs.astuple(run)) for run in plan.runs],
            )
            for index, plan in told
        ]
        return KvrayExtras(
            plans=plans or UNSET,
            prompt_sources=PromptSourceCounts(
                device=sum(s.device for s in sources),
                host=sum(s.host for s in sources),
                peer=sum(s.peer for s in sources),
                disk=sum(s.disk for s in sources),
                remote=sum(s.remote for s in sources),
                computed=sum(s.computed for s in sources),
            ),
        )
