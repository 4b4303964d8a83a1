"""What serves on this machine is found by whoever is of the same user."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest

from cluster.announcement import Announcement, ServerFound, servers_here
from cluster.client import Server, server_of
from messages.errors import ConfigError

#: Somebody else who asks, having learned the name.
ASK = """
import json, os, sys
from pathlib import Path
from cluster.announcement import servers_here, _asked
os.setuid(65534)
names = [line.rpartition(" ")[2] for line in Path("/proc/net/unix").read_text().splitlines() if sys.argv[1] in line]
print(len(names), servers_here(), [_asked(chr(0) + name[1:]) for name in names])
"""
NAME = "kvray-serves-"


@contextlib.contextmanager
def announced(**fields):
    announcement = Announcement(ServerFound(**fields))
    try:
        yield
    finally:
        announcement.close()


def ours() -> list[ServerFound]:
    """Those that were announced here: another kvray may serve on this machine."""
    return [server for server in servers_here() if server.url.endswith(".test")]


def test_those_that_serve_are_found_until_they_end():
    assert ours() == []
    with announced(url="http://b.test", pid=2, api_key_file="/proc/2/fd/3"):
        with announced(url="http://a.test", pid=1):
            assert ours() == [
                ServerFound(url="http://a.test", pid=1),
                ServerFound(url="http://b.test", pid=2, api_key_file="/proc/2/fd/3"),
            ]
        assert [server.url for server in ours()] == ["http://b.test"]
    assert ours() == []


def test_a_socket_of_any_name_hides_nobody():
    with socket.socket(socket.AF_UNIX) as odd, announced(url="http://a.test", pid=1):
        odd.bind(b"\0kvray-odd-\xff\xfe %d" % os.getpid())
        odd.listen()
        assert [server.url for server in ours()] == ["http://a.test"]


def test_somebody_who_took_such_a_name_and_says_nothing_or_nonsense_is_no_server(monkeypatch):
    monkeypatch.setattr("cluster.announcement._TIMEOUT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"\0{NAME}{os.getuid()}-silent")
        silent.listen()
        assert ours() == []
    code = """
import os, socket
with socket.socket(socket.AF_UNIX) as door:
    door.bind(chr(0) + f"kvray-serves-{os.getuid()}-nonsense")
    door.listen()
    print(flush=True)
    peer, _ = door.accept()
    peer.sendall(b"{}")
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert ours() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_is_told_nothing():
    with announced(url="http://a.test", pid=1):
        asked = subprocess.check_output([sys.executable, "-c", ASK, NAME], text=True).split(maxsplit=1)
    assert int(asked[0]) >= 1
    assert "a.test" not in asked[1]


def test_the_command_line_asks_the_one_that_serves_here_with_its_key_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("KVRAY_API_KEY", raising=False)
    keys = tmp_path / "keys"
    keys.write_text("a-key\nanother\n")
    keys.chmod(0o600)
    monkeypatch.setattr("cluster.client.servers_here", ours)
    assert server_of(None) == Server("http://127.0.0.1:8000")
    with announced(url="http://a.test", pid=1, api_key_file=str(keys)):
        assert server_of(None) == Server("http://a.test", "a-key")
        assert server_of(None, "mine") == Server("http://a.test", "mine")
        assert server_of("http://b.test/") == Server("http://b.test")
        monkeypatch.setenv("KVRAY_API_KEY", "from-the-environment")
        assert server_of(None) == Server("http://a.test", "from-the-environment")
        with (
            announced(url="http://b.test", pid=2),
            pytest.raises(ConfigError, match=r"2 serve here, http://a\.test, http://b\.test: which one\? \(--url\)"),
        ):
            server_of(None)
