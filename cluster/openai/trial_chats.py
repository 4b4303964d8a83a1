"""Trial conversations, by which the formats of calls and of thoughts are told from a model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from messages.errors import RequestError
from text.tokenizer import Tokenizer

#: Formats of Hunyuan's, whose tags end in the name of a release: <think:opensource>
SUFFIXED: Final = ("hy_v3", "hy_v4")


def tried(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    is_begun: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str | None:
    """Render `messages`, with the assistant's turn begun or not; None where the template refuses them."""
    try:
        return tokenizer.render_chat(
            messages, tools=tools, add_generation_prompt=is_begun, template_kwargs=template_kwargs
        )
    except RequestError:
        return None
