import itertools

import msgspec
import numpy as np
import pytest

from kvrouter.fit import can_ever_hold, can_hand_over
from kvrouter.fleet_table import FleetTable
from kvrouter.index import Holder, Matches, Run
from kvrouter.policy import Assumptions, Pricing, check_ttft
from kvrouter.worker_state import Reserved, WorkerState
from messages.errors import CapacityError
from messages.fleet import LoadReport, WorkerInfo
from messages.price import ComputePrice, MovePrice
from messages.request import Copy
from messages.route import RouteRequest

ASSUMED = Assumptions()


def per_second(num_tokens):
    """The price of a worker that prefills so many tokens a second, whatever their positions; 0: none was measured."""
    return ComputePrice(token_s=1 / num_tokens) if num_tokens else None


def link(source, *, byte_s=1e-9, handoff_s=0.005, road="shm"):
    return MovePrice(source=f"tcp://{source}:1", road=road, fixed_s=0.0, byte_s=byte_s, handoff_s=handoff_s)


def info(worker_id, role="decode", **changes):
    fields = {
        "worker_id": worker_id,
        "role": role,
        "address": f"tcp://{worker_id}:1",
        "node_id": "n1",
        "fingerprint": b"f",
        "block_size": 16,
        "num_blocks": 1000,
        "block_bytes": 100_000,
        "max_model_len": 8192,
        "max_num_seqs": 64,
        "roads": ("shm",),
    }
    return WorkerInfo(**(fields | changes))


def load(worker_id, **changes):
    fields = {
        "worker_id": worker_id,
        "queued_s": 0.0,
        "num_waiting": 0,
        "num_running": 0,
        "free_blocks": 1000,
        "compute": per_second(1000.0),
        "decode_step_s": 0.05,
    }
    return LoadReport(**(fields | changes))


