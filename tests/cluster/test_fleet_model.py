"""The model of a fleet against what can be said without one."""

import pytest

from cluster.autoscaling import FleetSeen
from cluster.fleet_model import FleetModel, Limits, ModelRequest, ModelSession, WorkerShape
from messages.errors import ConfigError
from messages.price import ComputePrice

PRICE = ComputePrice(step_s=0.01, row_s=0.001, token_s=0.001)
SHAPE = WorkerShape(compute=PRICE, max_num_seqs=4, kv_tokens=10_000)
PROMPT_S = 0.01 + 1000 * 0.001  #: one step, a thousand tokens


def sessions(*begins_s: float, num_tokens: int = 1000, num_output: int = 11, num_hit: int = 0) -> list[ModelSession]:
    return [ModelSession(begin_s, (ModelRequest(num_tokens, num_hit, num_output),)) for begin_s in begins_s]


def test_alone_a_request_takes_its_prompt_and_its_steps():
    outcome = FleetModel(SHAPE, sessions(0.0), 1, 1).run()
    assert outcome.ttft_s == pytest.approx([PROMPT_S])
    assert outcome.itl_s == pytest.approx([0.011])
    assert outcome.end_s == pytest.approx(PROMPT_S + 10 * 0.011)


def test_prompts_wait_for_each_other_on_one_worker_and_not_on_two():
    assert FleetModel(SHAPE, sessions(0.0, 0.0), 1, 1).run().ttft_s == pytest.approx([PROMPT_S, 2 * PROMPT_S])
    assert FleetModel(SHAPE, sessions(0.0, 0.0), 2, 1).run().ttft_s == pytest.approx([PROMPT_S, PROMPT_S])


def test_hits_are_not_computed():
    outcome = FleetModel(SHAPE, sessions(0.0, num_hit=900), 1, 1).run()
    assert outcome.ttft_s == pytest.approx([0.01 + 0.1])


def test_rows_share_a_step():
    outcome = FleetModel(SHAPE, sessions(0.0, 0.0), 2, 1).run()
    assert outcome.itl_s == pytest.approx([0.012, 0.012])
    assert FleetModel(SHAPE, sessions(0.0, 0.0), 2, 2).run().itl_s == pytest.approx([0.011, 0.011])


@pytest.mark.parametrize("shape", [{"max_num_seqs": 1}, {"kv_tokens": 1500}])
def test_who_finds_no_slot_or_no_blocks_waits_for_the_first_token(shape):
    narrow = WorkerShape(**{"compute": PRICE, "max_num_seqs": 4, "kv_tokens": 10_000, **shape})
    outcome = FleetModel(narrow, sessions(0.0, 0.0), 2, 1).run()
    assert outcome.ttft_s == pytest.approx([PROMPT_S, PROMPT_S + 10 * 0.011])


def test_a_client_asks_again_after_its_pause():
    turns = (ModelRequest(1000, 0, 1), ModelRequest(1000, 0, 1, pause_s=5.0))
    outcome = FleetModel(SHAPE, [ModelSession(1.0, turns)], 1, 1).run()
    assert outcome.arrived_s == pytest.approx([1.0, 1.0 + PROMPT_S + 5.0])


def test_a_request_that_fits_nowhere_is_refused_at_once():
    with pytest.raises(ConfigError, match="the longest request has 10011 tokens, a worker has KV for 10000"):
        FleetModel(SHAPE, sessions(0.0, num_tokens=10_000), 1, 1)


def test_workers_that_leave_end_what_they_have_and_new_ones_take_time_to_start():
    numbers = iter([(1, 1), (3, 2), (1, 1), (1, 1)])
    seen: list[FleetSeen] = []

    def policy(fleet: FleetSeen, now_s: float) -> tuple[int, int]:
        seen.append(fleet)
        return next(numbers, (1, 1))

    shape = WorkerShape(compute=PRICE, max_num_seqs=4, kv_tokens=10_000, start_s=0.5)
    limits = Limits(most_prefill=3, most_decode=2)
    begins = [0.1 * number for number in range(40)]
    outcome = FleetModel(shape, sessions(*begins, num_output=100), 1, 1, policy, limits).run()
    assert len(outcome.ttft_s) == 40, "nobody is lost on the way down"
    assert [(one.at_s, one.prefill, one.decode) for one in outcome.numbers] == [(0, 1, 1), (2, 3, 2), (3, 1, 1)]
    assert seen[2].prefill is not None
    assert (seen[2].prefill.num_there, seen[2].prefill.num_wanted) == (3, 3)
    assert seen[1].prefill is not None
    assert seen[1].prefill.workers[0].queued_s > 5
