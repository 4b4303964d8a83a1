"""The Serve deployment around a prefill worker: Ray places, restarts and health-checks it. No request passes here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import msgspec
import ray.util
from ray import serve

from engine.worker import WorkerOptions
from prefill.worker import PrefillWorker
from transport.plasma.actor import RayVaults

logger = logging.getLogger(__name__)


class PrefillActor:
    """One replica: one prefill worker for as long as the process lives."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, options: WorkerOptions, prepare: Callable[[], None]
    ) -> None:
        prepare()
        worker_id = f"prefill-{serve.get_replica_context().replica_id.unique_id}"
        host = options.host or ray.util.get_node_ip_address()
        self._worker = PrefillWorker(worker_id, host, options, self._on_crash, RayVaults())
        self._info = await self._worker.start()

    def record_replica_metadata(self) -> dict[str, Any]:
        """What the fleet needs to know, pushed by Serve to every process that watches this deployment."""
        info: dict[str, Any] = msgspec.to_builtins(self._info)
        return info

    async def identify(self) -> str:
        """The worker's id; the only method that is ever called over a handle."""
        return self._info.worker_id

    @staticmethod
    def _on_crash(error: BaseException) -> None:
        """A step raised: the pool's state is unknown. Peers notice the closed socket at once, Serve starts another."""
        logger.critical("prefill worker ends: %r", error)
        os._exit(70)

    async def __del__(self) -> None:
        """Serve's only shutdown hook: what is under way ends first, as long as Serve waits for it."""
        worker = getattr(self, "_worker", None)
        if worker is not None:
            await worker.drain()
            await worker.close()
