"""Log-probabilities in the three shapes that clients know."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cluster.openai.replies import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
)
from cluster.openai.transcript import LoggedToken
from messages.stream import TokenLogprob
from text.token_texts import TokenText, TokenTexts
from text.tokenizer import Tokenizer

# JSON has no infinities: a token that the model rules out altogether is given this, as OpenAI's API does.
_LOWEST = -9999.0


def chat_logprobs(tokens: Sequence[LoggedToken], num_top: int, *, as_ids: bool = False) -> ChatLogprobs:
    """Write one entry per generated token, each with the `num_top` likeliest alternatives; `as_ids`: see `_name`."""
    content: list[ChatTokenLogprob] = []
    for entry, token in tokens:
        text, data = token.written
        top = [
            ChatTopLogprob(_name(other.text, other_id, as_ids=as_ids), _finite(logprob), list(other.data))
            for other, (other_id, logprob) in zip(token.others[:num_top], entry.top[:num_top], strict=True)
        ]
        name = _name(text, entry.token_id, as_ids=as_ids)
        content.append(ChatTokenLogprob(name, _finite(entry.logprob), list(data), top))
    return ChatLogprobs(content)


def completion_logprobs(
    tokens: Sequence[LoggedToken], num_top: int, *, offset: int, as_ids: bool = False
) -> CompletionLogprobs:
    """Write four lists of generated tokens; `offset`: characters of the prompt that stand before their text.

    The chosen token is always among its `top_logprobs`, as in OpenAI's API. Of several tokens with one text (parts of
    characters) the chosen one is told, else the likeliest.
    """
    result = CompletionLogprobs([], [], [], [])
    for entry, token in tokens:
        _add(result, token, token.offset + offset, entry, num_top, token_id=entry.token_id, as_ids=as_ids)
    return result


def echoed_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprob | None],
    num_top: int,
    *,
    text: str,
    skipped: Collection[int],
    as_ids: bool = False,
) -> CompletionLogprobs:
    """Write the four lists of an echoed prompt: its first token has no log-probability.

    Args:
        tokenizer: the model's.
        token_ids: of the prompt.
        entries: one for each of them; any at the end that nobody told may be missing.
        num_top: alternatives of each.
        text: that is echoed.
        skipped: tokens that are left out of it, unless it is the client's own and has them.
        as_ids: see `_name`.
    """
    result = CompletionLogprobs([], [], [], [])
    texts, offset = TokenTexts(tokenizer), 0
    for index, token_id in enumerate(token_ids):
        entry = entries[index] if index < len(entries) else None
        others = [] if entry is None else [other for other, _ in entry.top[:num_top]]
        is_hidden = token_id in skipped or (
            # put around the client's own text, which has it not
            token_id in tokenizer.special_ids and not text.startswith(tokenizer.token_text(token_id), offset)
        )
        token = texts.pass_by(token_id, others) if is_hidden else texts.take(token_id, others=others)
        _add(result, token, offset, entry, num_top, token_id=token_id, as_ids=as_ids)
        written = token.written.text
        if not is_hidden or text.startswith(written, offset):
            offset = min(offset + len(written), len(text))
    return result


def _add(
    lists: CompletionLogprobs,
    token: TokenText,
    offset: int,
    entry: TokenLogprob | None,
    num_top: int,
    *,
    token_id: int,
    as_ids: bool,
) -> None:
    name = _name(token.written.text, token_id, as_ids=as_ids)
    lists.tokens.append(name)
    lists.text_offset.append(offset)
    if entry is None:
        lists.token_logprobs.append(None)
        lists.top_logprobs.append(None)
        return
    lists.token_logprobs.append(_finite(entry.logprob))
    top: dict[str, float] = {}
    for other, (other_id, logprob) in zip(token.others, entry.top[:num_top], strict=False):
        top.setdefault(_name(other.text, other_id, as_ids=as_ids), _finite(logprob))
    top[name] = _finite(entry.logprob)
    lists.top_logprobs.append(top)


def joined(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Join the lists of neighbouring pieces."""
    return CompletionLogprobs(
        [token for piece in pieces for token in piece.tokens],
        [logprob for piece in pieces for logprob in piece.token_logprobs],
        [top for piece in pieces for top in piece.top_logprobs],
        [offset for piece in pieces for offset in piece.text_offset],
    )


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]
) -> PromptLogprobs:
    """Write vLLM's `prompt_logprobs`: for each prompt token its own and the likeliest ones, by token id."""
    result: PromptLogprobs = []
    texts = TokenTexts(tokenizer)
    for token_id, entry in zip(token_ids, entries, strict=False):
        token = texts.take(token_id, others=[] if entry is None else [other for other, _ in entry.top])
        if entry is None:
            result.append(None)
            continue
        candidates = {
            other_id: PromptLogprob(_finite(logprob), rank, other.text)
            for rank, (other, (other_id, logprob)) in enumerate(zip(token.others, entry.top, strict=True), start=1)
        }
        candidates[entry.token_id] = PromptLogprob(_finite(entry.logprob), entry.rank, token.written.text)
        result.append(candidates)
    return result


def _name(text: str, token_id: int, *, as_ids: bool) -> str:
    """Return what stands for a token: its text, or its id as vLLM writes it, which tells parts of characters apart."""
    return f"token_id:{token_id}" if as_ids else text


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
