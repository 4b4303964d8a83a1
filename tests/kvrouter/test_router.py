import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrouter.policy import Assumptions
from kvrouter.router import AskSnapshot, Reply, Router, RouterConfig, TellWorker, TimePassed, WorkerJoined, WorkerLost
from messages.cache import BlockHolder, BlocksKnown, KnownRun, WhereBlocks
from messages.fleet import KvEvents, LoadReport, SpareBlocks, WorkerInfo
from messages.price import ComputePrice, MovePrice
from messages.request import Copy, HeldRun
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.view import AskView
from tests.kvrouter.indexes import compiled


def per_second(num_tokens):
    """The price of a worker that prefills so many tokens a second; 0: none was measured."""
    return ComputePrice(token_s=1 / num_tokens) if num_tokens else None


def move(source, *, handoff_s):
    return MovePrice(source=f"tcp://{source}:1", road="shm", fixed_s=0.0, byte_s=1e-9, handoff_s=handoff_s)


def info(worker_id, role="decode", **changes):
    fields = {
        "worker_id": worker_id,
        "role": role,
        "address": f"tcp://{worker_id}:1",
        "node_id": "n1",
        "fingerprint": b"f",
        "block_size": 16,
        "num_blocks": 10_000,
        "block_bytes": 10_000,
        "max_model_len": 8192,
        "max_num_seqs": 256,
        "roads": ("shm",),
    }
    return WorkerInfo(**(fields | changes))


def load(worker_id, **changes):
    fields = {
        "worker_id": worker_id,
        "queued_s": 0.0,
        "num_waiting": 0,
        "num_running": 0,
        "free_blocks": 10_000,
        "compute": per_second(1000.0),
        "decode_step_s": 0.05,
    }
    return LoadReport(**(fields | changes))


def names(chain, num_blocks):
    return b"".join(bytes([chain]) * 12 + i.to_bytes(4, "big") for i in range(num_blocks))


def request(request_id="r", chain=0, num_blocks=10, **changes):
    return RouteRequest(
        **({
            "request_id": request_id,
            "names": names(chain, num_blocks),
            "num_prompt_tokens": num_blocks * 16 + 4,
            "max_tokens": 10,
        } | changes)
    )  # fmt: skip


class Fleet:
    """A router that workers have joined, in step, at time 0."""

    def __init__(self, *infos, config=None):
        self.router = Router(config or RouterConfig())
        self.now_s = 0.0
        for worker in infos:
            assert self.tell(WorkerJoined(worker)) == [AskSnapshot(worker.worker_id)]
            assert self.tell(KvEvents(worker_id=worker.worker_id, seq=0, cleared=True)) == []
            self.tell(load(worker.worker_id))

    def tell(self, event):
        instructions = self.router.on_event(event, self.now_s)
        while not self.router.is_swept:
            instructions += self.router.sweep()
        self.router.check_invariants()
        return instructions

    def route(self, **fields):
        (reply,) = self.tell(request(**fields))
        assert isinstance(reply, Reply)
        return reply.message


def test_placement_says_where_how_much_is_held_and_why():
    fleet = Fleet(info("d"), info("p", "prefill"))
    fleet.tell(KvEvents(worker_id="p", seq=1, stored=names(0, 40)))
    placement = fleet.route(num_blocks=50)
    assert placement.request_id == "r"
    assert (placement.decode_worker, placement.decode_address) == ("d", "tcp://d:1")
    assert (placement.prefill_worker, placement.prefill_address) == ("p", "tcp://p:1")
    assert (placement.decode_match_tokens, placement.prefill_match_tokens) == (0, 640)
    assert placement.predicted_ttft_s > 0.16
    assert "prefill 640" in placement.reason


def test_a_snapshot_in_pieces_counts_at_once_and_warms_when_it_is_whole():
    fleet = Fleet(info("d0"))
    fleet.tell(KvEvents(worker_id="d0", seq=1, stored=names(0, 4)))
    fleet.route(num_blocks=5)
    assert fleet.tell(WorkerJoined(info("d1"))) == [AskSnapshot("d1")]
    first = KvEvents(worker_id="d1", seq=0, cleared=True, num_pieces_left=1, stored=names(0, 1))
    assert fleet.tell(first) == [spare("d0", names(0, 1))]
    assert fleet.router.stats()["kvray_router_workers_out_of_step"] == 1
    *told, taken = fleet.tell(KvEvents(worker_id="d1", seq=1, num_pieces_left=0, stored=names(0, 2)[16:]))
    assert told == [spare("d0", names(0, 2)[16:])]
    assert len(taken.message.names) == 2 * 16  # what it lacks of the four
    assert fleet.router.stats()["kvray_router_workers_out_of_step"] == 0


