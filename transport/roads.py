"""All roads of one process: describes its region, probes the roads to each peer, pulls over the best that works.

roads = Roads([ShmTransport(), ...], memory, scratch, stall_s=5.0)
link = roads.connect(send)                    # a channel to a peer is there, from either end
roads.learn(link, regions)                    # the peer said where its blocks lie: probing begins
await roads.pull(link, copies, memory)
roads.on_message(link, road, body); roads.disconnect(link)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from messages.fleet import RoadStatus
from messages.handoff import RegionInfo
from transport.protocol import Arrived, Copies, Copy, Link, RegionError, RegionMemory, TransferError, Transport
from transport.road_choice import RoadChoice

logger = logging.getLogger(__name__)

#: A probe is one small pull, which connects, and some of so many bytes, which are timed.
PROBE_BYTES = 4 << 20
_HELLO_BYTES = 4096
_NUM_TIMED = 3  #: the best counts: the first one touches pages, and other work may be in the way
_MAX_TRIES = 2  #: roads per pull


@dataclass(slots=True)
class _LinkRoads:
    """The roads over one link: the regions that lie at its other end, and how well each road did."""

    regions: dict[str, RegionInfo]  #: by road
    choice: RoadChoice
    has_road: asyncio.Event = field(default_factory=asyncio.Event)  #: a road was proven, or all were tried
    has_failed: asyncio.Event = field(default_factory=asyncio.Event)  #: a road must be probed anew
    prober: asyncio.Task[None] | None = None


class Pulled(NamedTuple):
    """A pull that went well."""

    road: str
    elapsed_s: float  #: over that road


@dataclass(slots=True)
class RoadCounters:
    """What was pulled and what failed since the start, by road."""

    num_bytes: Counter[str] = field(default_factory=Counter)
    busy_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_failed: Counter[str] = field(default_factory=Counter)


class Roads:
    """All roads of one process, for all its peers. All methods belong to one event loop."""

    def __init__(
        self, transports: Sequence[Transport], memory: RegionMemory, scratch: RegionMemory, stall_s: float
    ) -> None:
        """Register `memory` with every road that can read it; `transports`: the preferred ones first.

        A road that peers cannot read it over is kept for pulls into it, if it can do those. `scratch`, PROBE_BYTES of
        the same kind of memory, is where probes land.
        """
        self._transports: dict[str, Transport] = {}
        self._scratch = scratch
        self._stall_s = stall_s
        self._learned: dict[Link, _LinkRoads] = {}
        self.counters = RoadCounters()
        regions = []
        for transport in transports:
            try:
                regions.append(transport.register(memory))
            except RegionError as error:
                logger.info("road %s is not offered: %s", transport.road, error.message)
                if not transport.can_fill(memory):
                    transport.close()
                    continue
            self._transports[transport.road] = transport
        #: what peers are told
        self.regions = tuple(regions)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the roads that this process takes; it is read over those of `regions`."""
        return tuple(self._transports)

    # ------------------------------------------------------------------------------------------------------ the peers

    def connect(self, send: Callable[[str, bytes], bool]) -> Link:
        """Make a link to a peer whose channel carries `send(road, body)`."""
        return Link(send)

    def learn(self, link: Link, regions: Sequence[RegionInfo]) -> None:
        """Take in the peer's description of its region, and begin to probe the roads that both have."""
        if link.is_lost or link in self._learned:
            return
        common = {region.road: region for region in regions if region.road in self._transports}
        choice = RoadChoice(
            [(name, road.is_direct, road.is_one_sided) for name, road in self._transports.items() if name in common]
        )
        known = self._learned[link] = _LinkRoads(common, choice)
        known.prober = asyncio.get_running_loop().create_task(self._probe_forever(link, known))

    def on_message(self, link: Link, road: str, body: bytes) -> None:
        """Hand a message of a peer's road to the same road here."""
        transport = self._transports.get(road)
        if transport is None:
            logger.warning("a message for road %r, which is not one of %s", road, ", ".join(self._transports))
        elif not link.is_lost:
            transport.on_message(link, body)

    def disconnect(self, link: Link) -> None:
        """Forget a peer that is gone: pulls from it fail at once."""
        link.is_lost = True
        for transport in self._transports.values():
            transport.on_link_lost(link)
        known = self._learned.pop(link, None)
        if known is not None and known.prober is not None:
            known.prober.cancel()
            known.has_road.set()

    def close(self) -> None:
        """Take the own region off all roads; pulls under way end with TransferError."""
        for link in list(self._learned):
            self.disconnect(link)
        for transport in self._transports.values():
            transport.close()

    # --------------------------------------------------------------------------------------------------------- pulling

    def can_pull(self, link: Link) -> bool:
        """Tell whether a road works, or may: before the peer described its region, and until the roads were probed."""
        known = self._learned.get(link)
        return not link.is_lost and (known is None or not known.has_road.is_set() or bool(known.choice.proven()))

    async def pull(
        self,
        link: Link,
        copies: Sequence[Copy],
        target: RegionMemory,
        on_arrived: Arrived | None = None,
        on_begun: Callable[[], None] | None = None,
    ) -> Pulled:
        """Carry out all copies from the peer's region over the best road, or the next best; the answer says which.

        Each road is given up when nothing arrives for `stall_s`. `on_begun` is called before each road writes: what
        `on_arrived` told before is void, for the next road does all copies over.

        Raises:
            RegionError: the peer refuses: what was asked for is not there. Nothing was written.
            TransferError: no road works. With a `quarantine_s` late bytes may land for that long.
        """
        known = self._learned.get(link)
        if known is None:
            raise TransferError("the peer is lost, or never said where its blocks lie")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._stall_s):
                await known.has_road.wait()
        error = TransferError(f"no road works: tried {', '.join(known.choice.states) or 'none, no road is common'}")
        for road in known.choice.proven()[:_MAX_TRIES]:
            if on_begun is not None:
                on_begun()
            try:
                elapsed_s = await self._pull_over(road, link, known, copies, target, on_arrived)
            except RegionError:
                raise
            except TransferError as failure:
                error = failure
                if failure.quarantine_s > 0:
                    break
            else:
                return Pulled(road, elapsed_s)
        raise error

    def distrust(self, link: Link, road: str) -> None:
        """Note that what came over `road` was damaged: another one is taken until a probe of it went well."""
        known = self._learned.get(link)
        if known is not None and road in known.choice.states:
            logger.warning("road %s brought damaged bytes", road)
            self.counters.num_failed[road] += 1
            self._rest(known, road)

    def _rest(self, known: _LinkRoads, road: str) -> None:
        known.choice.on_failed(road, time.monotonic())
        known.has_failed.set()

    async def _pull_over(
        self,
        road: str,
        link: Link,
        known: _LinkRoads,
        copies: Sequence[Copy],
        target: RegionMemory,
        on_arrived: Arrived | None,
    ) -> float:
        started_s = time.perf_counter()
        try:
            await self._transports[road].pull(link, known.regions[road], copies, target, self._stall_s, on_arrived)
        except RegionError:
            self.counters.num_failed[road] += 1
            raise
        except TransferError as error:
            self.counters.num_failed[road] += 1
            if not error.is_busy:
                self._rest(known, road)
            logger.warning("road %s failed: %s", road, error.message)
            raise
        seconds = time.perf_counter() - started_s
        num_bytes = Copies.of(copies).num_bytes
        known.choice.on_pulled(road, num_bytes, seconds)
        self.counters.num_bytes[road] += num_bytes
        self.counters.busy_s[road] += seconds
        return seconds

    # --------------------------------------------------------------------------------------------------------- probing

    async def _probe_forever(self, link: Link, known: _LinkRoads) -> None:
        """Probe what is due, then wait until another road is."""
        is_timing = asyncio.Lock()
        while True:
            due = known.choice.due_probes(time.monotonic())
            await asyncio.gather(*(self._probe(road, link, known, is_timing) for road in due))
            if known.choice.due_probes(time.monotonic()):
                continue  # no direct road works: the others' turn
            known.has_road.set()
            at_s = known.choice.next_probe_s()
            known.has_failed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if at_s is None else max(0.01, at_s - time.monotonic())):
                    await known.has_failed.wait()

    async def _probe(self, road: str, link: Link, known: _LinkRoads, is_timing: asyncio.Lock) -> None:
        """Pull into the scratch memory: that it works, and how fast, is what the road is chosen by.

        All roads connect at once, for one that is closed may take `stall_s` to show it; they are timed one by one.
        """
        transport, region = self._transports[road], known.regions[road]
        num_bytes = min(PROBE_BYTES, region.num_bytes)
        try:
            hello = [Copy(0, 0, min(_HELLO_BYTES, num_bytes))]
            await transport.pull(link, region, hello, self._scratch, self._stall_s)
            async with is_timing:
                seconds = math.inf
                for _ in range(_NUM_TIMED):
                    started_s = time.perf_counter()
                    await transport.pull(link, region, [Copy(0, 0, num_bytes)], self._scratch, self._stall_s)
                    seconds = min(seconds, time.perf_counter() - started_s)
        except TransferError as error:
            known.choice.on_failed(road, time.monotonic())
            if not link.is_lost:
                logger.info("road %s does not work: %s", road, error.message)
            return
        except Exception:  # the edge: one road's fault must not end the probes of all
            known.choice.on_failed(road, time.monotonic())
            logger.exception("road %s failed in a way that it has no name for", road)
            return
        known.choice.on_pulled(road, num_bytes, seconds)
        known.has_road.set()

    # ---------------------------------------------------------------------------------------------------------- numbers

    def status(self, link: Link, name: str) -> RoadStatus:
        """Describe the road to a peer, for people; `name` is the peer's address."""
        known = self._learned.get(link)
        road = next(iter(known.choice.proven()), "") if known is not None else ""
        states = {} if known is None else known.choice.states
        return RoadStatus(
            peer=name,
            road=road,
            carriers=self._transports[road].carriers(link) if road else "",
            bytes_per_s=states[road].bytes_per_s if road else 0.0,
            num_failed=sum(state.num_failed for state in states.values()),
        )

    @property
    def bytes_per_s(self) -> float:
        """Mean rate over all pulls and roads; 0 before the first pull."""
        busy_s = sum(self.counters.busy_s.values())
        return self.counters.num_bytes.total() / busy_s if busy_s else 0.0

    def stats(self) -> dict[str, float]:
        """Return the counters by metric name."""
        values: dict[str, float] = {}
        for road in self._transports:
            values[f'kvray_transfer_bytes_total{{road="{road}"}}'] = float(self.counters.num_bytes[road])
            values[f'kvray_transfer_seconds_total{{road="{road}"}}'] = self.counters.busy_s[road]
            values[f'kvray_transfers_failed_total{{road="{road}"}}'] = float(self.counters.num_failed[road])
        return values
