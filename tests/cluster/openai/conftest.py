"""A real HTTP server over a backend that speaks from a script, and a byte-level tokenizer made on the spot."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec
import openai
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cluster.openai.app import create_app
from cluster.openai.backend import HttpLimits, Readiness, ServedModel
from cluster.openai.exposition import Family
from messages.errors import KvrayError
from messages.request import GenerateRequest
from messages.stream import PromptSources, TokenChunk, TokenLogprob
from tests.cluster.openai.brief_server import BriefServer
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer

SPECIAL = ("<|end|>", "<|bos|>", "[TOOL_CALLS]", "<|python_tag|>", "<|other|>")
HERMES_TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
Script = Callable[[GenerateRequest], list[TokenChunk]]


def make_tokenizer(template: str = HERMES_TEMPLATE, special_tokens: Sequence[str] = SPECIAL) -> Tokenizer:
    """One token per byte, then the special ones, of which the first ends an output."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special_tokens))
    special = {"eos_token": special_tokens[0], "bos_token": "<|bos|>"}
    return Tokenizer(backend, special, {"default": ChatTemplate(template, special)})


@dataclass
class FakeBackend:
    """Speaks from `script`; a chunk may be preceded by `delay_s`. Can refuse, fail, stall, and remembers all."""

    tokenizer: Tokenizer
    script: Script = field(init=False)
    refusal: KvrayError | None = None
    delay_s: float = 0.0
    requests: list[GenerateRequest] = field(default_factory=list)
    speaking: dict[str, asyncio.Task[None]] = field(default_factory=dict)  #: by client request
    cancelled: list[str] = field(default_factory=list)
    accepts: bool = False  #: says so at once, where word of it is wanted
    num_active: int = 0
    num_closed_early: int = 0
    is_ready: bool = True

    def __post_init__(self) -> None:
        self.says("Hello, world")

    @property
    def eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        assert eos is not None
        return eos

    def says(self, text: str, *, per_chunk: int = 1, ends: bool = True) -> None:
        """Answer everything with `text`, then the end token (or run into max_tokens)."""
        self.script = lambda request: self.spoken(request, text, per_chunk=per_chunk, ends=ends)

    def spoken(self, request: GenerateRequest, text: str, *, per_chunk: int = 1, ends: bool = True) -> list[TokenChunk]:
        ids = self.tokenizer.encode(text, add_special_tokens=False) + ([self.eos] if ends else [])
        ids = ids[: request.params.max_tokens]
        chunks = [
            TokenChunk(request_id=request.request_id, token_ids=ids[i : i + per_chunk])
            for i in range(0, len(ids), per_chunk)
        ]
        if request.params.logprobs is not None:
            chunks = [
                msgspec.structs.replace(c, logprobs=[self.logprob(request, i) for i in c.token_ids]) for c in chunks
            ]
        first = msgspec.structs.replace(
            chunks[0],
            sources=sources(request.num_prompt_tokens),
            prompt_logprobs=None
            if request.params.prompt_logprobs is None
            else [None, *[self.logprob(request, i) for i in prompt_ids(request)[1:]]],
        )
        chunks[0] = first
        has_stopped = ids[-1] in request.params.stop_token_ids
        chunks[-1] = msgspec.structs.replace(
            chunks[-1],
            finish_reason="stop" if has_stopped else "length",
            stop_token_id=ids[-1] if has_stopped else None,
        )
        return chunks

    def logprob(self, request: GenerateRequest, token_id: int) -> TokenLogprob:
        num_top = max(request.params.logprobs or 0, request.params.prompt_logprobs or 0)
        top = tuple(((token_id + k) % 256, -0.5 - k) for k in range(num_top))
        return TokenLogprob(token_id, -0.5, 1, top)

    def start(self, requests: Sequence[GenerateRequest], take: Callable[[TokenChunk | None], None]) -> None:
        self.requests += requests
        if self.refusal is not None:
            for request in requests:
                take(TokenChunk(request_id=request.request_id, finish_reason="error", error=self.refusal.info()))
            take(None)
            return
        queues = [self.script(request) for request in requests]
        self.num_active += 1
        speaking = asyncio.ensure_future(self._speak(queues, take))
        self.speaking[requests[0].request_id] = speaking
        if self.accepts and requests[0].wants_word:
            take(TokenChunk(request_id=requests[0].request_id, is_accepted=True))
        speaking.add_done_callback(self._close)

    def leave(self, request_id: str) -> None:
        if request_id in self.speaking:
            self.speaking.pop(request_id).cancel()

    async def _speak(self, queues: list[list[TokenChunk]], take: Callable[[TokenChunk | None], None]) -> None:
        while any(queues):
            for queue in queues:
                if queue:
                    await asyncio.sleep(self.delay_s)
                    chunk = queue.pop(0)
                    if chunk.request_id not in self.cancelled:
                        take(chunk)
        take(None)

    def _close(self, spoken: asyncio.Task[None]) -> None:
        self.num_active -= 1
        self.num_closed_early += spoken.cancelled()
        if not spoken.cancelled():
            spoken.result()

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    async def ready(self) -> Readiness:
        return Readiness(self.is_ready, {"decode_workers": 2})

    async def metrics(self) -> list[Family]:
        fake = Family("kvray_fake", "gauge", "Nothing", ["kvray_fake 1.0\n"])
        line = 'kvray_prompt_tokens_total{worker="d1",source="peer"} 2.0\n'
        return [fake, Family("kvray_prompt_tokens_total", "counter", "Another text", [line])]