def test_the_worker_that_was_silent_for_longest_is_told_of_as_long_as_it_is_there():
    fleet = Fleet(info("d0"), info("d1"))
    fleet.now_s = 4.0
    fleet.tell(load("d0"))
    fleet.tell(TimePassed())
    assert fleet.router.stats()["kvray_router_oldest_report_seconds"] == 4.0
    fleet.tell(WorkerLost("d1"))
    fleet.now_s = 5.0
    fleet.tell(TimePassed())
    assert fleet.router.stats()["kvray_router_oldest_report_seconds"] == 1.0
    fleet.tell(WorkerLost("d0"))
    fleet.tell(TimePassed())
    assert fleet.router.stats()["kvray_router_oldest_report_seconds"] == 0.0, "nobody is there"


def test_burst_with_one_prefix_does_not_herd_on_a_cold_fleet():
    fleet = Fleet(*(info(f"d{i}") for i in range(4)))
    placed = Counter(fleet.route(request_id=f"r{i}", num_blocks=20).decode_worker for i in range(100))
    assert len(placed) == 4
    assert max(placed.values()) - min(placed.values()) <= 2


def test_burst_over_pairs_spreads_over_both_roles():
    fleet = Fleet(*(info(f"d{i}") for i in range(4)), *(info(f"p{i}", "prefill") for i in range(2)))
    placements = [fleet.route(request_id=f"r{i}", num_blocks=50) for i in range(60)]
    decodes = Counter(placement.decode_worker for placement in placements)
    prefills = Counter(placement.prefill_worker for placement in placements)
    assert len(decodes) == 4
    assert max(decodes.values()) - min(decodes.values()) <= 6
    assert abs(prefills["p0"] - prefills["p1"]) <= 1
    assert prefills[None] > 0  # once prefill has a queue, idle decode workers help


def test_conversation_comes_back_to_the_worker_that_decoded_it():
    fleet = Fleet(*(info(f"d{i}") for i in range(4)), info("p", "prefill"))
    fleet.tell(KvEvents(worker_id="d2", seq=1, stored=names(7, 60)))
    placement = fleet.route(chain=7, num_blocks=61)
    assert (placement.decode_worker, placement.prefill_worker) == ("d2", None)
    assert placement.decode_match_tokens == 960


def test_by_load_nobody_is_chosen_for_what_it_holds_nor_for_the_prompt():
    fleet = Fleet(*(info(f"d{i}") for i in range(4)), config=RouterConfig(routing="load"))
    fleet.tell(KvEvents(worker_id="d2", seq=1, stored=names(7, 60)))
    placements = []
    for number in range(40):
        placements.append(fleet.route(request_id=f"r{number}", chain=7, num_blocks=61))
        fleet.tell(RequestEnded(request_id=f"r{number}"))
    placed = Counter(placement.decode_worker for placement in placements)
    assert len(placed) == 4
    assert max(placed.values()) < 20
    assert {placement.held for placement in placements} == {None}  # not known: a worker asks the cache of its node
    assert {placement.decode_match_tokens for placement in placements} == {0}


def test_by_load_no_copy_is_spare_and_where_blocks_lie_is_still_known():
    fleet = Fleet(info("d0"), info("d1"), config=RouterConfig(routing="load"))
    fleet.tell(KvEvents(worker_id="d0", seq=1, stored=names(0, 4)))
    assert fleet.tell(KvEvents(worker_id="d1", seq=1, stored=names(0, 4))) == []
    [run] = fleet.router.where(WhereBlocks(query_id="q", names=names(0, 4))).runs
    assert {holder.worker_id for holder in run.holders} == {"d0", "d1"}
    assert fleet.tell(WorkerLost("d0")) == []


def test_who_asks_where_a_prompt_lies_hears_of_every_tier():
    router = Router()
    router.on_event(WorkerJoined(info("d0")), 0.0)
    router.on_event(WorkerJoined(info("c0", "cache")), 0.0)
    router.on_event(KvEvents(worker_id="d0", seq=0, cleared=True, stored=names(1, 4)), 0.0)
    router.on_event(KvEvents(worker_id="c0", seq=0, tier="host", cleared=True, stored=names(1, 6)), 0.0)
    router.on_event(KvEvents(worker_id="c0", seq=1, tier="disk", stored=names(1, 4)), 0.0)
    known = router.where(WhereBlocks(query_id="q", names=names(1, 10)))
    here = (BlockHolder("d0", "device"), BlockHolder("c0", "host"), BlockHolder("c0", "disk"))
    assert known == BlocksKnown(query_id="q", runs=(KnownRun(0, 4, here), KnownRun(4, 6, here[1:2])))
    assert router.where(WhereBlocks(query_id="q", names=names(2, 10))).runs == ()
    assert router.where(WhereBlocks(query_id="q", names=b"")).runs == ()


