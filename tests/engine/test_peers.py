"""Peers: connected to on demand, asked where their blocks lie, pulled from, told when they are lost."""

from __future__ import annotations

import time

import pytest

from engine.loans import LearnHandoff
from engine.memory.kv_pool import LayerSpec
from engine.peers import Peers
from engine.puller import PullOutcome
from kvcache.locations import pack_locations
from kvcache.price import ASSUMED_MOVE, ASSUMED_MOVES
from messages.handoff import DescribeRegions, ReleaseLease, RenewLease
from messages.request import Copy
from messages.wire import Message
from tests.engine.shared_pools import SharedPool
from tests.workers import until
from transport.channel import ChannelConfig, ChannelServer
from transport.loopback import LoopbackNetwork
from transport.secret import ClusterSecret

SECRET = ClusterSecret.generate()
CHANNEL = ChannelConfig(heartbeat_s=0.05, lost_after_s=0.3)


class Owner:
    """A pool behind a channel, that says where its blocks lie."""

    def __init__(self, pool: SharedPool) -> None:
        self.pool = pool
        self.said: list[Message] = []
        self.senders: set[bytes] = set()
        self.server = ChannelServer(SECRET, "127.0.0.1", self._take, lambda _: None, CHANNEL)

    def _take(self, sender: bytes, message: Message) -> None:
        self.senders.add(sender)
        if isinstance(message, DescribeRegions):
            self.server.send(sender, self.pool.described())
        else:
            self.said.append(message)

    def close(self) -> None:
        self.server.close()
        self.pool.close()


class Setting:
    def __init__(self) -> None:
        self.networks = {"a": LoopbackNetwork()}
        self.own = SharedPool(self.networks, seed=9)
        self.owners: list[Owner] = []
        self.told: list[tuple[str, Message]] = []
        self.lost: list[str] = []
        self.peers = Peers(
            self.own.puller,
            self.own.roads,
            SECRET,
            CHANNEL,
            lambda address, message: self.told.append((address, message)),
            self.lost.append,
            pytest.fail,
        )

    def owner(self, **options) -> Owner:
        self.owners.append(Owner(SharedPool(self.networks, seed=len(self.owners), **options)))
        return self.owners[-1]

    async def connected(self, owner: Owner) -> str:
        """Its address, when its pool is known and its road proven."""
        address = owner.server.address
        self.peers.connect(address)
        await until(lambda: any(status.peer == address and status.road for status in self.peers.statuses()))
        return address

    async def pull(self, address: str, owner: Owner, block_id: int, target: int) -> PullOutcome:
        blocks = pack_locations(owner.pool.published(block_id))
        return await self.peers.pull(address, blocks, [target], lambda: None)


def learned(owner: Owner, elapsed_s: float, *, asked_s: float | None = None) -> LearnHandoff:
    """`asked_s`: where it was asked so long ago that more passed than `elapsed_s`."""
    asked_s = time.monotonic() - elapsed_s if asked_s is None else asked_s
    return LearnHandoff(owner.server.address, "device", elapsed_s, source_s=0.0, num_blocks=0, asked_s=asked_s)


@pytest.fixture
async def setting():
    made = Setting()
    yield made
    made.peers.close()
    for owner in made.owners:
        owner.close()
    made.own.close()


async def test_blocks_come_from_each_of_several_owners(setting):
    first, second = setting.owner(), setting.owner()
    for target, owner in enumerate((first, second)):
        assert await setting.pull(await setting.connected(owner), owner, 3, target) == PullOutcome()
    assert (setting.own.row(0), setting.own.row(1)) == (first.pool.row(3), second.pool.row(3))
    assert [status.road for status in setting.peers.statuses()] == ["a", "a"]
    assert set(setting.peers.stats().values()) == {0.0}


async def test_an_owner_is_connected_to_once(setting):
    owner = setting.owner()
    address = await setting.connected(owner)
    setting.peers.connect(address)
    setting.peers.send(address, RenewLease(request_id="r"))
    await until(lambda: owner.said)
    assert (owner.said, len(owner.senders)) == ([RenewLease(request_id="r")], 1)


