"""What a worker that joins is asked to take in, in what order and amounts, and when it takes traffic."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvcache.names import block_names, pack_tokens, split_names
from kvrouter.index import Holder, Run
from kvrouter.router import AskSnapshot, TellWorker, TimePassed, WorkerJoined, WorkerLost
from kvrouter.warming import Warming
from kvrouter.worker import RouterWorker
from messages.fleet import KvEvents, TakeBlocks
from messages.route import RouteRequest
from tests.kvrouter.test_router import Fleet, info, load, names
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.workers import CHANNEL, SECRET, engine_of, running_decode, until, worker_options
from transport.channel import ChannelClient


def fleet_that_served(*chains: tuple[int, int], **changes) -> Fleet:
    """A worker that holds some blocks of each chain, for each of which a request was placed, the last one last."""
    fleet = Fleet(info("old", **changes))
    for seq, (chain, num_blocks) in enumerate(chains, 1):
        fleet.tell(KvEvents(worker_id="old", seq=seq, stored=names(chain, num_blocks)))
    for number, (chain, num_blocks) in enumerate(chains):
        fleet.now_s += 1.0
        fleet.route(request_id=f"served {number}", chain=chain, num_blocks=num_blocks + 1)
    return fleet


def join(fleet: Fleet, worker_id="new", held: bytes = b"", **changes) -> list[TakeBlocks]:
    """A worker comes; what it is told once it said what it holds."""
    assert fleet.tell(WorkerJoined(info(worker_id, **changes))) == [AskSnapshot(worker_id)]
    told = fleet.tell(KvEvents(worker_id=worker_id, seq=0, cleared=True, stored=held))
    fleet.tell(load(worker_id))
    return taken(told, worker_id)


def taken(told, worker_id="new") -> list[TakeBlocks]:
    takes = [instruction for instruction in told if isinstance(instruction.message, TakeBlocks)]
    assert all(isinstance(take, TellWorker) and take.worker_id == worker_id for take in takes)
    return [take.message for take in takes]


def places(fleet: Fleet) -> set[str]:
    return {fleet.route(request_id=f"r{number}", chain=90 + number).decode_worker for number in range(40)}


def test_it_is_asked_for_what_was_matched_last_first_tails_first_and_takes_traffic_when_it_came():
    fleet = fleet_that_served((1, 3), (2, 2))
    takes = join(fleet)
    assert [(take.address, split_names(take.names), take.age_s) for take in takes] == [
        ("tcp://old:1", split_names(names(2, 2))[::-1], 0.0),
        ("tcp://old:1", split_names(names(1, 3))[::-1], 1.0),
    ]
    assert places(fleet) == {"old"}
    fleet.tell(KvEvents(worker_id="new", seq=1, stored=names(2, 2)))
    assert places(fleet) == {"old"}
    fleet.tell(KvEvents(worker_id="new", seq=2, stored=names(1, 3)))
    assert places(fleet) == {"old", "new"}


def test_what_came_by_a_second_snapshot_came():
    fleet = fleet_that_served((1, 3), (2, 2))
    assert join(fleet)
    assert fleet.tell(KvEvents(worker_id="new", seq=5, stored=names(2, 2))) == [AskSnapshot("new")]
    fleet.tell(KvEvents(worker_id="new", seq=0, cleared=True, stored=names(2, 2), num_pieces_left=1))
    assert places(fleet) == {"old"}
    fleet.tell(KvEvents(worker_id="new", seq=1, stored=names(1, 3), num_pieces_left=0))
    assert places(fleet) == {"old", "new"}


def test_it_takes_traffic_after_a_while_whatever_came_and_at_once_where_there_is_no_other():
    fleet = fleet_that_served((1, 3))
    assert join(fleet)
    assert places(fleet) == {"old"}
    fleet.now_s += 5.0
    fleet.tell(TimePassed())
    assert places(fleet) == {"old", "new"}
    fleet.tell(WorkerLost("new"))
    assert join(fleet)
    fleet.tell(WorkerLost("old"))
    assert places(fleet) == {"new"}


def test_a_worker_that_nothing_is_known_for_or_that_holds_it_takes_traffic_at_once():
    fleet = Fleet(info("old"))
    assert join(fleet) == []
    assert places(fleet) == {"old", "new"}
    fleet = fleet_that_served((1, 3))
    assert join(fleet, held=names(1, 3)) == []
    assert places(fleet) == {"old", "new"}


def test_it_is_asked_for_half_of_its_blocks_at_most_and_for_some_at_a_time():
    fleet = fleet_that_served((1, 450), (2, 500))
    takes = join(fleet, num_blocks=1400)
    every = [split_names(take.names) for take in takes]
    assert [len(part) for part in every] == [256, 244, 200]
    assert every[0] == split_names(names(2, 256))[::-1]
    assert every[2] == split_names(names(1, 200))[::-1]
    fleet = fleet_that_served((1, 1000), max_model_len=1 << 20)
    assert [len(split_names(take.names)) for take in join(fleet)] == [256, 256]
    told = fleet.tell(KvEvents(worker_id="new", seq=1, stored=names(1, 256)))
    assert [split_names(take.names) for take in taken(told)] == [split_names(names(1, 768))[512:][::-1]]


def test_a_prompt_that_goes_on_is_remembered_once_and_what_cannot_be_reached_is_not_asked_for():
    fleet = fleet_that_served((1, 3), (1, 5))
    [take] = join(fleet)
    assert split_names(take.names) == split_names(names(1, 5))[::-1]
    assert join(fleet_that_served((1, 3)), node_id="another") == []
    assert join(fleet_that_served((1, 3)), fingerprint=b"another") == []


def test_each_part_of_a_prompt_is_asked_of_who_has_it():
    fleet = Fleet(info("old"), info("other"))
    fleet.tell(KvEvents(worker_id="old", seq=1, stored=names(1, 2)))
    fleet.tell(KvEvents(worker_id="other", seq=1, stored=names(1, 5)[2 * 16 :]))
    fleet.route(chain=1, num_blocks=6)
    assert [(take.address, split_names(take.names)) for take in join(fleet)] == [
        ("tcp://old:1", split_names(names(1, 2))[::-1]),
        ("tcp://other:1", split_names(names(1, 5))[2:][::-1]),
    ]


def test_of_what_it_has_no_room_for_nobody_is_looked_up():
    looked_up = []

    def runs(prefix: bytes) -> list[Run]:
        looked_up.append(prefix)
        return [Run(0, len(prefix) // 16, (Holder("old"),))]

    infos = {"old": info("old"), "new": info("new", num_blocks=20)}
    warming = Warming(runs, infos.__getitem__)
    for chain in range(100):
        warming.note(names(chain, 8), 0.0)
    warming.begin("new", 0.0)
    assert [len(split_names(take.names)) for take in warming.on_snapshot("new", 0, 0.0)] == [8, 2]
    assert looked_up == [names(99, 8), names(98, 8)]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
async def test_a_worker_that_joins_holds_what_was_asked_last_before_it_is_asked(tmp_path):
    model_dir = make_tiny_model(tmp_path)
    prompt = [random.Random(7).randrange(5, 250) for _ in range(330)]
    options = worker_options(model_dir)
    wanted = Reference(model_dir).greedy(prompt, 16)
    async with (
        running_decode(options) as (_, ingress),
        running_decode(options, worker_id="joined") as (joined, its_ingress),
    ):
        router = RouterWorker("router", SECRET, "127.0.0.1", CHANNEL)
        answers: asyncio.Queue = asyncio.Queue()
        client = ChannelClient(SECRET, router.address, answers.put_nowait, lambda _: None, config=CHANNEL)
        router.set_fleet([ingress.info])
        assert await ingress.finish(ingress.send("first", prompt)) == [wanted]
        every = block_names(ingress.info.fingerprint, b"", pack_tokens(prompt), 16)

        async def place():
            client.send(RouteRequest(request_id="r", names=every, num_prompt_tokens=330, max_tokens=1))
            return await asyncio.wait_for(answers.get(), 5)

        async with asyncio.timeout(10):
            while not getattr(await place(), "held", ()):  # it has to hear of the worker, and of its blocks
                pass
        router.set_fleet([ingress.info, its_ingress.info])
        await until(lambda: all(map(engine_of(joined).pool.holds, split_names(every))))
        answer = its_ingress.send("warm", prompt)
        assert await its_ingress.finish(answer) == [wanted]
        assert (answer.sources.device, answer.sources.computed) == (320, 10)
        await until(lambda: not engine_of(joined).pool.num_used)
        client.close()
        router.close()