def test_who_looks_is_told_what_is_believed_of_whom_and_what_is_hot():
    fleet = Fleet(info("d"), info("c", "cache"), info("unmeasured"), config=RouterConfig(is_observed=True))
    fleet.tell(load("unmeasured", compute=None))
    fleet.tell(load("d", queued_s=2.0, num_running=3, num_waiting=1))
    fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 8)))
    fleet.tell(KvEvents(worker_id="c", seq=1, tier="host", stored=names(0, 10)))
    fleet.tell(KvEvents(worker_id="c", seq=2, tier="disk", stored=names(1, 5)))
    for number in range(3):
        fleet.route(request_id=f"r{number}", num_blocks=12)
    fleet.route(request_id="other#2", chain=1, num_blocks=12, tenant=7)
    fleet.now_s += 5.0
    told = fleet.router.view(AskView(query_id="q"), fleet.now_s)
    holders = {holder.worker_id: holder for holder in told.holders}
    assert holders["d"].known_blocks == {"device": 8}
    assert holders["d"].num_spare == 8  # the node cache keeps them
    assert holders["c"].known_blocks == {"device": 0, "host": 10, "disk": 5}
    assert (holders["d"].num_running, holders["d"].num_waiting, holders["d"].queue_s >= 2.0) == (3, 1, True)
    assert holders["d"].ttft_s - holders["d"].queue_s == pytest.approx(told.nominal_tokens / 1000.0)
    assert (holders["c"].ttft_s, holders["unmeasured"].ttft_s) == (None, None)
    assert sum(holder.num_promised for holder in told.holders) == 4
    assert all(holder.is_in_step for holder in told.holders)
    hottest, other = told.prefixes
    assert (hottest.num_blocks, hottest.num_tokens, hottest.last_request, hottest.age_s) == (10, 160, "r2", 5.0)
    assert hottest.num_requests == pytest.approx(3, rel=0.01)
    here = (BlockHolder("d", "device"), BlockHolder("c", "host"))
    assert hottest.runs == (KnownRun(0, 8, here), KnownRun(8, 10, here[1:]))
    assert (other.num_blocks, other.last_request, other.tenant) == (5, "other#2", 7)
    own = fleet.router.view(AskView(query_id="q", tenant=7), fleet.now_s)
    assert (own.holders, [prefix.name for prefix in own.prefixes]) == ((), [other.name])
    assert fleet.router.view(AskView(query_id="q", num_prefixes=1), fleet.now_s).prefixes == (hottest,)


def test_a_router_that_nobody_observes_counts_no_prefixes_and_tells_the_rest():
    fleet = Fleet(info("d"))
    fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 8)))
    fleet.route()
    told = fleet.router.view(AskView(query_id="q"), fleet.now_s)
    assert (told.prefixes, told.holders[0].known_blocks) == (None, {"device": 8})


def test_removed_blocks_attract_no_more():
    fleet = Fleet(info("d"))
    fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 10)))
    fleet.tell(KvEvents(worker_id="d", seq=2, removed=names(0, 10)[5 * 16 :]))
    assert fleet.route().decode_match_tokens == 80


def test_lost_worker_is_never_placed_on_and_its_blocks_are_forgotten():
    fleet = Fleet(info("d0"), info("d1"))
    fleet.tell(KvEvents(worker_id="d1", seq=1, stored=names(0, 10)))
    assert fleet.route().decode_worker == "d1"
    fleet.tell(WorkerLost("d1"))
    assert fleet.route(request_id="r2").decode_worker == "d0"
    fleet.tell(WorkerJoined(info("d1")))
    assert fleet.router.explain(request())[0].decode_match_tokens == 0


@pytest.mark.parametrize("rate", [0.0, 100.0], ids=["unmeasured", "once measured badly"])
def test_prefill_worker_is_not_left_out_for_a_rate_that_nobody_gave_it_a_chance_to_show(rate):
    fleet = Fleet(info("d"), info("p", role="prefill"))
    fleet.tell(load("d", compute=per_second(20_000.0)))
    fleet.tell(load("p", compute=per_second(rate)))
    fleet.tell(load("d", compute=per_second(20_000.0), num_running=8))
    assert fleet.route(num_blocks=400).prefill_worker == "p"


def test_each_link_has_its_own_price():
    fleet = Fleet(info("d"), info("near", "prefill"), info("far", "prefill"))
    fleet.tell(load("d", moves=(move("near", handoff_s=0.004), move("far", handoff_s=0.3))))
    assert fleet.route(num_blocks=30).prefill_worker == "near"
    fleet.tell(load("d", moves=(move("far", handoff_s=0.001),)))  # only what changed is told
    fleet.tell(load("near", queued_s=0.5))
    assert fleet.route(request_id="r9", chain=9, num_blocks=30).prefill_worker == "far"


def test_an_unmeasured_link_costs_what_its_road_costs_others():
    fleet = Fleet(info("d0"), info("d1"), info("p", "prefill"))
    fleet.tell(load("d0", moves=(move("elsewhere", handoff_s=2.0),)))
    assert fleet.route(num_blocks=30).prefill_worker is None


