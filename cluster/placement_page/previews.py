"""Beginnings of prompts as text, for people: kept by an ingress only where the operator switches it on.

What is kept are the tokens of the last prompts, within limits; they become text when somebody looks.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvcache.names import NAME_BYTES, TOKEN_BYTES, block_names, unpack_tokens
from messages.request import GenerateRequest
from messages.view import PrefixView
from text.tokenizer import Tokenizer

_MAX_PROMPTS: Final = 256
_MAX_BYTES: Final = 2 << 20  #: of all of their tokens, half a million of them
_GAP: Final = " … "


@dataclass(slots=True)
class _Prompt:
    token_bytes: bytes
    salt: bytes
    names: bytes | None = None  #: of its blocks, concatenated; None: nobody has looked yet


class PromptPreviews:
    """The last prompts of one ingress. One event loop."""

    def __init__(self, tokenizer: Tokenizer, max_chars: int) -> None:
        """Show at most `max_chars` of a prefix; 0: keep and show nothing."""
        self._tokenizer = tokenizer
        self._max_chars = max_chars
        self._prompts: OrderedDict[tuple[bytes, bytes], _Prompt] = OrderedDict()  # by salt and tokens
        self._num_bytes = 0

    def note(self, requests: Sequence[GenerateRequest]) -> None:
        """Keep the prompt of what a client asked for now."""
        first = requests[0]
        prompt = first.token_ids[: first.num_prompt_tokens * TOKEN_BYTES]
        if not self._max_chars or len(prompt) > _MAX_BYTES:
            return
        key = (first.salt, prompt)
        if key in self._prompts:
            self._prompts.move_to_end(key)
            return
        self._prompts[key] = _Prompt(prompt, first.salt)
        self._num_bytes += len(prompt)
        while len(self._prompts) > _MAX_PROMPTS or self._num_bytes > _MAX_BYTES:
            _, oldest = self._prompts.popitem(last=False)
            self._num_bytes -= len(oldest.token_bytes)

    async def texts(self, prefixes: Sequence[PrefixView], fingerprint: bytes, block_size: int) -> dict[bytes, str]:
        """Return the texts of those of these prefixes that are kept, by name; a thread names their blocks."""
        if not self._max_chars or not prefixes:
            return {}
        prompts = list(self._prompts.values())
        await asyncio.to_thread(_name, prompts, fingerprint, block_size)
        found = ((prefix, _with(prefix, prompts)) for prefix in prefixes)
        return {
            prefix.name: self._text(prompt.token_bytes[: prefix.num_blocks * block_size * TOKEN_BYTES])
            for prefix, prompt in found
            if prompt is not None
        }

    def _text(self, token_bytes: bytes) -> str:
        """Return the text of these tokens; of a long one its head and its tail, which tells it from others."""
        half = self._max_chars // 2
        num_bytes = 2 * self._max_chars * TOKEN_BYTES  # a token may be part of a character
        if len(token_bytes) <= 2 * num_bytes:
            text = self._decoded(token_bytes)
            if len(text) <= self._max_chars:
                return text
            return text[: self._max_chars - half] + _GAP + text[len(text) - half :]
        head, tail = self._decoded(token_bytes[:num_bytes]), self._decoded(token_bytes[-num_bytes:])
        return head[: self._max_chars - half] + _GAP + tail[max(0, len(tail) - half) :]

    def _decoded(self, token_bytes: bytes) -> str:
        return self._tokenizer.decode(unpack_tokens(token_bytes), skip_special_tokens=False)


def _name(prompts: Sequence[_Prompt], fingerprint: bytes, block_size: int) -> None:
    for prompt in prompts:
        if prompt.names is None:
            prompt.names = block_names(fingerprint, prompt.salt, prompt.token_bytes, block_size)


def _with(prefix: PrefixView, prompts: Sequence[_Prompt]) -> _Prompt | None:
    """Return a prompt that begins with this prefix; None: none is kept."""
    end = prefix.num_blocks * NAME_BYTES
    return next((one for one in prompts if one.names and one.names[end - NAME_BYTES : end] == prefix.name), None)