def sources(num_tokens: int) -> PromptSources:
    """One token from the device, the next two from a peer, the others computed."""
    peer = min(2, num_tokens - 1)
    return PromptSources(device=1, peer=peer, computed=num_tokens - 1 - peer)


def prompt_ids(request: GenerateRequest) -> list[int]:
    return list(struct.unpack(f"<{len(request.token_ids) // 4}I", request.token_ids))


@dataclass
class Server:
    """A running server and what is behind it."""

    url: str
    backend: FakeBackend
    tokenizer: Tokenizer
    http: httpx.Client  #: one for all tests: making one takes 30 ms

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, api_key: str = "unused") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, http_client=self.http)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return self.http.post(self.url + path, json=body, headers=headers)

    def prompt(self, index: int = -1) -> str:
        """The text that the backend was asked to continue."""
        return self.tokenizer.decode(prompt_ids(self.backend.requests[index]), skip_special_tokens=False)

    def wait_idle(self) -> None:
        """Fails unless the backend's work ends soon."""
        deadline_s = time.monotonic() + 2
        while self.backend.num_active:
            assert time.monotonic() < deadline_s, "the backend still works"
            time.sleep(0.005)


def served(tokenizer: Tokenizer, **changes: object) -> ServedModel:
    facts: dict[str, object] = {
        "names": ("tiny", "alias"),
        "max_model_len": 512,
        "max_prompt_tokens": 500,
        "vocab_size": 264,
        "eos_token_ids": (tokenizer.eos_token_id,),
        "created_s": 1_700_000_000,
    }
    return ServedModel(**{**facts, **changes})  # type: ignore[arg-type]


class _Running:
    def __init__(self, http: httpx.Client, backend: FakeBackend, **settings: object) -> None:
        model = settings.pop("model", None) or served(backend.tokenizer)
        limits = settings.pop("limits", None) or HttpLimits(max_body_bytes=64 * 1024, max_choices=8, max_sequences=16)
        app = create_app(backend, model, backend.tokenizer, version="1.2.3", limits=limits, **settings)  # type: ignore[arg-type]
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.uvicorn = BriefServer(app)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.005)
        port = self.socket.getsockname()[1]
        self.server = Server(f"http://127.0.0.1:{port}", backend, backend.tokenizer, http)

    def stop(self) -> None:
        self.uvicorn.end()
        self.thread.join(5)
        self.socket.close()
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def backend(tokenizer: Tokenizer) -> FakeBackend:
    return FakeBackend(tokenizer)


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=10) as client:
        yield client


@pytest.fixture(scope="session")
def _shared(http: httpx.Client) -> Iterator[_Running]:
    running = _Running(http, FakeBackend(make_tokenizer()))
    yield running
    running.stop()


@pytest.fixture
def server(_shared: _Running) -> Iterator[Server]:
    """The common server with its backend as new; nothing may be running in it afterwards."""
    backend = _shared.server.backend
    backend.__init__(backend.tokenizer)  # type: ignore[misc]
    yield _shared.server
    _shared.server.wait_idle()


@pytest.fixture
def serve(http: httpx.Client) -> Iterator[Callable[..., Server]]:
    """A server of its own: serve(template, special_tokens, tokenizer=one of its own, **settings of create_app)."""
    started: list[_Running] = []

    def start(template: str = HERMES_TEMPLATE, special_tokens: Sequence[str] = SPECIAL, **settings: object) -> Server:
        own = settings.pop("tokenizer", None)
        tokenizer = own if isinstance(own, Tokenizer) else make_tokenizer(template, special_tokens)
        started.append(_Running(http, FakeBackend(tokenizer), **settings))
        return started[-1].server

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def served_model() -> Callable[..., ServedModel]:
    return lambda tokenizer=None, **changes: served(tokenizer or make_tokenizer(), **changes)
