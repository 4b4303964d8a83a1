"""Log-probabilities in the three shapes that clients know."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.openai.replies import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
)
from messages.stream import TokenLogprob
from text.tokenizer import Tokenizer

# JSON has no infinities: a token that the model rules out altogether is given this, as OpenAI's API does.
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob], num_top: int) -> ChatLogprobs:
    """Write one entry per generated token, each with the `num_top` likeliest alternatives."""
    content: list[ChatTokenLogprob] = []
    for entry in entries:
        token_bytes = tokenizer.token_bytes(entry.token_id)
        top = [
            ChatTopLogprob(_text(raw), _finite(logprob), list(raw))
            for raw, logprob in ((tokenizer.token_bytes(token_id), lp) for token_id, lp in entry.top[:num_top])
        ]
        content.append(ChatTokenLogprob(_text(token_bytes), _finite(entry.logprob), list(token_bytes), top))
    return ChatLogprobs(content)


class CompletionLogprobList:
    """Builds a choice's four lists; text offsets run on from one piece to the next.

    The chosen token is always among its `top_logprobs`, as in OpenAI's API. Of several tokens with one text (parts of
    characters) the chosen one is told, else the likeliest.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def prompt(self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        """Return the echoed prompt's part: its first token has no log-probability."""
        padded = [*entries, *[None] * (len(token_ids) - len(entries))]
        return self._lists(list(zip(token_ids, padded, strict=False)))

    def piece(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """Return the part of tokens just generated."""
        return self._lists([(entry.token_id, entry) for entry in entries])

    def _lists(self, tokens: list[tuple[int, TokenLogprob | None]]) -> CompletionLogprobs:
        result = CompletionLogprobs([], [], [], [])
        for token_id, entry in tokens:
            text = self._tokenizer.token_text(token_id)
            result.tokens.append(text)
            result.text_offset.append(self._offset)
            self._offset += len(text)
            if entry is None:
                result.token_logprobs.append(None)
                result.top_logprobs.append(None)
                continue
            result.token_logprobs.append(_finite(entry.logprob))
            top: dict[str, float] = {}
            for top_id, logprob in entry.top[: self._num_top]:
                top.setdefault(self._tokenizer.token_text(top_id), _finite(logprob))
            top[text] = _finite(entry.logprob)
            result.top_logprobs.append(top)
        return result


def joined(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Join the lists of neighbouring pieces."""
    return CompletionLogprobs(
        [token for piece in pieces for token in piece.tokens],
        [logprob for piece in pieces for logprob in piece.token_logprobs],
        [top for piece in pieces for top in piece.top_logprobs],
        [offset for piece in pieces for offset in piece.text_offset],
    )


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None]) -> PromptLogprobs:
    """Write vLLM's `prompt_logprobs`: for each prompt token its own and the likeliest ones, by token id."""
    result: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        candidates = {
            token_id: PromptLogprob(_finite(logprob), rank, tokenizer.token_text(token_id))
            for rank, (token_id, logprob) in enumerate(entry.top, start=1)
        }
        candidates[entry.token_id] = PromptLogprob(
            _finite(entry.logprob), entry.rank, tokenizer.token_text(entry.token_id)
        )
        result.append(candidates)
    return result


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
