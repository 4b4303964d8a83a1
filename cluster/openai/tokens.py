"""Answers POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio

import msgspec

from cluster.openai.conversation import rendered, template_tools
from cluster.openai.prompts import check_token_ids
from cluster.openai.protocol import DetokenizeRequest, TokenizeRequest
from cluster.openai.replies import DetokenizeReply, TokenizeReply
from cluster.openai.surface import Surface
from messages.errors import RequestError


async def tokenize(surface: Surface, fields: TokenizeRequest) -> bytes:
    """Return the token ids of a prompt, or of messages rendered by the chat template, as a JSON reply.

    Raises:
        RequestError: neither or both of them are given, or a text is refused: unread if it takes too much memory.
    """
    surface.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError("prompt: want either prompt or messages", param="prompt", code="invalid_value")
    if fields.messages is None:
        param, text, adds_special = "prompt", fields.prompt or "", fields.add_special_tokens is not False
    else:
        tools = template_tools(fields.tools) if fields.tools else None
        param, text = (
            "messages",
            rendered(
                surface.tokenizer, fields.messages, fields, tools, takes_template=surface.limits.takes_chat_template
            ),
        )
        adds_special = bool(fields.add_special_tokens)
    _check_bytes(param, text, surface.limits.max_tokenize_bytes)
    token_ids = await surface.encode(text, add_special_tokens=adds_special)
    token_strs = None
    if fields.return_token_strs:
        token_strs = await asyncio.to_thread(lambda: [surface.tokenizer.token_text(i) for i in token_ids])
    return msgspec.json.encode(
        TokenizeReply(
            count=len(token_ids), max_model_len=surface.model.max_model_len, tokens=token_ids, token_strs=token_strs
        )
    )


async def detokenize(surface: Surface, fields: DetokenizeRequest) -> bytes:
    """Return the text of token ids, special tokens included, as a JSON reply.

    Raises:
        RequestError: an id is outside the vocabulary, or there are more than the model's context holds.
    """
    surface.check_model(fields.model)
    if len(fields.tokens) > surface.model.max_model_len:
        wanted = f"at most {surface.model.max_model_len}, which the model's context holds"
        raise RequestError(
            f"tokens: got {len(fields.tokens)} tokens, want {wanted}", param="tokens", code="invalid_value"
        )
    if fields.tokens:
        check_token_ids("tokens", fields.tokens, surface.model.vocab_size)
    text = await asyncio.to_thread(surface.tokenizer.decode, fields.tokens, skip_special_tokens=False)
    return msgspec.json.encode(DetokenizeReply(text))


def _check_bytes(param: str, text: str, max_bytes: int) -> None:
    if len(text) > max_bytes or len(text.encode(errors="replace")) > max_bytes:
        raise RequestError(
            f"{param}: got {len(text)} characters, want at most {max_bytes} bytes of UTF-8 (http.max_tokenize_bytes)",
            param=param,
            code="request_too_large",
            status=413,
        )
