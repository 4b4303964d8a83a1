"""The command line's part of an application's life, with a stand-in for the keeper: no Ray is started."""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from cluster import launch
from cluster.config import KvrayConfig
from cluster.keeper_messages import KeeperTask

#: Called as the keeper is, it says that requests are answered.
KEEPER = f"""#!{sys.executable}
import ctypes, json, os, socket, sys, threading, time
line = socket.socket(fileno=int(sys.argv[3]))
def say(**report):
    line.sendall(json.dumps(report).encode() + b"\\n")
def end_but_for_a_thread():
    def linger():
        time.sleep(1.5)
        os._exit(7)
    threading.Thread(target=linger).start()
    ctypes.CDLL(None).pthread_exit(None)
say(type="up", url="http://127.0.0.1:1")
"""


@pytest.fixture
def life(monkeypatch, tmp_path) -> Iterator[Callable[[str], launch._Life]]:
    """Makes a life whose keeper goes on as the given code says."""
    lives = []

    def make(code: str) -> launch._Life:
        keeper = tmp_path / "keeper"
        keeper.write_text(KEEPER + code)
        keeper.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(keeper))
        lives.append(launch._Life(KeeperTask(config=KvrayConfig(), address=None, listener=None)))
        return lives[-1]

    yield make
    for each in lives:
        each.end(is_polite=False)
    ctypes.CDLL(None).prctl(launch._PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def lost(life: launch._Life) -> str:
    urls: list[str] = []
    found = life.run(threading.Event(), lambda _: None, lambda url, _: urls.append(url))
    assert urls == ["http://127.0.0.1:1"]
    return found


@pytest.mark.slow
def test_a_command_line_that_stood_still_does_not_take_its_own_silence_for_the_controllers(life, monkeypatch):
    """Ctrl-Z and fg, or a machine that slept: the clock has run on, wherever it stood."""
    started = life('for _ in range(3):\n    time.sleep(0.2)\n    say(type="seen")\n    time.sleep(0.6)\n')
    times = itertools.count(step=1000)
    with monkeypatch.context() as patched:
        patched.setattr(launch.time, "monotonic", lambda: float(next(times)))
        assert lost(started) == "the process that Ray's driver runs in ended with exit code 0"


@pytest.mark.slow
def test_a_keeper_of_which_a_thread_still_ends_is_waited_for(life):
    """Linux shows a process as a zombie once its first thread has ended, and has it reaped after the last one."""
    assert lost(life("end_but_for_a_thread()")) == "the process that Ray's driver runs in ended with exit code 7"


@pytest.mark.slow
def test_an_orphan_of_which_a_thread_still_ends_is_reaped_later(life):
    orphan = "if os.fork() == 0:\n    if os.fork() == 0:\n        end_but_for_a_thread()\n    os._exit(0)\n"
    assert lost(life(f"{orphan}os.wait()\ntime.sleep(3)\nos._exit(3)\n")).endswith("ended with exit code 3")
