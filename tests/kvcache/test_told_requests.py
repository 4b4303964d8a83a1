"""What subscribers are told of a worker's requests adds up to what it has, whoever subscribes when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.told_requests import ToldRequests, report_pause_s
from kvrouter.worker_state import Changed, WorkerState
from tests.kvrouter.test_router import info, load

ids = st.frozensets(st.sampled_from([f"r{number}" for number in range(6)]))


def test_a_report_tells_what_came_and_went_since_the_last():
    told = ToldRequests()
    first = told.told(load("d"), ("a", "b"), ("a",))
    assert (first.seq, first.is_whole) == (1, False)
    assert (set(first.request_ids), first.ended_ids, first.declined_ids) == ({"a", "b"}, (), ("a",))
    second = told.told(load("d"), ("b", "c"), ())
    assert (second.seq, second.request_ids, second.ended_ids, second.declined_ids) == (2, ("c",), ("a",), ())
    assert told.told(load("d"), ("b", "c"), ()).request_ids == ()


def test_who_subscribes_is_told_all_that_the_others_know():
    told = ToldRequests()
    told.told(load("d"), ("a", "b"), ("a",))
    whole = told.whole(load("d", num_running=7))
    assert (whole.seq, whole.is_whole, whole.num_running) == (1, True, 7)
    assert (set(whole.request_ids), whole.declined_ids) == ({"a", "b"}, ("a",))


def test_a_request_that_came_and_went_between_two_reports_is_told_once():
    told = ToldRequests()
    told.told(load("d"), ("a", "b", "c"), ())
    for request_id in ("a", "b", "d"):
        told.finish(request_id)
    report = told.told(load("d"), ("b",), ())  # a ended, b is kept, c was cancelled, d came and ended
    assert (report.request_ids, set(report.ended_ids)) == (("d",), {"a", "c", "d"})
    assert told.told(load("d"), (), ()).ended_ids == ("b",)


@pytest.mark.slow
@given(st.lists(ids, max_size=8), st.integers(0, 8))
def test_whoever_listens_knows_what_the_worker_has(steps, begin):
    told, state = ToldRequests(), WorkerState(info("d"))
    for number, now in enumerate(steps):
        report = told.told(load("d"), now, ())
        if number == begin:
            state.report(told.whole(load("d")))
        elif number > begin:
            before = set(state.request_ids)
            assert state.report(report) == Changed(set(now) - before, before - now)
        if number >= begin:
            assert state.request_ids == now


def test_the_more_sequences_there_are_the_rarer_are_reports():
    assert report_pause_s(0) == 0.02
    assert report_pause_s(256) == 0.18
