"""What this process takes of its machine, for people: every process of kvray tells it among its numbers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

_STATM: Final = Path("/proc/self/statm")  #: pages: size, resident, ...


def process_stats() -> dict[str, float]:
    """Return processor time and resident memory by metric name; memory only where the kernel has /proc."""
    stats = {"kvray_process_cpu_seconds_total": time.process_time()}
    try:
        resident_pages = int(_STATM.read_text().split()[1])
    except OSError:
        return stats
    return {**stats, "kvray_process_resident_memory_bytes": float(resident_pages * os.sysconf("SC_PAGE_SIZE"))}
