"""Threads for IO that a hung disk may hold: callers leave at their deadline, and nobody waits for threads that hang."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nodecache.store import StoreError

T = TypeVar("T")

#: A thread that has been at one job for so long hangs: jobs are about a MiB, a tenth of a second on a slow disk.
STALL_S = 5.0


class Call:
    """A caller's memory, lent until the call is answered or given up. Touch it only between `begin` and `end`."""

    def __init__(self) -> None:
        self._ended = threading.Condition()
        self._num_touching = 0
        self._is_given_up = False
        self._is_answered = False

    def is_given_up(self) -> bool:
        """Tell whether the caller left, with its memory."""
        return self._is_given_up

    def begin(self) -> bool:
        """Begin to copy from or to the caller's memory; False where it is the caller's again."""
        with self._ended:
            if not self._is_given_up:
                self._num_touching += 1
            return not self._is_given_up

    def end(self) -> None:
        """Say that the copy is made."""
        with self._ended:
            self._num_touching -= 1
            self._ended.notify_all()

    def answer(self) -> bool:
        """Say that all was done in time; False where the caller gave it up."""
        with self._ended:
            self._is_answered = not self._is_given_up
            return self._is_answered

    def give_up(self) -> bool:
        """Take the memory back: when this returns nobody touches it any more. False: it is answered after all."""
        with self._ended:
            self._is_given_up = not self._is_answered
            self._ended.wait_for(lambda: not self._num_touching)
            return self._is_given_up


class IoThreads:
    """`num_threads` daemon threads that take jobs in order. Any thread may submit."""

    def __init__(
        self, name: str, num_threads: int, *, idle_s: float | None = None, on_idle: Callable[[], bool] | None = None
    ) -> None:
        """`on_idle` is run where there was no job for `idle_s`, and again at once while it says that there is more."""
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._is_stopped = False
        self._idle_s = idle_s
        self._on_idle = on_idle
        self._since: list[float | None] = [None] * num_threads  # when each began what it does now
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job; what it returns or raises is the future's.

        Raises:
            StoreError: no thread answers any more, or they were stopped.
        """
        future: Future[T] = Future()
        with self._wake:
            self._check()
            self._jobs.append((job, future))
            self._wake.notify()
        return future

    def check(self) -> None:
        """Raise StoreError where a job would be refused now."""
        with self._wake:
            self._check()

    def stop(self, timeout_s: float) -> bool:
        """Let the queued jobs be done, then end the threads; False where some still hang after `timeout_s`."""
        with self._wake:
            self._is_stopped = True
            self._wake.notify_all()
        end_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _check(self) -> None:
        if self._is_stopped:
            raise StoreError("the disk store is closed")
        begun = [since for since in self._since if since is not None]
        stalled_s = time.monotonic() - max(begun) if len(begun) == len(self._since) else 0.0
        if stalled_s > STALL_S:
            raise StoreError(f"the disk has not answered for {stalled_s:.0f} s; at most {STALL_S:g} s are waited")

    def _run(self, number: int) -> None:
        has_more = False
        while True:
            with self._wake:
                self._since[number] = None
                if not self._jobs and not self._is_stopped and not has_more:
                    self._wake.wait(self._idle_s)
                job = self._jobs.popleft() if self._jobs else None
                if job is None and self._is_stopped:
                    return
                self._since[number] = time.monotonic()
            if job is not None:
                _do(*job)
            elif self._on_idle is not None:
                has_more = self._on_idle()
            del job


def _do(job: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(job())
    except BaseException as error:  # noqa: BLE001 - it is the caller's, who waits for it
        future.set_exception(error)
