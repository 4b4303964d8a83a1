"""The other process of a transport benchmark, and this process's end to it, wired as workers are.

    async with peer_process(spec) as hello:                          a process that owns a pool, until the block ends
        peer = await connected(secret, hello.address, transports, target, scratch)      ChannelClient, Link, regions
        await peer.transports["shm"].pull(peer.link, peer.regions["shm"], copies, target, stall_s)

Both processes keep their roads in a transport.roads.Roads and talk over a channel: DescribeRegions is answered with
RegionsDescribed, what roads have to say goes as RoadMessage (engine.worker is the owner's side, engine.peers ours).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import msgspec
import uvloop

from harness.transport_pool import filled, python_path
from messages.errors import KvrayError
from messages.handoff import DescribeRegions, RegionInfo, RegionsDescribed, RoadMessage
from messages.wire import Message
from transport.channel import ChannelClient, ChannelConfig, ChannelServer
from transport.memory import Memory
from transport.protocol import Link, RegionMemory, Transport
from transport.roads import PROBE_BYTES, Roads
from transport.secret import ClusterSecret

HOST = "127.0.0.1"
PORT_RANGE = (20000, 20999)
#: A road is given up when nothing arrives for so long.
STALL_S = 10.0
_START_S, _END_S = 60.0, 10.0
#: Rivals block the loop for as long as they copy.
_CHANNEL = ChannelConfig(lost_after_s=60.0)


class PeerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The task of the other process. Goes over its standard input: the secret is nobody else's business."""

    secret: str  #: 64 hexadecimal digits
    pool_bytes: int
    seed: int
    roads: tuple[str, ...]
    rivals: tuple[str, ...] = ()  #: of harness.transport_rivals.SERVERS
    ray_address: str | None = None


class PeerHello(msgspec.Struct, frozen=True, kw_only=True):
    """The other process's answer to its PeerSpec, once it is ready."""

    pid: int
    address: str  #: of its channel
    rivals: dict[str, str]  #: where each is served


# ------------------------------------------------------------------------------------------------- what both ends need


def open_road(name: str, secret: ClusterSecret) -> Transport:
    """Open one road on this host; plasma needs a Ray that this process has joined.

    Raises:
        ImportError: the road, or what it needs, is not installed.
        KvrayError: the road cannot be taken here.
    """
    if name == "shm":
        from transport.shm import ShmTransport

        return ShmTransport()
    if name == "socket":
        from transport.socket.road import SocketTransport

        return SocketTransport(secret, HOST, port_range=PORT_RANGE)
    if name == "ucx":
        from transport.ucx.road import UcxTransport

        return UcxTransport(HOST, port_range=PORT_RANGE)
    from transport.plasma.actor import RayVaults
    from transport.plasma.road import PlasmaTransport

    return PlasmaTransport(RayVaults())


def open_all(names: Sequence[str], secret: ClusterSecret) -> tuple[list[Transport], dict[str, str]]:
    """Open those roads that can be taken; return them, and why the others cannot."""
    opened, refused = [], {}
    for name in names:
        try:
            opened.append(open_road(name, secret))
        except (ImportError, KvrayError) as error:
            refused[name] = str(error)
    return opened, refused


# ------------------------------------------------------------------------------------------------------ the other side


class Owner:
    """A pool behind a channel: the part of engine.worker.EngineWorker that transport is about."""

    def __init__(
        self, secret: ClusterSecret, transports: Sequence[Transport], memory: RegionMemory, scratch: RegionMemory
    ) -> None:
        """Register `memory` with all roads, and listen on the running loop."""
        self._roads = Roads(transports, memory, scratch, STALL_S)
        self._links: dict[bytes, Link] = {}
        self._server = ChannelServer(secret, HOST, self._on_message, self._on_peer_lost, _CHANNEL)
        self.address = self._server.address

    def close(self) -> None:
        """Hang up and unregister."""
        self._server.close()
        self._roads.close()

    def _on_message(self, peer: bytes, message: Message) -> None:
        match message:
            case DescribeRegions():
                self._link(peer)
                regions = list(self._roads.regions)
                described = RegionsDescribed(regions=regions, num_blocks=1, has_generations=False)
                self._server.send(peer, described)
            case RoadMessage(road=road, body=body):
                self._roads.on_message(self._link(peer), road, body)
            case _:
                raise TypeError(f"nobody sends a {type(message).__name__} here")

    def _link(self, peer: bytes) -> Link:
        if peer not in self._links:
            self._links[peer] = self._roads.connect(
                lambda road, body: self._server.send(peer, RoadMessage(road=road, body=body))
            )
        return self._links[peer]

    def _on_peer_lost(self, peer: bytes) -> None:
        link = self._links.pop(peer, None)
        if link is not None:
            self._roads.disconnect(link)


