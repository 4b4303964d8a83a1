"""Real prefill and decode workers on one event loop, and a client that speaks to a decode worker as an ingress does."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import unittest.mock
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from decode.worker import DecodeWorker
from engine.core import EngineOptions
from engine.scheduling.plan import StepPlan
from engine.worker import FindCache, WorkerOptions
from kvcache.names import pack_tokens
from messages.fleet import GetStats, Stats, WorkerInfo
from messages.request import CancelRequest, Choice, GenerateRequest, HeldRun, SamplingParams
from messages.stream import PromptSources, TokenBatch, TokenChunk
from messages.wire import Message
from prefill.worker import PrefillWorker
from transport.channel import ChannelClient, ChannelConfig
from transport.opening import RoadOptions, open_roads
from transport.protocol import Transport
from transport.secret import ClusterSecret

SECRET = ClusterSecret(b"\x5a" * 32)
BLOCK_BYTES = 16384  #: of the tiny model, in float32
CHANNEL = ChannelConfig(heartbeat_s=0.1, lost_after_s=0.6)


def worker_options(model_dir: Path, **overrides: object) -> WorkerOptions:
    """Options of a worker for tests: float32, one thread, a small pool."""
    engine = {
        "kv_cache_bytes": 16 * 2**20,
        "max_num_seqs": 64,
        "remote_timeout_s": 5.0,
        **{key: overrides.pop(key) for key in list(overrides) if key in EngineOptions.__dataclass_fields__},
    }
    values: dict[str, object] = {
        "model_dir": str(model_dir),
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": None,
        "num_threads": 1,
        "engine": EngineOptions(**engine),
        "use_kernels": True,
        "channel": CHANNEL,
        "lease_s": 5.0,
        "stall_s": 2.0,
        "roads": RoadOptions(names=("shm",)),
        **overrides,
    }
    return WorkerOptions(**values)


@dataclass(slots=True)
class Answer:
    """What came for one request."""

    token_ids: list[int] = field(default_factory=list)
    sources: PromptSources | None = None
    num_accepted: int = 0  #: words of it that came before the first token
    last: TokenChunk | None = None
    is_done: asyncio.Event = field(default_factory=asyncio.Event)


class Ingress:
    """The ingress' side of a decode worker's channel."""

    def __init__(self, decode: WorkerInfo, prefill: WorkerInfo | None) -> None:
        self.prefill = prefill
        self.info = decode
        self.address = decode.address
        self.answers: dict[str, Answer] = {}
        self._stats: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        self.client = ChannelClient(SECRET, decode.address, self._take, lambda _reason: None, config=CHANNEL)

    def send(
        self,
        request_id: str,
        prompt: Sequence[int],
        generated: Sequence[int] = (),
        held: tuple[HeldRun, ...] | None = (),
        others: tuple[Choice, ...] = (),
        deadline_s: float | None = None,
        *,
        wants_word: bool = False,
        **params: object,
    ) -> Answer:
        """Begin a request, or go on after what was generated elsewhere; greedy and 16 tokens unless told otherwise."""
        values = {"max_tokens": 16, "temperature": 0.0, **params}
        prefill = self.prefill
        self.answers |= {asked: Answer() for asked in (request_id, *(other.request_id for other in others))}
        self.client.send(
            GenerateRequest(
                request_id=request_id,
                token_ids=pack_tokens([*prompt, *generated]),
                num_prompt_tokens=len(prompt),
                params=SamplingParams(**values),
                prefill_worker=None if prefill is None else prefill.worker_id,
                prefill_address=None if prefill is None else prefill.address,
                held=held,
                others=others,
                deadline_s=deadline_s,
                wants_word=wants_word,
            )
        )
        return self.answers[request_id]

    def cancel(self, request_id: str) -> None:
        self.client.send(CancelRequest(request_id=request_id))

    async def finish(self, *answers: Answer, timeout_s: float = 20.0) -> list[list[int]]:
        """The token ids of each, when all have ended well."""
        await asyncio.wait_for(asyncio.gather(*(answer.is_done.wait() for answer in answers)), timeout_s)
        for answer in answers:
            assert answer.last is not None
            assert answer.last.error is None, answer.last.error
        return [answer.token_ids for answer in answers]

    async def stats(self) -> dict[str, float]:
        """The decode worker's numbers."""
        self._stats = asyncio.get_running_loop().create_future()
        self.client.send(GetStats(query_id="test"))
        return (await asyncio.wait_for(self._stats, 5)).values

    def _take(self, message: Message) -> None:
        if isinstance(message, Stats):
            self._stats.set_result(message)
            return
        assert isinstance(message, TokenBatch), message
        for chunk in message.chunks:
            answer = self.answers[chunk.request_id]
            assert not answer.is_done.is_set(), f"a chunk after the last one: {chunk}"
            if chunk.is_accepted:
                assert not answer.token_ids
                answer.num_accepted += 1
            answer.token_ids += chunk.token_ids
            answer.sources = chunk.sources or answer.sources
            if chunk.finish_reason is not None:
                answer.last = chunk
                answer.is_done.set()