def test_a_prompt_that_decode_computes_itself_is_not_held_against_prefill():
    fleet = Fleet(info("d"), info("p", "prefill"))
    placement = fleet.route(num_blocks=100)
    assert placement.prefill_worker == "p"
    assert placement.prefill_s == pytest.approx(1.604 + 0.005)
    assert fleet.router.stats()["kvray_router_reservations"] == 2
    for _ in range(2):
        fleet.tell(load("d", request_ids=("r",), declined_ids=("r", "unknown"), num_running=1))
    assert fleet.router.stats()["kvray_router_reservations"] == 0
    assert fleet.router.stats()["kvray_router_declined_total"] == 1
    fleet.tell(RequestEnded(request_id="r"))
    assert fleet.router.stats()["kvray_router_requests"] == 0


def test_prefill_that_was_lost_is_not_used():
    fleet = Fleet(info("d"), info("p", "prefill"))
    assert fleet.route(num_blocks=100).prefill_worker == "p"
    fleet.tell(WorkerLost("p"))
    assert fleet.route(request_id="r2", num_blocks=100).prefill_worker is None


@pytest.mark.parametrize("seq", [0, 2, 5])
def test_gap_leads_to_one_question_and_is_healed_by_the_snapshot(seq):
    fleet = Fleet(info("d"))
    assert fleet.tell(KvEvents(worker_id="d", seq=seq, stored=names(0, 3))) == [AskSnapshot("d")]
    assert fleet.tell(KvEvents(worker_id="d", seq=seq + 1, stored=names(0, 3))) == []
    assert fleet.route().decode_match_tokens == 0
    assert fleet.tell(KvEvents(worker_id="d", seq=0, cleared=True, stored=names(0, 10))) == []
    assert fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(1, 2))) == []
    assert fleet.route(request_id="r2").decode_match_tokens == 160


def test_torn_names_count_as_a_gap():
    fleet = Fleet(info("d"))
    assert fleet.tell(KvEvents(worker_id="d", seq=1, stored=b"short")) == [AskSnapshot("d")]


def test_snapshot_that_does_not_come_is_asked_for_again():
    fleet = Fleet(info("d"))
    fleet.tell(KvEvents(worker_id="d", seq=9))
    fleet.now_s = 4.0
    assert fleet.tell(TimePassed()) == []
    fleet.now_s = 6.0
    assert fleet.tell(TimePassed()) == [AskSnapshot("d")]
    assert fleet.tell(TimePassed()) == []


def test_events_and_reports_of_strangers_are_ignored():
    fleet = Fleet(info("d"))
    assert fleet.tell(KvEvents(worker_id="x", seq=0, cleared=True, stored=names(0, 10))) == []
    assert fleet.tell(load("x")) == []
    assert fleet.route().decode_worker == "d"
    assert fleet.tell(RequestEnded(request_id="unheard of")) == []


def test_reservation_ends_with_the_workers_report_the_end_or_its_deadline():
    fleet = Fleet(info("d"), config=RouterConfig(reservation_grace_s=2.0))

    def queued():
        (candidate,) = fleet.router.explain(request(num_blocks=20))
        return candidate.queue_s

    fleet.route(request_id="a")
    assert queued() == pytest.approx(0.164)
    fleet.tell(load("d", queued_s=0.01, num_running=1, request_ids=("a",)))
    assert queued() == pytest.approx(0.010)
    fleet.route(request_id="b")
    assert queued() == pytest.approx(0.174)
    fleet.tell(RequestEnded(request_id="b"))
    assert queued() == pytest.approx(0.010)
    placement = fleet.route(request_id="c")
    fleet.now_s = placement.predicted_ttft_s + 1.9
    fleet.tell(TimePassed())
    assert queued() == pytest.approx(0.174)
    fleet.now_s += 0.2
    fleet.tell(TimePassed())
    assert queued() == pytest.approx(0.010)


def test_request_whose_end_nobody_tells_is_forgotten_when_no_worker_reports_it_any_more():
    fleet = Fleet(info("d"))
    fleet.route(request_id="a")
    fleet.route(request_id="b")

    def num_requests():
        fleet.tell(TimePassed())
        return fleet.router.stats()["kvray_router_requests"]

    for _ in range(100):
        fleet.now_s += 1.0
        fleet.tell(load("d", num_running=1, request_ids=("a",)))
    assert num_requests() == 1
    assert fleet.router.has("a")
    fleet.tell(load("d"))
    fleet.now_s += 29.0
    assert num_requests() == 1
    fleet.now_s += 2.0
    assert num_requests() == 0
    assert fleet.router.stats()["kvray_router_reservations"] == 0


def test_report_from_before_a_placement_does_not_undo_it():
    fleet = Fleet(info("d"))
    fleet.route(request_id="a")
    fleet.tell(load("d"))
    assert fleet.router.explain(request(num_blocks=20))[0].queue_s > 0


def test_request_routed_anew_is_reserved_once():
    fleet = Fleet(info("d0"), info("d1"))
    first = fleet.route(request_id="a")
    second = fleet.route(request_id="a", exclude=(first.decode_worker,))
    assert {first.decode_worker, second.decode_worker} == {"d0", "d1"}
    assert fleet.router.stats()["kvray_router_reservations"] == 1


