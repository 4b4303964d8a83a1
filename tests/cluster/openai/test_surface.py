"""What every endpoint works with: texts are encoded where they hold nobody up."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from cluster.openai.backend import HttpLimits
from cluster.openai.callers import Callers
from cluster.openai.completions import start_completion
from cluster.openai.grammar_checks import GrammarChecks
from cluster.openai.metrics import HttpMetrics
from cluster.openai.protocol import CompletionRequest
from cluster.openai.surface import Surface
from messages.errors import RequestError
from tests.cluster.openai.conftest import FakeBackend
from text.tokenizer import Tokenizer


class Watched(Tokenizer):
    """Notes on which threads it encodes, and how many texts at once."""

    def __init__(self, backend):
        super().__init__(backend)
        self.threads: list[int] = []
        self.num_running = self.most_running = 0

    def encode(self, text, *, add_special_tokens=True, enough=None):
        self.threads.append(threading.get_ident())
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        ids = super().encode(text, add_special_tokens=add_special_tokens, enough=enough)
        self.num_running -= 1
        return ids


@pytest.fixture
def surface(served_model, tokenizer) -> Surface:
    model = served_model(tokenizer)
    return Surface(
        backend=FakeBackend(tokenizer),
        model=model,
        tokenizer=Watched(tokenizer.backend),
        grammars=GrammarChecks(model, tokenizer, HttpLimits()),
        limits=HttpLimits(),
        callers=Callers(),
        metrics=HttpMetrics(),
        tool_format=None,
        call_ids=frozenset(),
        thought_format=None,
        thought_ids=frozenset(),
    )


async def test_a_long_text_is_encoded_beside_the_event_loop_and_a_short_one_on_it(surface, tokenizer):
    for text in ("a" * 8191, "a" * 8192):
        ids = await surface.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
    here = threading.get_ident()
    assert [thread == here for thread in surface.tokenizer.threads] == [True, False]


@pytest.mark.slow
async def test_huge_texts_are_encoded_one_at_a_time(surface):
    await asyncio.gather(*(surface.encode("ab " * 2**17, add_special_tokens=False) for _ in range(3)))
    assert surface.tokenizer.most_running == 1


async def complete(surface: Surface, prompts: list[str]) -> None:
    await start_completion(surface, surface.callers.find(""), CompletionRequest(prompt=prompts), "r")


async def test_others_have_their_turn_between_many_short_prompts(surface):
    completing = asyncio.ensure_future(complete(surface, ["a" * 100] * 200))
    num_encoded = [0]
    while not completing.done():
        await asyncio.sleep(0)
        num_encoded.append(len(surface.tokenizer.threads))
    await completing
    assert num_encoded[-1] == 200
    assert max(after - before for before, after in itertools.pairwise(num_encoded)) == 1


async def test_more_prompts_than_a_request_may_have_are_refused_before_any_is_encoded(surface):
    with pytest.raises(RequestError, match="1025 prompts"):
        await complete(surface, ["a"] * 1025)
    assert surface.tokenizer.threads == []
