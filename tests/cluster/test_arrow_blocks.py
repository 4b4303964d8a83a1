"""Blocks of a real node cache as Arrow memory: in place, leased, and only what is there."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
import pytest

from cluster.arrow_blocks import leased_blocks
from messages.errors import RequestError, WorkerError
from nodecache.supervisor import Supervisor
from tests.nodecache.blocks import content_of, names_of
from tests.nodecache.client import CacheClient
from tests.nodecache.test_process import BLOCK_BYTES, options_of
from transport.channel import ChannelConfig
from transport.checksum import checksum
from transport.secret import ClusterSecret

SECRET = ClusterSecret(b"\x15" * 32)
NUM_BLOCKS = 12


@pytest.fixture
async def cache():
    """A node cache process with some blocks, and a client of it."""
    options = msgspec.structs.replace(options_of(NUM_BLOCKS, lease_s=2.0), channel=ChannelConfig(heartbeat_s=0.1))
    supervisor = Supervisor(options, SECRET)
    info = await supervisor.start()
    client = CacheClient(SECRET, info.address, BLOCK_BYTES)
    await client.open()
    yield info.address, client, supervisor
    client.close()
    await supervisor.close()


@pytest.mark.slow
async def test_blocks_are_read_in_place_and_stay_as_long_as_they_are_leased(cache):
    address, client, _ = cache
    names = names_of(range(6))
    await client.write(names)
    async with leased_blocks(SECRET, address, [*names, *names_of([99])], BLOCK_BYTES) as table:
        table.validate(full=True)
        assert set(table["name"].to_pylist()) == set(names)
        await asyncio.sleep(2.5)  # longer than a lease: it is renewed
        for first in range(10, 40, 4):  # others want room all the time
            await client.write(names_of(range(first, first + 4)))
        rows = zip(*(table[name].to_pylist() for name in ("name", "bytes", "checksum")), strict=True)
        for name, data, value in rows:
            assert data == content_of(name, BLOCK_BYTES)
            assert checksum(memoryview(data)) == value
        held = np.frombuffer(table["bytes"].chunk(0).buffers()[1], np.uint8)
        assert not held.flags.owndata
        assert not held.flags.writeable
    async with asyncio.timeout(10):
        while (await client.stats())["kvray_leases"] > 0:  # the word that it is over goes over another socket
            pass


async def test_what_is_not_there_gives_no_rows_and_another_size_is_refused(cache):
    address, _, _ = cache
    async with leased_blocks(SECRET, address, names_of(range(3)), BLOCK_BYTES) as table:
        assert (table.num_rows, table.column_names) == (0, ["name", "num_tokens", "checksum", "bytes"])
    with pytest.raises(RequestError, match=f"12 blocks of {2 * BLOCK_BYTES} bytes take"):
        async with leased_blocks(SECRET, address, names_of(range(3)), 2 * BLOCK_BYTES):
            pass


async def test_who_is_gone_is_named(cache):
    address, _, supervisor = cache
    await supervisor.close()
    with pytest.raises(WorkerError, match="the node cache is lost"):
        async with leased_blocks(SECRET, address, names_of(range(3)), BLOCK_BYTES):
            pass