def test_nobody_there_is_503_all_excluded_is_a_worker_error_and_too_long_is_the_callers():
    fleet = Fleet(info("p", "prefill"))
    failed = fleet.route()
    assert isinstance(failed, RouteFailed)
    assert (failed.error.kind, failed.error.status) == ("CapacityError", 503)
    fleet.tell(WorkerJoined(info("d", max_model_len=100)))
    assert fleet.route(exclude=("d",)).error.kind == "WorkerError"
    too_long = fleet.route().error
    assert (too_long.kind, too_long.code) == ("RequestError", "context_length_exceeded")
    assert "164" in too_long.message
    assert "99" in too_long.message


def test_saturated_fleet_is_429_with_a_time_to_come_back_and_counts_nothing():
    fleet = Fleet(info("d"), config=RouterConfig(max_ttft_s=5.0))
    fleet.tell(load("d", queued_s=20.0))
    failed = fleet.route(num_blocks=20)
    assert (failed.error.kind, failed.error.status, failed.error.retry_after_s) == ("CapacityError", 429, 16.0)
    assert fleet.router.stats()["kvray_router_reservations"] == 0


def test_short_requests_have_a_share_that_long_ones_do_not_fill():
    fleet = Fleet(info("d"), info("p", "prefill"), config=RouterConfig(max_ttft_s=5.0))
    answers = [fleet.route(request_id=f"long{i}", chain=i, num_blocks=100) for i in range(20)]
    assert isinstance(answers[-1], RouteFailed)
    short = fleet.route(request_id="short", chain=99, num_blocks=2)
    assert isinstance(short, Placement)
    assert short.predicted_ttft_s < 0.1
    answers = [fleet.route(request_id=f"short{i}", chain=99, num_blocks=10) for i in range(100)]
    assert isinstance(answers[-1], RouteFailed)  # their share has an end, too


def test_a_request_with_several_prompts_counts_for_all_of_them():
    fleet = Fleet(info("d"), config=RouterConfig(max_ttft_s=5.0))
    assert isinstance(
        fleet.route(request_id="list", num_blocks=2, num_sequences=20, other_prompts=(500,) * 19), Placement
    )
    assert fleet.router._workers["d"].reserved["list"].blocks == 19 * 32 + 3 + 20
    failed = fleet.route(request_id="next", num_blocks=100)
    assert failed.error.status == 429  # behind 9.5 s
    too_long = fleet.route(request_id="long", num_blocks=2, num_sequences=2, other_prompts=(9000,)).error
    assert too_long.code == "context_length_exceeded"


def test_nobody_is_refused_by_what_is_only_assumed_of_how_long_requests_take():
    fleet = Fleet(info("d", max_num_seqs=2), config=RouterConfig(max_ttft_s=5.0))
    fleet.tell(load("d", compute=per_second(1e6)))
    first = [fleet.route(request_id=f"r{i}", chain=i, num_blocks=20) for i in range(9)]
    assert all(isinstance(placement, Placement) for placement in first)
    fleet.now_s = 8.0
    fleet.tell(RequestEnded(request_id="r0"))
    assert fleet.route(request_id="next", num_blocks=20).error.status == 429


def test_huge_prompt_on_an_idle_fleet_is_not_refused_for_its_own_length():
    fleet = Fleet(info("d"), config=RouterConfig(max_ttft_s=5.0))
    assert isinstance(fleet.route(num_blocks=500), Placement)


def test_burst_beyond_what_is_allowed_to_wait_is_refused_early():
    fleet = Fleet(info("d"), config=RouterConfig(max_ttft_s=5.0))
    answers = [fleet.route(request_id=f"r{i}", num_blocks=20) for i in range(40)]
    kinds = [isinstance(answer, Placement) for answer in answers]
    assert kinds == sorted(kinds, reverse=True)
    assert 12 <= sum(kinds) <= 18  # 5 s at 324 tokens each, 1,000 tokens/s


def test_explanation_lists_every_pair_cheapest_first_and_reserves_nothing():
    fleet = Fleet(info("d0"), info("d1"), info("p0", "prefill"), info("p1", "prefill"))
    candidates = fleet.router.explain(request(num_blocks=50))
    pairs = {(c.decode.info.worker_id, c.prefill.info.worker_id if c.prefill else None) for c in candidates}
    assert pairs == {(d, p) for d in ("d0", "d1") for p in ("p0", "p1", None)}
    costs = [candidate.cost_s for candidate in candidates]
    assert costs == sorted(costs)
    assert fleet.router.stats()["kvray_router_reservations"] == 0


