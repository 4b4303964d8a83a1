"""A node cache's blocks as Arrow memory: zero-copy over the arena, leased while they are read.

For programs on the node that look into KV: the bytes are those that workers pull, in place. The lease keeps blocks
from being evicted or written; once it has ended the same memory holds other blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Final, TypeVar

import numpy as np
import pyarrow as pa

from kvcache.locations import Locations, unpack_locations
from kvcache.names import NAME_BYTES
from kvcache.region import RegionLayout
from messages.errors import RequestError, WorkerError
from messages.handoff import (
    BlocksRequest,
    DescribeRegions,
    KvHandoff,
    RegionsDescribed,
    ReleaseLease,
    RenewLease,
)
from messages.wire import Message
from transport.channel import ChannelClient
from transport.secret import ClusterSecret
from transport.shm import open_region

_TIMEOUT_S: Final = 60.0  #: of what may have to be read from disk first
_RENEWALS: Final = 3  #: of a lease, within its time
_REQUEST_ID: Final = "arrow"

T = TypeVar("T", RegionsDescribed, KvHandoff)


@contextlib.asynccontextmanager
async def leased_blocks(
    secret: ClusterSecret, address: str, names: Sequence[bytes], block_bytes: int
) -> AsyncGenerator[pa.Table]:
    """Lease blocks of the node cache at `address`, on this node; they are the table's rows until the `async with` ends.

    Args:
        secret: the cluster's.
        address: of the node cache's channel, as `kvray status --json` has it.
        names: of the wanted blocks, 16 bytes each; those that it does not have are not among the rows.
        block_bytes: of one block, as `kvray status --json` has it.

    Yields:
        A table with the columns name, num_tokens, checksum (of the bytes, transport.checksum), bytes (`block_bytes`
        each, over the arena). A row batch for each run of blocks that lie together.

    Raises:
        WorkerError: the node cache is lost, or does not answer.
        RequestError: blocks have another size.
        RegionError: its memory cannot be mapped: it is of another node, or of another user.
    """
    answers: asyncio.Queue[Message | str] = asyncio.Queue()
    client = ChannelClient(secret, address, answers.put_nowait, answers.put_nowait)
    renewing: asyncio.Task[None] | None = None
    try:
        client.send(DescribeRegions())
        described = await _answer(answers, RegionsDescribed)
        layout = RegionLayout(described.num_blocks, block_bytes, described.has_generations)
        region = next((region for region in described.regions if region.road == "shm"), None)
        if region is None:
            raise WorkerError(f"the node cache at {address} has no memory that can be mapped")
        if region.num_bytes != layout.num_bytes:
            raise RequestError(
                f"{described.num_blocks} blocks of {block_bytes} bytes take {layout.num_bytes} bytes; "
                f"the node cache has {region.num_bytes}"
            )
        arena = open_region(region)
        client.send(BlocksRequest(request_id=_REQUEST_ID, first_index=0, names=b"".join(names)))
        found = b""
        is_last = False
        while not is_last:
            handoff = await _answer(answers, KvHandoff)
            found += handoff.blocks
            is_last = handoff.is_last
            if renewing is None:
                renewing = asyncio.create_task(_renew(client, handoff.lease_s / _RENEWALS))
        yield _table(unpack_locations(found), layout, pa.py_buffer(arena.view))
    finally:
        if renewing is not None:
            renewing.cancel()
        client.send(ReleaseLease(request_id=_REQUEST_ID))
        client.close()


async def _renew(client: ChannelClient, pause_s: float) -> None:
    while True:
        await asyncio.sleep(pause_s)
        client.send(RenewLease(request_id=_REQUEST_ID))


async def _answer(answers: asyncio.Queue[Message | str], wanted: type[T]) -> T:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            while not isinstance(message := await answers.get(), wanted):
                if isinstance(message, str):
                    raise WorkerError(f"the node cache is lost: {message}")
    except TimeoutError:
        raise WorkerError(f"the node cache has not answered within {_TIMEOUT_S:g} s") from None
    return message


def _table(found: Locations, layout: RegionLayout, arena: pa.Buffer) -> pa.Table:
    """Lay rows over the arena, a batch for each run of consecutive blocks."""
    schema = pa.schema(
        [
            pa.field("name", pa.binary(NAME_BYTES), nullable=False),
            pa.field("num_tokens", pa.uint32(), nullable=False),
            pa.field("checksum", pa.uint64(), nullable=False),
            pa.field("bytes", pa.binary(layout.block_bytes), nullable=False),
        ]
    )
    found = np.sort(found, order="block_id")
    batches = []
    for some in np.split(found, np.flatnonzero(np.diff(found["block_id"]) != 1) + 1) if len(found) else ():
        data = arena.slice(layout.block_offset(int(some["block_id"][0])), len(some) * layout.block_bytes)
        batches.append(
            pa.record_batch(
                [
                    pa.array(some["name"].tolist(), pa.binary(NAME_BYTES)),
                    pa.array(some["num_tokens"], pa.uint32()),
                    pa.array(some["checksum"], pa.uint64()),
                    pa.Array.from_buffers(pa.binary(layout.block_bytes), len(some), [None, data]),
                ],
                schema=schema,
            )
        )
    return pa.Table.from_batches(batches, schema=schema)
