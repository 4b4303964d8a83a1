"""A client that costs next to nothing: HTTP/1.1 on one asyncio connection, answers whole or as server-sent events.

The machine that is measured runs the client too: what it takes is missing from the server. The openai client takes
milliseconds of its own per request, which are its users' business but not the server's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

_DONE = b"[DONE]"


def completion(prompt: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """Write a request in which every token gives an event, also one without text."""
    return {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **more,
    }


class HttpConnection:
    """One kept-alive connection; one request at a time."""

    def __init__(self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._host = host
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, url: str) -> HttpConnection:
        """Connect to http://host:port."""
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
        return cls(parts.netloc, reader, writer)

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()

    async def get(self, path: str) -> bytes:
        """Return the body that answers a GET."""
        self._send("GET", path, b"")
        return b"".join([part async for part in self._body()])

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the server-sent events that answer a POST, as they come; the connection is free again at their end.

        Raises:
            ConnectionError: the status is not 200, or an event is an error.
        """
        self._send("POST", path, json.dumps(body).encode())
        rest = b""
        async for part in self._body():
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data != _DONE and not data.startswith(b":"):  # a comment keeps a silent stream alive
                    yield _checked(json.loads(data))

    def _send(self, method: str, path: str, body: bytes) -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async def _body(self) -> AsyncIterator[bytes]:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
        if "chunked" not in fields.get("transfer-encoding", ""):
            body = await self._reader.readexactly(int(fields["content-length"]))
            _check_status(head[0], body)
            yield body
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            chunk = await self._reader.readexactly(size + 2)
            _check_status(head[0], chunk)
            yield chunk[:-2]
        await self._reader.readuntil(b"\r\n")


def _check_status(line: str, body: bytes) -> None:
    if line.split()[1] != "200":
        raise ConnectionError(f"{line}: {body[:500]!r}")


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise ConnectionError(f"the server says {event['error']}")
    return event