def test_how_long_requests_take_is_learnt():
    fleet = Fleet(info("d", max_num_seqs=1), config=RouterConfig(assumed=Assumptions(sequence_s=10.0)))
    for i in range(200):
        fleet.route(request_id=f"r{i}")
        fleet.now_s += 1.0
        fleet.tell(RequestEnded(request_id=f"r{i}"))
    fleet.tell(load("d", num_running=1))
    assert fleet.router.explain(request())[0].wait_s == pytest.approx(1.0, rel=0.01)


def test_the_first_requests_that_end_tell_most_of_how_long_they_take():
    fleet = Fleet(info("d", max_num_seqs=1), config=RouterConfig(assumed=Assumptions(sequence_s=10.0)))
    for i in range(9):
        fleet.route(request_id=f"r{i}")
        fleet.now_s += 1.0
        fleet.tell(RequestEnded(request_id=f"r{i}"))
    fleet.tell(load("d", num_running=1))
    assert fleet.router.explain(request())[0].wait_s == pytest.approx((10.0 + 9 * 1.0) / 10)


@pytest.mark.slow
def test_router_is_light_to_import():
    program = (
        "import sys, time; started = time.process_time(); import kvrouter.router; "
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules); "
        "print(time.process_time() - started)"
    )
    times = [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(3)]
    assert min(times) < 0.3


# ---------------------------------------------------------------------------------------------- who holds, who keeps


def test_a_placement_names_who_holds_which_blocks_in_which_tier():
    fleet = Fleet(info("d"), info("p", "prefill"), info("c", "cache"))
    fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 4)))
    fleet.tell(KvEvents(worker_id="c", seq=1, tier="host", stored=names(0, 10)[4 * 16 :]))
    fleet.tell(KvEvents(worker_id="c", seq=2, tier="disk", stored=names(0, 10)))
    assert fleet.route(num_blocks=10).held == (
        HeldRun(0, 4, (Copy("tcp://d:1", "device"), Copy("tcp://c:1", "disk"))),
        HeldRun(4, 10, (Copy("tcp://c:1", "host"), Copy("tcp://c:1", "disk"))),
    )


def test_nothing_is_placed_on_a_node_cache():
    fleet = Fleet(info("c", "cache"))
    fleet.tell(KvEvents(worker_id="c", seq=1, tier="host", stored=names(0, 10)))
    assert isinstance(fleet.route(), RouteFailed)
    fleet.tell(WorkerJoined(info("d")))
    placement = fleet.route(request_id="r2")
    assert (placement.decode_worker, placement.num_computed_tokens) == ("d", 4)


def spare(worker_id, names):
    return TellWorker(worker_id, SpareBlocks(spare=names))


def kept(worker_id, names):
    return TellWorker(worker_id, SpareBlocks(kept=names))


def test_who_got_a_block_last_keeps_it_and_the_other_copy_is_spare():
    fleet = Fleet(info("d"), info("p", "prefill"))
    assert fleet.tell(KvEvents(worker_id="p", seq=1, stored=names(0, 3))) == []
    assert fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 2))) == [spare("p", names(0, 2))]
    assert fleet.tell(KvEvents(worker_id="d", seq=2, removed=names(0, 1))) == [kept("p", names(0, 1))]


def test_a_node_cache_keeps_what_a_pool_holds_too():
    fleet = Fleet(info("d"), info("c", "cache"))
    fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 2)))
    assert fleet.tell(KvEvents(worker_id="c", seq=1, tier="disk", stored=names(0, 2))) == []  # not at hand there
    assert fleet.tell(KvEvents(worker_id="c", seq=2, tier="host", stored=names(0, 2))) == [spare("d", names(0, 2))]
    assert fleet.tell(KvEvents(worker_id="c", seq=3, tier="host", removed=names(0, 2))) == [kept("d", names(0, 2))]


def test_when_a_keeper_is_lost_whoever_is_left_keeps():
    fleet = Fleet(info("d0"), info("d1"), info("d2"))
    for worker in ("d0", "d1", "d2"):
        fleet.tell(KvEvents(worker_id=worker, seq=1, stored=names(0, 1)))
    (told,) = fleet.tell(WorkerLost("d2"))
    assert told in (kept("d0", names(0, 1)), kept("d1", names(0, 1)))
    keeper, other = told.worker_id, {"d0": "d1", "d1": "d0"}[told.worker_id]
    assert fleet.tell(WorkerLost(keeper)) == [kept(other, names(0, 1))]
    assert fleet.tell(WorkerLost(other)) == []
    assert fleet.router._index.num_shared == 0


def test_whoever_comes_back_is_told_anew_what_is_spare():
    """A worker counts all as kept after Subscribe."""
    fleet = Fleet(info("d"), info("c", "cache"))
    fleet.tell(KvEvents(worker_id="c", seq=1, tier="host", stored=names(0, 2)))
    assert fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 2))) == [spare("d", names(0, 2))]
    snapshot = KvEvents(worker_id="d", seq=0, cleared=True, stored=names(0, 2))
    assert fleet.tell(snapshot) == [spare("d", names(0, 2))]
    assert fleet.tell(WorkerJoined(info("d"))) == [AskSnapshot("d")]
    assert fleet.tell(snapshot) == [spare("d", names(0, 2))]


