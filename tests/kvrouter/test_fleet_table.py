"""Rows of the fleet, as workers come and go, and what they measured of each other."""

import random

import numpy as np
import pytest

from kvrouter.fleet_table import FleetTable
from kvrouter.policy import Assumptions, Pricing
from kvrouter.worker_state import Reserved, WorkerState
from messages.errors import InvariantError
from messages.price import MovePrice
from tests.kvrouter.plain_policy import PlainFleet, PlainPricing
from tests.kvrouter.test_policy import info, load, matches_of, request

ASSUMED = Assumptions()


def price(source, handoff_s, tier="device", road="ucx"):
    return MovePrice(source=f"tcp://{source}:1", tier=tier, road=road, fixed_s=0.0, byte_s=0.0, handoff_s=handoff_s)


@pytest.fixture
def fleet():
    made = FleetTable(ASSUMED.move)
    yield made
    made.check_invariants()


def join(fleet, worker_id, role="decode"):
    fleet.join(WorkerState(info(worker_id, role, node_id=worker_id, roads=("shm", "ucx"))))


def handoff_s(fleet, source, target):
    """The seconds of a handoff between two pools, as pairs are priced."""
    sources, targets = (np.array(fleet.rows_of([worker_id])) for worker_id in (source, target))
    places = (fleet.constants(rows).place for rows in (sources, targets))
    source_place, target_place = places
    return fleet.links.between(source_place, sources, target_place, targets)[2, 0, 0]


def test_what_was_measured_of_a_source_counts_whether_it_joined_before_or_after(fleet):
    for worker_id in ("d", "p"):
        join(fleet, worker_id, "decode" if worker_id == "d" else "prefill")
    fleet.report(load("d", moves=(price("p", 0.25), price("late", 0.5, road="other"))))
    join(fleet, "late", "prefill")
    assert (handoff_s(fleet, "p", "d"), handoff_s(fleet, "late", "d")) == (0.25, 0.5)
    assert fleet.links.least(np.array(fleet.rows_of(["d"])))[2, 0] == ASSUMED.move.handoff_s
    assert handoff_s(fleet, "d", "p") == 0.25  # not measured: as the road costs


def test_prices_of_a_source_that_left_are_known_when_it_comes_back_and_those_of_a_target_are_not(fleet):
    for worker_id in ("d", "p", "q"):
        join(fleet, worker_id)
    fleet.report(load("d", moves=(price("p", 0.25), price("q", 0.5), price("c", 0.1, tier="disk", road="disk"))))
    fleet.leave("p")
    join(fleet, "other")  # in the row that is free
    assert handoff_s(fleet, "other", "d") == 0.5  # of the road, the last one measured
    join(fleet, "p")
    assert handoff_s(fleet, "p", "d") == 0.25
    fleet.leave("q")
    fleet.leave("d")
    join(fleet, "e")  # in the row that is free
    assert fleet.rows_of(["e"]) == [0]
    assert list(fleet.links._left) == ["tcp://q:1"]
    fleet.report(load("p", moves=(price("q", 0.75),)))
    join(fleet, "q")
    assert handoff_s(fleet, "q", "e") == 0.75  # of the road: what d measured is not e's
    assert fleet.links._others == {}


@pytest.mark.slow
def test_a_fleet_that_grows_shrinks_and_grows_again_is_priced_as_the_plain_one():
    rng = random.Random(7)
    fleet, plain = FleetTable(ASSUMED.move), PlainFleet()
    for turn in range(300):
        if turn > 200 or rng.random() < 0.75 or not plain.workers:
            role = rng.choice(["decode", "prefill", "prefill"])
            worker = info(f"w{turn}", role, node_id=f"n{turn % 50}", roads=("shm", "ucx", "socket"))
            fleet.join(WorkerState(worker))
            plain.workers[worker.worker_id] = WorkerState(worker)
        else:
            gone = rng.choice(list(plain.workers))
            fleet.leave(gone)
            del plain.workers[gone]
    for worker_id in plain.workers:
        sources = rng.sample(sorted(plain.workers), 5)
        report = load(
            worker_id,
            queued_s=rng.choice([0.0, rng.random()]),
            num_running=rng.randint(0, 3),
            moves=tuple(price(source, rng.random() / 10) for source in sources),
        )
        fleet.report(report)
        plain.report(report)
        if rng.random() < 0.3:
            reserved = Reserved(rng.random(), rng.randint(0, 50), 1)
            fleet.reserve(worker_id, "r", reserved)
            plain.workers[worker_id].reserve("r", reserved)
    fleet.check_invariants()
    decodes, prefills = (
        [worker_id for worker_id, state in plain.workers.items() if state.info.role == role]
        for role in ("decode", "prefill")
    )
    assert len(plain.workers) > 128  # rows were added twice
    assert sorted(fleet.rows("decode")) == sorted(fleet.rows_of(decodes))
    for number in range(20):
        route = request(200 * number + 1, request_id=f"r{number}")
        expected = min(PlainPricing(route, [], plain).placements(decodes, prefills), key=lambda one: one.order)
        chosen = Pricing(route, matches_of([]), fleet, ASSUMED).best(fleet.rows("decode"), fleet.rows("prefill"))
        assert chosen.decode.info.worker_id == expected.decode
        assert (chosen.prefill.info.worker_id if chosen.prefill else None) == expected.prefill


def test_a_row_that_does_not_say_what_its_worker_does_is_noticed():
    fleet = FleetTable(ASSUMED.move)
    join(fleet, "d")
    fleet.workers["d"].reserve("r", Reserved(1.0, 1, 1))  # past the fleet
    with pytest.raises(InvariantError, match="fleet: row 0"):
        fleet.check_invariants()
