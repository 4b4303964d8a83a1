"""Prompts as token ids: encoded, checked against the vocabulary and the context, cut where asked."""

from __future__ import annotations

import struct
from typing import Any

from cluster.openai.backend import ServedModel
from cluster.openai.errors import bad_field, context_overflow
from cluster.openai.surface import Surface
from messages.errors import RequestError
from text.pieces import PIECE_CHARS


def packed(token_ids: list[int]) -> bytes:
    """Pack token ids as they cross processes: uint32, little endian."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def prompts_of(prompt: str | list[Any], model: ServedModel) -> list[str | list[int]]:
    """Return the prompts that a `prompt` field holds: texts, or checked token ids.

    Raises:
        RequestError: a prompt is empty, kinds are mixed, or token ids are none.
    """
    if isinstance(prompt, str):
        return [_text("prompt", prompt)]
    if not prompt:
        raise bad_field("prompt", prompt, "a string, a list of strings, token ids, or lists of token ids; not empty")
    first = prompt[0]
    if isinstance(first, str):
        return [_text(f"prompt[{index}]", item) for index, item in enumerate(prompt)]
    if isinstance(first, list):
        return [check_token_ids(f"prompt[{index}]", item, model.vocab_size) for index, item in enumerate(prompt)]
    return [check_token_ids("prompt", prompt, model.vocab_size)]


def _text(param: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise bad_field(param, value, "a string of at least one character")
    return value


def check_token_ids(param: str, value: Any, vocab_size: int) -> list[int]:
    """Return `value`, which must be a list of token ids of the vocabulary.

    Raises:
        RequestError: `value` is something else; names the first position that is wrong.
    """
    if not isinstance(value, list) or not value:
        raise bad_field(param, value, "at least one token id")
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) < vocab_size:  # all in C: prompts are long
        return value
    whole: list[int] = [int(item) if isinstance(item, float) and item.is_integer() else item for item in value]
    for index, item in enumerate(whole):
        if type(item) is not int or not 0 <= item < vocab_size:
            raise bad_field(f"{param}[{index}]", item, f"a token id from 0 to {vocab_size - 1}")
    return whole


def fitted(
    param: str, token_ids: list[int], truncate: int | None, max_tokens: int | None, model: ServedModel
) -> list[int]:
    """Cut `token_ids` from the left to `truncate` tokens where given (-1: to what fits), and check that they fit.

    Raises:
        RequestError: nothing is left, or more than the model's context or a pool holds, or a token is none of the
            model's: a tokenizer may have some that its embedding has not.
    """
    if truncate is not None:
        room = min(model.max_prompt_tokens, max(1, model.max_model_len - max(1, max_tokens or 1)))
        keep = room if truncate == -1 else truncate
        if keep > model.max_prompt_tokens:
            raise bad_field("truncate_prompt_tokens", truncate, f"-1 to {model.max_prompt_tokens}")
        token_ids = token_ids[max(0, len(token_ids) - keep) :]
    if not token_ids:
        raise RequestError(f"{param}: got no tokens, want at least one", param=param, code="invalid_value")
    check_length(param, len(token_ids), model)
    largest = max(token_ids)
    if largest >= model.vocab_size:
        raise RequestError(
            f"{param}: got the token {largest}, want token ids from 0 to {model.vocab_size - 1}",
            param=param,
            code="invalid_value",
        )
    return token_ids


def check_length(param: str, num_tokens: int, model: ServedModel) -> None:
    """Check that a prompt leaves room for one token, and fits a pool.

    Raises:
        RequestError: the prompt is too long (context_length_exceeded).
    """
    if num_tokens > model.max_prompt_tokens:
        raise _too_long(param, f"{num_tokens} tokens", model)


async def encoded(
    surface: Surface,
    param: str,
    text: str,
    *,
    add_special_tokens: bool,
    truncate: int | None = None,
    max_tokens: int | None = None,
) -> list[int]:
    """Encode `text` and make it fit, as `fitted` does; what cannot fit is refused before all of it is encoded.

    Raises:
        RequestError: as `fitted` and `Tokenizer.encode`.
    """
    enough = surface.model.max_prompt_tokens if truncate is None else None
    token_ids = await surface.encode(text, add_special_tokens=add_special_tokens, enough=enough)
    if enough is not None and len(token_ids) > enough and len(text) > PIECE_CHARS:
        raise _too_long(param, f"at least {len(token_ids)} tokens", surface.model)
    return fitted(param, token_ids, truncate, max_tokens, surface.model)


def _too_long(param: str, seen: str, model: ServedModel) -> RequestError:
    most = model.max_prompt_tokens
    why = "" if most >= model.max_model_len - 1 else " here, as the KV cache holds no more,"
    return context_overflow(
        param,
        f"got {seen}, want at most {most}: this model's maximum context length is {most + 1} tokens{why}"
        " with at least one of output",
    )
