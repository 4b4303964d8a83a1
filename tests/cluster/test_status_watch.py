"""`kvray status --watch`: on a terminal, in a pipe, when the server goes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cluster.status import fleet_status
from tests.cluster.test_status import FakeDispatcher, answering
from tests.served import free_port, kvray_command, run_kvray, takes_interrupts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def watching(url: str, *arguments: str, stdout: int) -> subprocess.Popen[bytes]:
    command = kvray_command("status", "--url", url, "--watch", "--interval", "0.2", *arguments)
    return subprocess.Popen(
        command,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
        preexec_fn=takes_interrupts,
    )


def read_until(descriptor: int, words: str, timeout_s: float = 30.0) -> str:
    """What is shown until `words` are there, without what steers the terminal."""
    seen = b""
    ends_s = time.monotonic() + timeout_s
    while True:
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode(errors="replace")).replace("\r", "")
        if words in text:
            return text
        assert time.monotonic() < ends_s, text
        if select.select([descriptor], [], [], 0.2)[0]:
            seen += os.read(descriptor, 65536)


async def test_a_terminal_shows_it_in_place_and_a_server_that_goes_is_said_until_ctrl_c_ends_it():
    body = json.dumps(await fleet_status(FakeDispatcher(has_router=True))).encode()
    leader, follower = pty.openpty()
    with answering(200, body) as url:
        process = watching(url, stdout=follower)
        os.close(follower)
        try:
            shown = read_until(leader, "tokens/s generated")
            assert "decode-e5f6g7h8" in shown
            assert f"{url}, every 0.2 s; Ctrl-C ends" in shown
        except BaseException:
            process.kill()
            raise
    try:
        assert ": no status from http" in read_until(leader, "no answer for ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


@pytest.mark.long
async def test_programs_get_a_document_a_line():
    status = await fleet_status(FakeDispatcher(has_router=True))
    with answering(200, json.dumps(status).encode()) as url:
        process = watching(url, "--json", stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
            process.stdout.close()
    assert lines == [status, status]


@pytest.mark.long
def test_a_server_that_was_never_there_is_one_line_and_exit_code_2():
    url = f"http://127.0.0.1:{free_port()}"
    finished, _ = run_kvray("status", "--watch", "--url", url)
    assert finished.returncode == 2
    assert finished.stderr == f"kvray: no status from {url}: Connection refused; where does kvray serve? (--url)\n"
