"""Where every fault ends that leaves a worker's state unknown: one `crash(error)`, whatever it came from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Crash = Callable[[BaseException], None]


class CrashOnce:
    """Tells `on_crash` of the first fault; the later ones, which often follow from it, are logged only."""

    def __init__(self, on_crash: Crash) -> None:
        self._on_crash = on_crash
        self._has_crashed = False

    def __call__(self, error: BaseException) -> None:
        """Log `error` with its traceback, and end the worker if it is the first."""
        logger.critical("the worker cannot go on: %r", error, exc_info=error)
        if not self._has_crashed:
            self._has_crashed = True
            self._on_crash(error)


def guarded(callback: Callable[P, None], crash: Crash) -> Callable[P, None]:
    """Return `callback`, for a loop that would only log what it raises: that ends the worker, panics included."""

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - the edge: native libraries' panics are no Exceptions
            crash(error)

    return call
