"""What the store counts."""

from __future__ import annotations

import threading

_COUNTERS = (
    "kvray_remote_damaged_blocks_total",
    "kvray_remote_damaged_manifests_total",
    "kvray_remote_errors_total",
    "kvray_remote_missing_blocks_total",
    "kvray_remote_quota_evicted_blocks_total",
    "kvray_remote_read_blocks_total",
    "kvray_remote_read_bytes_total",
    "kvray_remote_read_stored_bytes_total",
    "kvray_remote_removed_blocks_total",
    "kvray_remote_timeouts_total",
    "kvray_remote_unknown_codec_blocks_total",
    "kvray_remote_written_blocks_total",
    "kvray_remote_written_bytes_total",
    "kvray_remote_written_stored_bytes_total",
)


class RemoteStats:
    """Counters by metric name. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(_COUNTERS, 0.0)

    def count(self, what: str, number: int = 1) -> None:
        """Count `number` more of kvray_remote_<what>_total."""
        with self._lock:
            self._values[f"kvray_remote_{what}_total"] += number

    def values(self) -> dict[str, float]:
        """Return all counters."""
        with self._lock:
            return dict(self._values)
