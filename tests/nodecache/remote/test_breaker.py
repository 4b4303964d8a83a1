from __future__ import annotations

import pytest

from nodecache.remote.breaker import MAX_FAILURES, MAX_REST_S, MIN_REST_S, Breaker
from nodecache.store import StoreError


@pytest.fixture
def breaker():
    return Breaker("reading it")


def fail(breaker, now_s=0.0, *, times=MAX_FAILURES):
    for _ in range(times):
        breaker.on_failed("no answer", now_s)


def test_some_failures_in_a_row_open_it_a_success_between_them_does_not(breaker):
    fail(breaker, times=MAX_FAILURES - 1)
    breaker.on_worked()
    fail(breaker, times=MAX_FAILURES - 1)
    breaker.check()
    fail(breaker, times=1)
    with pytest.raises(StoreError, match="reading it is given up for now: no answer"):
        breaker.check()


def test_a_lasting_failure_opens_it_at_once(breaker):
    breaker.on_failed("access denied", 0.0, is_lasting=True)
    assert breaker.reason == "access denied"


def test_nothing_is_tried_while_it_is_closed(breaker):
    assert not breaker.takes_trial(1e9)


def test_one_of_those_who_ask_makes_the_trial_when_it_is_due(breaker):
    fail(breaker, 100.0)
    assert not breaker.takes_trial(100.0)
    assert 100.0 + MIN_REST_S / 2 <= breaker.due_s <= 100.0 + MIN_REST_S
    assert breaker.takes_trial(breaker.due_s)
    assert not breaker.takes_trial(breaker.due_s - 0.1)


def test_trials_that_fail_are_further_and_further_apart_up_to_a_limit(breaker):
    now_s, rests = 0.0, []
    fail(breaker, now_s)
    for _ in range(12):
        rests.append(breaker.due_s - now_s)
        now_s = breaker.due_s
        assert breaker.takes_trial(now_s)
        fail(breaker, now_s, times=1)
    assert all(MIN_REST_S * 2**n / 2 <= rest <= MIN_REST_S * 2**n for n, rest in enumerate(rests[:6]))
    assert all(MAX_REST_S / 2 <= rest <= MAX_REST_S for rest in rests[6:])


def test_after_a_trial_alone_one_failure_opens_it_again_for_longer(breaker):
    fail(breaker, 0.0)
    breaker.on_worked(was_trial=True)
    breaker.check()
    fail(breaker, 0.0, times=1)
    assert breaker.due_s >= MIN_REST_S
    with pytest.raises(StoreError):
        breaker.check()


def test_what_worked_makes_it_as_new(breaker):
    for _ in range(3):
        fail(breaker, 0.0)
    breaker.on_worked(was_trial=True)
    breaker.on_worked()
    fail(breaker, 0.0, times=MAX_FAILURES - 1)
    breaker.check()
    fail(breaker, 0.0, times=1)
    assert breaker.due_s <= MIN_REST_S


def test_each_change_is_told_once(breaker, caplog):
    fail(breaker, times=10)
    breaker.on_worked(was_trial=True)
    breaker.on_worked()
    assert caplog.messages == ["reading it is given up for now: no answer", "reading it works again"]
