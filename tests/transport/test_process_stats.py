"""What a process takes, beside what the system says of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from transport import process_stats


def test_processor_time_and_memory_are_what_the_system_says():
    before_s = sum(psutil.Process().cpu_times()[:2])
    stats = process_stats.process_stats()
    assert stats["kvray_process_cpu_seconds_total"] >= before_s - 0.05
    resident_bytes = psutil.Process().memory_info().rss
    assert stats["kvray_process_resident_memory_bytes"] == pytest.approx(resident_bytes, rel=0.05)


def test_where_there_is_no_proc_memory_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setattr(process_stats, "_STATM", Path(tmp_path / "statm"))
    assert list(process_stats.process_stats()) == ["kvray_process_cpu_seconds_total"]
