"""A door is answered for processes of the same user alone, and for nobody once it is closed."""

from __future__ import annotations

import os
import resource
import secrets
import socket
import subprocess
import sys
import time

import pytest

from cluster import door as door_module
from cluster.door import Door, process_at

ASK = """
import os, socket, sys
if len(sys.argv) > 2:
    os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as asking:
    asking.settimeout(30)
    asking.connect("\\0" + sys.argv[1])
    print(asking.recv(16).decode(), end="")
"""
NOBODY = 65534


@pytest.fixture
def name():
    return f"kvray-test-{secrets.token_hex(8)}"


def ask(*arguments):
    return subprocess.run([sys.executable, "-I", "-c", ASK, *arguments], capture_output=True, text=True)


def test_each_that_knocks_is_answered_and_knows_who_answers(name):
    door = Door(name, lambda peer: peer.sendall(b"come in"))
    assert [ask(name).stdout for _ in range(2)] == ["come in"] * 2
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(f"\0{name}")
        assert process_at(asking) == (os.getpid(), os.getuid())
    door.close()
    assert "ConnectionRefusedError" in ask(name).stderr


def test_one_that_leaves_at_once_keeps_nobody_out(name):
    def answer(peer):
        while True:
            peer.sendall(b"come in" * 4096)

    door = Door(name, answer)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(f"\0{name}")
    assert ask(name).stdout.startswith("come in")
    door.close()


def test_a_process_that_had_too_many_open_files_answers_afterwards(name, monkeypatch, caplog):
    monkeypatch.setattr(door_module, "_REST_S", 0.01)
    door = Door(name, lambda peer: peer.sendall(b"come in"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        ends_s = time.monotonic() + 30
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # no number below it is free
        try:
            # Linux reserves a number as accept begins to wait: a thread that waits already has one for the first.
            for asking in (first, second):
                asking.settimeout(30)
                asking.connect(f"\0{name}")
            while "Too many open files" not in caplog.text:
                assert time.monotonic() < ends_s, caplog.text
                time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (first.recv(16), second.recv(16)) == (b"come in", b"come in")
    door.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_is_told_nothing(name, caplog):
    door = Door(name, lambda peer: peer.sendall(b"come in"))
    found = ask(name, str(NOBODY))
    assert (found.returncode, found.stdout) == (0, "")
    assert f"of user {NOBODY} knocked" in caplog.text
    door.close()
