"""What processes write to their log files, as the terminal shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from cluster import log_tail, logs
from cluster.log_tail import LogTail, terminal_line


@pytest.fixture
def shown():
    return []


@pytest.fixture
def tail(tmp_path, shown):
    """Closed by the tests themselves, which shows what is left."""
    return LogTail(tmp_path, lambda name, line: shown.append((name, line)))


#: A process of ours: its log is opened, and it says what it is told to in different ways.
PROCESS = """
import logging, os, subprocess, sys, warnings
from cluster.logs import open_process_log
open_process_log("info", sys.argv[1], sys.argv[2], "decode-a1")
logging.getLogger("decode.worker").warning("late")
warnings.warn("deprecated")
print("printed", flush=True)
os.write(2, b"native\\x1b[31m \\xff\\n")
subprocess.run(["echo", "a child's"])
try:
    int("three")
except ValueError:
    logging.getLogger("engine").exception("broken")
os.write(2, b"half a li")
os.kill(os.getpid(), 9)
"""


def run(style, directory):
    subprocess.run([sys.executable, "-c", PROCESS, style, str(directory)], capture_output=True, check=False)


def test_all_that_a_process_writes_is_shown_in_order_a_line_each_with_its_name(tmp_path, tail, shown):
    run("text", tmp_path)
    tail.close()
    assert {name for name, _ in shown} == {"decode-a1"}
    lines = [line for _, line in shown]
    assert lines[0].endswith("warning decode.worker: late")
    assert lines[1:3] == ["<string>:6: UserWarning: deprecated", "printed"]
    assert lines[3:5] == ["native\\x1b[31m \ufffd", "a child's"]
    assert lines[5].endswith("error   engine: broken")
    assert lines[6] == "Traceback (most recent call last):"
    assert lines[-2] == "ValueError: invalid literal for int() with base 10: 'three'"
    assert lines[-1] == "half a li"


def test_on_a_terminal_the_name_stands_before_each_line():
    assert terminal_line("decode-a1", "12:00:00 info    engine: x", "text") == "decode-a1 | 12:00:00 info    engine: x"


def test_as_json_each_line_is_an_object_with_the_name_whoever_wrote_it(tmp_path, tail, shown):
    run("json", tmp_path)
    tail.close()
    said = [json.loads(terminal_line(name, line, "json")) for name, line in shown]
    assert {one["worker"] for one in said} == {"decode-a1"}
    assert [said[0][key] for key in ("level", "logger", "message")] == ["warning", "decode.worker", "late"]
    assert [one["message"] for one in said[1:5]] == [
        "<string>:6: UserWarning: deprecated",
        "printed",
        "native\\x1b[31m \ufffd",
        "a child's",
    ]
    assert "ValueError" in said[5]["traceback"]
    for line in ("{", "[1]", '"text"', '{"a": 1}', "null"):
        assert json.loads(terminal_line("a", line, "json")) == {"worker": "a", "message": line}


def test_a_file_that_begins_later_is_followed_too_and_files_of_other_names_are_not(tmp_path, tail, shown):
    (tmp_path / "prefill-b2.log").write_text("one\n")
    (tmp_path / "prefill-b2.log.1").write_text("former\n")
    (tmp_path / "note").write_text("other\n")
    tail.close()
    assert shown == [("prefill-b2", "one")]


def test_a_log_that_has_become_too_large_goes_on_in_another_file_and_no_line_is_lost(
    tmp_path, tail, shown, monkeypatch, capfd
):
    monkeypatch.setattr(logs, "_MAX_BYTES", 1000)
    monkeypatch.setattr(logs, "_log_file", None)
    kept = [os.dup(stream) for stream in (1, 2)]
    try:
        logs.open_process_log("info", "text", str(tmp_path), "router-c3")
        for number in range(400):
            os.write(2, b"%d\n" % number)
            logs.turn_over_log()
            if number % 100 == 0:
                tail.drain()
    finally:
        for stream, former in zip((1, 2), kept, strict=True):
            os.dup2(former, stream)
            os.close(former)
    tail.close()
    assert (tmp_path / "router-c3.log.1").stat().st_size == pytest.approx(1000, abs=5)
    assert [int(line) for _, line in shown] == list(range(400))
    logs.configure_logging("info", "text")


def test_what_a_terminal_cannot_keep_up_with_is_left_out_and_said(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(log_tail, "_MAX_BEHIND_BYTES", 1000)
    (tmp_path / "decode-a1.log").write_text("x" * 9 + "\n" + "123456789\n" * 999)
    tail = LogTail(tmp_path, lambda name, line: shown.append(line))
    tail.close()
    assert shown[0] == f"... 9500 bytes are not shown, they are in {tmp_path}/decode-a1.log"
    assert shown[1:] == ["123456789"] * 50


def test_a_line_without_end_is_shown_in_pieces(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(log_tail, "_MAX_LINE_BYTES", 100)
    (tmp_path / "decode-a1.log").write_text("x" * 150)
    LogTail(tmp_path, lambda name, line: shown.append(line)).close()
    assert "".join(shown) == "x" * 150


def test_what_was_written_to_a_following_file_just_before_the_end_is_shown(tmp_path, shown):
    path = tmp_path / "decode-a1.log"
    path.write_text("one\n")
    tail = LogTail(tmp_path, lambda name, line: shown.append(line))
    tail.drain()
    with tail._lock:
        path.rename(tmp_path / "decode-a1.log.1")
        path.write_text("two\n")
        tail._ending.set()
    tail.close()
    assert shown == ["one", "two"]


def test_a_file_that_was_cut_off_is_read_from_its_begin(tmp_path, shown):
    path = tmp_path / "decode-a1.log"
    path.write_text("one and more\n")
    tail = LogTail(tmp_path, lambda name, line: shown.append(line))
    tail.drain()
    path.write_text("two\n")
    tail.close()
    assert shown == ["one and more", "two"]


def test_a_file_that_cannot_be_read_hides_no_other(tmp_path, shown):
    (tmp_path / "a.log").mkdir()
    (tmp_path / "b.log").write_text("one\n")
    LogTail(tmp_path, lambda name, line: shown.append(line)).close()
    assert shown == ["one"]


def test_control_characters_of_eight_bits_do_not_reach_the_terminal(tmp_path, shown):
    (tmp_path / "decode-a1.log").write_text("\x9b2J\x85 \u00e9\n", encoding="utf-8")
    LogTail(tmp_path, lambda name, line: shown.append(line)).close()
    assert shown == ["\\x9b2J\\x85 \u00e9"]


def test_json_that_is_too_deep_to_read_is_a_text():
    line = '{"a":' * 20_000
    assert json.loads(terminal_line("a", line, "json")) == {"worker": "a", "message": line}


@pytest.mark.parametrize("text", ["\u00e9" * 150, "x" + "\u00e9" * 150, "\u20ac" * 150, "\U0001f600" * 150])
def test_a_piece_of_a_line_has_whole_characters(tmp_path, shown, monkeypatch, text):
    monkeypatch.setattr(log_tail, "_MAX_LINE_BYTES", 100)
    written = text.encode()
    tail = LogTail(tmp_path, lambda name, line: shown.append(line))
    with (tmp_path / "decode-a1.log").open("wb", buffering=0) as file:
        for begin in range(0, len(written), 101):
            file.write(written[begin : begin + 101])
            tail.drain()
    tail.close()
    assert "".join(shown) == text
    assert len(shown) > 1


def test_a_line_of_bytes_that_are_no_text_ends(tmp_path, shown, monkeypatch):
    monkeypatch.setattr(log_tail, "_MAX_LINE_BYTES", 100)
    (tmp_path / "decode-a1.log").write_bytes(b"\xff" * 150 + b"\x80" * 150)
    LogTail(tmp_path, lambda name, line: shown.append(line)).close()
    assert "".join(shown) == "\ufffd" * 300


def test_a_directory_that_is_gone_ends_nothing(tmp_path, shown):
    inner = tmp_path / "logs"
    inner.mkdir()
    (inner / "decode-a1.log").write_text("one\n")
    seen = threading.Event()
    tail = LogTail(inner, lambda name, line: seen.set())
    assert seen.wait(10)
    (inner / "decode-a1.log").unlink()
    inner.rmdir()
    tail.drain()
    tail.close()
