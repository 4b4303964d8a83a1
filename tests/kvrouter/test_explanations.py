"""What is kept of decisions, and told of them."""

import random

from kvrouter.router import RouterConfig, WorkerJoined, WorkerLost
from messages.errors import CapacityError
from messages.explain import ExplainPlacement, IndexQuestion
from messages.fleet import KvEvents
from messages.miss import MissedRun
from messages.route import RequestEnded
from tests.kvrouter.test_router import Fleet, info, load, names, request

OBSERVED = RouterConfig(explained_requests=3, is_observed=True)


def fleet_of(*infos, config=OBSERVED):
    return Fleet(*infos, config=config)


def explained(fleet, request_id):
    return fleet.router.explained(ExplainPlacement(query_id="q", request_id=request_id))


def test_a_placed_request_is_explained_by_what_was_priced_then_also_after_it_ended():
    fleet = fleet_of(info("d0"), info("d1"), info("p", "prefill"))
    fleet.tell(KvEvents(worker_id="d0", seq=1, stored=names(0, 40)))
    placement = fleet.route(num_blocks=50)
    before = explained(fleet, "r")
    fleet.tell(load("d0", queued_s=50.0))
    fleet.tell(RequestEnded(request_id="r"))
    after = explained(fleet, "r")
    assert after == before
    (chosen,) = (one for one in after.placements if one.is_chosen)
    assert (chosen.decode_worker, chosen.prefill_worker) == (placement.decode_worker, placement.prefill_worker)
    assert chosen.ttft_s == placement.predicted_ttft_s
    assert all(
        one.matched_tokens == {"device" if one.decode_worker == "d0" else "peer": 640} for one in after.placements
    )
    assert after.num_possible == 4
    assert len(after.placements) == 4, "two alone, and two pairs"
    assert [one.cost_s for one in after.placements] == sorted(one.cost_s for one in after.placements)
    assert after.placements[0].is_chosen


def test_what_is_told_is_what_all_placements_cost_the_cheapest_first():
    fleet = fleet_of(*(info(f"d{i}") for i in range(4)), *(info(f"p{i}", "prefill") for i in range(3)))
    for number in range(4):
        fleet.tell(load(f"d{number}", queued_s=0.1 * number, num_running=number))
    everything = fleet.router.explain(request(num_blocks=50))
    fleet.route(num_blocks=50)
    told = explained(fleet, "r")
    assert told.num_possible == 16
    assert [round(one.cost_s, 9) for one in told.placements] == [round(one.cost_s, 9) for one in everything[:8]]


def test_the_parts_add_up_to_the_cost():
    fleet = fleet_of(info("d"), info("p", "prefill"))
    fleet.route(num_blocks=20)
    for one in explained(fleet, "r").placements:
        ttft_s = one.wait_s + one.load_s + one.queue_s + one.compute_s + one.handoff_s
        assert abs(one.ttft_s - ttft_s) < 1e-9
        assert abs(one.cost_s - (ttft_s + one.crowding_s + one.displaced_s)) < 1e-9


def test_only_the_last_requests_are_kept_and_a_refused_one_is_not():
    fleet = fleet_of(info("d"))
    for number in range(5):
        fleet.route(request_id=f"r{number}")
    fleet.route(request_id="too-long", num_blocks=10_000)
    assert [bool(explained(fleet, f"r{number}").placements) for number in range(5)] == [False, False, True, True, True]
    assert explained(fleet, "too-long").placements == ()
    assert explained(fleet, "nobody's").placements == ()


def test_a_worker_that_left_meanwhile_is_still_told_of_and_one_that_took_its_row_is_not():
    fleet = fleet_of(info("d0"), info("d1"), info("p", "prefill"))
    fleet.route(num_blocks=50)
    fleet.tell(WorkerLost("d1"))
    fleet.tell(WorkerLost("p"))
    join(fleet, info("d2"))
    told = {(one.decode_worker, one.prefill_worker) for one in explained(fleet, "r").placements}
    assert {("d0", None), ("d1", None)} <= told
    assert not any("d2" in pair for pair in told)


def join(fleet, worker):

    fleet.tell(WorkerJoined(worker))


def test_where_nothing_is_to_be_kept_nothing_is():
    fleet = fleet_of(info("d"), config=RouterConfig())
    placement = fleet.route()
    assert placement.missing == ()
    assert explained(fleet, "r").placements == ()


def test_a_placement_says_why_nobody_holds_the_rest():
    prompt = random.Random(1).randbytes(10 * 16)
    fleet = fleet_of(info("d0"), info("d1"))
    fleet.tell(KvEvents(worker_id="d0", seq=1, stored=prompt[: 4 * 16]))
    fleet.tell(KvEvents(worker_id="d1", seq=1, stored=prompt[: 8 * 16]))
    fleet.tell(KvEvents(worker_id="d1", seq=2, removed=prompt[4 * 16 : 6 * 16]))
    fleet.tell(WorkerLost("d1"))
    assert fleet.route(names=prompt).missing == (
        MissedRun(4, 6, "evicted"),
        MissedRun(6, 8, "holder_lost", "d1"),
        MissedRun(8, 10, "never_seen"),
    )


def test_a_route_is_explained_before_it_is_asked_for_and_reserves_nothing():
    fleet = fleet_of(info("d0"), info("d1"))
    fleet.tell(KvEvents(worker_id="d1", seq=1, stored=names(0, 8)))
    told = fleet.router.explained(ExplainPlacement(query_id="q", route=request(num_blocks=10)))
    assert [one.decode_worker for one in told.placements if one.is_chosen] == ["d1"]
    assert told.held[0].end == 8
    assert told.missing == (MissedRun(8, 10, "never_seen"),)
    assert told.reason.startswith("decode holds 128 tokens")
    assert fleet.router.stats()["kvray_router_reservations"] == 0
    assert fleet.router.stats()["kvray_router_requests"] == 0
    assert fleet.router.demand.scaling().num_asked_total == 0, "a question is no demand"


def test_a_route_that_would_be_refused_is_explained_by_the_refusal():
    told = fleet_of().router.explained(ExplainPlacement(query_id="q", route=request()))
    assert told.error is not None
    assert told.error.kind == CapacityError.__name__


def test_the_index_tells_of_single_names_and_of_some_that_were_stored_of_late():
    fleet = fleet_of(info("d0"), info("d1"))
    fleet.tell(KvEvents(worker_id="d0", seq=1, stored=names(0, 3)))
    fleet.tell(KvEvents(worker_id="d1", seq=1, stored=names(1, 3)))
    wanted = names(1, 1) + names(2, 1) + names(0, 1)
    answer = fleet.router.who_holds(IndexQuestion(query_id="q", names=wanted))
    assert answer.names == wanted
    assert [[one.worker_id for one in holders] for holders in answer.holders] == [["d1"], [], ["d0"]]
    fleet.tell(KvEvents(worker_id="d1", seq=2, stored=names(0, 3)))
    sampled = fleet.router.who_holds(IndexQuestion(query_id="q", num_sampled=10))
    assert len(sampled.names) == 2 * 16, "each name once, however many stored it"
    assert {sampled.names[i : i + 16] for i in range(0, len(sampled.names), 16)} == {
        names(0, 3)[-16:],
        names(1, 3)[-16:],
    }
    assert sampled.out_of_step == ()
