"""Threads for calls that may hang in a library or in the kernel: callers leave at their deadline."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from nodecache.remote.filesystem import DeniedError, MissingError
from nodecache.store import StoreError

T = TypeVar("T")

_MAX_ATTEMPTS = 3
_PAUSE_S = 0.2  #: after the first failed attempt at most, then twice as long


class _Job(NamedTuple):
    call: Callable[[], Any]
    end_s: float
    future: Future[Any]


class RemoteThreads:
    """`num_threads` daemon threads that make calls in order, again where they fail. Any thread may submit."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopped = threading.Event()
        self._end_s: list[float | None] = [None] * num_threads  # by when each ought to be done with what it does now
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T], end_s: float) -> Future[T]:
        """Queue a call that ought to be answered by `end_s`, on the monotonic clock.

        It is made again, after a random pause, while it raises StoreError, unless that will not help; what it returns
        or raises at last is the future's.

        Raises:
            StoreError: the threads were stopped, or all hang in calls that are overdue.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._stopped.is_set():
                raise StoreError("the remote store is closed")
            if self.are_hanging:
                raise StoreError(f"all {len(self._threads)} calls under way are overdue; the store does not answer")
            self._jobs.append(_Job(call, end_s, future))
            self._wake.notify()
        return future

    @property
    def are_hanging(self) -> bool:
        """Whether all are at calls that ought to have ended."""
        now_s = time.monotonic()
        return all(end_s is not None and end_s < now_s for end_s in self._end_s)

    def stop(self, timeout_s: float) -> bool:
        """End the threads once the calls under way have ended; False where some hang after `timeout_s`."""
        with self._wake:
            self._stopped.set()
            self._wake.notify_all()
        end_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, number: int) -> None:
        while True:
            with self._wake:
                self._end_s[number] = None
                self._wake.wait_for(lambda: self._jobs or self._stopped.is_set())
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                if not job.future.set_running_or_notify_cancel():
                    continue
                self._end_s[number] = job.end_s
            try:
                job.future.set_result(self._answer(job))
            except BaseException as error:  # noqa: BLE001 - it is the caller's, who waits for it
                job.future.set_exception(error)
            del job  # and the memory that it holds

    def _answer(self, job: _Job) -> Any:
        for attempt in range(_MAX_ATTEMPTS):
            try:
                return job.call()
            except (MissingError, DeniedError):
                raise
            except StoreError:
                pause_s = _PAUSE_S * 2**attempt * random.uniform(0.5, 1.0)
                is_last = attempt == _MAX_ATTEMPTS - 1 or time.monotonic() + pause_s >= job.end_s
                if is_last or self._stopped.wait(pause_s):
                    raise
        raise AssertionError("the last attempt returns or raises")
