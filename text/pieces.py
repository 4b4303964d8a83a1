"""Long texts to token ids, a piece at a time, so that memory follows the piece and not the text.

    text    ...the cat sat| on the mat, and...        |  cut: the end of a word
    window      [cat sat][ on the]                       kept only where both halves encode as the window does

`tokenizers` takes 140 to 240 bytes of memory for each byte of a text (our measurement, 2026-11-29, version 0.23). Words
are encoded apart from each other by nearly every tokenizer, so that the ids of two pieces are those of the whole; where
that is not so of a window around the cut, as with a tokenizer that puts something in front of every text, none is made
there. What further to the left could change a window is not looked at: no pattern in use looks so far.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator

#: A text of so many characters is encoded at once, and pieces are about as long.
PIECE_CHARS = 2**15
#: A stretch without a place to cut may have so many bytes of UTF-8: 240 MiB of memory.
MAX_STRETCH_BYTES = 2**20
_WINDOW_CHARS = 512  #: on either side of a cut
_MAX_TRIES = 4  #: cuts that are looked at for each end of a piece, the last one first
_WORD_END = re.compile(r"(?<=[^\W_])(?=[\W_])")

#: Texts to their token ids, without those around a text.
Encode = Callable[[list[str]], list[list[int]]]


class StretchTooLongError(ValueError):
    """A text has a stretch longer than MAX_STRETCH_BYTES that cannot be cut."""


def encode_pieces(text: str, encode: Encode, enough: int | None = None) -> Iterator[array[int]]:
    """Yield the token ids of `text`, piece by piece; nothing after more than `enough` of them.

    Raises:
        StretchTooLongError: there is no place to cut for too long; at the piece that cannot be encoded.
    """
    begin, num_ids = 0, 0
    while begin < len(text) and (enough is None or num_ids <= enough):
        end = _end(text, begin, encode)
        [ids] = encode([text[begin:end]])
        yield array("I", ids)
        begin, num_ids = end, num_ids + len(ids)


def _end(text: str, begin: int, encode: Encode) -> int:
    """Return where the piece that begins at `begin` ends: as soon as possible after half a piece."""
    low = begin + PIECE_CHARS // 2
    num_bytes = 0
    for high in range(begin + PIECE_CHARS, len(text), PIECE_CHARS // 2):
        ends = [match.start() for match in _WORD_END.finditer(text, low, high)]
        for end in reversed(ends[-_MAX_TRIES:]):
            if _is_cut(text, end, encode):
                return end
        low, num_bytes = high, num_bytes + len(text[low:high].encode())
        if num_bytes > MAX_STRETCH_BYTES:
            raise StretchTooLongError
    return len(text)


def _is_cut(text: str, end: int, encode: Encode) -> bool:
    """Tell whether the window around `end` encodes as its halves do."""
    left, right = text[max(0, end - _WINDOW_CHARS) : end], text[end : end + _WINDOW_CHARS]
    whole_ids, left_ids, right_ids = encode([left + right, left, right])
    return whole_ids == left_ids + right_ids