@dataclass(slots=True)
class Pair:
    """A prefill and a decode worker, and an ingress in front of them."""

    prefill: PrefillWorker
    decode: DecodeWorker
    ingress: Ingress

    async def idle(self, timeout_s: float = 5.0) -> None:
        """Wait until no block is pinned anywhere, then check the invariants of both."""
        ends_s = asyncio.get_running_loop().time() + timeout_s
        engines = [engine_of(self.prefill), engine_of(self.decode)]
        while any(engine.pool.num_used or engine.pool.num_quarantined for engine in engines):
            assert asyncio.get_running_loop().time() < ends_s, [engine.pool.num_used for engine in engines]
            for engine in engines:
                engine.pool.release_quarantined(time.monotonic())
            await asyncio.sleep(0.02)
        for worker in (self.prefill, self.decode):
            engine = engine_of(worker)
            engine.scheduler.check_invariants()
            engine.pool.check_invariants()
            worker._book.check_invariants(engine.scheduler.seq_ids())
            borrower_of(worker)._book.check_invariants(engine.scheduler.seq_ids())


def borrower_of(worker: PrefillWorker | DecodeWorker):
    return worker._worker.borrower


def peers_of(worker: PrefillWorker | DecodeWorker):
    return borrower_of(worker).peers


def engine_of(worker: PrefillWorker | DecodeWorker):
    return worker._worker.engine


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    """Draw prompts of these lengths, of tokens that the tiny model has."""
    rng = random.Random(seed)
    return [[rng.randrange(5, 250) for _ in range(length)] for length in lengths]


async def until(holds: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait for what nobody tells."""
    ends_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_s, "it did not come to pass in time"
        await asyncio.sleep(0.002)


class Steps:
    """The steps of a worker: which sequences they compute, with a gate before the forward pass."""

    def __init__(self, worker: PrefillWorker | DecodeWorker) -> None:
        driver = worker._worker.driver
        self._launch = driver._launch
        self._gate = threading.Event()
        self._gate.set()
        self._held_id: str | None = None
        self._num_let_pass = 0
        self.begun: list[StepPlan] = []
        driver._launch = self._launch_when_open

    def hold(self, seq_id: str, *, after: int) -> None:
        """Let `after` steps pass that compute `seq_id`, and hold the next one in its middle."""
        self._held_id, self._num_let_pass = seq_id, after

    @property
    def is_holding(self) -> bool:
        """A step is being held."""
        return not self._gate.is_set()

    def go_on(self) -> None:
        """Hold no step any more."""
        self._held_id = None
        self._gate.set()

    def num_of(self, seq_id: str) -> int:
        """Steps begun so far that compute it."""
        return sum(any(part.seq_id == seq_id for part in plan.parts) for plan in self.begun)

    def _launch_when_open(self, plan: StepPlan) -> object:
        """On the engine's thread."""
        self.begun.append(plan)
        held_id = self._held_id
        if held_id is not None and any(part.seq_id == held_id for part in plan.parts):
            if self._num_let_pass == 0:
                self._gate.clear()
                assert self._gate.wait(20)
            self._num_let_pass -= 1
        return self._launch(plan)


def taken_in(worker: PrefillWorker | DecodeWorker, kind: type[Message]) -> asyncio.Event:
    """Set when the worker has done what it does about a message of that kind."""
    event, on_message = asyncio.Event(), worker.on_message

    def on_message_then_tell(sender: bytes, message: Message) -> None:
        on_message(sender, message)
        if isinstance(message, kind):
            event.set()

    worker.on_message = on_message_then_tell
    return event


@asynccontextmanager
async def running_pair(
    prefill_options: WorkerOptions,
    decode_options: WorkerOptions,
    fake_roads: Callable[[], list[Transport]] | None = None,
) -> AsyncIterator[Pair]:
    """Both workers started on the running loop; at the end nothing may be pinned.

    `fake_roads` makes the roads of each worker, prefill's first, in the stead of real ones.
    """
    crashes: list[BaseException] = []
    opened = open_roads if fake_roads is None else lambda *_: fake_roads()
    with unittest.mock.patch("engine.worker.open_roads", opened):
        prefill = PrefillWorker("prefill-1", "127.0.0.1", prefill_options, SECRET, crashes.append)
        decode = DecodeWorker("decode-1", "127.0.0.1", decode_options, SECRET, crashes.append)
    prefill_info, decode_info = await prefill.start(), await decode.start()
    pair = Pair(prefill, decode, Ingress(decode_info, prefill_info))
    try:
        yield pair
        await pair.idle()
    finally:
        pair.ingress.client.close()
        await decode.close()
        await prefill.close()
    assert not crashes


@asynccontextmanager
async def running_decode(
    options: WorkerOptions, find_cache: FindCache | None = None, worker_id: str = "decode"
) -> AsyncIterator[tuple[DecodeWorker, Ingress]]:
    """A decode worker on the running loop, and an ingress in front of it that knows no prefill worker."""
    crashes: list[BaseException] = []
    decode = DecodeWorker(worker_id, "127.0.0.1", options, SECRET, crashes.append, find_cache=find_cache)
    ingress = Ingress(await decode.start(), None)
    try:
        yield decode, ingress
    finally:
        ingress.client.close()
        await decode.close()
    assert not crashes
