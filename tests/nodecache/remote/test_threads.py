from __future__ import annotations

import threading
import time

import pytest

from nodecache.remote import threads
from nodecache.remote.filesystem import DeniedError, MissingError
from nodecache.remote.threads import RemoteThreads
from nodecache.store import StoreError

LONG_S = 60.0


@pytest.fixture
def two():
    two = RemoteThreads("test", 2)
    yield two
    assert two.stop(LONG_S)


def soon():
    return time.monotonic() + LONG_S


class Call:
    """Fails so many times, then answers."""

    def __init__(self, num_failures, error=StoreError):
        self.num_failures = num_failures
        self.error = error
        self.num_calls = 0

    def __call__(self):
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise self.error("as told")
        return self.num_calls


def test_a_call_that_fails_is_made_again(two, monkeypatch):
    monkeypatch.setattr(threads, "_PAUSE_S", 0.001)
    assert two.submit(Call(2), soon()).result(LONG_S) == 3
    call = Call(3)
    with pytest.raises(StoreError, match="as told"):
        two.submit(call, soon()).result(LONG_S)
    assert call.num_calls == 3


@pytest.mark.parametrize("error", [MissingError, DeniedError, ZeroDivisionError])
def test_where_it_would_not_help_it_is_not(two, error):
    call = Call(1, error)
    with pytest.raises(error):
        two.submit(call, soon()).result(LONG_S)
    assert call.num_calls == 1


def test_nor_where_there_is_no_time(two):
    call = Call(1)
    with pytest.raises(StoreError):
        two.submit(call, time.monotonic()).result(LONG_S)
    assert call.num_calls == 1


def test_calls_are_made_side_by_side(two):
    barrier = threading.Barrier(2)
    futures = [two.submit(lambda: barrier.wait(LONG_S), soon()) for _ in range(2)]
    assert sorted(future.result(LONG_S) for future in futures) == [0, 1]


def test_a_call_given_up_before_it_began_is_not_made(two):
    begun, released = threading.Barrier(3), threading.Event()

    def hang():
        begun.wait(LONG_S)
        released.wait(LONG_S)

    for _ in range(2):
        two.submit(hang, soon())
    begun.wait(LONG_S)
    call = Call(0)
    assert two.submit(call, soon()).cancel()
    released.set()
    assert two.submit(Call(0), soon()).result(LONG_S) == 1
    assert call.num_calls == 0


def test_once_all_hang_beyond_their_deadlines_calls_are_refused_until_one_ends(two):
    begun, released = threading.Barrier(2), threading.Event()

    def hang():
        begun.wait(LONG_S)
        released.wait(LONG_S)

    two.submit(hang, 0.0)
    begun.wait(LONG_S)
    assert two.submit(Call(0), soon()).result(LONG_S) == 1
    hanging = two.submit(hang, 0.0)
    begun.wait(LONG_S)
    with pytest.raises(StoreError, match="all 2 calls under way are overdue"):
        two.submit(Call(0), soon())
    assert not two.stop(0.0)
    released.set()
    hanging.result(LONG_S)


def test_after_stop_calls_are_refused(two):
    assert two.stop(LONG_S)
    with pytest.raises(StoreError, match="closed"):
        two.submit(Call(0), soon())
