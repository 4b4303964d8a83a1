from collections import Counter

import pytest

from kvrouter.fallback import OwnQueues, choose
from messages.errors import CapacityError, RequestError, WorkerError
from messages.fleet import WorkerInfo
from messages.price import ComputePrice
from messages.route import RouteRequest


def worker(worker_id, role="decode", node_id="n1", compute=None):
    return WorkerInfo(
        compute=compute,
        worker_id=worker_id,
        role=role,
        address=f"tcp://{worker_id}:1",
        node_id=node_id,
        fingerprint=b"f",
        block_size=16,
        num_blocks=1000,
        block_bytes=1000,
        max_model_len=4096,
        max_num_seqs=64,
        roads=("shm",),
    )


def request(chain=0, num_blocks=20, request_id="r", exclude=()):
    names = b"".join(bytes([chain]) * 12 + i.to_bytes(4, "big") for i in range(num_blocks))
    return RouteRequest(
        request_id=request_id, names=names, num_prompt_tokens=num_blocks * 16 + 5, max_tokens=10, exclude=exclude
    )


def place(asked, workers, num_sequences, queues=None, max_ttft_s=20.0):
    return choose(asked, workers, num_sequences, queues or OwnQueues(), max_ttft_s)


FLEET = [worker(f"d{i}") for i in range(4)] + [worker(f"p{i}", "prefill") for i in range(2)]


def test_prompts_that_begin_alike_meet_whoever_places_them():
    placements = {place(request(num_blocks=n), fleet, {}) for n in (20, 20, 20) for fleet in (FLEET, FLEET[::-1])}
    assert len(placements) == 1
    longer = place(request(num_blocks=60), FLEET, {})
    assert longer.decode_worker == next(iter(placements)).decode_worker


def test_different_prompts_spread():
    placed = Counter(place(request(chain), FLEET, {}).decode_worker for chain in range(200))
    assert len(placed) == 4
    assert max(placed.values()) < 90


def test_nobody_gets_far_more_than_the_mean():
    running: Counter[str] = Counter()
    for _ in range(100):
        running[place(request(), FLEET, running).decode_worker] += 1
    assert max(running.values()) <= 1.25 * 100 / 4 + 1


def test_a_prompt_is_handed_over_where_that_is_cheaper_by_the_workers_own_prices():
    busy = {f"d{i}": 10 for i in range(4)}
    placement = place(request(), FLEET, busy)
    assert placement.prefill_worker in {"p0", "p1"}
    assert placement.prefill_s == pytest.approx(0.325 + 0.005)  # a millisecond a token is assumed
    assert place(request(), FLEET, {}).prefill_worker in {"p0", "p1"}  # another may come while it computes
    assert place(request(num_blocks=0), FLEET, {}).prefill_worker is None
    slow, fast = ComputePrice(token_s=1e-3), ComputePrice(token_s=1e-5)
    assert place(request(), [worker("d", compute=slow), worker("p", "prefill", compute=fast)], {}).prefill_worker
    assert not place(request(), [worker("d", compute=fast), worker("p", "prefill", compute=slow)], {}).prefill_worker


def test_a_prefill_worker_out_of_reach_is_not_chosen():
    far = [worker("d0"), worker("p0", "prefill", node_id="n2")]
    assert place(request(), far, {}).prefill_worker is None


def test_address_and_reason_come_with_it():
    placement = place(request(), [worker("d0")], {})
    assert placement.decode_address == "tcp://d0:1"
    assert "no router" in placement.reason
    assert placement.held is None  # that is for the worker to find out


def test_excluded_workers_are_not_chosen():
    excluded = ("d0", "d1", "d2", "p0")
    placement = place(request(exclude=excluded), FLEET, {})
    assert (placement.decode_worker, placement.prefill_worker) == ("d3", "p1")


def test_failures_say_whose_they_are():
    with pytest.raises(CapacityError) as nobody:
        place(request(), FLEET[4:], {})
    assert nobody.value.status == 503
    with pytest.raises(WorkerError):
        place(request(exclude=("d0",)), [worker("d0")], {})
    with pytest.raises(RequestError):
        place(request(num_blocks=300), FLEET, {})


def test_requests_of_this_ingress_wait_for_each_other_until_one_more_would_wait_too_long():
    pair = [worker("d"), worker("p", "prefill")]
    queues = OwnQueues()
    queues.set_fleet(pair)
    busy = {"d": 10}
    for index in range(61):  # of 0.325 s each, by the assumed price
        asked = request(index, request_id=f"r{index}")
        placement = place(asked, pair, busy, queues)
        assert placement.predicted_ttft_s == pytest.approx(0.33 + 0.325 * index)
        queues.add(asked, placement)
    with pytest.raises(CapacityError) as refused:
        place(request(99), pair, busy, queues)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 1)
    short = place(request(num_blocks=10), pair, busy, queues)
    assert short.predicted_ttft_s < 0.2
    queues.end("r0")
    queues.end("r0")
    assert place(request(99), pair, busy, queues).predicted_ttft_s < 20
    queues.set_fleet([pair[0], worker("q", "prefill")])
    assert place(request(99), [pair[0], worker("q", "prefill")], busy, queues).predicted_ttft_s < 1


def test_without_a_slot_a_request_waits_for_one():
    with pytest.raises(CapacityError, match="20 s are allowed"):
        place(request(), [worker("d")], {"d": 64 + 200})