async def own_pool(spec: PeerSpec, answers: TextIO) -> None:
    """Be the other process: own a pool of host memory until the standard input ends."""
    from harness.transport_rivals import SERVERS

    secret = ClusterSecret.from_hex(spec.secret)
    memory = filled(spec.pool_bytes, spec.seed)
    transports, refused = open_all(spec.roads, secret)
    for road, reason in refused.items():
        print(f"the other process cannot take road {road}: {reason}", file=sys.stderr)
    owner = Owner(secret, transports, memory, Memory.allocate(PROBE_BYTES))
    rivals = {}
    for name in spec.rivals:
        try:
            rivals[name] = SERVERS[name](memory)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    await answer_and_wait(PeerHello(pid=os.getpid(), address=owner.address, rivals=rivals), answers)
    owner.close()


def told() -> tuple[PeerSpec, TextIO]:
    """Read what this process is told; return it, and where to answer. Libraries' prints go to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return msgspec.json.decode(sys.stdin.readline(), type=PeerSpec), answers


async def answer_and_wait(hello: PeerHello, answers: TextIO) -> None:
    """Say that all is ready, then wait until the measuring side is done, or gone."""
    print(msgspec.json.encode(hello).decode(), file=answers, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


# -------------------------------------------------------------------------------------------------- the measuring side


@dataclass(frozen=True, slots=True)
class Peer:
    """The other process seen from here."""

    client: ChannelClient
    link: Link
    regions: dict[str, RegionInfo]  #: by road
    transports: dict[str, Transport]  #: those that both sides can take
    roads: Roads

    def close(self) -> None:
        """Hang up."""
        self.client.close()
        self.roads.close()


@contextlib.asynccontextmanager
async def peer_process(spec: PeerSpec, *command: str) -> AsyncIterator[PeerHello]:
    """Run a process that does what `own_pool` does, or runs `command`, until the block ends.

    Raises:
        RuntimeError: the process ended before it was ready.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(command or ("-m", "harness.transport_peer")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": python_path()},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(spec) + b"\n")
        async with asyncio.timeout(_START_S):
            line = await process.stdout.readline()
        if not line:
            raise RuntimeError("the other process did not start; what it said stands above")
        yield msgspec.json.decode(line, type=PeerHello)
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def connected(
    secret: ClusterSecret,
    address: str,
    transports: Sequence[Transport],
    target: RegionMemory,
    scratch: RegionMemory,
) -> Peer:
    """Connect to the process at `address`, and wait until it has said where its pool lies.

    Raises:
        ConnectionError: the process is not there.
    """
    roads = Roads(transports, target, scratch, STALL_S)
    described: asyncio.Future[RegionsDescribed] = asyncio.get_running_loop().create_future()

    def on_message(message: Message) -> None:
        match message:
            case RegionsDescribed():
                described.set_result(message)
            case RoadMessage(road=road, body=body):
                roads.on_message(link, road, body)
            case _:
                raise TypeError(f"nobody sends a {type(message).__name__} here")

    def on_lost(reason: str) -> None:
        roads.disconnect(link)
        if not described.done():
            described.set_exception(ConnectionError(reason))

    client = ChannelClient(secret, address, on_message, on_lost, config=_CHANNEL)
    link = roads.connect(lambda road, body: client.send(RoadMessage(road=road, body=body)))
    client.send(DescribeRegions())
    regions = {region.road: region for region in (await described).regions if region.road in roads.names}
    usable = {transport.road: transport for transport in transports if transport.road in regions}
    return Peer(client, link, regions, usable, roads)


def main() -> None:
    """Run the other process, which `peer_process` started."""
    spec, answers = told()
    if spec.ray_address is None:
        uvloop.run(own_pool(spec, answers))
        return
    from harness.transport_ray import joined

    with joined(spec.ray_address):
        uvloop.run(own_pool(spec, answers))


if __name__ == "__main__":
    main()
