"""Which tokens the grammar of a sequence allows next, packed in bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.sampling.row import SamplingRow
from messages.errors import KvrayError
from messages.request import Grammar
from text.grammar import GrammarCompiler, GrammarMatcher


@dataclass(slots=True)
class _GrammarState:
    matcher: GrammarMatcher
    num_output_tokens: int = 0  #: those that the matcher has taken


class GrammarMasks:
    """The place of each sequence in its grammar, rebuilt from a row's tokens where it is missing or ahead of them."""

    def __init__(self, grammars: GrammarCompiler | None) -> None:
        """Look grammars up in `grammars`, where whoever admits sequences had them compiled."""
        self._known = grammars
        self._states: dict[str, _GrammarState] = {}

    def forget(self, seq_id: str) -> None:
        """Drop what is kept for a sequence; unknown ids are ignored."""
        self._states.pop(seq_id, None)

    def mask(self, row: SamplingRow, grammar: Grammar) -> NDArray[np.int32]:
        """Return which tokens may come next, [ceil(vocab_size / 32)] int32, as `GrammarMatcher.mask` does.

        All the row's tokens are known: a sequence that is held to a grammar is not planned ahead.

        Raises:
            KvrayError: its grammar is not compiled.
            RequestError: its output left the grammar, or the grammar grew too complex.
        """
        state = self._states.get(row.seq_id)
        if state is None or state.num_output_tokens > row.num_output_tokens:
            compiled = None if self._known is None else self._known.find(grammar)
            if compiled is None:
                raise KvrayError("its grammar is not compiled: its sequence has ended, or never waited for it")
            state = self._states[row.seq_id] = _GrammarState(GrammarMatcher(compiled))
        output = list(row.token_ids[row.num_prompt_tokens + state.num_output_tokens :])
        state.matcher.accept(output)
        state.num_output_tokens += len(output)
        return state.matcher.mask()


def bans(row: SamplingRow, mask: NDArray[np.int32] | None, vocab_size: int) -> tuple[int, ...]:
    """Return which tokens the row bans of the vocabulary, and of those that `mask` allows.

    Where nothing would be left, as of a complete grammar but its end, min_tokens cannot be had and yields: none.
    """
    banned = tuple(token_id for token_id in row.banned if 0 <= token_id < vocab_size)
    if not banned:
        return ()
    is_left = len(banned) < vocab_size if mask is None else _allows_any(mask, banned)
    return banned if is_left else ()


def _allows_any(mask: NDArray[np.int32], banned: tuple[int, ...]) -> bool:
    """Tell whether a mask still allows a token once the `banned` ones, each in the vocabulary, are taken out."""
    left = mask.view(np.uint32).copy()
    ids = np.array(banned, np.int64)
    np.bitwise_and.at(left, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
    return bool(left.any())
