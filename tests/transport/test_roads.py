"""Which road is taken, what happens when it fails; over fake roads that fail and stall on command."""

import asyncio

import pytest

from messages.handoff import RegionInfo
from transport.loopback import Corrupt, Fail, LoopbackNetwork, LoopbackTransport, Stall, WriteLate
from transport.memory import Memory
from transport.protocol import Copy, RegionError, TransferError
from transport.roads import Roads

SIZE = 1 << 20
COPIES = [Copy(0, 0, 1000), Copy(5000, 2000, 1000)]


class Indirect(LoopbackTransport):
    is_direct = False


class Setting:
    """An owner's and a puller's roads "a" and "b", and "c" through others."""

    def __init__(self, stall_s: float = 0.2) -> None:
        self.source, self.target, self.scratch = (Memory.allocate(SIZE) for _ in range(3))
        self.source.view[:] = bytes(range(256)) * (SIZE // 256)
        network = {road: LoopbackNetwork() for road in "abc"}
        kinds = {"a": LoopbackTransport, "b": LoopbackTransport, "c": Indirect}
        owners = [kinds[road](network[road], road=road) for road in "abc"]
        self.pullers = {road: kinds[road](network[road], road=road) for road in "abc"}
        self.owner = Roads(owners, self.source, self.scratch, stall_s)
        self.puller = Roads(list(self.pullers.values()), self.target, self.scratch, stall_s)
        self.link = self.puller.connect(lambda road, body: True)

    def learn(self, *roads: str) -> None:
        self.puller.learn(self.link, [region for region in self.owner.regions if region.road in roads])

    async def pull(self) -> str:
        """The road that was taken."""
        return (await self.puller.pull(self.link, COPIES, self.target)).road

    def is_whole(self) -> bool:
        return all(
            self.target.view[c.target_offset :][: c.num_bytes] == self.source.view[c.source_offset :][: c.num_bytes]
            for c in COPIES
        )

    def close(self) -> None:
        self.puller.close()
        self.owner.close()
        for memory in (self.source, self.target, self.scratch):
            memory.close()


@pytest.fixture
async def setting():
    made = Setting()
    yield made
    made.close()


async def test_a_pull_right_after_learning_waits_for_the_first_probe(setting):
    setting.learn("a", "b")
    assert await setting.pull() in ("a", "b")
    assert setting.is_whole()


async def test_a_road_that_both_do_not_have_is_not_taken(setting):
    setting.learn("b")
    assert await setting.pull() == "b"
    assert setting.pullers["a"].num_pulls == 0


async def test_a_road_through_others_is_taken_when_it_is_the_only_one(setting):
    setting.learn("c")
    assert await setting.pull() == "c"
    assert setting.is_whole()


async def test_a_road_through_others_rests_while_a_direct_one_works(setting):
    setting.learn("a", "b", "c")
    await setting.pull()
    await asyncio.sleep(0.05)
    assert setting.pullers["c"].num_pulls == 0


async def test_when_the_road_fails_the_other_one_brings_the_bytes(setting):
    setting.learn("a", "b")
    await setting.pull()
    await asyncio.sleep(0.05)  # all are probed
    first = setting.puller._learned[setting.link].choice.proven()[0]
    setting.pullers[first].faults.append(Fail(num_copies=1))
    assert await setting.pull() == ({"a", "b"} - {first}).pop()
    assert setting.is_whole()
    assert setting.puller.stats()[f'kvray_transfers_failed_total{{road="{first}"}}'] == 1


@pytest.mark.slow
async def test_a_road_that_failed_comes_back_after_a_probe(setting):
    setting.learn("a")
    await setting.pull()
    setting.pullers["a"].faults.append(Fail())
    with pytest.raises(TransferError):
        await setting.pull()
    with pytest.raises(TransferError, match="no road works"):
        await setting.pull()
    await asyncio.sleep(1.3)
    assert await setting.pull() == "a"


async def test_a_road_that_stalls_at_the_probe_is_not_waited_for_twice(setting):
    setting.pullers["a"].faults.append(Stall())
    setting.learn("a", "b")
    assert await setting.pull() == "b"
    assert setting.pullers["a"].num_pulls == 1


async def test_without_any_road_the_error_says_so(setting):
    setting.learn()
    with pytest.raises(TransferError, match="no road is common"):
        await setting.pull()


async def test_a_peer_that_described_nothing_cannot_be_pulled_from(setting):
    with pytest.raises(TransferError, match="never said"):
        await setting.pull()


async def test_a_refusal_is_not_tried_on_another_road(setting):
    setting.learn("a", "b")
    await asyncio.sleep(0.05)
    with pytest.raises(RegionError):
        await setting.puller.pull(setting.link, [Copy(SIZE, 0, 1)], setting.target)
    assert len(setting.puller._learned[setting.link].choice.proven()) == 2


async def test_late_bytes_forbid_a_second_try_into_the_same_targets(setting):
    setting.learn("a", "b")
    await setting.pull()
    await asyncio.sleep(0.05)
    first = setting.puller._learned[setting.link].choice.proven()[0]
    setting.pullers[first].faults.append(WriteLate(delay_s=0.01))
    with pytest.raises(TransferError) as caught:
        await setting.pull()
    assert caught.value.quarantine_s > 0


async def test_a_lost_peer_ends_pulls_at_once(setting):
    setting.learn("a")
    await setting.pull()
    setting.pullers["a"].faults.append(Stall())
    setting.puller._stall_s = 60.0
    pull = asyncio.ensure_future(setting.pull())
    await asyncio.sleep(0.01)
    setting.puller.disconnect(setting.link)
    with pytest.raises(TransferError):
        await asyncio.wait_for(pull, 1)
    with pytest.raises(TransferError):
        await setting.pull()


async def test_a_distrusted_road_gives_way_to_the_other(setting):
    setting.learn("a", "b")
    await asyncio.sleep(0.05)
    setting.pullers["a"].faults.append(Corrupt())
    setting.pullers["b"].faults.append(Corrupt())
    road = await setting.pull()
    setting.puller.distrust(setting.link, road)
    assert await setting.pull() != road


async def test_status_tells_road_carriers_and_rate(setting):
    assert setting.puller.status(setting.link, "p").road == ""
    setting.learn("a")
    await setting.pull()
    status = setting.puller.status(setting.link, "tcp://p:1")
    assert (status.peer, status.road, status.carriers) == ("tcp://p:1", "a", "memcpy")
    assert status.bytes_per_s > 0


async def test_memory_that_a_road_cannot_read_is_not_offered_on_it(setting):
    class Refusing(LoopbackTransport):
        def register(self, memory):
            raise RegionError("not that memory")

    network = LoopbackNetwork()
    transports = [Refusing(network, road="no"), LoopbackTransport(network, road="yes")]
    roads = Roads(transports, setting.source, setting.scratch, 1.0)
    assert roads.names == ("yes",)
    assert [region.road for region in roads.regions] == ["yes"]
    roads.close()


async def test_messages_for_unknown_roads_are_dropped(setting, caplog):
    setting.puller.on_message(setting.link, "pigeon", b"hello")
    assert "pigeon" in caplog.text


async def test_a_region_of_a_road_nobody_knows_is_ignored(setting):
    stranger = RegionInfo(road="pigeon", handle=b"", num_bytes=SIZE, nonce=bytes(16))
    setting.puller.learn(setting.link, [*setting.owner.regions, stranger])
    assert await setting.pull() in ("a", "b")


@pytest.mark.slow
async def test_it_is_known_whether_a_pull_has_a_road(setting):
    assert setting.puller.can_pull(setting.link), "nothing speaks against it yet"
    setting.pullers["a"].faults.append(Fail())
    setting.learn("a")
    await asyncio.sleep(0.05)
    assert not setting.puller.can_pull(setting.link)
    await asyncio.sleep(1.2)
    assert setting.puller.can_pull(setting.link), "it was probed anew"
    setting.puller.disconnect(setting.link)
    assert not setting.puller.can_pull(setting.link)


async def test_the_mean_rate_is_that_of_all_pulls(setting):
    assert setting.puller.bytes_per_s == 0
    setting.learn("a")
    await setting.pull()
    assert setting.puller.bytes_per_s > 0


async def test_a_road_that_others_kept_busy_is_not_blamed(setting, monkeypatch):
    setting.learn("a")
    await setting.pull()

    async def wait_in_vain(*_args):
        error = TransferError("not begun")
        error.is_busy = True
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(setting.pullers["a"], "pull", wait_in_vain)
        with pytest.raises(TransferError, match="not begun"):
            await setting.pull()
    assert await setting.pull() == "a"  # without a probe


@pytest.mark.slow
async def test_a_probe_that_fails_in_whatever_way_leaves_the_other_roads_and_comes_again(setting, monkeypatch, caplog):
    async def fail(*_args):
        raise ZeroDivisionError("in a library")

    with monkeypatch.context() as patch:
        patch.setattr(setting.pullers["a"], "pull", fail)
        setting.learn("a", "b")
        assert await setting.pull() == "b"
    assert "in a library" in caplog.text
    choice = setting.puller._learned[setting.link].choice
    async with asyncio.timeout(5):
        while len(choice.proven()) < 2:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)
