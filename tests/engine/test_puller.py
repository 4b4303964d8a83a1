"""Only blocks that are what was published are used; what is not is asked for once more, counted, and told as bad."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

import transport.memory
from engine.memory.kv_pool import LayerSpec
from engine.puller import PullOutcome
from kvcache.locations import pack_locations
from messages.handoff import RegionInfo
from tests.engine.shared_pools import NUM_BLOCKS, SharedPool
from transport.checksum import checksum, copy_all_checked
from transport.loopback import Corrupt, Fail, LoopbackNetwork, Tear, WriteLate
from transport.protocol import RegionError
from transport.shm import ShmTransport


class Setting:
    """An owner's pool and the own one, with a link that has proven all its roads: "a" and "b", or shm."""

    def __init__(self, *, is_shm: bool = False) -> None:
        networks = {} if is_shm else {"a": LoopbackNetwork(), "b": LoopbackNetwork()}
        self.owner, self.own = (
            SharedPool(networks, seed=seed, others=[ShmTransport()] if is_shm else []) for seed in (1, 2)
        )
        self.puller = self.own.puller
        self.peer = self.puller.understand(self.owner.described())
        self.link = self.own.roads.connect(lambda road, body: True)
        self.num_arrived = 0

    async def probed(self) -> None:
        self.own.roads.learn(self.link, self.owner.roads.regions)
        num_roads = len(self.own.roads.names)
        while len(self.own.roads._learned[self.link].choice.proven()) < num_roads:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)

    def _count(self) -> None:
        self.num_arrived += 1

    async def pull(self, pairs) -> PullOutcome:
        blocks, targets = pack_locations(location for location, _ in pairs), [target for _, target in pairs]
        return await self.puller.pull(self.link, self.peer, blocks, targets, self._count)

    def fault(self, *faults, roads: str = "ab") -> None:
        for road in roads:
            self.own.transports[road].faults.extend(faults)

    @property
    def rejected(self) -> Counter[str]:
        return +self.puller.num_rejected


@pytest.fixture
async def setting():
    made = Setting()
    await made.probed()
    yield made
    made.own.close()
    made.owner.close()


async def test_blocks_land_in_their_targets_and_each_is_told(setting):
    pairs = list(zip(setting.owner.published(5, 1, 3), (0, 7, 2), strict=True))
    assert await setting.pull(pairs) == PullOutcome()
    assert [setting.own.row(target) for target in (0, 7, 2)] == [setting.owner.row(b) for b in (5, 1, 3)]
    assert (setting.num_arrived, setting.puller.num_failed, setting.rejected) == (3, 0, Counter())


async def test_a_block_that_its_owner_reused_is_bad_and_the_road_is_not_blamed(setting):
    pairs = list(zip(setting.owner.published(0, 1), (0, 1), strict=True))
    setting.owner.books.unpin(setting.owner.books.allocate(2))  # another use, another generation
    setting.owner.damage(0)
    setting.owner.damage(1)
    outcome = await setting.pull(pairs)
    assert (outcome.bad, outcome.damaged) == ({0, 1}, frozenset())
    assert setting.rejected == Counter(generation=2)
    assert setting.own.roads.counters.num_failed.total() == 0


async def test_a_block_damaged_on_the_way_is_asked_for_once_more_over_another_road(setting):
    pairs = list(zip(setting.owner.published(4, 5), (4, 5), strict=True))
    setting.fault(Corrupt(offset=1))
    first = setting.own.roads._learned[setting.link].choice.proven()[0]
    setting.own.transports["b" if first == "a" else "a"].faults.clear()
    assert await setting.pull(pairs) == PullOutcome()
    assert [setting.own.row(b) for b in (4, 5)] == [setting.owner.row(b) for b in (4, 5)]
    assert setting.rejected == Counter(checksum=1)
    assert setting.own.roads.counters.num_failed == Counter({first: 1})


async def test_a_block_that_stays_damaged_is_bad_and_the_others_are_good(setting):
    pairs = list(zip(setting.owner.published(0, 1, 2), (0, 1, 2), strict=True))
    setting.owner.damage(1)  # under the same generation
    outcome = await setting.pull(pairs)
    assert outcome == PullOutcome(frozenset({1}))
    assert outcome.damaged == {1}
    assert setting.rejected == Counter(checksum=2)


@pytest.mark.parametrize("error", [0, 1])
async def test_the_checksum_that_a_road_computed_as_it_wrote_is_the_one_that_counts(setting, error):
    pairs = list(zip(setting.owner.published(0, 1), (0, 1), strict=True))

    def telling(pull):
        async def pull_and_tell(link, source, copies, target, stall_s, on_arrived=None):
            def tell(position):
                _, offset, length = copies[position]
                on_arrived(position, checksum(target.view[offset : offset + length]) + error)

            await pull(link, source, copies, target, stall_s, tell if on_arrived is not None else None)

        return pull_and_tell

    for road in setting.own.transports.values():
        road.pull = telling(road.pull)
    assert (await setting.pull(pairs)).bad == ({0, 1} if error else set())
    assert setting.own.row(0) == setting.owner.row(0)
    assert setting.rejected == Counter(checksum=4 * error)


# ------------------------------------------------------------------------------------------------ shared memory, really


@pytest.fixture
async def shm_setting():
    made = Setting(is_shm=True)
    await made.probed()
    yield made
    made.own.close()
    made.owner.close()


