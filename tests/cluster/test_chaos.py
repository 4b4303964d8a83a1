"""Random faults under eight clients, one after the other: nothing wrong, nothing hung, and whole again each time."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass

import psutil
import pytest
import yaml

from tests.cluster.chaos import CONFIG, Load
from tests.models import make_tiny_model
from tests.reference import Reference
from tests.served import Served, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(1800), pytest.mark.usefixtures("one_thread")]

NUM_PREFILL = NUM_DECODE = NUM_INGRESS = 2
GIVEN_UP_S = 120.0  #: then it will not be whole again
SEED = os.environ.get("KVRAY_CHAOS_SEED", "1")

REPLICAS = ("Prefill", "Decode", "Router", "Ingress")
PARTS = ("raylet", "gcs_server", "ray::ServeController", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True)
class Fault:
    """What is done to whom."""

    victim: str
    signals: tuple[signal.Signals, ...]  #: with two seconds between them

    @property
    def costs_ingress(self) -> bool:
        """Whether connections may break."""
        return self.victim == "Ingress" or self.victim in PARTS

    def __str__(self) -> str:
        return f"{' '.join(number.name for number in self.signals)} to {self.victim}"


HOWS = ((signal.SIGKILL,), (signal.SIGSTOP,), (signal.SIGSTOP, signal.SIGCONT))


def random_fault(rng: random.Random) -> Fault:
    victim = rng.choice(PARTS) if rng.random() < 0.2 else rng.choice(REPLICAS)
    return Fault(victim, rng.choice(HOWS))


async def inflict(served: Served, fault: Fault, rng: random.Random) -> None:
    if fault.victim in REPLICAS:
        victims = served.replicas(fault.victim)
    else:
        victims = [child for child in served.descendants() if child.name() == fault.victim]
    victim = rng.choice(victims)
    for number in fault.signals:
        victim.send_signal(number)
        if number != fault.signals[-1]:
            await asyncio.sleep(2)


def wait_until_whole(served: Served, timeout_s: float) -> None:
    ends_s = time.monotonic() + timeout_s
    while True:
        served.wait_until_whole(NUM_PREFILL, NUM_DECODE, max(1.0, ends_s - time.monotonic()))
        family = served.descendants()
        names = [child.name() for child in family if child.status() != psutil.STATUS_STOPPED]
        if len(served.replicas("Ingress")) == NUM_INGRESS and all(part in names for part in PARTS):
            return
        assert time.monotonic() < ends_s, f"not whole again after {timeout_s} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=8192)


@pytest.fixture
def served(model_dir, tmp_path):
    config = tmp_path / "kvray.yaml"
    pools = {"prefill": NUM_PREFILL, "decode": NUM_DECODE, "ingress": NUM_INGRESS}
    config.write_text(yaml.safe_dump(CONFIG | {"pools": pools}))
    arguments = [str(model_dir), "--config", str(config), "--dtype", "float32", "--max-model-len", "4352"]
    with serving(*arguments, "--kv-cache-memory", "16MiB", log_dir=tmp_path) as process:
        process.wait_until_whole(NUM_PREFILL, NUM_DECODE, 60)
        try:
            yield process
        finally:
            print(process.log.read_text())  # pytest shows it where the test failed


SHORT = (
    Fault("Decode", (signal.SIGSTOP,)),
    Fault("Ingress", (signal.SIGKILL,)),
    Fault("raylet", (signal.SIGKILL,)),
    Fault("Router", (signal.SIGSTOP, signal.SIGCONT)),
)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(0, id="four faults"), pytest.param(600, id="ten minutes of them", marks=pytest.mark.long)],
)
async def test_whatever_is_lost_no_answer_is_wrong_and_no_client_hangs(served, model_dir, seconds):
    rng = random.Random(SEED)
    load = Load(served.url, SEED)
    losses: list[tuple[float, float]] = []
    whole_s: list[float] = []
    pending = list(SHORT) if seconds == 0 else []
    ends_s = time.monotonic() + seconds
    async with load.running():
        await asyncio.sleep(2)
        while pending or time.monotonic() < ends_s:
            fault = pending.pop(0) if pending else random_fault(rng)
            print(f"{len(whole_s) + 1:3}. {fault}: ", end="", flush=True)
            began_s = time.monotonic()
            await inflict(served, fault, rng)
            # What is lost is noticed first: until then all looks whole.
            await asyncio.sleep(1 if fault.signals[-1] == signal.SIGCONT else 6)
            await asyncio.to_thread(wait_until_whole, served, GIVEN_UP_S)
            if fault.costs_ingress:
                losses.append((began_s, time.monotonic()))
            whole_s.append(time.monotonic() - began_s)
            print(f"whole again after {whole_s[-1]:.1f} s", flush=True)
            await asyncio.sleep(rng.uniform(0, 3))
    verdict = load.verdict(Reference(model_dir), losses)
    print(f"{len(whole_s)} faults, seed {SEED}; whole again after {max(whole_s):.1f} s at most; {load.summary()}")
    assert not verdict.wrong
    assert not verdict.hung
    assert not verdict.failed
    served.wait_until_idle()
