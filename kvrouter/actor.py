"""The Serve deployment around the router: one replica. Placements travel over its channel, not over Serve."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec
import ray.util
from ray import serve
from ray.util.metrics import Gauge

from kvrouter.gauges import GAUGES, PERIOD_S
from kvrouter.router import RouterConfig
from kvrouter.worker import RouterWorker
from messages.fleet import WorkerInfo
from messages.scaling import finite
from transport.channel import ChannelConfig
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_SET_AT_ONCE = 100  #: gauges, some ms


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """The settings that a router is told at its start."""

    channel: ChannelConfig
    max_ttft_s: float  #: predicted; requests beyond it are refused
    host: str | None = None  #: where the channel listens; None: the node's address
    explained_requests: int = 0  #: of so many what was priced for them is kept
    #: remember what became of blocks that nobody holds any more, count what prompts begin with, show what is known
    is_observed: bool = False
    routing: Literal["cache", "load"] = "cache"  #: load: without regard for who holds what


class ReplicaWatch(Protocol):
    """Tells of the replicas of a deployment as they come and go (cluster.fleet.FleetWatch)."""

    def start(self, deployment: str, on_change: Callable[[dict[str, dict[str, Any]]], None]) -> None:
        """Call `on_change` with replica id -> metadata, on the running loop."""
        ...


class RouterActor:
    """One replica: one router for as long as the process lives."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        options: RouterOptions,
        read_secret: Callable[[], ClusterSecret],
        make_watch: Callable[[], ReplicaWatch],
        deployments: Sequence[str],
        prepare: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Listen, and follow the replicas of `deployments`. `prepare` is told this process's name."""
        self._id = f"router-{serve.get_replica_context().replica_id.unique_id}"
        with prepare(self._id):
            host = options.host or ray.util.get_node_ip_address()
            config = RouterConfig(
                routing=options.routing,
                max_ttft_s=options.max_ttft_s,
                explained_requests=options.explained_requests,
                is_observed=options.is_observed,
            )
            self._router = RouterWorker(self._id, read_secret(), host, options.channel, config)
        if options.is_observed:
            self._showing = asyncio.create_task(self._show())
        self._replicas: dict[str, list[WorkerInfo]] = {}
        # Made here: Serve looks through the constructor's arguments afterwards, and they must still pickle.
        self._watch = make_watch()
        for deployment in deployments:
            self._watch.start(deployment, functools.partial(self._on_replicas, deployment))

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return where ingresses find this router, which Serve pushes to every process that watches this deployment."""
        return {"worker_id": self._id, "address": self._router.address}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return finite numbers by name (messages.scaling); Serve asks only where the fleet is to be scaled."""
        return finite(self._router.router.demand.scaling())

    async def identify(self) -> str:
        """Return the router's id; the only method that is ever called over a handle."""
        return self._id

    def _on_replicas(self, deployment: str, replicas: dict[str, dict[str, Any]]) -> None:
        self._replicas[deployment] = [msgspec.convert(metadata, WorkerInfo) for metadata in replicas.values()]
        self._router.set_fleet([info for infos in self._replicas.values() for info in infos])

    async def _show(self) -> None:
        """Set all gauges, changed or not: Ray forgets one that is not set for some 20 s. Placements come between."""
        gauges = {name: Gauge(name, description=kind.help, tag_keys=kind.labels) for name, kind in GAUGES.items()}
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                for number, (name, labels, value) in enumerate(self._router.samples(), 1):
                    gauges[name].set(value, labels)
                    if number % _SET_AT_ONCE == 0:
                        await asyncio.sleep(0)
            except Exception:  # the edge: whoever looks at gauges is not to stop who places requests
                logger.exception("the gauges were not set")

    async def __del__(self) -> None:
        """Hang up, in Serve's only shutdown hook, which runs after the drain."""
        if (showing := getattr(self, "_showing", None)) is not None:
            showing.cancel()
        router = getattr(self, "_router", None)
        if router is not None:
            router.close()
