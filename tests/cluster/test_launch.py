"""The command line's part of an application's life, with a stand-in for the keeper: no Ray is started."""

from __future__ import annotations

import itertools
import sys
import threading

import pytest

from cluster import launch
from cluster.config import KvrayConfig
from cluster.keeper_messages import KeeperTask

#: Called as the keeper is, it says that requests are answered and, three times, that all is well; then it ends.
KEEPER = f"""#!{sys.executable}
import json, socket, sys, time
line = socket.socket(fileno=int(sys.argv[3]))
line.sendall(json.dumps({{"type": "up", "url": "http://127.0.0.1:1"}}).encode() + b"\\n")
for _ in range(3):
    time.sleep(0.2)
    line.sendall(json.dumps({{"type": "seen"}}).encode() + b"\\n")
    time.sleep(0.6)
"""


@pytest.mark.slow
def test_a_command_line_that_stood_still_does_not_take_its_own_silence_for_the_controllers(monkeypatch, tmp_path):
    """Ctrl-Z and fg, or a machine that slept: the clock has run on, wherever it stood."""
    keeper = tmp_path / "keeper"
    keeper.write_text(KEEPER)
    keeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(keeper))
    times = itertools.count(step=1000)
    life = launch._Life(KeeperTask(config=KvrayConfig(), address=None, listener=None))
    monkeypatch.setattr(launch.time, "monotonic", lambda: float(next(times)))
    urls = []
    lost = life.run(threading.Event(), lambda _: None, lambda url, _: urls.append(url))
    life.end(is_polite=False)
    assert urls == ["http://127.0.0.1:1"]
    assert lost == "the process that Ray's driver runs in ended with exit code 0"
