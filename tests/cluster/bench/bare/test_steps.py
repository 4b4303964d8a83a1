"""Which time is the host's and which the device's, on a made-up clock and a made-up device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cluster.bench.bare import steps
from cluster.bench.bare.steps import DeviceWatch, ForwardWatch


class World:
    """A host's clock, and a device that works one thing after the other. Seconds."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.free_s = 0.0  #: when the device has done all that was launched

    def passes(self, seconds: float) -> None:
        self.now_s += seconds

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, world: World) -> None:
        self.world = world
        self.at_s: float | None = None

    def record(self) -> None:
        self.at_s = max(self.world.now_s, self.world.free_s)

    def synchronize(self) -> None:
        self.world.now_s = max(self.world.now_s, self.at_s)

    def elapsed_time(self, end: Event) -> float:
        assert max(self.at_s, end.at_s) <= self.world.now_s, "the device has not come there"
        return 1e3 * (end.at_s - self.at_s)


class Steps:
    """Launching takes the host 1 s, reading back 1 s, a step the device 10 s."""

    def __init__(self, world: World) -> None:
        self.world = world

    def launch(self, plan: str) -> tuple[str, float]:
        self.world.passes(1.0)
        self.world.free_s = max(self.world.now_s, self.world.free_s) + 10.0
        return plan, self.world.free_s

    def finish(self, launched: tuple[str, float]) -> str:
        assert self.world.now_s >= launched[1], "it has to wait, and nobody would know for how long"
        self.world.passes(1.0)
        return launched[0]


@pytest.fixture
def world(monkeypatch) -> World:
    made = World()
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: made.now_s))
    return made


@pytest.fixture
def engine(world) -> SimpleNamespace:
    return SimpleNamespace(steps=Steps(world))


def test_a_step_that_is_waited_for_leaves_the_device_idle_until_the_next(world, engine):
    watch = DeviceWatch(engine, world.event)
    found = []
    for plan in ("a", "b", "c"):
        watch.begin()
        world.passes(2.0)  # planning
        assert engine.steps.finish(engine.steps.launch(plan)) == plan
        found.append(watch.end())
    assert [step.host_s for step in found] == [4.0, 4.0, 4.0]  # planned, launched, read back
    # while the host launches, nothing was launched yet: that second counts as the device's, as a launch may be long
    assert [step.idle_s for step in found] == [0.0, 3.0, 3.0]
    assert found[-1].ended_s == world.now_s


def test_a_step_that_is_planned_while_another_computes_hides_the_hosts_time(world, engine):
    watch = DeviceWatch(engine, world.event)
    launched = engine.steps.launch("a")
    found = []
    for plan in ("b", "c"):
        watch.begin()
        world.passes(2.0)
        behind = engine.steps.launch(plan)
        engine.steps.finish(launched)
        launched = behind
        found.append(watch.end())
    assert [step.host_s for step in found] == [4.0, 4.0]
    assert [step.idle_s for step in found] == [0.0, 0.0]


def test_what_launches_steps_is_given_back(world, engine):
    own = engine.steps
    watch = DeviceWatch(engine, world.event)
    assert engine.steps is watch
    watch.close()
    assert engine.steps is own


class Model(torch.nn.Module):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def forward(self) -> None:
        self.world.passes(10.0)


def test_on_a_cpu_all_but_the_forward_is_the_hosts(world):
    model = Model(world)
    watch = ForwardWatch(model)
    found = []
    for _ in range(2):
        watch.begin()
        world.passes(2.0)
        model()
        world.passes(1.0)
        found.append(watch.end())
        world.passes(4.0)  # whoever asks
    assert [step.host_s for step in found] == [3.0, 3.0]
    assert [step.idle_s for step in found] == [0.0, 7.0]
    watch.close()
    model()
    assert watch.end().host_s == world.now_s - 117.0 - 10.0  # of this forward it does not know
