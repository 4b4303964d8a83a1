"""Which replicas of a deployment are there: Ray Serve's own replica set, as it changes.

Serve pushes the replica set to every process that holds a handle, into the deployment's request router. Ours passes
the replicas' metadata (messages.fleet.WorkerInfo, or the router's address) on to whoever in that process watches.
Requests do not travel this way: they go over the channel (docs/ARCHITECTURE.md).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

logger = logging.getLogger(__name__)

#: replica id -> what its record_replica_metadata returned
ReplicaMetadata = dict[str, dict[str, Any]]

_lock = threading.Lock()
_latest: dict[str, ReplicaMetadata] = {}
_listeners: dict[str, list[Callable[[ReplicaMetadata], None]]] = {}


def publish(deployment: str, replicas: ReplicaMetadata) -> None:
    """Tell those who watch `deployment` of its replicas. FleetRouter calls this, on Serve's own event loop thread."""
    with _lock:
        _latest[deployment] = replicas
        listeners = list(_listeners.get(deployment, ()))
    for listener in listeners:
        listener(replicas)


class FleetRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Publishes the replica set within its process; routes what little still comes over a handle to any replica."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return all candidates, as of one rank: what little comes over a handle may go to any."""
        return [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Publish a new replica set, which Serve's long poll brought."""
        super().update_replicas(replicas)
        # Serve ships this class by value: the module's state is reached by import, not through the class's globals.
        from cluster import fleet

        fleet.publish(
            self._deployment_id.name, {replica.replica_id.unique_id: replica.replica_metadata for replica in replicas}
        )


def fleet_router_config() -> RequestRouterConfig:
    """Configure the deployments whose replicas are watched, so that Serve uses FleetRouter for them."""
    return RequestRouterConfig(request_router_class="cluster.fleet:FleetRouter")


class FleetWatch:
    """Watches deployments of one application from inside a replica."""

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, deployment: str, on_change: Callable[[ReplicaMetadata], None]) -> None:
        """Call `on_change` on the running loop now (if known) and whenever the replica set of `deployment` changes."""
        loop = asyncio.get_running_loop()

        def listener(replicas: ReplicaMetadata) -> None:
            loop.call_soon_threadsafe(on_change, replicas)

        with _lock:
            _listeners.setdefault(deployment, []).append(listener)
            known = _latest.get(deployment)
        if known is not None:
            on_change(known)
        task = loop.create_task(self._warm(deployment))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _warm(self, deployment: str) -> None:
        """Pick a replica, call nothing: a handle subscribes to its replica set only once it is used."""
        while True:
            try:
                handle = serve.get_deployment_handle(deployment, self._app_name)
                async with handle.identify.choose_replica(_reserve=False):
                    return
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - Serve raises many kinds while the application starts
                logger.debug("watching %s: %s", deployment, error)
                await asyncio.sleep(0.2)
