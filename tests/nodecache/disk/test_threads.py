from __future__ import annotations

import threading

import pytest

from nodecache.disk import threads
from nodecache.disk.threads import Call, IoThreads
from nodecache.store import StoreError


@pytest.fixture
def one():
    one = IoThreads("test", 1)
    yield one
    assert one.stop(30)


def test_jobs_are_done_in_order_and_their_results_and_errors_are_the_callers(one):
    done = []
    futures = [one.submit(lambda number=number: done.append(number)) for number in range(100)]
    with pytest.raises(ZeroDivisionError):
        one.submit(lambda: 1 // 0).result(30)
    assert one.submit(lambda: 7).result(30) == 7
    assert all(future.done() for future in futures)
    assert done == list(range(100))


def test_jobs_run_beside_each_other_on_several_threads():
    several = IoThreads("test", 3)
    barrier = threading.Barrier(3)
    futures = [several.submit(lambda: barrier.wait(30)) for _ in range(3)]
    assert sorted(future.result(30) for future in futures) == [0, 1, 2]
    assert several.stop(30)


def test_a_hanging_thread_is_waited_for_until_all_hang_too_long(monkeypatch):
    several = IoThreads("test", 2)
    released, begun = threading.Event(), threading.Barrier(3)

    def hang():
        begun.wait(30)
        released.wait(30)

    several.submit(hang)
    several.check()
    several.submit(hang)
    begun.wait(30)
    several.submit(int)  # not for too long yet
    monkeypatch.setattr(threads, "STALL_S", 0.0)
    with pytest.raises(StoreError, match="the disk has not answered for 0 s; at most 0 s are waited"):
        several.submit(int)
    assert not several.stop(0.0)
    monkeypatch.undo()
    released.set()
    assert several.stop(30)
    with pytest.raises(StoreError, match="closed"):
        several.check()


def test_idle_work_goes_on_while_there_is_more_and_jobs_come_first():
    num_calls, enough = 0, threading.Event()

    def work():
        nonlocal num_calls
        num_calls += 1
        if num_calls == 10:
            enough.set()
        return num_calls < 10

    one = IoThreads("test", 1, idle_s=0.001, on_idle=work)
    assert enough.wait(30)
    assert one.submit(lambda: 1).result(30) == 1
    assert one.stop(30)


def test_a_call_is_answered_or_given_up_never_both():
    call = Call()
    assert call.answer()
    assert not call.give_up()
    assert not call.is_given_up()
    call = Call()
    assert call.give_up()
    assert not call.answer()
    assert call.is_given_up()
