"""The autoscaling policy alone, and over real traces in a model of the fleet."""

import dataclasses
import functools
import itertools

import pytest

from cluster.autoscaling import Asked, Autoscaler, FleetSeen, RoleSeen, Targets, WorkerSeen
from cluster.fleet_model import FleetModel, Limits, ModelSession, Numbers, Outcome, WorkerShape
from cluster.hit_curve import hits, in_order
from cluster.model_sessions import model_sessions
from cluster.traces import read_trace
from messages.price import ComputePrice
from tests.shared_traces import agent_sessions, mooncake

TARGETS = Targets(ttft_s=2.0, itl_s=0.05, grow_after_s=3.0, shrink_after_s=60.0, keeps_kv=True)
IDLE = WorkerSeen(
    queued_s=0.0,
    busy_share=0.0,
    num_waiting=0,
    num_running=0,
    max_num_seqs=10,
    used_share=0.0,
    step_s=0.0,
    step_fixed_s=0.01,
)
NOBODY = Asked(prefill_s_per_s=0.0, decode_s_per_s=0.0, ttft_s=0.0, hit_share=0.0)


def worker(**changes: float) -> WorkerSeen:
    return dataclasses.replace(IDLE, **changes)


def role(*workers: WorkerSeen, **changes: int) -> RoleSeen:
    seen = {"num_wanted": len(workers), "num_there": len(workers), "least": 1, "most": 8} | changes
    return RoleSeen(workers=workers, **seen)