def test_a_snapshot_is_no_sign_of_use():
    fleet = Fleet(info("d0", num_blocks=10), info("d1", num_blocks=100))
    fleet.tell(KvEvents(worker_id="d0", seq=1, stored=names(0, 2)))
    fleet.tell(KvEvents(worker_id="d1", seq=1, stored=names(0, 2)))
    told = fleet.tell(KvEvents(worker_id="d0", seq=0, cleared=True, stored=names(0, 2)))
    assert told == [spare("d0", names(0, 2))]  # d1, which is larger, goes on


@pytest.mark.slow
def test_a_worker_that_the_index_has_no_room_for_is_told_of_and_listened_to_once_there_is(monkeypatch, caplog):
    index = compiled()
    for number in range(2**16 - 1):
        index.fold(f"w{number}")
    monkeypatch.setattr("kvrouter.router.open_index", lambda _: index)
    fleet = Fleet(info("d"))  # the last one that there is room for
    fleet.tell(WorkerJoined(info("e")))
    snapshot = KvEvents(worker_id="e", seq=0, cleared=True, stored=names(0, 4), num_pieces_left=0)
    assert fleet.tell(snapshot) == []
    assert "what e has in tier device is unknown here: block index: 65,536 holders" in caplog.text
    assert fleet.router.stats()["kvray_router_index_full_total"] == 1
    assert fleet.route().decode_worker in ("d", "e")
    index.drop("w0")
    assert fleet.tell(TimePassed()) == []
    fleet.now_s = 6.0
    assert fleet.tell(TimePassed()) == [AskSnapshot("e")]
    fleet.tell(snapshot)
    assert fleet.route(request_id="again").decode_worker == "e"
    assert fleet.router.stats()["kvray_router_workers_out_of_step"] == 0


def test_the_share_that_a_worker_keeps_leaves_spare_copies_out():
    fleet = Fleet(info("d", num_blocks=10), info("p", "prefill", num_blocks=20))
    fleet.tell(KvEvents(worker_id="p", seq=1, stored=names(0, 8)))
    fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 5)))
    stats = fleet.router.stats()
    assert stats['kvray_router_kept_share{of="d"}'] == pytest.approx(0.5)
    assert stats['kvray_router_kept_share{of="p"}'] == pytest.approx(0.15)


def test_a_gap_between_reports_leads_to_a_snapshot_and_what_it_lists_is_not_taken():
    fleet = Fleet(info("d"))
    assert fleet.tell(load("d", seq=1, is_whole=False, request_ids=("a",))) == []
    assert fleet.tell(load("d", seq=3, is_whole=False, request_ids=("b",), num_running=5)) == [AskSnapshot("d")]
    assert fleet.tell(load("d", seq=4, is_whole=False, request_ids=("c",))) == []  # asked already
    assert fleet.router.explain(request())[0].decode.request_ids == {"a"}
    assert fleet.tell(KvEvents(worker_id="d", seq=0, cleared=True)) == []
    assert fleet.tell(load("d", seq=4, request_ids=("b", "c"))) == []
    assert fleet.router.explain(request())[0].decode.request_ids == {"b", "c"}
    assert fleet.router.stats()["kvray_router_gaps_total"] == 1


def test_a_request_that_came_and_went_between_two_reports_is_reserved_for_no_longer():
    fleet = Fleet(info("d"), info("p", "prefill"))
    placement = fleet.route(num_blocks=200)
    assert placement.prefill_worker == "p"
    fleet.tell(load("p", seq=1, is_whole=False, request_ids=("r",), ended_ids=("r",)))
    assert not fleet.router._workers["p"].reserved
    assert fleet.router._workers["d"].reserved
    assert fleet.router.has("r")


def test_a_request_that_is_reported_lives_as_long_as_any_worker_has_it_and_half_a_minute_longer():
    fleet = Fleet(info("d"), info("e"))
    worker = fleet.route().decode_worker
    fleet.tell(load(worker, seq=1, is_whole=False, request_ids=("r",)))
    fleet.now_s = 500.0
    fleet.tell(TimePassed())
    assert fleet.router.has("r")
    fleet.tell(WorkerLost(worker))
    fleet.now_s = 529.0
    fleet.tell(TimePassed())
    assert fleet.router.has("r")
    fleet.now_s = 531.0
    fleet.tell(TimePassed())
    assert not fleet.router.has("r")


