"""The Serve deployment around the router: one replica. Placements travel over its channel, not over Serve."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec
import ray.util
from ray import serve

from kvrouter.router import RouterConfig
from kvrouter.worker import RouterWorker
from messages.fleet import WorkerInfo
from transport.channel import ChannelConfig
from transport.secret import ClusterSecret


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """The settings that a router is told at its start."""

    channel: ChannelConfig
    max_ttft_s: float  #: predicted; requests beyond it are refused
    host: str | None = None  #: where the channel listens; None: the node's address
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
            config = RouterConfig(routing=options.routing, max_ttft_s=options.max_ttft_s)
            self._router = RouterWorker(self._id, read_secret(), host, options.channel, config)
        self._replicas: dict[str, list[WorkerInfo]] = {}
        # Made here: Serve looks through the constructor's arguments afterwards, and they must still pickle.
        self._watch = make_watch()
        for deployment in deployments:
            self._watch.start(deployment, functools.partial(self._on_replicas, deployment))

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return where ingresses find this router, which Serve pushes to every process that watches this deployment."""
        return {"worker_id": self._id, "address": self._router.address}

    async def identify(self) -> str:
        """Return the router's id; the only method that is ever called over a handle."""
        return self._id

    def _on_replicas(self, deployment: str, replicas: dict[str, dict[str, Any]]) -> None:
        self._replicas[deployment] = [msgspec.convert(metadata, WorkerInfo) for metadata in replicas.values()]
        self._router.set_fleet([info for infos in self._replicas.values() for info in infos])

    async def __del__(self) -> None:
        """Hang up, in Serve's only shutdown hook, which runs after the drain."""
        router = getattr(self, "_router", None)
        if router is not None:
            router.close()
