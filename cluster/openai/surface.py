"""The parts that every endpoint works with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from cluster.openai.backend import Backend, HttpLimits, ServedModel
from cluster.openai.call_formats import CallFormat
from cluster.openai.callers import Callers
from cluster.openai.errors import model_not_found
from cluster.openai.grammar_checks import GrammarChecks
from cluster.openai.metrics import HttpMetrics
from cluster.openai.stream import Turn
from cluster.openai.thought_formats import ThoughtFormat
from text.tokenizer import Tokenizer

# Text longer than this is encoded in a thread: at some 2 MB/s it would hold up everyone's tokens for over 4 ms.
_THREAD_FROM_CHARS = 8192
# Text longer than this is encoded beside no other such: it takes a core for a tenth of a second or more.
_ALONE_FROM_CHARS = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """One served model, seen from HTTP."""

    backend: Backend
    model: ServedModel
    tokenizer: Tokenizer
    grammars: GrammarChecks
    limits: HttpLimits
    callers: Callers
    metrics: HttpMetrics
    tool_format: CallFormat | None  #: how the model writes tool calls
    call_ids: frozenset[int]  #: special tokens that mark them
    thought_format: ThoughtFormat | None  #: how the model writes thoughts
    thought_ids: frozenset[int]  #: special tokens that mark them
    #: told the id of a reply that does not say it, and that of its request's first sequence
    on_reply_id: Callable[[str, str], None] = lambda _sequence_id, _reply_id: None
    turn: Turn = field(default_factory=Turn)  #: of the event loop
    huge_texts: asyncio.Lock = field(default_factory=asyncio.Lock)  #: whoever encodes one

    async def encode(self, text: str, *, add_special_tokens: bool, enough: int | None = None) -> list[int]:
        """Encode `text` as token ids, as `Tokenizer.encode` does; the event loop stays free for as long as it takes."""
        if len(text) < _THREAD_FROM_CHARS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        encode = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens, enough=enough)
        async with self.huge_texts if len(text) >= _ALONE_FROM_CHARS else contextlib.nullcontext():
            return await asyncio.to_thread(encode)

    def check_model(self, name: str | None) -> None:
        """Check that a request's model is served here; it may leave the name out.

        Raises:
            RequestError: no model of that name is served here (404).
        """
        if name is not None and name not in self.model.names:
            raise model_not_found(name, self.model.names)
