"""An event loop that knows its longest turn: how long others on it were not served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class TurnLoop(asyncio.SelectorEventLoop):
    """Measures turns by processor time of its thread: what others take of it is not counted, waiting neither."""

    _on_longer: Callable[[float], None] | None = None
    longest_ms = 0.0
    total_ms = 0.0

    def watch(self, on_longer: Callable[[float], None] | None = None) -> None:
        """Forget all turns before this one; call `on_longer` with the ms of each that is longer than those since."""
        self._on_longer, self.longest_ms, self.total_ms = on_longer, 0.0, 0.0

    def _run_once(self) -> None:
        begin_s = time.thread_time()
        super()._run_once()  # type: ignore[misc]  # a turn has no public name, and the stubs leave it out
        turn_ms = 1e3 * (time.thread_time() - begin_s)
        self.total_ms += turn_ms
        if turn_ms > self.longest_ms:
            self.longest_ms = turn_ms
            if self._on_longer is not None:
                self._on_longer(turn_ms)