@pytest.fixture
def between_blocks(monkeypatch):
    """Calls what is set, once: when the first block of a pull was copied, before the second."""
    waiting: list[Callable[[], None]] = []

    def copy(target, source, copies, watch):
        told = copy_all_checked(target, source, copies[:1], watch)
        while waiting:
            waiting.pop()()
        return told + copy_all_checked(target, source, copies[1:], watch)

    monkeypatch.setattr(transport.memory, "copy_all_checked", copy)
    return waiting.append


def overwrite(setting) -> None:
    for block_id in range(NUM_BLOCKS):
        setting.owner.damage(block_id)


@pytest.mark.parametrize("is_reused", [True, False])
@pytest.mark.parametrize("when", ["before", "during"])
async def test_over_shared_memory_a_block_that_was_overwritten_in_time_is_bad(
    shm_setting, between_blocks, when, is_reused
):
    setting = shm_setting
    locations = setting.owner.published(0, 1, 2)

    def use_otherwise():
        if is_reused:
            setting.owner.books.unpin(setting.owner.books.allocate(NUM_BLOCKS))
        overwrite(setting)

    use_otherwise() if when == "before" else between_blocks(use_otherwise)
    outcome = await setting.pull(list(zip(locations, (3, 4, 5), strict=True)))
    bad = {0, 1, 2} if when == "before" else {1, 2}
    assert outcome.bad == bad
    # The road is blamed where the generation says nothing, and there is no other to ask over.
    reasons = ["generation"] if is_reused else ["checksum", "transfer"]
    assert setting.rejected == Counter(dict.fromkeys(reasons, len(bad)))
    assert when == "before" or checksum(setting.own.row(3)) == locations[0].checksum


async def test_over_shared_memory_a_block_that_its_owner_overwrites_afterwards_stays_as_it_came(shm_setting):
    setting = shm_setting
    pairs = list(zip(setting.owner.published(0, 1), (3, 4), strict=True))
    assert await setting.pull(pairs) == PullOutcome()
    overwrite(setting)
    assert [checksum(setting.own.row(target)) for _, target in pairs] == [one.checksum for one, _ in pairs]


# ------------------------------------------------------------------------------------------------------ pulls that fail


async def test_what_came_before_a_failure_is_used(setting):
    pairs = list(zip(setting.owner.published(0, 1, 2), (0, 1, 2), strict=True))
    setting.fault(Fail(num_copies=2))
    assert await setting.pull(pairs) == PullOutcome(frozenset({2}))
    assert (setting.puller.num_failed, setting.rejected) == (1, Counter(transfer=1))


async def test_what_a_second_road_wrote_over_in_part_is_bad_though_the_first_had_brought_it(setting):
    pairs = list(zip(setting.owner.published(0, 1, 2), (0, 1, 2), strict=True))
    first, second = setting.own.roads._learned[setting.link].choice.proven()
    setting.fault(Fail(num_copies=2), roads=first)
    setting.fault(Tear(), roads=second)
    assert await setting.pull(pairs) == PullOutcome(frozenset({0, 1, 2}))
    assert setting.own.row(0) != setting.owner.row(0)
    assert setting.rejected == Counter(transfer=3)


async def test_where_late_bytes_may_land_nothing_that_came_is_used(setting):
    pairs = list(zip(setting.owner.published(0, 1), (0, 1), strict=True))
    setting.fault(WriteLate(delay_s=0.05))
    outcome = await setting.pull(pairs)
    assert outcome.bad == {0, 1}
    assert outcome.quarantine_s > 0
    assert setting.rejected == Counter(transfer=2)


@pytest.mark.parametrize("block_id", [NUM_BLOCKS, 2**32 - 1])
async def test_a_location_outside_the_peers_pool_is_refused_with_all_others(setting, block_id):
    locations = setting.owner.published(0, 1)
    locations[1] = type(locations[1])(1, block_id, 0, b"name".ljust(16), 4, 0)
    before = setting.own.row(0)
    assert (await setting.pull(list(zip(locations, (0, 1), strict=True)))).bad == {0, 1}
    assert setting.own.row(0) == before
    assert setting.rejected == Counter(refused=2)


async def test_a_lost_peers_blocks_are_bad(setting):
    setting.own.roads.disconnect(setting.link)
    outcome = await setting.pull(list(zip(setting.owner.published(0), (0,), strict=True)))
    assert outcome == PullOutcome(frozenset({0}))
    assert setting.puller.num_failed == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_blocks": NUM_BLOCKS + 1}, "bytes for 9 blocks, wanted"),
        ({"num_blocks": 0}, "bytes for 0 blocks, wanted"),
        ({"has_generations": False}, "blocks of"),
        ({"regions": [RegionInfo(road="a", handle=b"", num_bytes=1, nonce=b"")]}, "a region of 1 bytes"),
    ],
)
async def test_a_pool_that_is_not_laid_out_as_ours_is_not_understood(setting, changes, match):
    with pytest.raises(RegionError, match=match):
        setting.puller.understand(setting.owner.described(**changes))


async def test_a_pool_of_blocks_of_another_size_is_not_understood(setting):
    other = SharedPool({"a": LoopbackNetwork()}, specs=[LayerSpec(1, 8, 8)])
    with pytest.raises(RegionError, match="blocks of 128"):
        setting.puller.understand(other.described())
    other.close()
