"""Requests of all kinds over HTTP, each with what plain transformers would answer."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from functools import cached_property

import httpx
import openai

from messages.request import SamplingParams
from tests.reference import Reference


@dataclass(frozen=True)
class Ask:
    """One request and what plain transformers would answer."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    extra: dict = field(default_factory=dict)
    is_streamed: bool = False

    @cached_property
    def body(self) -> dict:
        extra = {"return_token_ids": True, "ignore_eos": True, **self.extra}
        if self.stop_token_ids:
            extra["stop_token_ids"] = list(self.stop_token_ids)
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "n": self.n,
            "extra_body": extra,
        }

    def expected(self, reference: Reference, answer: list[list[int]]) -> list[list[int]]:
        """What it must be; `answer` tells which way rounding went where it decides a draw."""
        params = {key: value for key, value in self.extra.items() if key in SamplingParams.__struct_fields__}
        return [
            reference.generate(
                self.prompt,
                SamplingParams(
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                    seed=self.seed,
                    choice=choice,
                    stop_token_ids=self.stop_token_ids,
                    **params,
                ),
                like,
            )
            for choice, like in zip(range(self.n), answer, strict=True)
        ]


def mixed_asks(count: int, seed: int | str) -> list[Ask]:
    """Lengths 1 to 4,000, shared prefixes, n, seeds, stops, penalties, every third streamed; the same for a seed."""
    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(5, 250) for _ in range(length)]

    shared = [tokens(length) for length in (40, 256, 700, 1500, 3000)]
    asks = []
    for number in range(count):
        kind = rng.random()
        if kind < 0.5:
            prefix = rng.choice(shared)
            prompt = (
                prefix[: rng.randrange(1, len(prefix))]
                if rng.random() < 0.3
                else prefix + tokens(rng.randrange(1, 200))
            )
        else:
            prompt = tokens(
                rng.choice([1, 2, 15, 16, 17, 31, 64, 255, 256, 257, 511, 900, 1800, rng.randrange(1, 4000)])
            )
        asks.append(
            Ask(
                prompt=prompt,
                max_tokens=rng.choice([1, 2, 5, 16, 33, 60]),
                temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
                seed=rng.randrange(2**31),
                n=rng.choice([1, 1, 1, 3]),
                stop_token_ids=tuple(rng.sample(range(5, 250), 6)) if rng.random() < 0.25 else (),
                extra=rng.choice([{}, {}, {"top_k": 20}, {"top_p": 0.8}, {"repetition_penalty": 1.2}, {"min_p": 0.05}]),
                is_streamed=number % 3 == 0,
            )
        )
    return asks


async def ask_all(client, asks: list[Ask], concurrency: int = 24) -> list[list[list[int]] | Exception]:
    """Answers in order; an error in an answer's place."""
    gate = asyncio.Semaphore(concurrency)

    async def one(ask: Ask) -> list[list[int]] | Exception:
        async with gate:
            try:
                return await (streamed if ask.is_streamed else whole)(client, ask)
            except (openai.APIError, httpx.HTTPError) as error:
                return error

    return await asyncio.gather(*(one(ask) for ask in asks))


async def whole(client, ask: Ask) -> list[list[int]]:
    """The token ids of each choice of a reply."""
    reply = await client.completions.create(model=await model_name(client), **ask.body)
    return [choice.model_extra["token_ids"] for choice in reply.choices]


async def streamed(client, ask: Ask) -> list[list[int]]:
    """The token ids of each choice of a stream, which must end as a stream does."""
    stream = await client.completions.create(model=await model_name(client), stream=True, **ask.body)
    token_ids: list[list[int]] = [[] for _ in range(ask.n)]
    reasons: dict[int, str] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            assert choice.index not in reasons, "a chunk after the last one"
            token_ids[choice.index] += choice.model_extra["token_ids"]
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert len(reasons) == ask.n
    return token_ids


async def model_name(client, _names: dict[str, str] = {}) -> str:  # noqa: B006 - a cache
    key = str(client.base_url)
    if key not in _names:
        _names[key] = (await client.models.list()).data[0].id
    return _names[key]
