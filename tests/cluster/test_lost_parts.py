"""Parts that Ray Serve cannot replace: Ray's own processes, and replicas that stand still where there is no room."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster.starting import wait_until
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.served import Served, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600), pytest.mark.usefixtures("one_thread")]

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207  # linux/ptrace.h
AGAIN_WITHIN_S = 60.0
REPLACED_WITHIN_S = 30.0
HUNG_WITHIN_S = 60.0  #: half of it is what a step may take
ERROR_WITHIN_S = 5.0  #: for a client of what was lost, once it is known to be
PROMPT = [7, 8, 9, 10, 11, 12, 13]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def served(model_dir, tmp_path_factory):
    """A cluster on which each worker has a CPU of Ray's, and no further one is free."""
    directory = tmp_path_factory.mktemp("served")
    copy = Path(shutil.copytree(model_dir, directory / "model"))
    config = directory / "kvray.yaml"
    config.write_text(f"pools: {{cpus_per_worker: {psutil.cpu_count() / 2}, prefill: 1, decode: 1, ingress: 2}}")
    arguments = [str(copy), "--config", str(config), "--dtype", "float32", "--kv-cache-memory", "8MiB"]
    with serving(*arguments, log_dir=directory) as process:
        yield process


def answer(served: Served, timeout_s: float) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    reply = httpx.post(f"{served.url}/v1/completions", json=body, timeout=timeout_s)
    reply.raise_for_status()
    return reply.json()["choices"][0]["token_ids"]


def answers_again(served: Served) -> list[int]:
    """The next answer; until it comes, clients are refused at once."""
    ends_s = time.monotonic() + AGAIN_WITHIN_S
    while True:
        began_s = time.monotonic()
        try:
            return answer(served, timeout_s=20)
        except httpx.HTTPError:
            assert time.monotonic() - began_s < 10 + ERROR_WITHIN_S, "a client was kept waiting"
        assert served.process.poll() is None, served.log.read_text()
        assert time.monotonic() < ends_s, served.log.read_text()
        time.sleep(0.2)


def part(served: Served, name: str) -> psutil.Process:
    found: list[psutil.Process] = []

    def is_found() -> bool:  # one that was replaced is not there at once
        found[:] = [child for child in served.descendants() if child.name() == name]
        return len(found) == 1

    wait_until(is_found, REPLACED_WITHIN_S)
    return found[0]


def expected(reference: Reference) -> list[int]:
    from messages.request import SamplingParams

    return reference.generate(PROMPT, SamplingParams(max_tokens=20, temperature=0))


@pytest.mark.parametrize("deployment", ["Decode", pytest.param("Prefill", marks=pytest.mark.long)])
def test_a_worker_that_stands_still_makes_room_for_its_successor(served, reference, deployment):
    (victim,) = served.replicas(deployment)
    victim.suspend()
    victim.wait(REPLACED_WITHIN_S)
    served.wait_until_whole(1, 1, REPLACED_WITHIN_S)
    assert answer(served, timeout_s=20) == expected(reference)


@pytest.mark.long
async def test_a_step_that_hangs_is_noticed_and_its_worker_replaced(served, reference):
    (victim,) = served.replicas("Decode")
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    async def ask() -> list[int]:
        async with httpx.AsyncClient(timeout=120) as http:
            reply = await http.post(f"{served.url}/v1/completions", json=body)
            return reply.raise_for_status().json()["choices"][0]["token_ids"]

    loads = [asyncio.create_task(ask()) for _ in range(4)]
    with stopped_thread(victim, await asyncio.to_thread(busiest_thread, victim)):
        # A zombie for as long as its thread is held.
        await asyncio.to_thread(wait_until, lambda: victim.status() == psutil.STATUS_ZOMBIE, HUNG_WITHIN_S)
    answers = await asyncio.gather(*loads)
    assert answers == 4 * [reference.greedy(PROMPT, 900)]
    await asyncio.to_thread(served.wait_until_whole, 1, 1, REPLACED_WITHIN_S)


