"""Facts of this machine, and of what is put in front of them: real files, ports, processes, directories."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from cluster.config import parse_config
from cluster.doctor import gathering
from cluster.doctor.examination import EXAMINATIONS, Examination, examine
from cluster.doctor.findings import of_cpu
from tests.served import free_port

ROOT = Path(__file__).parent.parent.parent.parent


def facts_of(gather, **sections):
    return gather(parse_config(sections))


@pytest.mark.parametrize(
    ("name", "membership", "files", "limit"),
    [
        ("v2", "0::/pod/box\n", {"pod/box/memory.max": "max", "pod/memory.max": "1000"}, 1000),
        ("v2, nearest", "0::/pod/box\n", {"pod/box/memory.max": "500", "pod/memory.max": "1000"}, 500),
        ("v2, in a container", "0::/not/seen/here\n", {"memory.max": "700"}, 700),
        ("v1", "4:memory:/a\n3:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "900"}, 900),
        ("v1, no limit", "4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("none", "", {}, None),
    ],
)
def test_the_lowest_limit_of_memory_is_found_in_control_groups_of_either_version(
    tmp_path, name, membership, files, limit
):
    (tmp_path / "membership").write_text(membership)
    for path, text in files.items():
        (tmp_path / "groups" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / path).write_text(f"{text}\n")
    assert gathering.memory_limit(2000, tmp_path / "groups", tmp_path / "membership") == limit


def test_sizes_that_the_configuration_names_are_added_up_for_a_node():
    facts = facts_of(
        gathering.memory_facts,
        engine={"kv_cache_memory": "1GiB"},
        pools={"prefill": 1, "decode": 2},
        tiers={"host_memory": "2GiB"},
    )
    assert facts.wanted_bytes == {"engine.kv_cache_memory, 3 workers": 3 * 2**30, "tiers.host_memory": 2 * 2**30}
    assert facts.total_bytes > facts.available_bytes > 0


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pools": {"prefill": 2, "decode": 2, "cpus_per_worker": 4}}, {"engine.kv_cache_memory, 1 workers": 2**30}),
        ({"pools": {"prefill": 2, "decode": 2, "gpus_per_worker": 1}}, {}),
        ({"model": {"device": "cuda"}}, {}),
    ],
)
def test_memory_of_other_nodes_and_of_gpus_is_not_wanted_of_this_one(settings, wanted):
    facts = facts_of(gathering.memory_facts, engine={"kv_cache_memory": "1GiB"}, **settings)
    assert facts.wanted_bytes == wanted


def test_a_port_that_somebody_listens_on_is_told_and_a_free_one_is_not():
    port = free_port()
    free = facts_of(gathering.port_facts, http={"port": port}, network={"port_range": [port + 1, port + 9]})
    assert (free.http, free.http_error, free.served_here) == (f"127.0.0.1:{port}", "", "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        facts = facts_of(gathering.port_facts, http={"port": port}, network={"port_range": [port, port + 1]})
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in facts.http_error
    assert facts.num_free <= 1


def test_the_clocks_of_this_machine_go_together():
    facts = facts_of(gathering.clock_facts)
    assert abs(facts.wall_drift_s) < 0.05
    assert facts.now_s > facts.installed_s


def test_the_directory_of_the_disk_tier_is_written_and_left_as_it_was(tmp_path):
    (tmp_path / "there").write_bytes(bytes(4096))
    facts = facts_of(gathering.disk_facts, tiers={"disk_dir": str(tmp_path), "disk_capacity": "1GiB"})
    assert facts.error == ""
    assert facts.free_bytes > 0
    assert facts.used_bytes == 4096
    assert facts.wanted_bytes == 2**30
    assert facts.filesystem != "unknown"
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


def test_a_directory_that_is_still_to_be_made_is_judged_by_the_one_above_it(tmp_path):
    facts = facts_of(gathering.disk_facts, tiers={"disk_dir": str(tmp_path / "a" / "b")})
    assert facts.error == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path):
    (tmp_path / "file").touch()
    facts = facts_of(gathering.disk_facts, tiers={"disk_dir": str(tmp_path / "file")})
    assert "Not a directory" in facts.error


def test_a_read_only_disk_is_told(tmp_path):
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        facts = facts_of(gathering.disk_facts, tiers={"disk_dir": str(tmp_path)})
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert "Read-only file system" in facts.error


def test_a_remote_directory_is_tried_and_one_that_cannot_be_written_is_told(tmp_path):
    assert facts_of(gathering.remote_facts, tiers={"remote": str(tmp_path)}).error == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert "Not a directory" in facts_of(gathering.remote_facts, tiers={"remote": f"file://{tmp_path}/file"}).error


def test_a_bucket_that_nobody_serves_and_a_uri_that_is_none_are_told():
    uri = f"s3://key:secret@bucket/prefix?endpoint_override=127.0.0.1:{free_port()}&scheme=http&region=us-east-1"
    facts = facts_of(gathering.remote_facts, tiers={"remote": uri})
    assert facts.uri == "s3://bucket/prefix"
    assert facts.error.startswith("s3://bucket/prefix: ")
    assert "secret" not in facts.error
    assert "http" in facts_of(gathering.remote_facts, tiers={"remote": "http://x/y"}).error


def test_keys_are_told_by_their_lengths_alone_and_an_open_file_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("KVRAY_API_KEY", raising=False)
    keys = tmp_path / "keys"
    keys.write_text("abcdef\nghijklmnop\n")
    keys.chmod(stat.S_IRUSR | stat.S_IROTH)
    facts = facts_of(gathering.secret_facts, http={"api_key_file": str(keys), "host": "0.0.0.0"})
    assert facts.key_lengths == (6, 10)
    assert facts.readable_by_all == (str(keys),)
    assert facts.is_open_to_all


def test_a_secret_of_the_wrong_length_is_told_without_it(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o600)
    facts = facts_of(gathering.secret_facts, network={"secret_file": str(secret)})
    assert facts.error.startswith("network.secret_file: ")
    assert "0123456789abcdef" not in facts.error


@pytest.mark.slow
def test_ucx_is_asked_in_a_process_of_its_own():
    if find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    facts = facts_of(gathering.ucx_facts)
    assert "tcp" in facts.transports
    assert "lo" in facts.devices
    assert facts.version[0].isdigit()
    wrong = facts_of(gathering.ucx_facts, network={"ucx_transports": "nonsense"})
    assert wrong.error.startswith("UCX does not load: ")


def test_ray_is_asked_for_where_the_operator_says_and_a_cluster_that_is_gone_is_told(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    facts = facts_of(gathering.ray_facts)
    assert (facts.address, facts.auth_mode, facts.token_source) == ("", "token", "RAY_AUTH_TOKEN")
    assert facts.wanted
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert "no Ray cluster answers" in facts_of(gathering.ray_facts).error


def test_a_collector_that_is_not_there_is_told():
    endpoint = f"http://127.0.0.1:{free_port()}"
    assert "Connection refused" in facts_of(gathering.span_facts, observability={"otlp_endpoint": endpoint}).error
    with socket.socket() as collector:
        collector.bind(("127.0.0.1", 0))
        collector.listen()
        endpoint = f"http://127.0.0.1:{collector.getsockname()[1]}/v1/traces"
        assert facts_of(gathering.span_facts, observability={"otlp_endpoint": endpoint}).error == ""


@pytest.mark.slow
def test_every_examination_of_this_machine_says_something():
    found = examine(parse_config({"tiers": {"disk_dir": "/tmp"}}), EXAMINATIONS)
    assert [finding.about for finding in found] == [one.about for one in EXAMINATIONS]
    assert not [finding for finding in found if "could not be looked at" in finding.seen]


@pytest.mark.slow
def test_who_hangs_or_fails_is_a_finding_and_the_others_are_told_all_the_same():
    never = threading.Event()

    def fail(_config):
        raise ValueError("odd")

    wanted = [
        Examination("hangs", lambda _config: never.wait(), of_cpu),
        Examination("fails", fail, of_cpu),
        Examination("cpu", gathering.cpu_facts, of_cpu),
    ]
    hangs, fails, cpu = examine(parse_config({}), wanted, limit_s=1.0)
    never.set()
    assert (hangs.about, hangs.state, hangs.seen) == ("hangs", "fail", "no answer within 1 s")
    assert (fails.state, fails.seen) == ("warn", "could not be looked at: ValueError: odd")
    assert cpu.seen.endswith(gathering.cpu_facts(parse_config({})).baseline or "plain")


@pytest.mark.slow
def test_the_limit_of_a_real_control_group_is_found_by_a_process_in_it():
    is_first_version = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
    group = Path("/sys/fs/cgroup/memory" if is_first_version else "/sys/fs/cgroup") / f"kvray-test-{os.getpid()}"
    limit = 300 * 2**20
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if is_first_version else "memory.max")).write_text(str(limit))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group may be made here: {error}")
    code = (
        f"open('{group}/cgroup.procs', 'w').write('0')\n"
        "from cluster.doctor.gathering import memory_limit\n"
        "print(memory_limit(2**40))\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    finally:
        group.rmdir()
    assert done.stdout == f"{limit}\n", done.stderr
