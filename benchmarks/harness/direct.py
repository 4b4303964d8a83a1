"""Speaks to a decode worker as an ingress does, without HTTP, routing or Serve: what these cost is the difference."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence

from kvcache.names import pack_tokens
from messages.cache import BlocksFetched, BlocksListed, CacheAnswer, CacheQuestion, PieceDone
from messages.fleet import GetStats, Stats
from messages.handoff import KvHandoff, PrefillFailed, PrefillRequest, ReleaseLease
from messages.request import GenerateRequest, HeldRun, SamplingParams
from messages.stream import PromptSources, TokenBatch, TokenChunk
from messages.wire import Message
from transport.channel import ChannelClient, ChannelConfig
from transport.secret import ClusterSecret

_TIMEOUT_S = 60.0


class DirectClient:
    """One request at a time. Belongs to the loop it was made on."""

    _ids = itertools.count()  #: of all clients: a worker takes a request once

    def __init__(self, secret: ClusterSecret, address: str, config: ChannelConfig | None = None) -> None:
        self._inbox: asyncio.Queue[Message | str] = asyncio.Queue()  #: a string: why the worker was lost
        self._client = ChannelClient(
            secret, address, self._inbox.put_nowait, on_lost=self._inbox.put_nowait, config=config or ChannelConfig()
        )
        self.sources: PromptSources | None = None  #: of the last prompt
        self.token_ids: list[int] = []  #: of the last answer

    def close(self) -> None:
        """Close the channel."""
        self._client.close()

    async def round_trip_s(self) -> float:
        """Ask for the worker's numbers; return the seconds until the answer."""
        begin_s = time.perf_counter()
        await self.values()
        return time.perf_counter() - begin_s

    async def answer(self, question: CacheQuestion) -> CacheAnswer:
        """Ask the owner at the other end about its blocks; return the answer to one piece.

        Raises:
            RuntimeError: it failed.
            ConnectionError: the owner is gone.
        """
        self._client.send(question)
        while True:
            message = await self._next()
            if isinstance(message, BlocksListed | PieceDone | BlocksFetched) and message.query_id == question.query_id:
                if not isinstance(message, BlocksListed) and message.error is not None:
                    raise RuntimeError(message.error.message)
                return message

    async def values(self) -> dict[str, float]:
        """Return the worker's numbers by metric name, as they are now."""
        self._client.send(GetStats(query_id=str(next(self._ids))))
        while not isinstance(message := await self._next(), Stats):
            pass
        return message.values

    async def first_token_s(
        self,
        prompt: Sequence[int],
        prefill_address: str | None,
        *,
        held: tuple[HeldRun, ...] = (),
        kind: str = "direct",
        timeout_s: float = _TIMEOUT_S,
    ) -> float:
        """Return the seconds from sending a prompt to its first token, after the second and last one came.

        Arguments and errors as `token_times_s` has them.
        """
        begin_s = time.monotonic()
        times_s = await self.token_times_s(
            prompt, prefill_address, max_tokens=2, held=held, kind=kind, timeout_s=timeout_s
        )
        return times_s[0] - begin_s

    async def hold(self, prompt: Sequence[int]) -> None:
        """Have the prefill worker at the other end compute a prompt and keep its full blocks, which nobody pulls.

        Raises:
            RuntimeError: the worker refused the prompt.
            ConnectionError: the worker is gone.
        """
        request = GenerateRequest(
            request_id=f"direct-{next(self._ids)}",
            token_ids=pack_tokens(prompt),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(max_tokens=1, temperature=0.0),
        )
        self._client.send(PrefillRequest(request=request, num_held_tokens=len(prompt)))
        while True:
            match await self._next():
                case KvHandoff(is_last=True):
                    self._client.send(ReleaseLease(request_id=request.request_id))
                    return
                case PrefillFailed(error=error):
                    raise RuntimeError(error.message)
                case _:
                    pass

    async def token_times_s(
        self,
        prompt: Sequence[int],
        prefill_address: str | None,
        *,
        max_tokens: int,
        held: tuple[HeldRun, ...] = (),
        kind: str = "direct",
        salt: bytes = b"",
        timeout_s: float = _TIMEOUT_S,
    ) -> list[float]:
        """Send a prompt; return when each token came, on the machine's monotonic clock.

        `held`: where its blocks lie. `kind`: what the request's id begins with. `timeout_s`: until the next word.

        Raises:
            RuntimeError: the worker refused the prompt.
            ConnectionError: the worker is gone.
        """
        request = GenerateRequest(
            request_id=f"{kind}-{next(self._ids)}",
            token_ids=pack_tokens(prompt),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
            prefill_worker=None if prefill_address is None else "prefill",
            prefill_address=prefill_address,
            held=held,
            salt=salt,
        )
        self._client.send(request)
        self.sources, self.token_ids = None, []
        times_s: list[float] = []
        while True:
            chunk = await self._chunk(timeout_s)
            self.token_ids += chunk.token_ids
            times_s += [time.monotonic()] * len(chunk.token_ids)
            self.sources = chunk.sources or self.sources
            if chunk.error is not None:
                raise RuntimeError(chunk.error.message)
            if chunk.finish_reason is not None:
                return times_s

    async def _chunk(self, timeout_s: float) -> TokenChunk:
        while True:
            message = await self._next(timeout_s)
            if isinstance(message, TokenBatch):
                (chunk,) = message.chunks
                return chunk

    async def _next(self, timeout_s: float = _TIMEOUT_S) -> Message:
        message = await asyncio.wait_for(self._inbox.get(), timeout_s)
        if isinstance(message, str):
            raise ConnectionError(f"the decode worker was lost: {message}")
        return message
