"""A process that stands still is killed by its warden; all others are left alone, and leave no warden behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from tests.cluster.starting import wait_until

#: Starts a warden, says so, blocks its loop for as long as it is told to, and ends when its standard input does.
WATCHED = """
import asyncio, sys, threading, time
from cluster.replica import start_warden

async def live():
    start_warden()
    print("up", flush=True)
    time.sleep(float(sys.argv[1]))  # as whoever loads a model
    await asyncio.sleep(1)
    time.sleep(float(sys.argv[2]))
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(live())
"""


@pytest.fixture
def watched(request):
    command = [sys.executable, "-c", WATCHED, *map(str, getattr(request, "param", (0, 0)))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        yield process
        process.kill()


def warden_of(process: subprocess.Popen) -> psutil.Process:
    (warden,) = psutil.Process(process.pid).children()
    return warden


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE  # whom nobody waited for yet


@pytest.mark.slow
def test_who_stands_still_is_killed_and_who_was_continued_in_time_is_not(watched):
    warden = warden_of(watched)
    watched.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        watched.wait(1.5)
    watched.send_signal(signal.SIGCONT)
    with pytest.raises(subprocess.TimeoutExpired):
        watched.wait(4)
    watched.send_signal(signal.SIGSTOP)
    assert watched.wait(20) == -signal.SIGKILL
    wait_until(lambda: has_ended(warden), 5)


@pytest.mark.slow
@pytest.mark.parametrize("watched", [(0, 60)], indirect=True)
def test_whose_loop_hangs_is_killed(watched):
    assert watched.wait(30) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("watched", [(12, 0)], indirect=True)
def test_who_starts_slowly_is_left_alone(watched):
    with pytest.raises(subprocess.TimeoutExpired):
        watched.wait(15)


@pytest.mark.slow
def test_a_warden_ends_with_whom_it_watches(watched):
    warden = warden_of(watched)
    watched.stdin.close()
    watched.wait(10)
    wait_until(lambda: has_ended(warden), 5)
