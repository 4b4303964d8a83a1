"""The plasma road between the nodes of a real Ray."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.served import own_environment, using


@pytest.fixture(scope="module")
def seen():
    """What plasma_cluster.py saw: two nodes of a Ray of its own."""
    with own_environment() as variables:
        try:
            finished = subprocess.run(
                [sys.executable, "-m", "tests.transport.plasma_cluster"],
                cwd=Path(__file__).parents[2],
                env=variables,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
        finally:
            for process in using(variables["RAY_TMPDIR"]):
                process.kill()
        assert finished.returncode == 0, finished.stderr
        print(finished.stderr)
        return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.alone
def test_blocks_come_exactly_from_another_node_and_the_vault_is_made_for_it(seen):
    assert seen["vaults_before"] == []
    assert seen["first_pull"]["error"] == ""
    assert seen["first_pull"]["told"]
    assert seen["is_there"]
    assert seen["is_exact"]


@pytest.mark.alone
def test_more_than_a_vault_may_hold_comes_exactly(seen):
    for pull in seen["small_pulls"] + seen["large_pulls"]:
        assert pull["error"] == ""
        assert pull["told"]
    assert seen["is_large_exact"]
    assert seen["at_once"] == []
    assert seen["is_at_once_exact"]


@pytest.mark.alone
def test_cancelled_pulls_over_ray_have_stopped_when_they_are_over(seen):
    assert seen["is_cancelled_quiet"]
    assert seen["after_cancel"]["error"] == ""
    assert seen["logs"] == []


@pytest.mark.alone
def test_segments_outlive_whom_they_were_read_from(seen):
    assert seen["outlives_producer"]
    assert "RegionError" in seen["dead_producer"]["error"]


@pytest.mark.alone
def test_a_killed_vault_fails_the_pull_and_the_next_makes_another(seen):
    assert "TransferError: plasma: a segment was lost: OwnerDiedError" in seen["killed_vault"]["error"]
    assert seen["after_kill"]["error"] == ""
    assert seen["is_there_after_kill"]
    assert seen["is_exact_after_kill"]


@pytest.mark.alone
def test_an_idle_vault_ends_itself_and_is_made_again_when_needed(seen):
    assert 0 <= seen["gone_after_s"] < 20
    assert seen["after_idle"]["error"] == ""


@pytest.mark.alone
def test_a_node_that_is_gone_has_no_vault(seen):
    assert "TransferError: plasma: no vault on node eee" in seen["unknown_node"]["error"]


@pytest.mark.alone
def test_a_vault_needs_no_torch():
    code = "import sys, transport.plasma.actor; print(*{'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []
