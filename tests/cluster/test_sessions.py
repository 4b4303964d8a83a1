"""Ray's sessions that were kvray's own: cleaned once nobody uses them, and never anybody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.sessions import Session, clean, clean_former

#: A keeper: has the session until its standard input ends.
KEEPER = """
import sys
from pathlib import Path
from cluster.sessions import Session
session = Session(Path(sys.argv[1]))
print(session.log_dir, flush=True)
sys.stdin.read()
"""


def session_dir(ray_dir: Path, number: int) -> Path:
    directory = ray_dir / f"session_2026-11-29_10-00-0{number}_000000_{number}"
    (directory / "logs").mkdir(parents=True)
    (directory / "logs" / "gcs_server.out").write_text("")
    return directory


class Keeper:
    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-c", KEEPER, str(directory)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.log_dir = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def left(tmp_path):
    """Makes a session whose keeper was killed."""

    def make(number: int) -> Path:
        directory = session_dir(tmp_path, number)
        Keeper(directory).kill()
        return directory

    return make


def test_what_a_killed_keeper_left_is_cleaned_and_what_another_uses_is_not(left, tmp_path):
    former = left(1)
    used = session_dir(tmp_path, 2)
    keeper = Keeper(used)
    assert keeper.log_dir == used / "logs" / "kvray"
    (tmp_path / "session_latest").symlink_to(used)
    assert clean_former(tmp_path) == [former]
    assert not former.exists()
    assert (used / "logs" / "gcs_server.out").exists()
    keeper.kill()
    assert clean_former(tmp_path) == [used]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_command_line_that_starts_another_ray_leaves_the_lost_one_to_be_looked_at(left, tmp_path):
    directory = left(1)
    code = "import sys; from pathlib import Path; from cluster.sessions import clean_former as clean"
    child = [sys.executable, "-c", f"{code}; print(clean(Path(sys.argv[1])))", str(tmp_path)]
    assert subprocess.check_output(child, text=True) == "[]\n"  # as the keeper, a child of this process
    assert clean_former(tmp_path) == [directory]


def test_sessions_that_are_not_kvrays_are_left_alone(left, tmp_path):
    other = session_dir(tmp_path, 1)  # of `ray start`, say: without our lock
    elsewhere = left(2)
    moved = tmp_path / "kept"
    elsewhere.rename(moved)
    (tmp_path / elsewhere.name).symlink_to(moved)  # a link leads anywhere
    assert clean_former(tmp_path) == []
    assert other.exists()
    assert moved.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give something to somebody else")
def test_another_users_sessions_are_left_alone(left, tmp_path):
    directory = left(1)
    os.chown(directory, 65534, 65534)
    assert clean_former(tmp_path) == []
    assert directory.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give something to somebody else")
def test_a_lock_that_another_user_put_there_makes_no_session_kvrays(left, tmp_path):
    other = session_dir(tmp_path, 1)  # of `ray start`, say, into which every user may write
    (other / "kvray.lock").write_bytes((left(2) / "kvray.lock").read_bytes().replace(b"02_000000_2", b"01_000000_1"))
    os.chown(other / "kvray.lock", 65534, 65534)
    assert not clean(other)
    assert (other / "logs" / "gcs_server.out").exists()


def test_a_lock_of_another_session_makes_no_session_kvrays(left, tmp_path):
    other = session_dir(tmp_path, 1)
    (left(2) / "kvray.lock").rename(other / "kvray.lock")
    assert not clean(other)
    (other / "kvray.lock").unlink()
    os.mkfifo(other / "kvray.lock")
    assert not clean(other)
    assert (other / "logs" / "gcs_server.out").exists()


def test_a_command_line_of_the_same_process_id_is_another_one(left, tmp_path):
    directory = left(1)
    name, pid, started = (directory / "kvray.lock").read_text().split()
    assert (name, int(pid)) == (directory.name, os.getpid())
    (directory / "kvray.lock").write_text(f"{name} {os.getppid()} {int(started) - 1}")
    assert clean_former(tmp_path) == [directory]


def test_processes_of_the_session_end_with_it_and_no_others(left, tmp_path):
    directory = left(1)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    agent = subprocess.Popen([*sleep, f"--session-dir={directory}"])
    logger = subprocess.Popen([*sleep, f"--log-dir={directory}/logs"])
    others = [
        subprocess.Popen([*sleep, f"{directory}/logs/gcs_server.out"]),  # somebody reads it
        subprocess.Popen([*sleep, f"--session-dir={directory}0"]),  # another session's
        subprocess.Popen([*sleep, f"--logdir={directory}/logs"]),  # somebody looks at it
    ]
    assert clean(directory)
    assert not psutil.pid_exists(agent.pid)
    assert not psutil.pid_exists(logger.pid)
    for other in others:
        assert psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE
        other.kill()
        other.wait()


def test_the_lock_is_this_processs_and_ends_with_it(tmp_path):
    directory = session_dir(tmp_path, 1)
    session = Session(directory)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert not clean(directory)
    os.close(session._lock)
    assert clean(directory)  # though the child lives
    child.communicate()


def test_a_directory_of_rays_that_is_not_there_is_no_error(tmp_path):
    assert clean_former(tmp_path / "none") == []
