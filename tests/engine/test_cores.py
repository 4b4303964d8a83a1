"""A node's cores: how many a container may use, and how the workers of a node share them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cores import NodeCores, fair_share, num_cores

CORES = len(os.sched_getaffinity(0))
ROOT = Path(__file__).parents[2]


# -------------------------------------------------------------------------------------------------------------- quotas


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {}, CORES),
        ("0::/", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/", {"cpu.max": "150000 100000\n"}, min(CORES, 2)),
        ("0::/", {"cpu.max": "99999999 100000\n"}, CORES),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "100000 100000\n"}, 1),  # of the group around it
        ("0::/of/the/host", {"cpu.max": "100000 100000\n"}, 1),  # a container that sees its own at the root
        ("4:cpu,cpuacct:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, CORES),
        ("4:cpu,cpuacct:/\n0::/", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "100000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 1),
        ("8:pids:/a", {"pids/a/cpu.max": "100000 100000\n"}, CORES),  # not of processors
        ("nonsense", {"cpu.max": "100000 100000\n"}, CORES),
    ],
)
def test_a_quota_bounds_what_is_there(tmp_path: Path, membership: str, files: dict[str, str], expected: int):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership + "\n")
    assert num_cores(tmp_path, tmp_path / "membership") == expected


def test_no_control_groups_are_no_limit(tmp_path: Path):
    assert num_cores(tmp_path, tmp_path / "none") == CORES


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1), (1.5, min(CORES, 2)), (1000.0, CORES)])
def test_a_quota_of_the_kernels_is_seen(share: float, expected: int):
    is_first_version = Path("/sys/fs/cgroup/cpu/cpu.shares").exists()
    group = Path("/sys/fs/cgroup/cpu" if is_first_version else "/sys/fs/cgroup") / f"kvray-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if is_first_version:
            (group / "cpu.cfs_quota_us").write_text(str(int(share * 100_000)))
        elif not (group / "cpu.max").exists():
            pytest.skip("control groups do not limit processors here")
        else:
            (group / "cpu.max").write_text(f"{int(share * 100_000)} 100000")
        code = (
            f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
            "from engine.cores import num_cores; print(num_cores())"
        )
        assert int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) == expected
    finally:
        group.rmdir()


# ------------------------------------------------------------------------------------------------------- what is shared


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [(8, 1, [8]), (8, 2, [4, 4]), (8, 3, [3, 3, 2]), (3, 2, [2, 1]), (2, 2, [1, 1]), (2, 3, [1, 1, 1]), (1, 1, [1])],
)
def test_shares_are_as_equal_as_can_be_and_each_worker_has_a_core(cores: int, workers: int, expected: list[int]):
    assert [fair_share(cores, workers, rank) for rank in range(workers)] == expected


@pytest.fixture
def node(tmp_path: Path) -> Iterator[list[NodeCores]]:
    """Three workers on four cores, each of which waits until it has one."""
    file = tmp_path / "cores"
    file.touch()
    workers = [NodeCores(4, file, max_wait_s=60) for _ in range(3)]
    yield workers
    for worker in workers:
        worker.close()


def test_who_is_alone_has_all_cores_and_no_more_than_it_wants(node):
    assert node[0].take(4) == 4
    assert node[0].take(2) == 2
    assert node[0].take(9) == 4


def test_who_comes_waits_until_the_other_has_given_back_what_is_more_than_its_part(node):
    assert node[0].take(4) == 4
    taken: list[int] = []
    comes = threading.Thread(target=lambda: taken.append(node[1].take(4)))
    comes.start()
    while (of_first := node[0].take(4)) == 4:  # until it sees that the other has something to compute
        pass
    comes.join()
    assert of_first == 2
    assert taken == [2]
    assert (node[0].take(4), node[1].take(4)) == (2, 2)


def test_who_has_nothing_more_to_compute_leaves_its_cores_to_the_others(node):
    node[0].take(2)
    node[1].take(4)
    assert node[1].take(4) == 2
    node[0].give_back()
    assert node[1].take(4) == 4
    node[1].give_back()
    node[1].give_back()
    assert node[2].take(4) == 4


def test_more_workers_than_cores_have_one_each_and_wait_for_nobody(tmp_path):
    file = tmp_path / "cores"
    file.touch()
    workers = [NodeCores(2, file, max_wait_s=60) for _ in range(4)]
    for worker in workers:
        worker.take(1)
    assert [worker.take(2) for worker in workers] == [1, 1, 1, 1]
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("seed", range(5))
def test_each_sees_all_the_others_wherever_their_places_are(tmp_path, seed: int):
    file = tmp_path / "cores"
    file.touch()
    workers = [NodeCores(32, file) for _ in range(5)]
    for place, worker in zip(random.Random(seed).sample(range(1000), 5), workers, strict=True):
        worker._place = worker._begin + (place << 16)
    for number, worker in enumerate(workers, 1):
        assert worker.take(number) == number
    for worker in workers:
        others = [(other._place, other._num_taken) for other in workers if other is not worker]
        assert sorted(worker._others()) == sorted(others)
    for worker in workers:
        worker.close()


def test_together_they_never_compute_on_more_cores_than_there_are(node):
    has = [0] * len(node)
    lock = threading.Lock()
    seen: list[int] = []

    def work(place: int) -> None:
        for number in range(300):
            with lock:
                has[place] = 0  # while it asks it may have fewer than before
            taken = node[place].take(1 + (number + place) % 4)
            with lock:
                has[place] = taken
                seen.append(sum(has))
            if number % 5 == 4:
                with lock:
                    has[place] = 0
                node[place].give_back()
        node[place].give_back()

    threads = [threading.Thread(target=work, args=[place]) for place in range(len(node))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 900
    assert max(seen) <= 4


WORKER = """
import os, sys, time
from pathlib import Path
from engine.cores import NodeCores
os.sched_setaffinity(0, set(map(int, sys.argv[2:])) or os.sched_getaffinity(0))
cores = NodeCores(4, Path(sys.argv[1]))
print(cores.take(4), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_cores_of_a_worker_that_is_killed_are_free(tmp_path, end):
    file = tmp_path / "cores"
    file.touch()
    worker = NodeCores(4, file)
    other = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "4\n"
        assert worker.take(4) == 1  # it waited, and none was given back
        assert worker.take(4) == 1
        other.send_signal(end)
        other.wait()
        assert worker.take(4) == 4
    finally:
        other.kill()
        other.communicate()
        worker.close()


@pytest.mark.skipif(CORES < 2, reason="needs two cores to be bound to one of them")
def test_who_is_bound_to_other_cores_is_not_waited_for(tmp_path):
    file = tmp_path / "cores"
    file.touch()
    worker = NodeCores(4, file, max_wait_s=60)
    core = str(min(os.sched_getaffinity(0)))
    other = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(file), core], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "4\n"
        assert worker.take(4) == 4
    finally:
        other.kill()
        other.communicate()
        worker.close()


def test_workers_that_cannot_see_each_other_take_what_they_want(tmp_path):
    worker = NodeCores(4, tmp_path / "none")
    assert (worker.take(3), worker.take(7)) == (3, 7)
    worker.give_back()
    worker.close()


def test_the_file_that_is_used_can_be_locked_here():
    assert NodeCores(1)._file is not None
