"""Paths of others' APIs that are not built here: whoever asks one is told so by its name."""

from __future__ import annotations

import re
from typing import Final

_NOT_SERVED: Final = (
    (r"/v1/embeddings|/v2/embed|/v1/pooling|/pooling|/embed", "embeddings"),
    (r"/v1/audio|/v1/realtime", "speech"),
    (r"/v1/images|/v1/videos", "images and videos"),
    (r"/v1/moderations", "moderation"),
    (r"/v1/messages|/v1/complete", "Anthropic's API"),
    (r"/(v1/|v2/)?rerank|/(v1/)?score|/classify", "ranking and classification"),
    (r"/v1/batches", "batches"),
    (r"/v1/files|/v1/uploads|/v1/containers", "files"),
    (r"/v1/fine_tuning|/v1/evals", "training"),
    (r"/v1/assistants|/v1/threads", "assistants"),
    (r"/v1/conversations", "conversations (previous_response_id of /v1/responses goes on from a response)"),
    (r"/v1/vector_stores", "vector stores"),
    (r"/v1/responses/(compact|input_tokens)", "compacting and counting (/tokenize counts)"),
    (r"/v1/responses/[^/]+/cancel", "cancelling: no response runs in the background"),
)
_PATTERNS: Final = tuple((re.compile(rf"({path})(/.*)?", re.DOTALL), what) for path, what in _NOT_SERVED)


def not_served(path: str) -> str | None:
    """Return what is said of a path that others serve and this server does not; None for all other paths."""
    for pattern, what in _PATTERNS:
        if pattern.fullmatch(path):
            return f"this server has none of it: {what}"
    return None
