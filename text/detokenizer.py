"""Tokens to text as they come, behind the prompt that they go on from.

    prompt   ... [ the][ c][at]|[ s][at]     output      prompt + text = decode(prompt ids + output ids)
    context           [ c][at]                as much of the prompt's end as decides how the output begins

A decoder may drop the space that a text begins with, join the bytes of a character, or join tokens by rules of its own:
what follows a prompt is decoded as that, and not as a text of its own.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_BYTES = 4
#: Tokens before the last bytes that a context looks back over; a decoder that is not local sees no further.
_MAX_CONTEXT_TOKENS = 64
#: Byte tokens at a prompt's end that a context holds, up to the beginning of a character: whether earlier ones are
#: text or nonsense it does not see.
_MAX_CONTEXT_BYTES = 256


class Context(NamedTuple):
    """The end of a prompt, as far as it decides how what follows it is decoded."""

    token_ids: Sequence[int] = ()  #: none where the prompt has no text
    num_open: int = 0  #: bytes at its end that begin a character which is not whole; byte tokens, one each

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        hidden_ids: Collection[int] = (),
    ) -> Context:
        """Find the context that `prompt` is; it takes microseconds, however long that is.

        `hidden_ids`: tokens without text, besides the special ones where these are skipped.
        """
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        window: list[int] = []  # last one first
        if tokenizer.decoding.is_byte_level:
            size = 0
            for token_id in reversed(prompt):
                if token_id not in skipped and token_id not in hidden_ids:
                    window.append(token_id)
                    size += len(tokenizer.token_bytes(token_id))
                    if size >= _MAX_CHARACTER_BYTES:
                        break
            window.reverse()
            return cls(window, _num_open(b"".join(map(tokenizer.token_bytes, window))))
        decoding, backend = tokenizer.decoding, tokenizer.backend
        run: list[int] = []  # bytes that the prompt ends with, last one first
        num_texts = 0
        for token_id in reversed(prompt):
            token = backend.id_to_token(token_id)
            if token is None or token_id in skipped or token_id in hidden_ids:
                continue
            byte = decoding.byte_of(token)
            if byte is not None and len(run) == len(window):
                run.append(byte)
            window.append(token_id)
            if len(run) >= _MAX_CONTEXT_BYTES and (_begins_character(run[-1]) or len(run) >= 2 * _MAX_CONTEXT_BYTES):
                break
            num_texts += byte is None
            if num_texts == _MAX_CONTEXT_TOKENS:
                break
            if byte is None and decoding.is_local and backend.decode(window[::-1], skip_special_tokens=False):
                break
        window.reverse()
        return cls(window, _num_open(bytes(reversed(run)), has_errors=True))

    def given(self, tokenizer: Tokenizer) -> str:
        """Return the text of the context that belongs to the prompt: all but a character that is not whole."""
        return tokenizer.decode(self.token_ids[: len(self.token_ids) - self.num_open], skip_special_tokens=False)


def prompt_text(tokenizer: Tokenizer, prompt: Sequence[int], context: Context, *, skip_special_tokens: bool) -> str:
    """Return the text of a prompt of token ids, whose context is `context`: what follows it goes on from there.

    A character that the prompt has only the beginning of belongs to what follows.
    """
    if not context.num_open:
        return tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)
    if tokenizer.decoding.is_byte_level:
        return tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens).removesuffix(_REPLACEMENT)
    end, num_left = len(prompt), context.num_open
    while num_left:
        end -= 1
        num_left -= tokenizer.decoding.byte_of(tokenizer.backend.id_to_token(prompt[end]) or "") is not None
    return tokenizer.decode(prompt[:end], skip_special_tokens=skip_special_tokens)


def _begins_character(byte: int) -> bool:
    return byte & 0xC0 != 0x80


def _num_open(data: bytes, *, has_errors: bool = False) -> int:
    """Count the bytes at the end of `data` that begin a character; 0 where `has_errors` decide otherwise already."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if has_errors else "replace")
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return 0  # a byte that fits nothing makes U+FFFD of each byte of its run
    return len(decoder.getstate()[0])


class Detokenizer:
    """Text of one sequence, token by token. The pieces and what flush gives add up to what `decode` adds to its prompt.

    A piece never ends inside a character: its bytes wait until the character is whole. With byte-fallback tokens a run
    of them waits for its end, because one bad byte turns the whole run into U+FFFD.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, context: Context | None = None
    ) -> None:
        """Stand behind the prompt that `context` is the end of; None: at the beginning of a text."""
        pieces = _ByteLevelPieces if tokenizer.decoding.is_byte_level else _WindowPieces
        decoder = pieces(tokenizer, skip_special_tokens=skip_special_tokens, context=context or Context())
        #: returns the text that some tokens add, as far as it is decided
        self.push: Callable[[Sequence[int]], str] = decoder.push
        #: returns what is still held back, when no more tokens come
        self.flush: Callable[[], str] = decoder.flush


class _ByteLevelPieces:
    """Every token is a byte string and the text is their concatenation, read as UTF-8."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, context: Context) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._texts = tokenizer.texts[skip_special_tokens]
        # Python and the tokenizer's Rust both put one U+FFFD for each maximal invalid part.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_open = False  #: the last bytes are the beginning of a character
        if context.num_open:
            self._decoded(context.token_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        if self._is_open or len(token_ids) != 1:
            return self._decoded(token_ids)
        text = self._texts.get(token_ids[0])
        if text is None:
            text = self._decoded(token_ids)
            if not self._is_open:
                self._texts[token_ids[0]] = text
        return text

    def _decoded(self, token_ids: Sequence[int]) -> str:
        skipped, token_bytes = self._skipped, self._tokenizer.token_bytes
        text = self._utf8.decode(b"".join([token_bytes(i) for i in token_ids if i not in skipped]))
        self._is_open = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowPieces:
    """Decodes a short window that begins with text already given, and gives what is new in it.

    The window moves on where nothing that follows can change its text, and begins at a token that has text, so that
    a decoder that trims the start of a text trims only there. With a decoder that is not local it never moves.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, context: Context) -> None:
        self._backend = tokenizer.backend
        self._decoding = tokenizer.decoding
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window = list(context.token_ids)
        self._given = context.given(tokenizer)  #: text of the window that was returned already, or is the prompt's

    def push(self, token_ids: Sequence[int]) -> str:
        last = None
        for token_id in token_ids:
            token = self._backend.id_to_token(token_id)
            if token is not None and token_id not in self._skipped:
                self._window.append(token_id)
                last = token
        if last is None or self._decoding.byte_of(last) is not None:
            return ""
        text = self._decode(self._window)
        if self._decoding.may_end_open and text.endswith(_REPLACEMENT):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        given = self._given
        if not text.startswith(given):
            if not self._decoding.is_local:
                return ""  # a decoder that is not local changed its mind: wait until the text agrees again
            # a byte that fits nothing spoiled the prompt's last ones
            given = given[: next((i for i, (a, b) in enumerate(zip(given, text, strict=False)) if a != b), len(text))]
        piece = text[len(given) :]
        self._given = text
        if self._decoding.is_local:
            for size in range(1, min(4, len(self._window))):
                start = self._decode(self._window[-size:])
                if start:
                    self._window, self._given = self._window[-size:], start
                    break
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text
