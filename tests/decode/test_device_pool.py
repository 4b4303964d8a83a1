"""Workers whose pools lie on a device, here a fake one that does nothing before it is waited for: tokens are exact.

Their KV leaves for the node cache, comes back from it, and goes from pool to pool (tests/engine/fake_device.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from messages.handoff import RegionInfo
from tests.decode.test_node_cache import ask, engine_of, load_for_nothing, nodes, options_of, prompt_of, running
from tests.engine import fake_device
from tests.workers import peers_of, running_decode, running_pair, until, worker_options
from transport.loopback import Fail, LoopbackNetwork, LoopbackTransport
from transport.protocol import Arrived, Copy, Link, RegionMemory, TransferError, check_ranges

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

__all__ = ["nodes"]

ENGINE = {"kv_cache_bytes": 2 << 20, "plans_ahead": True}


async def test_what_left_a_devices_pool_comes_back_from_host_also_to_another_device(
    model_dir, reference, nodes, monkeypatch
):
    devices = fake_device.install(monkeypatch)
    node, prompt = nodes(), prompt_of(1, 330)
    wanted = reference.greedy(prompt, 16)
    async with running(model_dir, node, engine=ENGINE) as (worker, ingress, router):
        tokens, sources = await ask(ingress, "cold", prompt)
        assert (tokens, sources.computed) == (wanted, 330)
        await router.hears(prompt, {"device", "host"})
        engine_of(worker).pool.clear()
        held = await router.hears(prompt, {"host"})
        devices[0].wipe()
        tokens, sources = await ask(ingress, "from host", prompt, held)
        assert (tokens, sources.host, sources.computed) == (wanted, 320, 10)
        async with running_decode(options_of(model_dir, engine=ENGINE), node.find) as (other, its_ingress):
            load_for_nothing(other)
            tokens, sources = await ask(its_ingress, "from host", prompt, held)
            assert (tokens, sources.host) == (wanted, 320)
        await until(lambda: not engine_of(worker).pool.num_used)
        stats = await ingress.stats()
        assert stats['kvray_blocks_rejected_total{reason="checksum"}'] == 0
        assert stats['kvray_transfer_bytes_total{road="shm"}'] > 0
        assert sum(devices[0].locked.values()) > 0
    assert devices[0].locked == devices[1].locked == {}


class DeviceRoad(LoopbackTransport):
    """Moves bytes from one device's pool to another's past all their streams, as UCX does; it hashes nothing."""

    def __init__(self, network: LoopbackNetwork, devices: Sequence[fake_device.TwinDevice]) -> None:
        super().__init__(network, road="device")
        self._devices = devices
        self.damage = 0  #: bytes of the next pulls that come as others

    def can_fill(self, memory: RegionMemory) -> bool:
        return not memory.is_host

    def register(self, memory: RegionMemory) -> RegionInfo:
        self._network.regions[memory.nonce] = memory
        return RegionInfo(road=self.road, handle=memory.nonce, num_bytes=memory.num_bytes, nonce=memory.nonce)

    async def pull(
        self,
        link: Link,
        source: RegionInfo,
        copies: Sequence[Copy],
        target: RegionMemory,
        stall_s: float,
        on_arrived: Arrived | None = None,
    ) -> None:
        memory = self._network.regions[source.nonce]
        check_ranges(copies, memory.num_bytes, target.num_bytes)
        await asyncio.sleep(0)
        for position, (begin, into, num_bytes) in enumerate(copies):
            if self.faults and position == self.faults[0].num_copies:
                self.faults.popleft()
                raise TransferError("failed on command")
            data = memory.slice(begin, num_bytes).clone()
            if on_arrived is not None and self.damage:
                self.damage -= 1
                data[num_bytes // 2] ^= 1
            for device in self._devices:
                if device.of_copies.data_ptr() == target.slice(0, 1).data_ptr():
                    device.land(lambda data=data, into=into: target.slice(into, len(data)).copy_(data))
            if on_arrived is not None:
                on_arrived(position)


@pytest.mark.parametrize("fault", ["none", "damaged", "fails"])
async def test_prefill_on_one_device_and_decode_on_another_give_the_tokens_of_one_process(
    model_dir, reference, monkeypatch, fault
):
    devices = fake_device.install(monkeypatch)
    network = LoopbackNetwork()
    roads = [DeviceRoad(network, devices) for _ in range(2)]
    made = iter(roads)
    asked = [prompt_of(seed, length) for seed, length in ((1, 330), (2, 150))]
    options = worker_options(model_dir, **ENGINE, max_num_batched_tokens=128)
    async with running_pair(options, options, lambda: [next(made)]) as pair:
        warm = prompt_of(9, 64)
        assert await pair.ingress.finish(pair.ingress.send("warm", warm)) == [reference.greedy(warm, 16)]
        if fault == "damaged":
            roads[1].damage = 3
        elif fault == "fails":
            roads[1].faults.append(Fail(num_copies=2))
        answers = [pair.ingress.send(f"r{i}", prompt) for i, prompt in enumerate(asked)]
        assert await pair.ingress.finish(*answers) == [reference.greedy(prompt, 16) for prompt in asked]
        rejected = {
            reason: peers_of(pair.decode).stats()[f'kvray_blocks_rejected_total{{reason="{reason}"}}']
            for reason in ("checksum", "transfer")
        }
        assert rejected["checksum"] == (3 if fault == "damaged" else 0)
        assert (rejected["transfer"] > 0) == (fault != "none")  # what was damaged has no other road to come over
        assert pair.decode._worker.roads.counters.num_bytes["device"] > 0


async def test_devices_of_one_node_map_each_others_pools(model_dir, reference, monkeypatch):
    fake_device.install(monkeypatch)
    asked = [prompt_of(seed, length) for seed, length in ((1, 330), (2, 150))]
    options = worker_options(model_dir, **ENGINE, max_num_batched_tokens=128)
    async with running_pair(options, options) as pair:
        answers = [pair.ingress.send(f"r{i}", prompt) for i, prompt in enumerate(asked)]
        assert await pair.ingress.finish(*answers) == [reference.greedy(prompt, 16) for prompt in asked]
        stats = await pair.ingress.stats()
        assert stats['kvray_transfer_bytes_total{road="shm"}'] > 0
        assert stats['kvray_blocks_rejected_total{reason="checksum"}'] == 0


async def test_a_device_whose_pool_cannot_be_exported_computes_what_it_cannot_pull(model_dir, reference, monkeypatch):
    fake_device.install(monkeypatch, lambda: fake_device.TwinDevice(refusal="not supported"))
    prompt = prompt_of(1, 330)
    options = worker_options(model_dir, **ENGINE)
    async with running_pair(options, options) as pair:
        assert await pair.ingress.finish(pair.ingress.send("r", prompt)) == [reference.greedy(prompt, 16)]
        assert pair.decode._worker.roads.regions == ()
        assert pair.decode._worker.roads.counters.num_bytes.total() == 0
