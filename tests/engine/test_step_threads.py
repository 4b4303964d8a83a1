"""As many threads as get cores: fewer beside others, more where cores lie idle."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from engine import step_threads
from engine.cores import NodeCores
from engine.step_threads import StepThreads, TeamSize


@pytest.fixture(autouse=True)
def threads_of_others() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_team_that_gets_its_cores_stays():
    team = TeamSize(4)
    team.on_shares([1.0, 0.97, 0.9, 0.99], 1.0)
    assert team.size == 4


@pytest.mark.parametrize(
    ("shares", "size"),
    [
        ([0.5, 0.9], 1),
        ([0.67, 0.67], 1),
        ([1.0, 1.0, 1.0, 0.5], 3),
        ([0.5] * 8, 4),
        ([0.1, 0.1], 1),
        ([0.6, 1.0, 1.0, 1.0], 3),  # a share of a core is no core
    ],
)
def test_a_team_that_shares_cores_shrinks_to_those_that_it_has(shares: list[float], size: int):
    team = TeamSize(len(shares))
    team.on_shares(shares, 1.0)
    assert team.size == size


def test_a_thread_alone_stays():
    team = TeamSize(2)
    team.on_shares([0.5, 0.5], 1.0)
    team.on_shares([0.1], 2.0)
    assert team.size == 1


def test_it_grows_by_the_cores_that_lie_idle_and_never_beyond_its_limit():
    team = TeamSize(8)
    team.on_shares([0.5] * 8, 0.0)
    team.on_idle(1.9, 0.05)
    assert team.size == 4  # too soon
    team.on_idle(0.5, 1.0)
    assert team.size == 4  # half a core is none
    team.on_idle(1.9, 1.0)
    assert team.size == 6
    team.on_idle(64.0, 1.1)
    assert team.size == 8


def test_a_team_that_grew_in_vain_waits_longer_each_time():
    team, now_s, pauses = TeamSize(2), 0.0, []
    for _ in range(12):
        team.on_shares([0.6, 0.6], now_s)
        begun_s = now_s
        while not team.may_grow(now_s):
            now_s += 0.02
        pauses.append(now_s - begun_s)
        team.on_idle(1.0, now_s)
        assert team.size == 2
        now_s += 0.1
    assert pauses[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8], abs=0.03)
    assert pauses[-2:] == pytest.approx([30.0, 30.0], abs=0.03)
    now_s += 1000.0
    team.on_shares([0.6, 0.6], now_s)
    assert not team.may_grow(now_s + 0.05)
    assert team.may_grow(now_s + 0.11)


@pytest.mark.slow
def test_beside_processes_that_take_all_cores_one_thread_computes(tmp_path):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        threads = StepThreads(2, NodeCores(2, tmp_path / "none"))
        until_s = time.monotonic() + 60
        while threads.team.size > 1 and time.monotonic() < until_s:
            with threads.step():
                multiply()
        with threads.step():
            assert torch.get_num_threads() == threads.team.size == 1
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_what_others_do_between_steps_does_not_keep_a_team_small(tmp_path, monkeypatch):
    times: list[float] = []  # when a step began or ended

    def unused_s() -> float:
        """Two cores within steps, none between them."""
        times.append(time.monotonic())
        return sum(2 * (end - begin) for begin, end in zip(times[::2], times[1::2], strict=False))

    monkeypatch.setattr(step_threads, "_unused_s", unused_s)
    threads = StepThreads(2, NodeCores(2, tmp_path / "none"))
    threads.team.on_shares([0.5, 0.5], time.monotonic() - 1.0)
    assert threads.team.size == 1
    until_s = time.monotonic() + 60
    while threads.team.size == 1 and time.monotonic() < until_s:
        with threads.step():
            multiply()
        time.sleep(0.05)  # others compute
    assert threads.team.size == 2


def multiply() -> None:
    matrix = torch.ones(256, 256)
    for _ in range(50):
        matrix @ matrix


@pytest.fixture
def workers(tmp_path) -> Iterator[list[StepThreads]]:
    """Two on four cores of which no other process takes any."""
    file = tmp_path / "cores"
    file.touch()
    made = [StepThreads(4, NodeCores(4, file, max_wait_s=60)) for _ in range(2)]
    for threads in made:
        threads.team = Alone(4)
    yield made
    for threads in made:
        threads.close()


class Alone(TeamSize):
    """Of a team that always gets its cores, whatever else this machine does."""

    def on_shares(self, shares, now_s):
        pass


def test_a_worker_computes_on_all_cores_until_another_has_something_to_compute(workers):
    first, second = workers
    with first.step():
        assert torch.get_num_threads() == 4
    first.rest()
    with second.step():
        assert torch.get_num_threads() == 4
    second.rest()


def test_within_a_step_it_gives_back_what_another_needs_and_takes_what_another_leaves(workers):
    first, second = workers
    other = threading.Thread(target=second.step().__enter__)
    with first.step():
        other.start()
        while torch.get_num_threads() == 4:
            first.on_layer()
        assert torch.get_num_threads() == 2
        other.join()
        second.rest()
        while torch.get_num_threads() == 2:
            first.on_layer()
        assert torch.get_num_threads() == 4
