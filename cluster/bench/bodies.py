"""A turn as the body of a request; what a session's later turns go on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.bench.workload import Turn

PromptForm = Literal["ids", "text"]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = tuple(consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How turns are written for one server."""

    model: str
    path: str = COMPLETIONS
    form: PromptForm = "ids"
    ignores_eos: bool = True  #: answers are as long as they may be
    has_token_ids: bool = False  #: the server gives the token ids of an answer when it is asked to
    has_sources: bool = False  #: the server says where a prompt's KV came from: kvray
    extra: dict[str, Any] = field(default_factory=dict)  #: what every body has besides

    def body(self, turn: Turn, before: Sequence[int], salt: str) -> tuple[str, dict[str, Any]]:
        """Return where `turn` is posted, and what. `before`: tokens of the session, where it is appended to them."""
        if turn.body is not None:
            return turn.path or self.path, self._posted(turn, salt)
        prompt = [*before, *turn.tokens]
        return self.path, {"model": self.model, **self._prompt(prompt), **self._wishes(turn.max_tokens), **self.extra}

    def _posted(self, turn: Turn, salt: str) -> dict[str, Any]:
        """Return the body that a trace holds, streamed, asked of this model."""
        body = {**(turn.body or {}), "model": self.model, "stream": True}
        if turn.path != RESPONSES:
            body["stream_options"] = {"include_usage": True}
            if self.has_sources:
                # Each repeat begins with an empty cache; elsewhere the second finds what the first left.
                body = {"cache_salt": salt, **body, "return_prompt_sources": True}
        return {**body, **self.extra}

    def _prompt(self, prompt: list[int]) -> dict[str, Any]:
        if self.path == CHAT:
            return {"messages": [{"role": "user", "content": text_of(prompt)}]}
        if self.path == RESPONSES:
            return {"input": text_of(prompt)}
        return {"prompt": prompt if self.form == "ids" else text_of(prompt)}

    def _wishes(self, max_tokens: int) -> dict[str, Any]:
        wishes: dict[str, Any] = {"temperature": 0, "stream": True}
        if self.path == RESPONSES:
            return {**wishes, "max_output_tokens": max_tokens}
        wishes |= {"max_tokens": max_tokens, "stream_options": {"include_usage": True}}
        if self.ignores_eos:
            wishes["ignore_eos"] = True
        if self.has_token_ids and self.path == COMPLETIONS:
            wishes["return_token_ids"] = True  # a token without text gives an event, too
        if self.has_sources:
            wishes["return_prompt_sources"] = True
        return wishes


def text_of(tokens: Sequence[int]) -> str:
    """Write a word for each token, the same for equal ones: of two or three syllables, a token or a few to a model."""
    return " ".join(map(_word, tokens))


def _word(token: int) -> str:
    base = len(_SYLLABLES)
    word = _SYLLABLES[token % base] + _SYLLABLES[token // base % base]
    return word if token < base * base else word + _SYLLABLES[token // base // base % base]
