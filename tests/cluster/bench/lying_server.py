"""A small OpenAI server on a socket of this machine, which answers well, slowly, or in ways that are wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

_HEAD = "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Server:
    """Where it is, how it answers, and what it was asked."""

    mode: str = "good"
    step_s: float = 0.0  #: between tokens
    owner: str = "made up"
    dies_after: int = 2**31  #: questions; then nobody is there any more
    port: int = 0
    listening: asyncio.Server | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    num_streaming: int = 0
    most_streaming: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def chunk(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(number: int) -> bytes:
    return chunk(choices=[{"index": 0, "text": f" t{number}", "token_ids": [200 + number], "finish_reason": None}])


def usage(prompt: int, output: int, **more: Any) -> bytes:
    return chunk(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output, **more})


END = chunk(choices=[{"index": 0, "text": "", "finish_reason": "length"}])
DONE = b"data: [DONE]\n\n"


async def events(server: Server, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """What a stream of this mode holds; raises ConnectionError where it breaks off."""
    wanted, prompt = body["max_tokens"], len(body["prompt"])
    told = usage(prompt, wanted, prompt_tokens_details={"cached_tokens": prompt // 2})
    match server.mode:
        case "error":
            yield token(0)
            yield chunk(error={"message": "the worker\n was lost", "code": 500})
            return
        case "garbage":
            yield b"data: {'single': quotes}\n\n"
            return
        case "wrong types":
            yield chunk(choices=[{"text": 17}])
            return
        case "endless event":
            while True:
                yield b"x" * 2**20
        case "endless":
            for number in range(10**9):
                yield token(number)
        case "no tokens":
            yield END + usage(prompt, wanted) + DONE
            return
        case "cut off":
            yield token(0)
            raise ConnectionError
        case "silent end":
            yield token(0)
            return
        case "hangs":
            yield token(0)
            await asyncio.sleep(60)
        case "drips":
            while True:
                yield b": still here\n\n"
                await asyncio.sleep(0.02)
        case "missing":
            wanted -= 2
            told = usage(prompt, wanted)
        case "claims more":
            told = usage(prompt, wanted + 1)
        case "impossible hits":
            told = usage(prompt, wanted, prompt_tokens_details={"cached_tokens": prompt + 1})
        case "no usage":
            told = b""
        case "no numbers":
            told = chunk(choices=[], usage={"total_tokens": 3})
        case "in pairs":
            for number in range(0, wanted, 2):
                ids = [200 + number, 201 + number]
                yield chunk(choices=[{"text": " a b", "token_ids": ids[: wanted - number]}])
            yield END + told + DONE
            return
        case "in bytes":
            whole = (
                b": comment\r\n\r\n" + b"".join(token(n) for n in range(wanted)).replace(b"\n", b"\r\n") + END + told
            )
            for begin in range(0, len(whole), 7):
                yield whole[begin : begin + 7]
            yield DONE
            return
        case "sources":
            yield chunk(choices=[], kvray={"prompt_sources": {"device": prompt // 2, "computed": prompt - prompt // 2}})
    for number in range(wanted):
        yield token(number)
        await asyncio.sleep(server.step_s)
    yield END + told + DONE


async def answer(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next(
                (int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length")), 0
            )
            server.keys |= {line.split()[-1] for line in head.split("\r\n") if line.startswith("authorization")}
            body = json.loads(await reader.readexactly(length) or b"{}")
            await _answer_one(server, head.split()[1], body, writer)
    writer.close()


async def _answer_one(server: Server, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    async def send(data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()

    if path == "/v1/models":
        models = {"data": [{"id": "tiny", "owned_by": server.owner}]}
        said = b"<html>hello</html>" if server.mode == "no models" else json.dumps(models).encode()
        writer.write(_HEAD.format(status="200 OK", kind="application/json").encode())
        await send(said)
        return await send(b"")
    server.bodies.append(body)
    if len(server.bodies) > server.dies_after:
        assert server.listening is not None
        server.listening.close()
        raise ConnectionError
    match server.mode:
        case "no http":
            writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            raise ConnectionError
        case "hangs up":
            raise ConnectionError
        case "status":
            writer.write(_HEAD.format(status="503 Service Unavailable", kind="application/json").encode())
            await send(json.dumps({"error": {"message": "no worker is there"}}).encode())
            return await send(b"")
        case "no stream":
            writer.write(_HEAD.format(status="200 OK", kind="application/json").encode())
            await send(b'{"choices": [{"text": "all at once"}]}')
            return await send(b"")
        case "redirect":
            writer.write(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")
            return None
    server.num_streaming += 1
    server.most_streaming = max(server.most_streaming, server.num_streaming)
    try:
        writer.write(_HEAD.format(status="200 OK", kind="text/event-stream; charset=utf-8").encode())
        async for event in events(server, body):
            await send(event)
        await send(b"")
    finally:
        server.num_streaming -= 1
    return None


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    """The server, on a thread of its own until the block ends."""
    server = Server(**settings)
    loop = asyncio.new_event_loop()

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(lambda reader, writer: answer(server, reader, writer), "127.0.0.1", 0)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(listen(), loop).result(10)
    server.port, server.listening = listening.sockets[0].getsockname()[1], listening
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_end(listening), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _end(listening: asyncio.Server) -> None:
    listening.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