class World:
    """A policy that is asked every second, of a fleet that follows at once."""

    def __init__(self, targets: Targets = TARGETS) -> None:
        self.policy = Autoscaler(targets)
        self.now_s = 0.0
        self.why = ""

    def after(self, seconds: float, kind: str, seen: RoleSeen, asked: Asked | None = None) -> int:
        """The number of workers after so long of the same."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            fleet = FleetSeen(
                prefill=seen if kind == "prefill" else None, decode=seen if kind == "decode" else None, asked=asked
            )
            number, why = self.policy.decide(fleet, self.now_s)[kind]
            self.why = why or self.why
            if number != seen.num_wanted:
                seen = dataclasses.replace(seen, num_wanted=number, num_there=number)
        return seen.num_wanted


def test_a_queue_behind_others_wants_more_prefill_workers_and_says_so():
    world = World()
    busy = role(worker(queued_s=30.0, busy_share=1.0, num_running=10))
    assert world.after(3, "prefill", busy) == 1, "not before it was so for a while"
    assert world.after(2, "prefill", busy) == 2
    assert "s queued" in world.why


def test_one_prompt_that_takes_longer_than_the_target_wants_nobody():
    alone = role(worker(queued_s=30.0, busy_share=0.5, num_running=1), IDLE)
    late = dataclasses.replace(NOBODY, ttft_s=30.0, prefill_s_per_s=0.5)
    assert World().after(30, "prefill", alone, late) == 2


def test_prompts_that_decode_workers_compute_want_prefill_workers_while_there_may_be_more():
    asked = dataclasses.replace(NOBODY, decode_s_per_s=2.0)
    for most, wanted in ((8, {"prefill": 2, "decode": 2}), (1, {"prefill": 1, "decode": 3})):
        policy = Autoscaler(TARGETS)
        for now_s in range(5):
            seen = FleetSeen(prefill=role(IDLE, most=most), decode=role(IDLE, IDLE), asked=asked)
            numbers = {name: number for name, (number, _) in policy.decide(seen, float(now_s)).items()}
            if numbers["prefill"] > 1 or numbers["decode"] > 2:
                break
        assert numbers == wanted


def test_refused_requests_count_though_nobody_queues_them():
    asked = dataclasses.replace(NOBODY, prefill_s_per_s=3.0, ttft_s=25.0)
    assert World().after(20, "prefill", role(worker(busy_share=1.0, num_running=3)), asked) == 4


def test_what_hits_save_is_kept_where_no_node_cache_has_it():
    hit = dataclasses.replace(NOBODY, prefill_s_per_s=0.4, hit_share=0.9)
    seen = role(*[worker(busy_share=0.1)] * 4)
    assert World().after(200, "prefill", seen, hit) < 4
    without = World(dataclasses.replace(TARGETS, keeps_kv=False))
    assert without.after(200, "prefill", seen, hit) > World().after(200, "prefill", seen, hit)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_running": 10, "num_waiting": 8}, "slots"),
        ({"num_running": 2, "used_share": 0.95}, "blocks"),
        ({"num_running": 5, "step_s": 0.09}, "steps"),
        ({"num_running": 2, "queued_s": 30.0}, "prompts"),
    ],
)
def test_decode_grows_by_whatever_is_short(changes, why):
    world = World()
    assert world.after(6, "decode", role(worker(**changes)), NOBODY) >= 2
    assert why in world.why


def test_a_gap_that_a_single_row_exceeds_wants_nobody():
    seen = role(worker(num_running=1, step_s=0.08, step_fixed_s=0.08))
    assert World().after(60, "decode", seen, NOBODY) == 1


def test_decode_rows_in_every_step_are_no_reason_to_grow():
    assert World().after(60, "decode", role(worker(busy_share=1.0, num_running=1, step_s=0.02)), NOBODY) == 1


def test_fewer_are_taken_only_after_patience_and_never_below_the_least():
    world = World()
    idle = role(*[IDLE] * 4, least=2)
    assert world.after(60, "prefill", idle, NOBODY) == 4
    assert world.after(2, "prefill", idle, NOBODY) == 3
    assert world.after(400, "prefill", role(*[IDLE] * 3, least=2), NOBODY) == 2


def test_a_burst_within_patience_keeps_them():
    world = World()
    idle, busy = role(*[IDLE] * 4), role(*[worker(busy_share=0.6, num_running=2)] * 4)
    for _ in range(10):
        assert world.after(40, "prefill", idle, NOBODY) == 4
        assert world.after(2, "prefill", busy, NOBODY) == 4


def test_patience_grows_where_it_was_too_short():
    world = World()
    idle, busy = role(IDLE, IDLE), role(worker(busy_share=1.0, num_running=4))
    assert world.after(62, "prefill", idle, NOBODY) == 1
    assert world.after(5, "prefill", busy, NOBODY) == 2
    assert world.after(62, "prefill", idle, NOBODY) == 2, "not again after so short a time"
    assert world.after(70, "prefill", idle, NOBODY) == 1


def test_those_that_start_are_waited_for():
    starting = role(worker(queued_s=60.0, busy_share=0.7, num_running=9), num_wanted=4)
    assert World().after(60, "prefill", starting, NOBODY) == 4


def test_numbers_stay_where_nobody_tells_anything():
    assert World().after(300, "decode", role(num_wanted=3, num_there=3)) == 3


def test_those_that_tell_nothing_are_not_taken_for_idle():
    assert World().after(300, "prefill", role(IDLE, num_wanted=4, num_there=4), NOBODY) == 4


def test_numbers_outside_of_limits_come_inside_at_once():
    assert World().after(1, "decode", role(IDLE, most=4, num_wanted=9)) == 4
    assert World().after(1, "decode", role(IDLE, least=2)) == 2


# ------------------------------------------------------------------------------------------------------- over traces

#: about a large GPU with a model of 8 billion weights
PRICE = ComputePrice(step_s=0.008, row_s=1e-4, row_key_s=3e-8, token_s=1e-4, pair_s=2e-9)
SHAPE = WorkerShape(compute=PRICE, max_num_seqs=64, kv_tokens=1_000_000, start_s=30.0)
FLEET = Targets(ttft_s=4.0, itl_s=0.03, grow_after_s=3.0, shrink_after_s=180.0, keeps_kv=True)
LIMITS = Limits(most_prefill=16, most_decode=16)


def run(sessions: list[ModelSession], targets: Targets = FLEET, num_prefill: int = 4, num_decode: int = 1) -> Outcome:
    scaler = Autoscaler(targets)

    def policy(seen: FleetSeen, now_s: float) -> tuple[int, int]:
        wanted = scaler.decide(seen, now_s)
        return wanted["prefill"].number, wanted["decode"].number

    return FleetModel(SHAPE, sessions, num_prefill, num_decode, policy, LIMITS).run()


def turns(numbers: list[Numbers], name: str) -> int:
    """How often a number turned: grew after it had shrunk, or shrank after it had grown."""
    course = [getattr(one, name) for one in numbers]
    steps = [after - before for before, after in itertools.pairwise(course) if after != before]
    return sum((one > 0) != (other > 0) for one, other in itertools.pairwise(steps))


def share_within(outcome: Outcome, target_s: float) -> float:
    return sum(ttft_s <= target_s for ttft_s in outcome.ttft_s) / len(outcome.ttft_s)


@functools.cache
def talks() -> list[ModelSession]:
    trace = read_trace(mooncake())
    return model_sessions(trace, hits(trace, list(in_order(trace, 1)), None), 1, 100.0)


@functools.cache
def agents() -> list[ModelSession]:
    trace = read_trace(agent_sessions(), max_sessions=96)
    cut = [dataclasses.replace(session, requests=session.requests[:30]) for session in trace.sessions]
    trace = dataclasses.replace(trace, sessions=tuple(cut))
    return model_sessions(trace, hits(trace, list(in_order(trace, 24)), 4_000_000), 24, 120.0)


def tripled(sessions: list[ModelSession]) -> list[ModelSession]:
    """Three times the requests from 1,000 s on, for three minutes."""
    more = [
        ModelSession(1000.0 + session.begin_s - begin_s, session.requests)
        for begin_s in (2000.0, 2500.0)
        for session in sessions
        if begin_s <= session.begin_s < begin_s + 180.0
    ]
    return sorted([*sessions, *more], key=lambda session: session.begin_s)


@pytest.mark.slow
def test_conversations_get_their_first_tokens_in_time_without_flapping():
    outcome = run(talks())
    assert len(outcome.ttft_s) == 12_031, "every request was answered"
    assert share_within(outcome, FLEET.ttft_s) > 0.9
    assert outcome.prefill_worker_s < 0.8 * LIMITS.most_prefill * outcome.end_s
    assert max(turns(outcome.numbers, "prefill"), turns(outcome.numbers, "decode")) <= 6  # in an hour
    quarter = [session for session in talks() if session.begin_s < 900]
    eager = run(quarter, dataclasses.replace(FLEET, shrink_after_s=1.0, grow_after_s=0.0))
    assert turns(eager.numbers, "prefill") > 8, "without patience it does flap"


@pytest.mark.slow
def test_numbers_follow_a_load_that_triples_and_falls():
    outcome = run(tripled(talks()))

    def wanted(begin_s: float, end_s: float) -> list[Numbers]:
        known = [one for one in outcome.numbers if one.at_s <= begin_s][-1:]
        return known + [one for one in outcome.numbers if begin_s < one.at_s < end_s]

    for name in ("prefill", "decode"):
        before = getattr(wanted(990, 1000)[-1], name)
        most = max(getattr(one, name) for one in wanted(1000, 1200))
        after = getattr(wanted(2400, 2500)[-1], name)
        assert most > before, name
        assert after < most, name
        course = [getattr(one, name) for one in wanted(1000, 2000)]
        top = course.index(most)
        assert course[: top + 1] == sorted(course[: top + 1]), f"{name} only grows while the load is up"
        assert course[top:] == sorted(course[top:], reverse=True), f"{name} only shrinks afterwards"
    calm = [ttft_s for ttft_s, at_s in zip(outcome.ttft_s, outcome.arrived_s, strict=True) if not 1000 <= at_s < 1300]
    assert sum(ttft_s <= FLEET.ttft_s for ttft_s in calm) > 0.9 * len(calm)


@pytest.mark.slow
def test_agents_are_served_without_flapping():
    outcome = run(agents())
    assert len(outcome.ttft_s) == sum(len(session.requests) for session in agents())
    hours = outcome.end_s / 3600
    assert max(turns(outcome.numbers, "prefill"), turns(outcome.numbers, "decode")) <= 6 * max(1.0, hours)
    assert outcome.prefill_worker_s + outcome.decode_worker_s < 0.75 * 32 * outcome.end_s