def busiest_thread(process: psutil.Process) -> int:
    """The thread that computed most within a moment: the one that steps."""
    before = {thread.id: thread.user_time for thread in process.threads()}
    time.sleep(0.5)
    return max(process.threads(), key=lambda thread: thread.user_time - before.get(thread.id, 0.0)).id


@contextlib.contextmanager
def stopped_thread(process: psutil.Process, thread: int) -> Iterator[None]:
    """One thread stands still while the others go on, as a debugger holds it; it is let go at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    attached = libc.ptrace(PTRACE_SEIZE, thread, None, None)
    assert attached == 0, os.strerror(ctypes.get_errno())
    try:
        assert libc.ptrace(PTRACE_INTERRUPT, thread, None, None) == 0
        yield
    finally:
        libc.ptrace(PTRACE_DETACH, thread, None, None)  # unless it has ended


def test_the_other_ingress_answers_while_one_stands_still(served, reference):
    first, second = served.replicas("Ingress")
    began_s = time.monotonic()
    first.suspend()
    with httpx.Client(timeout=0.5) as http:
        while first.is_running() and first.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() - began_s < 10
            httpx_answers = http.get(f"{served.url}/health").status_code
            assert httpx_answers == 200
    assert second.is_running()
    assert answer(served, timeout_s=20) == expected(reference)
    wait_until(lambda: len(served.replicas("Ingress")) == 2, REPLACED_WITHIN_S)


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        pytest.param("raylet", signal.SIGKILL, "raylet ended", id="raylet killed"),
        pytest.param("gcs_server", signal.SIGKILL, "gcs_server ended", id="GCS killed", marks=pytest.mark.long),
        pytest.param(
            "ray::DashboardAgent", signal.SIGKILL, "DashboardAgent", id="agent killed", marks=pytest.mark.long
        ),
        pytest.param("ray::RuntimeEnvAgent", signal.SIGKILL, "RuntimeEnvAgent", id="agent2", marks=pytest.mark.long),
        pytest.param("raylet", signal.SIGSTOP, "raylet ended", id="raylet stopped", marks=pytest.mark.long),
        pytest.param("gcs_server", signal.SIGSTOP, "gcs_server ended", id="GCS stopped", marks=pytest.mark.long),
    ],
)
def test_a_ray_of_our_own_is_started_anew(served, reference, name, number, words):
    began = len(served.log.read_text())
    family = served.descendants()
    lost_s = time.monotonic()
    part(served, name).send_signal(number)
    wait_until(lambda: "starting Ray and the application anew" in served.log.read_text()[began:], 20)
    assert answers_again(served) == expected(reference)
    assert time.monotonic() - lost_s < AGAIN_WITHIN_S
    (line,) = [line for line in served.log.read_text()[began:].splitlines() if "anew" in line]
    assert words in line
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive, "of the former life"
    served.wait_until_whole(1, 1, 30)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSTOP])
def test_serves_controller_is_replaced_while_requests_go_on(served, reference, number):
    controller = part(served, "ray::ServeController")
    began = len(served.log.read_text())
    controller.send_signal(number)
    while controller.is_running() and controller.status() != psutil.STATUS_ZOMBIE:
        assert answer(served, timeout_s=5) == expected(reference)
    wait_until(lambda: [c for c in served.descendants() if c.name() == "ray::ServeController"] != [], 30)
    (victim,) = served.replicas("Decode")
    victim.kill()
    served.wait_until_whole(1, 1, 60)
    assert answer(served, timeout_s=20) == expected(reference)
    assert "anew" not in served.log.read_text()[began:]


def test_what_cannot_start_again_as_configured_ends_in_one_line(served):
    """The last test of this module: there is no cluster after it."""
    model = Path(served.log.parent / "model")
    model.rename(model.with_name("elsewhere"))
    for ingress in served.replicas("Ingress"):
        ingress.kill()
    assert served.process.wait(AGAIN_WITHIN_S) == 2
    lines = served.log.read_text().splitlines()
    assert re.fullmatch(rf"kvray: .*{re.escape(str(model))}.*", lines[-1]), lines[-1]
    wait_until(lambda: not served.descendants(), 5)
