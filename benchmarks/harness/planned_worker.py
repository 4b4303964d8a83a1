"""A worker process (harness.worker_process) in which a request's id says what is loaded: "compute-...", "load-...".

All others are planned as ever. What is forced is the planner's answer alone; all that follows is the worker's own.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.scheduling import sourcing
from harness.worker_process import main
from kvcache.load_plan import LoadPlan

_FOREVER_S = 1e6
_plan, _plan_loads = sourcing.Sourcing.plan, sourcing.plan_loads


def planned(self: sourcing.Sourcing, seq: Any, *, beside: str = "") -> LoadPlan:
    """Plan as the sequence's id says: loading is all that is left where computing would have to wait forever."""
    if seq.seq_id.startswith("compute"):
        return LoadPlan()
    is_forced = seq.seq_id.startswith("load")
    sourcing.plan_loads = _forced_loads if is_forced else _plan_loads
    return _plan(self, seq, beside=beside)


def _forced_loads(*arguments: Any, **options: Any) -> LoadPlan:
    return _plan_loads(*arguments, **(options | {"queue_s": _FOREVER_S}))


sourcing.Sourcing.plan = planned

if __name__ == "__main__":
    asyncio.run(main())
