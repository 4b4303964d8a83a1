"""Answers POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio

import msgspec

from cluster.openai.conversation import rendered, template_tools
from cluster.openai.errors import bad_field
from cluster.openai.protocol import DetokenizeRequest, TokenizeRequest
from cluster.openai.replies import DetokenizeReply, TokenizeReply
from cluster.openai.surface import Surface
from messages.errors import RequestError


async def tokenize(surface: Surface, fields: TokenizeRequest) -> bytes:
    """Return the token ids of a prompt, or of messages rendered by the chat template, as a JSON reply.

    Raises:
        RequestError: neither or both of them are given, or a text is refused.
    """
    surface.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError("prompt: want either prompt or messages", param="prompt", code="invalid_value")
    if fields.messages is None:
        text, adds_special = fields.prompt or "", fields.add_special_tokens is not False
    else:
        tools = template_tools(fields.tools) if fields.tools else None
        text = rendered(surface.tokenizer, fields.messages, fields, tools)
        adds_special = bool(fields.add_special_tokens)
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
        RequestError: an id is outside the vocabulary.
    """
    surface.check_model(fields.model)
    for index, token_id in enumerate(fields.tokens):
        if token_id >= surface.model.vocab_size:
            raise bad_field(f"tokens[{index}]", token_id, f"a token id from 0 to {surface.model.vocab_size - 1}")
    text = await asyncio.to_thread(surface.tokenizer.decode, fields.tokens, skip_special_tokens=False)
    return msgspec.json.encode(DetokenizeReply(text))
