"""Asks a server over HTTP, each question within deadlines: what goes wrong is an outcome, never an exception.

aiohttp: an event costs the client 35 us of processor time, with httpx 104 or more (docs/LOG.md, 2026-11-29).
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from yarl import URL

from cluster.bench.answers import AnswerReader, Fault, refusal
from cluster.bench.figures import Outcome
from cluster.direct_http import is_loopback
from messages.errors import ConfigError

_CONNECT_S: Final = 10.0
_MAX_ERROR_BYTES: Final = 1 << 16
_MAX_MODELS_BYTES: Final = 1 << 22
#: A kept connection that is older may be closed by the server while the next request is on its way.
_KEPT_S: Final = 3.0
_NO_ANSWER: Final = (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long a server may take."""

    request_s: float = 600.0  #: from sending to the end of an answer
    silence_s: float = 60.0  #: between two bytes
    ready_s: float = 30.0  #: until it answers at all


@dataclass(frozen=True, slots=True)
class ServerModel:
    """A model that a server says it has."""

    name: str
    owner: str  #: what serves it, where it says so: kvray, vllm


@dataclass(frozen=True, slots=True)
class Answer:
    """An outcome, and the tokens of the answer as far as they are known."""

    outcome: Outcome
    token_ids: list[int]


class Sender:
    """Connections to one server. Used within one event loop, as an async context."""

    def __init__(self, url: str, api_key: str | None, deadlines: Deadlines) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._deadlines = deadlines
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Sender:
        deadlines = self._deadlines
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S),
            timeout=aiohttp.ClientTimeout(
                total=deadlines.request_s, sock_connect=_CONNECT_S, sock_read=deadlines.silence_s
            ),
            headers={**self._headers, "Accept-Encoding": "identity"},
            trust_env=not is_loopback(self.url),
            json_serialize=json.dumps,
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def models(self) -> list[ServerModel]:
        """Return the models there, once the server answers.

        Raises:
            ConfigError: it does not in time, or answers what is no list of models.
        """
        ends_s = time.monotonic() + self._deadlines.ready_s
        while True:
            try:
                return await self._models(max(0.1, ends_s - time.monotonic()))
            except _NO_ANSWER as error:
                if time.monotonic() >= ends_s:
                    waited = f"within {self._deadlines.ready_s:g} s (--ready-check-timeout-sec)"
                    raise ConfigError(f"nobody answers at {self.url} {waited}: {_reason(error)}") from None
                await asyncio.sleep(0.2)

    async def _models(self, timeout_s: float) -> list[ServerModel]:
        assert self._session is not None
        url = f"{self.url}/v1/models"
        async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=timeout_s)) as response:
            body = await _beginning(response, _MAX_MODELS_BYTES)
        if response.status in (401, 403):
            raise ConfigError(f"{url} answers HTTP {response.status}: wanted the right API key (--api-key-file)")
        if response.status != 200:
            raise ConfigError(
                f"{url} answers HTTP {response.status}: {refusal(body)[:200]}; no OpenAI-compatible server?"
            )
        try:
            return [ServerModel(str(row["id"]), str(row.get("owned_by", ""))) for row in json.loads(body)["data"]]
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = body[:100].decode(errors="replace")
            raise ConfigError(f"{url}: wanted a list of models, saw {shown!r}; no OpenAI-compatible server?") from None

    async def ask(
        self, path: str, body: dict[str, Any], *, num_sent_tokens: int, max_tokens: int, wants_all: bool
    ) -> Answer:
        """Ask, and read the answer to its end; whatever happens is told by the outcome."""
        assert self._session is not None
        data = json.dumps(body).encode()
        reader = AnswerReader(time.perf_counter(), num_sent_tokens, max_tokens, wants_all)
        try:
            await self._read(path, data, reader)
            outcome = reader.close(time.perf_counter())
        except Fault as fault:
            outcome = _failed(reader, fault)
        except _NO_ANSWER as error:
            outcome = _failed(reader, self._fault(error))
        return Answer(outcome, reader.token_ids)

    async def _read(self, path: str, data: bytes, reader: AnswerReader) -> None:
        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        async with self._session.post(
            URL(self.url + path), data=data, headers=headers, allow_redirects=False
        ) as response:
            if response.status != 200:
                said = await _beginning(response, _MAX_ERROR_BYTES)
                raise Fault(f"HTTP {response.status}", refusal(said))
            if response.content_type != "text/event-stream":
                said = await _beginning(response, _MAX_ERROR_BYTES)
                shown = said[:100].decode(errors="replace")
                raise Fault("no event stream", f"content type {response.content_type}: {shown}")
            async for part in response.content.iter_any():
                reader.feed(part, time.perf_counter())

    def _fault(self, error: Exception) -> Fault:
        match error:
            case aiohttp.SocketTimeoutError():
                return Fault("hung", f"nothing came for {self._deadlines.silence_s:g} s")
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return Fault("not reached", _reason(error))
            case aiohttp.ServerTimeoutError() | TimeoutError():
                return Fault("too slow", f"no end of the answer within {self._deadlines.request_s:g} s")
            case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError() | ConnectionError():
                return Fault("cut off", _reason(error))
            case aiohttp.ClientOSError():
                return Fault("cut off", _reason(error))
        return Fault("no HTTP", _reason(error))


async def _beginning(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    body = b""
    async for part in response.content.iter_any():
        body += part
        if len(body) >= max_bytes:
            break
    return body[:max_bytes]


def _failed(reader: AnswerReader, fault: Fault) -> Outcome:
    now_s = time.perf_counter()
    return Outcome(e2e_s=now_s - reader.began_s, fault=fault.kind, detail=fault.detail)


def _reason(error: Exception) -> str:
    """Say in one line what an exception of HTTP or sockets tells."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason}"
    os_error = getattr(error, "os_error", None)
    if os_error is not None and os_error.strerror:
        return str(os_error.strerror)
    return " ".join(str(error).split()) or type(error).__name__
