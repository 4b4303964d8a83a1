from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.scheduling.scheduler_bench import Bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.scheduler.check_invariants()
