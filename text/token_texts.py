"""What each token of a sequence writes where it stands, and how many characters stand before it.

tokens    [ the][ f][<0xC3>][<0xA9>][</s>][as]       text " the féas", </s> is hidden
texts      " the" " f"  ""     "é"   "</s>" "as"     those of tokens that are not hidden add up to the text
offsets      0     4     6      6      7     7
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from text.detokenizer import Context
from text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_new_decoder = codecs.getincrementaldecoder("utf-8")


class Written(NamedTuple):
    """What a token adds to a text."""

    text: str  #: "" where it begins a character, or goes on with one, that a later token ends
    data: bytes  #: those of a character's tokens add up to it


class TokenText(NamedTuple):
    """A token where it stands."""

    written: Written
    offset: int  #: characters of the text before it
    others: list[Written]  #: what other tokens would have written in its place


class TokenTexts:
    """Follows one sequence, token by token."""

    def __init__(self, tokenizer: Tokenizer, context: Context | None = None) -> None:
        """Stand behind the prompt that `context` is the end of."""
        context = context or Context()
        self._tokenizer = tokenizer
        self._decoding = tokenizer.decoding
        self._is_first = not self._decoding.is_byte_level and not context.token_ids  #: the next token begins a text
        data = b"".join(map(tokenizer.token_bytes, context.token_ids)) if context.num_open else b""
        self._open = data[len(data) - context.num_open :]  #: bytes of a character that is not whole yet
        self._given = 0  #: characters that a detokenizer has given
        self._run = ""  #: text of the bytes since the last token that is none
        self.offset = 0  #: characters before the next token

    def take(self, token_id: int, given: str | None = None, others: Sequence[int] = ()) -> TokenText:
        """Return the next token's text, and what `others` would write instead of it.

        `given`: the text that a detokenizer of the same sequence gave for it, which settles how many characters bytes
        count that make none; None: nobody detokenizes.
        """
        found = [self._written(other)[0] for other in others]
        written, still_open = self._written(token_id)
        begin, end = self.offset, self.offset + len(written.text)
        if given is not None and not self._decoding.is_byte_level:
            self._given += len(given)
            if self._decoding.may_end_open:
                written, end = Written(given, written.data), begin + len(given)
            elif self._is_byte(token_id):
                self._run += written.text
            elif given:
                written = self._settled(written, given)
                begin, end = max(0, self._given - len(written.text)), self._given
                self._run = ""
        self.offset, self._open, self._is_first = end, still_open, False
        return TokenText(written, begin, found)

    def _settled(self, written: Written, given: str) -> Written:
        """Return what a token behind a run of bytes, or none, has of the text that came with it."""
        if self._open or _REPLACEMENT in self._run or not given.startswith(self._run):
            return written
        text = given[len(self._run) :]
        return written if text == written.text else Written(text, text.encode())

    def pass_by(self, token_id: int, others: Sequence[int] = ()) -> TokenText:
        """Return the text of the next token, which is hidden, and what `others` would write instead of it."""
        found = [self._written(other)[0] for other in others]
        data = self._tokenizer.token_bytes(token_id)
        return TokenText(Written(data.decode("utf-8", "replace"), data), self.offset, found)

    def _written(self, token_id: int) -> tuple[Written, bytes]:
        """Return what a token would write here, and the bytes that it would leave of a character that is not whole."""
        if self._is_first and not self._is_byte(token_id):
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            return Written(text, text.encode()), b""
        data = self._tokenizer.token_bytes(token_id)
        decoder = _new_decoder("replace")
        text = decoder.decode(self._open + data)
        return Written(text, data), decoder.getstate()[0]

    def _is_byte(self, token_id: int) -> bool:
        decoding = self._decoding
        if not decoding.has_byte_tokens:
            return False
        return decoding.byte_of(self._tokenizer.backend.id_to_token(token_id) or "") is not None
