"""One client request below HTTP: its sequences, started together, taken as deltas, stopped together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import msgspec
from msgspec import UNSET

from cluster.openai.backend import Backend
from cluster.openai.metrics import HttpMetrics
from cluster.openai.replies import (
    CompletionTokensDetails,
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
from messages.stream import TokenChunk

logger = logging.getLogger(__name__)


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
        self._num_open = len(requests)
        self._is_running = False

    def start(
        self,
        on_delta: Callable[[int, Delta], None],
        on_end: Callable[[KvrayError | None], None],
        on_accepted: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin, once; `stop` has to follow, once. Both are called on the loop, perhaps before this returns.

        Args:
            on_delta: is told a choice's index and what it got.
            on_end: nothing follows: every choice has its finish_reason, or one was refused or failed, and with that
                error all are stopped. Not called once `stop` was.
            on_accepted: is called once a worker has taken all of them in, if they want word of it: before all others,
                unless there are several prompts.
        """
        self._on_delta, self._on_end, self._on_accepted = on_delta, on_end, on_accepted
        self._clock = self._metrics.clock(self.requests)
        self._began_s = time.perf_counter()
        self._is_running = True
        self._backend.start(self.requests, self._take)

    async def run(self, on_delta: Callable[[int, Delta], None]) -> None:
        """Begin, and wait until every choice has ended; instead of `start` and `stop`. Cancelled, it stops the work.

        Raises:
            KvrayError: a sequence was refused or failed.
        """
        has_ended = asyncio.Event()
        errors: list[KvrayError] = []

        def end(error: KvrayError | None) -> None:
            errors.extend([] if error is None else [error])
            has_ended.set()

        try:
            self.start(on_delta, end)
            await has_ended.wait()
        finally:
            self.stop()
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """Stop all work that still runs, and count the request as answered; nothing is told any more."""
        self._end("abandoned")
        self._clock.close()

    def _take(self, chunk: TokenChunk | None) -> None:
        if not self._is_running:
            return
        try:
            if chunk is None:
                self._miss()
            else:
                self._take_chunk(chunk)
        except KvrayError as error:
            self._fail(error)
        except Exception:  # of this request alone: whoever brought the chunk has others to serve
            logger.exception("an answer failed")
            self._fail(KvrayError("internal error"))

    def _take_chunk(self, chunk: TokenChunk) -> None:
        """Make a delta of a chunk: read path step 8."""
        if chunk.is_accepted:
            self._on_accepted()
            return
        index = self._index.get(chunk.request_id)
        if index is None or self.transcripts[index].is_finished:
            return
        if chunk.sources is not None:
            self._clock.first(index, chunk.sources, chunk.plan)
            self._ttft_s.setdefault(index, time.perf_counter() - self._began_s)
        delta = self.transcripts[index].take(chunk)
        self._clock.chunk(index, len(delta.token_ids))
        if delta.finish_reason is not None:
            self._num_open -= 1
            self._clock.finish(index, delta.finish_reason)
            if chunk.finish_reason is None and self._num_open:  # a stop string: only we know that it is over
                self._backend.cancel(chunk.request_id)
        self._on_delta(index, delta)
        if self._num_open == 0:
            self._end("")
            self._on_end(None)

    def _miss(self) -> None:
        raise WorkerError(
            f"{self._num_open} of {len(self.requests)} sequences ended without a last token", code="stream_ended"
        )

    def _fail(self, error: KvrayError) -> None:
        self._end("refused" if error.status < 500 else "error")
        self._on_end(error)

    def _end(self, reason: str) -> None:
        """Stop what still runs; choices that have no finish_reason count as ended for `reason`."""
        if self._is_running:
            self._is_running = False
            self._clock.end(reason)
            self._backend.leave(self.requests[0].request_id)

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
            completion_tokens_details=UNSET
            if self.transcripts[0].num_reasoning_tokens is None
            else CompletionTokensDetails(sum(t.num_reasoning_tokens or 0 for t in self.transcripts)),
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
