"""What Ray's driver prints, and what of it the terminal shows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cluster.ray_output import shown_line

DECODE = "(ServeReplica:kvray:Decode pid=123)"


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (f"{DECODE} decode-a1 | 12:00:00 info    engine: x", "decode-a1 | 12:00:00 info    engine: x"),
        ("\x1b[36m(ServeReplica:kvray:Router pid=1, ip=10.0.0.2)\x1b[0m router-b | x", "router-b | x"),
        (f"{DECODE} Traceback (most recent call last):", "decode-123 | Traceback (most recent call last):"),
        ("(ServeReplica:kvray:Decode pid=9, ip=10.0.0.2)   File", "decode-9@10.0.0.2 |   File"),
        ("(CacheActor pid=5) arena", "cache-5 | arena"),
        ("(ServeReplica:other:Decode pid=123) x", None),
        ("(raylet) A worker died or was killed while executing a task", None),
        ("2026-11-29 WARNING worker.py:1 -- something", None),
        ("", None),
    ],
)
def test_lines_of_our_processes_are_shown_with_their_names_and_nothing_else_is(printed, shown):
    assert shown_line(printed, "text") == shown


def test_as_json_too():
    said = '{"worker": "decode-a1", "message": "x"}'
    assert shown_line(f"{DECODE} {said}", "json") == said
    assert json.loads(shown_line(f"{DECODE} raw", "json")) == {"worker": "decode-123", "message": "raw"}


def test_what_a_process_prints_goes_through_it():
    code = f"""
import os, sys
terminal = os.fdopen(os.dup(2), "w")
from cluster.ray_output import filter_output
filter_output(terminal, "text")
print("{DECODE} one")
print("(raylet) two")
sys.stdout.flush()
os.system("echo '{DECODE} three' >&2")
import time
while True:
    time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "decode-123 | one\n"
        assert process.stderr.readline() == "decode-123 | three\n"
        process.kill()
