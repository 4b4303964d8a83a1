"""The scripts of benchmarks/harness, for tests: that is a folder beside the packages, not one of them."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def harness_workers() -> ModuleType:
    """benchmarks/harness/workers.py."""
    spec = spec_from_file_location("harness_workers", ROOT / "benchmarks" / "harness" / "workers.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["harness_workers"] = module
    spec.loader.exec_module(module)
    return module
