"""What the store counts."""

from __future__ import annotations

import threading

_COUNTERS = (
    "kvray_disk_copied_blocks_total",
    "kvray_disk_damaged_blocks_total",
    "kvray_disk_errors_total",
    "kvray_disk_evicted_blocks_total",
    "kvray_disk_lost_blocks_total",
    "kvray_disk_quota_evicted_blocks_total",
    "kvray_disk_read_blocks_total",
    "kvray_disk_timeouts_total",
    "kvray_disk_written_blocks_total",
)


class DiskStats:
    """Counters by metric name. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(_COUNTERS, 0.0)

    def count(self, what: str, number: int = 1) -> None:
        """Count `number` more of kvray_disk_<what>_total."""
        with self._lock:
            self._values[f"kvray_disk_{what}_total"] += number

    def values(self) -> dict[str, float]:
        """Return all counters."""
        with self._lock:
            return dict(self._values)
