"""A process with a region on the ucx road. Each connection to its unix socket is a link: run by test_ucx.py.

python ucx_peer.py SOCKET SIZE

A frame is its length (4 bytes) and a body. The first one, from here, is the region's RegionInfo; all others are what
the road's objects say to each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[2]))

from messages.handoff import RegionInfo
from transport.memory import Memory
from transport.protocol import Link
from transport.ucx.road import UcxTransport

HOST = "127.0.0.1"
PORTS = (21000, 21999)


def pattern(offset: int, num_bytes: int) -> bytes:
    """What the region holds there."""
    begin = offset % 251
    return (bytes(range(251)) * ((begin + num_bytes) // 251 + 1))[begin : begin + num_bytes]


def write_frame(writer: asyncio.StreamWriter, body: bytes) -> bool:
    writer.write(len(body).to_bytes(4, "big") + body)
    return True


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """Raises IncompleteReadError at the end, or ConnectionError."""
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


async def serve_link(
    transport: UcxTransport, region: RegionInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    link = Link(lambda _, body: write_frame(writer, body))
    write_frame(writer, msgspec.msgpack.encode(region))
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            transport.on_message(link, await read_frame(reader))
    link.is_lost = True
    transport.on_link_lost(link)
    writer.close()


async def main(path: Path, size: int) -> None:
    memory = Memory.allocate(size)
    memory.view[:] = pattern(0, size)
    transport = UcxTransport(HOST, port_range=PORTS)
    region = transport.register(memory)
    server = await asyncio.start_unix_server(lambda r, w: serve_link(transport, region, r, w), path)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
