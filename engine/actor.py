"""The Serve deployment around a worker: Ray places, restarts and health-checks it. No request passes here."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import msgspec
import ray.util
from ray import serve

from engine.worker import FindCache, WorkerOptions
from messages.fleet import Role, WorkerInfo
from messages.scaling import WorkerScaling, finite
from nodecache.actor import RayNodeCache
from nodecache.process import CacheOptions
from transport.plasma.actor import RayVaults
from transport.plasma.road import Vaults
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """A worker as the actor around it sees it: `prefill.worker.PrefillWorker` or `decode.worker.DecodeWorker`."""

    role: ClassVar[Role]

    def __init__(
        self,
        worker_id: str,
        host: str,
        options: WorkerOptions,
        secret: ClusterSecret,
        on_crash: Callable[[BaseException], None],
        vaults: Vaults | None = None,
        find_cache: FindCache | None = None,
    ) -> None:
        """Load the model; this blocks for as long as that takes."""
        ...

    async def start(self) -> WorkerInfo:
        """Listen, and begin to step; the answer is what the rest of the fleet needs to know."""
        ...

    def scaling(self) -> WorkerScaling:
        """Return what whoever scales the fleet wants to know."""
        ...

    async def drain(self) -> None:
        """Wait until nothing is under way any more, and what is to be kept is written down."""
        ...

    async def close(self) -> None:
        """Stop, hang up, and give memory back."""
        ...


class WorkerActor:
    """One replica: one worker for as long as the process lives."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        worker_class: type[Worker],
        options: WorkerOptions,
        read_secret: Callable[[], ClusterSecret],
        prepare: Callable[[str], AbstractContextManager[None]],
        open_log: Callable[[str], None],
    ) -> None:
        """Load the model and serve. `prepare` is told this process's name, `open_log` is for those that it starts."""
        self._worker_id = f"{worker_class.role}-{serve.get_replica_context().replica_id.unique_id}"
        self._cache: RayNodeCache | None = None
        self._read_secret = read_secret
        self._open_log = open_log
        with prepare(self._worker_id):
            host = options.host or ray.util.get_node_ip_address()
            self._worker = worker_class(
                self._worker_id, host, options, read_secret(), self._on_crash, RayVaults(), self._find_cache
            )
            self._info = await self._worker.start()
        # What was loaded stays for as long as the process, so nothing is lost if it is never looked through for cycles
        # again: a full collection of a model and its libraries held the event loop for some 0.2 s.
        gc.collect()
        gc.freeze()

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return the worker's WorkerInfo, which Serve pushes to every process that watches this deployment."""
        info: dict[str, Any] = msgspec.to_builtins(self._info)
        return info

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return finite numbers by name (messages.scaling); Serve asks for them only where the fleet is to be scaled.

        Serve never asks again a replica whose first answer was anything else.
        """
        return finite(self._worker.scaling())

    async def identify(self) -> str:
        """Return the worker's id; the only method that is ever called over a handle."""
        return self._worker_id

    async def _find_cache(self, options: CacheOptions) -> WorkerInfo:
        """Find the node cache of this node, as `engine.worker.FindCache`."""
        if self._cache is None:
            self._cache = RayNodeCache(options, self._read_secret, self._open_log)
        return await self._cache.info()

    def _on_crash(self, error: BaseException) -> None:
        """End the process: a step raised, the pool's state is unknown. Peers notice at once, Serve starts another."""
        logger.critical("%s ends: %r", self._worker_id, error)
        os._exit(70)

    async def __del__(self) -> None:
        """Drain, then close, in Serve's only shutdown hook: what is under way ends first, as long as Serve waits."""
        worker = getattr(self, "_worker", None)
        if worker is not None:
            await worker.drain()
            await worker.close()
            gc.unfreeze()  # or libraries warn at the end of the process of what they find still there
