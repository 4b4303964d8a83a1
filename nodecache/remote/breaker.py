"""Takes a store that fails, or does not answer, out of the plan, and says when it is to be tried again. No IO."""

from __future__ import annotations

import logging
import random
import threading

from nodecache.store import StoreError

logger = logging.getLogger(__name__)

#: So many failures in a row take it out of the plan.
MAX_FAILURES = 3
MIN_REST_S = 1.0
MAX_REST_S = 60.0


class Breaker:
    """What is known of one way to use a store: reading it, or writing it. Any thread; tells the log of each change."""

    def __init__(self, what: str) -> None:
        """`what`: for people, "reading s3://bucket"."""
        self._what = what
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._num_failures = 0
        self._rest_s = MIN_REST_S
        self._due_s = 0.0

    @property
    def reason(self) -> str | None:
        """Why it is out of the plan; None where it is in."""
        return self._reason

    @property
    def due_s(self) -> float:
        """When it is to be tried again, on the monotonic clock."""
        return self._due_s

    def check(self) -> None:
        """Raise StoreError where it is out of the plan."""
        reason = self._reason
        if reason is not None:
            raise StoreError(f"{self._what} is given up for now: {reason}")

    def takes_trial(self, now_s: float) -> bool:
        """Tell whether to try again, now; who asks is the one who does, others are told to wait once more."""
        with self._lock:
            if self._reason is None or now_s < self._due_s:
                return False
            self._due_s = now_s + self._rest_s
            return True

    def on_worked(self, *, was_trial: bool = False) -> None:
        """Note a success. After that of a mere trial, the next failure takes it out at once, for longer than before."""
        with self._lock:
            was_out = self._reason is not None
            self._reason = None
            self._num_failures = MAX_FAILURES - 1 if was_trial and was_out else 0
            if not was_trial:
                self._rest_s = MIN_REST_S
        if was_out:
            logger.warning("%s works again", self._what)

    def on_failed(self, reason: str, now_s: float, *, is_lasting: bool = False) -> None:
        """Note a failure; `is_lasting`: it will be so again, so that it is out of the plan at once."""
        with self._lock:
            self._num_failures += 1
            if self._num_failures < MAX_FAILURES and not is_lasting and self._reason is None:
                return
            was_in = self._reason is None
            self._reason = reason
            # Half of it by chance: many nodes shall not come back in one moment.
            self._due_s = now_s + self._rest_s * random.uniform(0.5, 1.0)
            self._rest_s = min(2 * self._rest_s, MAX_REST_S)
        if was_in:
            logger.warning("%s is given up for now: %s", self._what, reason)