class RouterMachine(RuleBasedStateMachine):
    """Any order of events: one reply per request, onto workers that are there, and nothing left at the end."""

    workers = st.sampled_from(["d0", "d1", "d2", "p0", "p1", "c"])
    ids = st.sampled_from([f"r{i}" for i in range(6)])

    def __init__(self):
        super().__init__()
        self.router = Router()
        self.there = set()
        self.now_s = 0.0

    def tell(self, event):
        self.now_s += 0.01
        return self.router.on_event(event, self.now_s)

    @rule(worker=workers)
    def join(self, worker):
        role = {"d": "decode", "p": "prefill", "c": "cache"}[worker[0]]
        told = self.tell(WorkerJoined(info(worker, role, num_blocks=50, max_num_seqs=3)))
        self.there.add(worker)
        self.only_others_are_told(told, worker)

    def only_others_are_told(self, told, worker):
        for instruction in told:
            assert instruction.worker_id in self.there
            assert isinstance(instruction, AskSnapshot) or instruction.worker_id != worker

    @rule(worker=workers)
    def lose(self, worker):
        self.there.discard(worker)
        self.only_others_are_told(self.tell(WorkerLost(worker)), worker)

    @rule(
        worker=workers,
        seq=st.integers(0, 3),
        cleared=st.booleans(),
        num_left=st.sampled_from([None, 0, 1]),
        is_removed=st.booleans(),
        chain=st.integers(0, 1),
        n=st.integers(0, 12),
    )
    def events(self, worker, seq, cleared, num_left, is_removed, chain, n):
        change = {"removed" if is_removed else "stored": names(chain, n), "num_pieces_left": num_left}
        tier = "host" if worker == "c" else "device"
        for instruction in self.tell(KvEvents(worker_id=worker, seq=seq, cleared=cleared, tier=tier, **change)):
            assert instruction.worker_id in self.there
            assert isinstance(instruction, TellWorker | AskSnapshot)

    @rule()
    def sweep(self):
        for instruction in self.router.sweep():
            assert isinstance(instruction, TellWorker)
            assert instruction.worker_id in self.there

    @rule(
        worker=workers,
        free=st.integers(0, 50),
        running=st.integers(0, 5),
        seq=st.integers(0, 2),
        is_whole=st.booleans(),
        ids=st.lists(ids),
        ended=st.lists(ids),
    )
    def report(self, worker, free, running, seq, is_whole, ids, ended):
        lists = {"request_ids": tuple(ids), "ended_ids": tuple(ended)}
        report = load(worker, free_blocks=free, num_running=running, seq=seq, is_whole=is_whole, **lists)
        assert all(isinstance(told, AskSnapshot) for told in self.tell(report))

    @rule(request_id=ids, chain=st.integers(0, 1), n=st.integers(0, 60), excluded=st.lists(workers, max_size=3))
    def route(self, request_id, chain, n, excluded):
        (reply,) = self.tell(request(request_id, chain, n, exclude=tuple(excluded)))
        usable = self.there - set(excluded)
        if isinstance(reply.message, Placement):
            assert reply.message.decode_worker in usable
            assert reply.message.prefill_worker in usable | {None}
            assert reply.message.predicted_ttft_s >= 0
        else:
            can_fit = n * 16 + 4 < 50 * 16
            assert reply.message.error.status == 429 or not can_fit or not any(w.startswith("d") for w in usable)

    @rule(request_id=ids)
    def end(self, request_id):
        assert self.tell(RequestEnded(request_id=request_id)) == []

    @rule(seconds=st.sampled_from([1.0, 30.0]))
    def wait(self, seconds):
        self.now_s += seconds
        for instruction in self.tell(TimePassed()):
            assert instruction.worker_id in self.there

    @invariant()
    def sums_agree(self):
        self.router.check_invariants()

    def teardown(self):
        for i in range(6):
            self.tell(RequestEnded(request_id=f"r{i}"))
        self.router.check_invariants()
        assert self.router.stats()["kvray_router_reservations"] == 0
        assert self.router.stats()["kvray_router_requests"] == 0


TestRouterMachine = pytest.mark.slow(RouterMachine.TestCase)
TestRouterMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_what_is_asked_is_added_up_by_role_and_refused_requests_with_it():
    fleet = Fleet(info("d"), info("p", "prefill"), config=RouterConfig(max_ttft_s=5.0))
    fleet.tell(load("d", queued_s=1000.0, num_running=200))
    fleet.route(request_id="r1", num_blocks=100)
    fleet.tell(load("p", queued_s=100.0))
    fleet.route(request_id="r2", chain=1, num_blocks=100)
    told = fleet.router.demand.scaling()
    assert (told.num_asked_total, told.num_refused_total) == (2, 1)
    assert told.prompt_tokens_total == 2 * 1604
    assert told.prefill_asked_s_total + told.decode_asked_s_total == pytest.approx(2 * 1.604)
    assert told.prefill_asked_s_total >= 1.604
    assert told.ttft_s_total > 100.0


def test_hits_take_from_what_is_asked():
    fleet = Fleet(info("d"))
    fleet.tell(KvEvents(worker_id="d", seq=1, stored=names(0, 90)))
    fleet.route(num_blocks=100)
    told = fleet.router.demand.scaling()
    assert told.matched_tokens_total == 90 * 16
    assert told.decode_asked_s_total == pytest.approx(0.164)