async def test_what_is_not_about_roads_is_told_with_the_address(setting):
    owner = setting.owner()
    address = await setting.connected(owner)
    [sender] = owner.senders
    owner.server.send(sender, ReleaseLease(request_id="r"))
    await until(lambda: setting.told)
    assert setting.told == [(address, ReleaseLease(request_id="r"))]


async def test_a_stranger_may_be_pulled_from_unless_there_is_no_road_at_all(setting):
    assert setting.peers.can_pull("tcp://127.0.0.1:1")
    roadless = SharedPool({})
    peers = Peers(roadless.puller, roadless.roads, SECRET, CHANNEL, lambda *_: None, lambda _: None, pytest.fail)
    assert not peers.can_pull("tcp://127.0.0.1:1")


async def test_an_owner_of_other_blocks_is_not_pulled_from(setting):
    owner = setting.owner(specs=[LayerSpec(1, 8, 8)])
    address = owner.server.address
    setting.peers.connect(address)
    await until(lambda: not setting.peers.can_pull(address))
    assert (await setting.pull(address, owner, 0, 0)).bad == {0}
    assert [(status.peer, status.road) for status in setting.peers.statuses()] == [(address, "")]


async def test_what_was_never_connected_brings_nothing_and_is_sent_nothing(setting):
    setting.peers.send("tcp://127.0.0.1:1", RenewLease(request_id="r"))
    assert await setting.pull("tcp://127.0.0.1:1", setting.owner(), 0, 0) == PullOutcome(frozenset({0}))


async def test_a_lost_owner_is_told_once_and_another_at_its_address_is_met_anew(setting):
    owner = setting.owner()
    address = await setting.connected(owner)
    owner.server.close()
    await until(lambda: setting.lost)
    assert (setting.lost, setting.peers.statuses()) == ([address], ())
    assert (await setting.pull(address, owner, 0, 0)).bad == {0}
    assert setting.peers.can_pull(address)
    setting.peers.connect(address)  # nobody is there
    await until(lambda: len(setting.lost) == 2)


async def test_closing_hangs_up_and_tells_nobody(setting):
    owner = setting.owner()
    await setting.connected(owner)
    setting.peers.close()
    await until(lambda: not owner.server.peers)
    assert (setting.lost, setting.peers.statuses()) == ([], ())


async def test_each_owner_has_the_price_that_its_pulls_and_handoffs_taught(setting):
    first, second = setting.owner(), setting.owner()
    for owner in (first, second):
        await setting.connected(owner)
    assert setting.peers.prices() == setting.peers.changed_prices() == ()
    begun_s = time.monotonic()
    setting.peers.observe_handoff(learned(first, 9.0))  # asked before any pull: it waited for the roads
    await setting.pull(first.server.address, first, 3, 0)
    (price,) = setting.peers.changed_prices()
    assert (price.source, price.road, price.handoff_s) == (first.server.address, "a", ASSUMED_MOVE.handoff_s)
    setting.peers.observe_handoff(learned(first, 0.0, asked_s=begun_s))  # came, and was given up long after
    assert setting.peers.changed_prices() == ()  # told already
    assert setting.peers.prices() == (price,)
    setting.peers.observe_handoff(learned(first, 0.0))
    (changed,) = setting.peers.changed_prices()
    assert changed.handoff_s == 0.0
    setting.peers.observe_handoff(LearnHandoff("tcp://nobody:1", None, 0.0, 0.0, 0, 0.0))


async def test_a_copy_is_priced_as_assumed_until_it_was_pulled_from_and_never_where_nothing_comes_from(setting):
    owner, stranger = setting.owner(), Copy("tcp://127.0.0.1:1", "disk")
    copy = Copy(await setting.connected(owner), "device")
    assert setting.peers.price_of(copy) == ASSUMED_MOVE
    assert setting.peers.price_of(stranger) == ASSUMED_MOVES["disk"]
    await setting.pull(copy.address, owner, 3, 0)
    assert (setting.peers.price_of(copy),) == setting.peers.prices()
    setting.peers.own_address = copy.address
    assert setting.peers.price_of(copy) is None
    misfit = setting.owner(specs=[LayerSpec(1, 8, 8)]).server.address
    setting.peers.connect(misfit)
    await until(lambda: setting.peers.price_of(Copy(misfit, "device")) is None)
