"""The node cache as workers of a real Ray get it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.served import own_environment, using


@pytest.mark.alone
def test_workers_of_a_node_share_one_cache_that_is_followed_by_another_and_ends_with_them():
    with own_environment() as variables:
        try:
            finished = subprocess.run(
                [sys.executable, "-m", "tests.nodecache.cache_on_ray"],
                cwd=Path(__file__).parents[2],
                env=variables,
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
        finally:
            for process in using(variables["RAY_TMPDIR"]):
                process.kill()
    assert finished.returncode == 0, finished.stderr
    seen = json.loads(finished.stdout.splitlines()[-1])
    assert "bytes are available" in seen.pop("too_large")
    assert seen == {
        "is_one": True,
        "num_processes": 1,
        "is_back": True,
        "roads": ["shm", "plasma"],
        "is_pulled_by_way_of_a_vault": True,
        "has_ended": True,
    }
