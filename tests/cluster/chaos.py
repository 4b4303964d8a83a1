"""Clients that go on asking while things are lost, and what is held against their answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import httpx

from tests.cluster.asking import Ask, mixed_asks
from tests.reference import Reference

#: Nothing is refused, however slow the machine is.
CONFIG = {"http": {"max_ttft_s": 600}}
NUM_CLIENTS = 8
NUM_ASKS = 40
HUNG_S = 90.0
PAUSE_S = 0.3  #: of a client that got an error


@dataclass
class Outcome:
    """What became of one request."""

    ask: Ask
    began_s: float
    ended_s: float = 0.0
    has_seen_token: bool = False
    token_ids: list[list[int]] | None = None  #: of each choice; None where it failed
    error: str = ""
    longest_pause_s: float = 0.0


@dataclass
class Verdict:
    """What is to be empty."""

    wrong: list[Outcome] = field(default_factory=list)
    hung: list[Outcome] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)  #: although nothing of theirs was lost


class Load:
    """Eight clients, each asking one thing after the other, whole and streamed."""

    def __init__(self, url: str, seed: str) -> None:
        self._url = url
        # Half of them streamed, and no longer than what fits between two faults.
        asks = [replace(ask, n=1) for ask in mixed_asks(NUM_ASKS, seed)]
        self._asks = [replace(ask, is_streamed=number % 2 == 0) for number, ask in enumerate(asks)]
        self._rng = random.Random(seed)
        self.outcomes: list[Outcome] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask for as long as the block lasts; what is under way then comes to its end."""
        stop = asyncio.Event()
        clients = [asyncio.create_task(self._client(stop)) for _ in range(NUM_CLIENTS)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*clients)

    async def _client(self, stop: asyncio.Event) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=HUNG_S) as http:
            model = None
            while not stop.is_set():
                outcome = Outcome(self._rng.choice(self._asks), time.monotonic())
                try:
                    async with asyncio.timeout(HUNG_S):
                        model = model or (await http.get("/v1/models")).json()["data"][0]["id"]
                        await self._ask(http, model, outcome)
                except TimeoutError:
                    outcome.error = "hung"
                except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                    outcome.error = f"{type(error).__name__}: {error}"
                outcome.ended_s = time.monotonic()
                self.outcomes.append(outcome)
                if outcome.error:
                    await asyncio.sleep(PAUSE_S)

    async def _ask(self, http: httpx.AsyncClient, model: str, outcome: Outcome) -> None:
        ask = outcome.ask
        body = {key: value for key, value in ask.body.items() if key != "extra_body"} | ask.body["extra_body"]
        body |= {"model": model, "stream": ask.is_streamed}
        if not ask.is_streamed:
            reply = await http.post("/v1/completions", json=body)
            if reply.status_code == httpx.codes.OK:
                outcome.token_ids = [choice["token_ids"] for choice in reply.json()["choices"]]
            else:
                outcome.error = f"{reply.status_code} {reply.text[:200]}"
            return
        token_ids: list[int] = []
        last_s = time.monotonic()
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != httpx.codes.OK:
                outcome.error = f"{reply.status_code} {(await reply.aread())[:200]!r}"
                return
            async for line in reply.aiter_lines():
                if not line.startswith("data: "):  # the end of an event, or a comment that keeps a silent one alive
                    continue
                now_s = time.monotonic()
                outcome.longest_pause_s = max(outcome.longest_pause_s, now_s - last_s)
                last_s = now_s
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    outcome.token_ids = [token_ids]
                else:
                    event = json.loads(data)
                    if "error" in event:
                        outcome.error = str(event["error"])
                        return
                    for choice in event["choices"]:
                        token_ids += choice["token_ids"]
                        outcome.has_seen_token = bool(token_ids)
        if outcome.token_ids is None:
            outcome.error = "the stream broke off"

    def verdict(self, reference: Reference, ingress_losses: Sequence[tuple[float, float]]) -> Verdict:
        """Hold each answer against plain transformers; `ingress_losses`: from when to when (monotonic) one was lost."""
        verdict = Verdict()
        known: dict[tuple[int, str], bool] = {}  # answers repeat
        for outcome in self.outcomes:
            if outcome.token_ids is not None:
                key = (id(outcome.ask), str(outcome.token_ids))
                if key not in known:
                    known[key] = outcome.token_ids == outcome.ask.expected(reference, outcome.token_ids)
                if not known[key]:
                    verdict.wrong.append(outcome)
            elif outcome.error == "hung":
                verdict.hung.append(outcome)
            elif not outcome.has_seen_token and not any(
                outcome.began_s <= until_s and since_s <= outcome.ended_s for since_s, until_s in ingress_losses
            ):
                verdict.failed.append(outcome)
        return verdict

    def summary(self) -> str:
        """What happened, in one line."""
        errors = [outcome for outcome in self.outcomes if outcome.error]
        pause_s = max((outcome.longest_pause_s for outcome in self.outcomes), default=0.0)
        slowest_s = max((outcome.ended_s - outcome.began_s for outcome in self.outcomes), default=0.0)
        return (
            f"{len(self.outcomes)} requests, {len(errors)} failed; longest pause of a stream {pause_s:.1f} s, "
            f"slowest request {slowest_s:.1f} s"
        )
