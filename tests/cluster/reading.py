"""Reads what a Backend gives for one client request, chunk by chunk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from cluster.openai.backend import Backend
from messages.request import GenerateRequest
from messages.stream import TokenChunk


async def chunks_of(backend: Backend, requests: Sequence[GenerateRequest]) -> AsyncGenerator[TokenChunk, None]:
    """All chunks until the request ends; closing it leaves the request."""
    came: asyncio.Queue[TokenChunk | None] = asyncio.Queue()
    backend.start(requests, came.put_nowait)
    try:
        while (chunk := await came.get()) is not None:
            yield chunk
    finally:
        backend.leave(requests[0].request_id)
