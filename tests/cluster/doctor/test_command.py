"""`kvray doctor` as a person runs it."""

from __future__ import annotations

import json

import pytest

from cluster.doctor.examination import EXAMINATIONS
from tests.served import free_port, run_kvray

pytestmark = pytest.mark.slow


def test_a_node_that_lacks_what_is_needed_is_exit_code_1_and_json_says_it_too(tmp_path):
    file = tmp_path / "file"
    file.touch()
    config = tmp_path / "kvray.yaml"
    ours = f"tiers: {{disk_dir: {file}}}\nhttp: {{port: {free_port()}}}\n"
    config.write_text(f"{ours}network: {{roads: [shm, socket]}}\n")  # loading UCX takes a second of a free machine
    shown, left = run_kvray("doctor", "--config", str(config))
    assert left == []
    assert shown.returncode == 1, shown.stderr
    [line] = [line for line in shown.stdout.splitlines() if line.startswith("fail")]
    assert line == f"fail disk tier    {file}/.kvray-doctor-{line.rpartition('-')[2]}"
    assert shown.stdout.splitlines()[-1].startswith("1 to mend, ")
    told, _ = run_kvray("doctor", "--config", str(config), "--json")
    document = json.loads(told.stdout)
    assert told.returncode == 1
    assert [finding["about"] for finding in document["findings"]] == ["config", *(one.about for one in EXAMINATIONS)]
    assert [finding["about"] for finding in document["findings"] if finding["state"] == "fail"] == ["disk tier"]


@pytest.mark.long
def test_a_configuration_that_is_refused_is_a_finding_and_the_rest_is_told_by_defaults(tmp_path):
    config = tmp_path / "kvray.yaml"
    config.write_text("htp: {}\n")
    shown, _ = run_kvray("doctor", "--config", str(config))
    assert shown.returncode == 1
    assert shown.stdout.startswith("fail config       htp: no such key; did you mean http?\n")
