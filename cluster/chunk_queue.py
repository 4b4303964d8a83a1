"""What decode workers stream, on its way to one client: handed on at a pace that the ingress can keep."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence

import msgspec

from messages.stream import TokenChunk

_CORES_SHARE = 1 / 8  #: of the machine's cores, what one ingress may take, but no more than
_MAX_CORES = 0.5  #: of one, for Python does not use a second, and Serve's proxy needs as much
_MAX_SPACING_S = 0.05  #: nobody sees tokens come that are closer
_COUNTED = 256  #: hand-overs that the cost of one is taken from
_MIN_COST_S, _MAX_COST_S = 5e-5, 1e-3  #: of one; what an ingress does for new requests is in it too


class Pace:
    """How far apart one stream's hand-overs should be, so that all of an ingress's take a bounded share of a core."""

    def __init__(
        self,
        num_streams: Callable[[], int],
        cpu_s: Callable[[], float] = time.process_time,
        num_cores: int = os.cpu_count() or 1,
    ) -> None:
        """`num_streams`: that get tokens now; `cpu_s`: CPU time that this process has used."""
        self._num_streams = num_streams
        self._cpu_s = cpu_s
        self._cores = min(_MAX_CORES, _CORES_SHARE * num_cores)
        self._cost_s = _MIN_COST_S
        self._num_counted = 0
        self._since_s = cpu_s()

    def hand_over(self) -> float:
        """Counts one, and says how many seconds later the same stream's next may come."""
        self._num_counted += 1
        if self._num_counted == _COUNTED:
            now_s = self._cpu_s()
            self._cost_s = min(max((now_s - self._since_s) / _COUNTED, _MIN_COST_S), _MAX_COST_S)
            self._num_counted, self._since_s = 0, now_s
        return min(self._num_streams() * self._cost_s / self._cores, _MAX_SPACING_S)


class ChunkQueue:
    """The chunks of one client request. Belongs to one event loop.

    The first are handed on at once. Later ones keep the pace, and what came meanwhile is joined: a slow model's tokens
    are not held back, a fast one's for many streams reach their clients several at a time.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._chunks: list[TokenChunk] = []
        self._has_chunks = asyncio.Event()
        self._next_s = 0.0

    def put(self, chunk: TokenChunk) -> None:
        """Add what came."""
        self._chunks.append(chunk)
        self._has_chunks.set()

    async def get(self) -> list[TokenChunk]:
        """What is there, at least one chunk; those of one sequence are joined, but for a failure."""
        loop = asyncio.get_running_loop()
        await self._has_chunks.wait()
        if (pause_s := self._next_s - loop.time()) > 0:
            await asyncio.sleep(pause_s)
        self._next_s = loop.time() + self._pace.hand_over()
        chunks, self._chunks = self._chunks, []
        self._has_chunks.clear()
        return joined(chunks)


def joined(chunks: Sequence[TokenChunk]) -> list[TokenChunk]:
    """Those of one sequence made one; a failure stays apart, so that the tokens before it are given."""
    if len(chunks) == 1:
        return list(chunks)
    sequences: dict[str, list[TokenChunk]] = {}
    for chunk in chunks:
        sequences.setdefault(chunk.request_id, []).append(chunk)
    result: list[TokenChunk] = []
    for parts in sequences.values():
        num_good = sum(part.finish_reason not in ("error", "cancelled") for part in parts)  # a failure comes last
        if num_good:
            result.append(_one(parts[:num_good]))
        result += parts[num_good:]
    return result


def _one(parts: list[TokenChunk]) -> TokenChunk:
    first, last = parts[0], parts[-1]
    if first is last:
        return first
    return msgspec.structs.replace(
        first,  # with what only a first chunk has
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        logprobs=[logprob for part in parts for logprob in part.logprobs],
        stop_token_id=last.stop_token_id,
        finish_reason=last.finish_reason,
    )