def request(num_prompt_tokens=1600, request_id="r", **changes):
    names = b"".join(i.to_bytes(16, "big") for i in range(num_prompt_tokens // 16))
    return RouteRequest(
        **(
            {"request_id": request_id, "names": names, "num_prompt_tokens": num_prompt_tokens, "max_tokens": 100}
            | changes
        )
    )


def runs_of(held):
    """The runs of a prompt; `held`: blocks at its head, or spans of them by tier, by worker id."""
    spans = [
        (Holder(worker_id, tier), span)
        for worker_id, blocks in held.items()
        for tier, span in ({"device": (0, blocks)} if isinstance(blocks, int) else blocks).items()
    ]
    cuts = sorted({0, *(position for _, span in spans for position in span)})
    runs = []
    for begin, end in itertools.pairwise(cuts):
        holders = tuple(holder for holder, (first, last) in spans if first <= begin and end <= last)
        if not holders:
            break
        runs.append(Run(begin, end, holders))
    return runs


def matches_of(runs):
    """The same runs as the index gives them to whoever prices."""
    holders = tuple(sorted({holder for run in runs for holder in run.holders}))
    is_held = np.zeros((len(runs), len(holders)), np.bool_)
    for number, run in enumerate(runs):
        is_held[number, [holders.index(holder) for holder in run.holders]] = True
    return Matches(np.array([run.end for run in runs], np.int64), is_held, holders)


class Priced:
    """A request priced at workers as they are now."""

    def __init__(self, route, runs, states):
        self.fleet = FleetTable(ASSUMED.move)
        for state in states:
            self.fleet.join(state)
        for state in states:
            if state.load is not None:
                self.fleet.report(state.load)
        self.fleet.find_best_compute()
        self.pricing = Pricing(route, matches_of(runs), self.fleet, ASSUMED)

    def best(self, decodes, prefills):
        return self.pricing.best(self.rows(decodes), self.rows(prefills))

    def all(self, decodes, prefills):
        return list(self.pricing.all(self.rows(decodes), self.rows(prefills)))

    def rows(self, states):
        return np.array(self.fleet.rows_of([state.info.worker_id for state in states]), np.int64)


def best(route, held, decodes, prefills=(), others=()):
    """The best placement; of `others`, which only hold blocks, none can be placed on."""
    return Priced(route, runs_of(held), [*decodes, *prefills, *others]).best(decodes, prefills)


def test_warm_worker_wins_until_its_queue_outweighs_the_loading_of_what_it_holds():
    cold, warm = WorkerState(info("cold"), load("cold")), WorkerState(info("warm"))
    warm.load = load("warm", queued_s=0.01, queued_short_s=0.005)
    assert best(request(1600), {"warm": 90}, [cold, warm]).decode is warm
    warm.load = load("warm", queued_s=1.0, queued_short_s=0.5)
    chosen = best(request(1600), {"warm": 90}, [cold, warm])
    assert chosen.decode is cold
    assert (chosen.decode_match_tokens, chosen.num_computed_tokens) == (0, 160)
    assert chosen.load_s == pytest.approx(0.005 + 0.009)  # 90 blocks of 100 kB


def test_warm_worker_out_of_reach_wins_until_its_queue_outweighs_its_cache():
    cold, warm = WorkerState(info("cold", node_id="n2"), load("cold")), WorkerState(info("warm"))
    warm.load = load("warm", queued_s=1.0, queued_short_s=0.5)
    assert best(request(1600), {"warm": 90}, [cold, warm]).decode is warm
    warm.load = load("warm", queued_s=2.0, queued_short_s=1.0)
    assert best(request(1600), {"warm": 90}, [cold, warm]).decode is cold


@pytest.mark.parametrize(
    ("tier", "load_s"),
    [("host", 0.005 + 0.01), ("disk", 0.005 + 0.002 + 0.02), ("remote", 0.005 + 0.1 + 0.1)],
)
def test_what_a_node_cache_holds_need_not_be_computed_and_costs_what_its_tier_costs(tier, load_s):
    decode, cache = WorkerState(info("d"), load("d")), WorkerState(info("cache", "cache"))
    chosen = best(request(1610), {"cache": {tier: (0, 100)}}, [decode], others=[cache])
    assert (chosen.decode_match_tokens, chosen.num_computed_tokens) == (0, 10)
    assert chosen.load_s == pytest.approx(load_s)
    assert chosen.ttft_s == pytest.approx(load_s + 0.01)


def test_of_several_copies_the_cheapest_is_loaded():
    decode, cache = WorkerState(info("d"), load("d")), WorkerState(info("cache", "cache"))
    held = {"cache": {"remote": (0, 100), "disk": (0, 100), "host": (0, 100)}}
    assert best(request(1610), held, [decode], others=[cache]).load_s == pytest.approx(0.015)


def test_what_is_cheaper_to_compute_is_not_loaded():
    decode, cache = WorkerState(info("d"), load("d")), WorkerState(info("cache", "cache"))
    chosen = best(request(170), {"cache": {"remote": (0, 10)}}, [decode], others=[cache])  # 0.115 s against 0.16 s
    assert chosen.num_computed_tokens == 10
    decode.report(load("d", compute=per_second(2000.0)))
    chosen = best(request(170), {"cache": {"remote": (0, 10)}}, [decode], others=[cache])
    assert (chosen.num_computed_tokens, chosen.load_s) == (170, 0.0)


def test_the_worker_on_the_node_whose_cache_holds_the_prompt_wins():
    decodes = [WorkerState(info(f"d{i}", node_id=f"n{i}"), load(f"d{i}")) for i in range(3)]
    cache = WorkerState(info("cache", "cache", node_id="n2"))
    assert best(request(1600), {"cache": {"host": (0, 100)}}, decodes, others=[cache]).decode is decodes[2]


def test_a_measured_copy_costs_what_was_measured_of_its_tier():
    decode, cache = WorkerState(info("d")), WorkerState(info("cache", "cache"))
    slow = MovePrice(source="tcp://cache:1", tier="disk", road="disk", fixed_s=0.5, byte_s=0.0, handoff_s=0.0)
    decode.report(load("d", moves=(slow,)))
    assert best(request(1610), {"cache": {"disk": (0, 100)}}, [decode], others=[cache]).load_s == pytest.approx(0.5)
    held = {"cache": {"disk": (0, 100), "host": (0, 100)}}
    assert best(request(1610), held, [decode], others=[cache]).load_s == pytest.approx(0.015)


def test_a_worker_with_a_hole_loads_the_hole_alone():
    decode, other = WorkerState(info("d"), load("d")), WorkerState(info("other"))
    spans = [Run(0, 10, (Holder("d"),)), Run(10, 40, (Holder("other"),)), Run(40, 100, (Holder("d"), Holder("other")))]
    chosen = Priced(request(1610), spans, [decode, other]).best([decode], [])
    assert (chosen.decode_match_tokens, chosen.num_computed_tokens) == (160, 10)
    assert chosen.load_s == pytest.approx(0.005 + 30 * 1e-4)


def test_a_prefill_worker_loads_what_decode_holds():
    decode = WorkerState(info("d"), load("d", num_running=60, decode_step_s=0.001))
    prefill = WorkerState(info("p", "prefill"), load("p"))
    chosen = best(request(8000), {"d": 400}, [decode], [prefill])
    assert chosen.prefill is prefill
    assert (chosen.prefill_match_tokens, chosen.num_computed_tokens) == (0, 1600)
    assert chosen.load_s == pytest.approx(0.005 + 0.04)


def test_workers_are_told_of_a_few_copies_of_each_run_their_own_first():
    decodes = [WorkerState(info(f"d{i}"), load(f"d{i}")) for i in range(6)]
    cache = WorkerState(info("cache", "cache"))
    held = {f"d{i}": 50 for i in range(6)} | {"cache": {"host": (50, 80)}, "gone": {"device": (50, 80)}}
    priced = Priced(request(1600), runs_of(held), [*decodes, cache])
    chosen = priced.best(decodes[5:], [])
    assert chosen.decode is decodes[5]
    first, second = priced.pricing.held(chosen)
    assert (first.begin, first.end, second.begin, second.end) == (0, 50, 50, 80)
    assert first.copies[0] == Copy("tcp://d5:1", "device")
    assert len(set(first.copies)) == 4
    assert second.copies == (Copy("tcp://cache:1", "host"),)


def test_long_uncached_prompt_goes_to_prefill_and_a_short_one_stays():
    decode, prefill = WorkerState(info("d"), load("d")), WorkerState(info("p", "prefill"), load("p"))
    assert best(request(1600), {}, [decode], [prefill]).prefill is prefill
    assert best(request(10), {}, [decode], [prefill]).prefill is None


def test_prompt_that_decode_holds_almost_whole_is_not_handed_over():
    decode, prefill = WorkerState(info("d"), load("d")), WorkerState(info("p", "prefill"), load("p"))
    chosen = best(request(1610), {"d": 100, "p": 100}, [decode], [prefill])
    assert chosen.prefill is None
    assert chosen.decode_match_tokens == 1600


def test_busy_prefill_sends_the_prompt_to_an_idle_decode():
    decode = WorkerState(info("d"), load("d"))
    prefill = WorkerState(info("p", "prefill"), load("p", queued_s=100.0))
    assert best(request(1600), {}, [decode], [prefill]).prefill is None


def test_decode_full_of_sequences_does_not_prefill_itself():
    decode = WorkerState(info("d"), load("d", num_running=32))
    prefill = WorkerState(info("p", "prefill"), load("p", queued_s=3.0))
    assert best(request(1600), {}, [decode], [prefill]).prefill is prefill


def test_prefill_that_holds_the_prefix_wins():
    decode = WorkerState(info("d"), load("d"))
    prefills = [WorkerState(info(f"p{i}", "prefill"), load(f"p{i}")) for i in range(3)]
    chosen = best(request(1600), {"p1": 80}, [decode], prefills)
    assert chosen.prefill is prefills[1]
    assert (chosen.prefill_match_tokens, chosen.num_computed_tokens) == (1280, 320)


def test_decode_that_holds_the_prefix_need_not_pull_it():
    decodes = [WorkerState(info(f"d{i}"), load(f"d{i}", moves=(link("p", byte_s=1e-7),))) for i in range(2)]
    prefill = WorkerState(info("p", "prefill"), load("p"))
    chosen = best(request(1600), {"p": 100, "d1": 50}, decodes, [prefill])
    assert chosen.decode is decodes[1]


def test_measured_rates_replace_the_assumed_ones_everywhere():
    slow = WorkerState(info("slow"), load("slow", compute=per_second(100.0)))
    unmeasured = WorkerState(info("unmeasured"), load("unmeasured", compute=per_second(0.0)))
    assert best(request(1600), {}, [unmeasured]).compute_s == pytest.approx(1.6)
    assert best(request(1600), {}, [slow]).compute_s == pytest.approx(16.0)
    assert best(request(1600), {}, [unmeasured], others=[slow]).compute_s == pytest.approx(16.0)


def test_fully_held_prompt_still_computes_its_last_token():
    decode = WorkerState(info("d"), load("d"))
    assert best(request(1600), {"d": 100}, [decode]).num_computed_tokens == 1


def test_worker_without_free_blocks_or_slots_is_waited_for_and_avoided():
    free = WorkerState(info("free"), load("free", queued_s=0.1))
    out_of_blocks = WorkerState(info("blocks"), load("blocks", free_blocks=10))
    out_of_slots = WorkerState(info("slots"), load("slots", num_running=1, num_waiting=63))
    assert best(request(1600), {}, [out_of_blocks, out_of_slots, free]).decode is free
    assert best(request(1600), {}, [out_of_blocks]).wait_s > 0
    assert best(request(1600), {}, [out_of_slots]).wait_s > 0
    assert best(request(1600), {}, [free]).wait_s == 0


def test_who_would_evict_what_is_used_again_costs_what_computing_that_again_does():
    full = WorkerState(info("full"), load("full", idle_blocks=40, reused_share=0.5))
    idle = WorkerState(info("idle"), load("idle", idle_blocks=100, queued_s=0.2, reused_share=0.5))
    alone = best(request(1600), {}, [full])  # 100 blocks, 60 of them kept
    assert alone.displaced_s == pytest.approx(0.5 * 0.96)
    assert alone.cost_s == pytest.approx(alone.ttft_s + alone.harm_s + 0.48)
    assert best(request(1600), {}, [full, idle]).decode is idle
    assert best(request(1600), {"full": 70}, [full]).displaced_s == 0
    full.load = load("full", idle_blocks=40, reused_share=0.0)  # nothing of it is ever used again
    assert best(request(1600), {}, [full, idle]).decode is full


def test_a_handoff_costs_what_both_of_its_workers_evict():
    decode = WorkerState(info("d"), load("d", idle_blocks=90, reused_share=1.0))
    prefill = WorkerState(info("p", "prefill"), load("p", idle_blocks=80, reused_share=1.0))
    alone, pair = sorted(
        Priced(request(1600), [], [decode, prefill]).all([decode], [prefill]),
        key=lambda c: c.decode is None or c.prefill is not None,
    )
    assert alone.displaced_s == pytest.approx(0.16)
    assert pair.displaced_s == pytest.approx(0.16 + 0.32)
    assert pair.prefill_s == pytest.approx(pair.ttft_s - pair.wait_s)
    full = WorkerState(info("full", "prefill"), load("full", idle_blocks=0, reused_share=1.0))
    chosen = best(request(1600), {}, [decode], [full, prefill])
    assert chosen.prefill is not full


def test_what_was_promised_evicts_too():
    state = WorkerState(info("d"), load("d", idle_blocks=100))
    state.reserve("other", Reserved(compute_s=0.0, blocks=30, sequences=1))
    assert state.idle_blocks == 70
    assert WorkerState(info("new")).idle_blocks == info("new").num_blocks


def test_more_choices_need_more_slots():
    decode = WorkerState(info("d"), load("d", num_running=60))
    assert best(request(160, num_sequences=4), {}, [decode]).wait_s == 0
    assert best(request(160, num_sequences=8), {}, [decode]).wait_s > 0


def test_all_prompts_of_a_request_are_priced():
    decode = WorkerState(info("d", num_blocks=10_000), load("d", free_blocks=250))
    one = best(request(1600), {}, [decode])
    both = best(request(1600, num_sequences=2, other_prompts=(3200,)), {}, [decode])
    three = best(request(3200), {}, [decode])
    assert both.compute_s == pytest.approx(one.compute_s + three.compute_s)
    assert both.num_computed_tokens == one.num_computed_tokens + 3200
    assert one.wait_s == 0
    assert both.wait_s > 0  # 300 blocks are wanted, and two


def test_equal_costs_go_to_the_least_loaded_then_by_hash():
    light, heavy = WorkerState(info("light"), load("light")), WorkerState(info("heavy"), load("heavy"))
    heavy.reserve("other", Reserved(compute_s=0.0, blocks=0, sequences=1))
    heavy.load = load("heavy", decode_step_s=1e-9)
    light.load = load("light", decode_step_s=1e-9)
    assert best(request(1), {}, [heavy, light]).decode is light
    twins = [WorkerState(info(f"d{i}"), load(f"d{i}")) for i in range(4)]
    for i in range(20):
        route = request(0, request_id=f"r{i}")
        assert best(route, {}, twins).decode is best(route, {}, twins[::-1]).decode


def test_best_is_the_cheapest_of_all():
    decodes = [WorkerState(info(f"d{i}"), load(f"d{i}", num_running=i, queued_s=0.3 * i)) for i in range(5)]
    prefills = [WorkerState(info(f"p{i}", "prefill"), load(f"p{i}", queued_s=0.7 * i)) for i in range(5)]
    matches = {"d3": 70, "p4": 100, "p0": 10}
    for num_tokens in (1, 17, 300, 1600, 5000):
        priced = Priced(request(num_tokens), runs_of(matches), [*decodes, *prefills])
        cheapest = min(candidate.cost_s for candidate in priced.all(decodes, prefills))
        assert priced.best(decodes, prefills).cost_s == pytest.approx(cheapest, abs=0.001)


def test_what_moves_while_prefill_computes_costs_nothing_more():
    prefill = WorkerState(info("p", "prefill"), load("p"))
    decode = WorkerState(info("d"))
    decode.report(load("d", num_running=40, moves=(link("p", byte_s=1e-8, handoff_s=0.001),)))
    cold = best(request(1600), {}, [decode], [prefill])  # 100 blocks of 100 kB take 0.1 s, computing 1.6 s
    assert cold.pull_s == pytest.approx(0.001)
    held = best(request(1600), {"p": 100}, [decode], [prefill])
    assert held.pull_s == pytest.approx(0.001 + 0.1 - 0.001)


def test_the_price_knows_that_long_prompts_cost_more_a_token():
    quadratic = ComputePrice(token_s=1e-4, pair_s=1e-7)
    decode = WorkerState(info("d", max_model_len=100_000, num_blocks=100_000), load("d", compute=quadratic))
    short, long = (best(request(n), {}, [decode]).compute_s / n for n in (160, 16_000))
    assert long > 5 * short
    head, tail = (best(request(16_000), {"d": held}, [decode]).compute_s for held in (0, 500))
    assert tail > head / 2  # half the tokens, but each sees more


@pytest.mark.parametrize(
    ("changes", "can"),
    [
        ({}, True),
        ({"fingerprint": b"g"}, False),
        ({"block_size": 32}, False),
        ({"block_bytes": 1}, False),
        ({"node_id": "n2"}, False),
        ({"node_id": "n2", "roads": ("shm", "ucx")}, True),
        ({"roads": ()}, False),
    ],
)
def test_handover_needs_the_same_model_and_a_road(changes, can):
    decode = info("d", roads=("shm", "ucx"))
    assert can_hand_over(info("p", "prefill", **changes), decode) is can


def test_unreachable_prefill_is_not_chosen_and_the_reachable_one_is():
    decode = WorkerState(info("d"), load("d"))
    far = WorkerState(info("far", "prefill", node_id="n2"), load("far"))
    near = WorkerState(info("near", "prefill"), load("near", queued_s=0.5))
    assert best(request(3200), {"far": 100}, [decode], [far, near]).prefill is near
    assert best(request(3200), {"far": 100}, [decode], [far]).prefill is None


def test_prompt_must_leave_room_for_one_token():
    assert can_ever_hold(info("d", max_model_len=100), request(99))
    assert not can_ever_hold(info("d", max_model_len=100), request(100))
    assert can_ever_hold(info("d", num_blocks=2), request(31))
    assert not can_ever_hold(info("d", num_blocks=2), request(32))


def test_reservations_add_up_and_go_when_the_worker_reports_the_request():
    state = WorkerState(info("d"), load("d", queued_s=5.0, num_running=1, free_blocks=100))
    state.reserve("a", Reserved(compute_s=10.0, blocks=3, sequences=1))
    state.reserve("b", Reserved(compute_s=20.0, blocks=4, sequences=2))
    state.reserve("b", Reserved(compute_s=21.0, blocks=4, sequences=2))
    assert (round(state.queue_s(999), 3), state.num_sequences, state.free_blocks) == (36, 4, 93)
    state.report(load("d", queued_s=7.0, num_running=3, free_blocks=90, request_ids=("b", "x")))
    assert (round(state.queue_s(999), 3), state.num_sequences, state.free_blocks) == (17, 4, 87)
    assert list(state.reserved) == ["a"]


def test_a_short_prompt_waits_for_short_ones_alone():
    state = WorkerState(info("d"), load("d", queued_s=30.0, queued_short_s=1.0, num_short=3))
    state.reserve("long", Reserved(10.0, 3, 1))
    state.reserve("short", Reserved(0.5, 4, 2, 0.5, 2))
    assert (state.queue_s(257), state.queue_s(256), state.num_short) == (40.5, 3.0, 5)
    state.report(load("d", queued_s=1.0, queued_short_s=1.0, request_ids=("long", "short")))
    assert (state.queue_s(257), state.queue_s(256), state.num_short) == (1.0, 1.0, 0)


def test_a_short_prompt_finds_a_slot_where_long_ones_have_taken_all_of_theirs():
    full = load("d", num_running=240, num_waiting=500, num_short=0)
    state = WorkerState(info("d"), full)
    assert best(request(4000), {}, [state], []).wait_s > 10
    assert best(request(200), {}, [state], []).wait_s == 0
    state.load = msgspec.structs.replace(full, num_short=16)
    assert best(request(200), {}, [state], []).wait_s > 10


@pytest.mark.parametrize(
    ("delay_s", "own_s", "retry_after_s"),
    [
        (15.0, 5.0, None),
        (15.0, 5.1, 1.0),
        (30.0, 2.0, 12.0),
        (9.0, 500.0, None),
        (13.5, 500.0, 4.0),
        (0.0, 500.0, None),
    ],
)
def test_a_first_token_beyond_the_limit_is_refused_until_it_is_within(delay_s, own_s, retry_after_s):
    if retry_after_s is None:
        check_ttft(delay_s, own_s, 20.0)
        return
    with pytest.raises(CapacityError, match=f"after {delay_s + own_s:.1f} s, 20 s are allowed") as caught:
        check_ttft(delay_s, own_s, 20.0)
    assert (caught.value.status, caught.value.retry_after_s) == (429, retry_after_s)
