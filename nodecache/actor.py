"""The node cache of each node as a Ray actor, made when the first worker of the node wants it. No block passes here."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final

import msgspec
import ray
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from messages.errors import ErrorInfo, KvrayError, WorkerError, error_from_info, first_line
from messages.fleet import WorkerInfo
from nodecache.process import CacheOptions
from nodecache.supervisor import Supervisor
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_NAMESPACE: Final = "kvray"
#: Nobody asked for so long: the workers of this node are gone, and have no successors.
_IDLE_S: Final = 60.0
_UP_S: Final = 30.0  #: that a process has to follow another one
#: Between tries to reach the actor: one that ends keeps its name for a moment.
_RETRY_DELAYS_S: Final = (0.0, 0.1, 0.4)


class CacheActor:
    """A node's supervisor of its node cache: keeps the arena's memory. Ends itself, and all of it, when nobody asks."""

    def __init__(
        self,
        options: CacheOptions,
        read_secret: Callable[[], ClusterSecret],
        open_log: Callable[[str], None],
        idle_s: float,
    ) -> None:
        open_log(f"cache-{os.uname().nodename}")
        level = logging.getLevelName(logger.getEffectiveLevel()).lower()
        options = msgspec.structs.replace(options, log_level=level)
        self._idle_s = idle_s
        self._asked_s = time.monotonic()
        self._is_up = asyncio.Event()
        self._supervisor = Supervisor(options, read_secret(), lambda _: self._is_up.set(), self._is_up.clear)
        self._start: asyncio.Task[WorkerInfo] | None = None
        self._self = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, name="node-cache-watch", daemon=True).start()

    async def info(self) -> WorkerInfo | ErrorInfo:
        """Return who serves now, or what is wrong; Ray would wrap what is raised."""
        self._asked_s = time.monotonic()
        try:
            if self._start is None:
                self._start = asyncio.get_running_loop().create_task(self._supervisor.start())
            await asyncio.shield(self._start)
            async with asyncio.timeout(_UP_S):
                while self._supervisor.info is None:
                    await self._is_up.wait()
            return self._supervisor.info
        except KvrayError as error:
            self._start = None  # the next one who asks tries again
            return error.info()
        except TimeoutError:
            return WorkerError(f"the node cache was not back within {_UP_S:g} s").info()

    def _watch(self) -> None:
        """End an actor that nobody asks, in a thread of its own: one that is never called has no other life."""
        while time.monotonic() - self._asked_s <= self._idle_s:
            time.sleep(min(1.0, self._idle_s / 4))
        ray.kill(self._self)  # the process sees the end of its standard input


RemoteCache = ray.remote(CacheActor)


class RayNodeCache:
    """The node cache of this process's node. Belongs to one event loop of a process that is connected to Ray."""

    def __init__(
        self,
        options: CacheOptions,
        read_secret: Callable[[], ClusterSecret],
        open_log: Callable[[str], None] = lambda _: None,
        *,
        idle_s: float = _IDLE_S,
    ) -> None:
        """Use the node cache of this node for the model and settings of `options`, which is made if there is none.

        The process that it is made in calls `open_log` with its name first.
        """
        self._node_id: str = ray.get_runtime_context().get_node_id()
        options = msgspec.structs.replace(options, ray_node_id=self._node_id)
        self._arguments = (options, read_secret, open_log, idle_s)
        # Of other settings another one: what an earlier deployment left ends by itself, with who still asks it.
        settings = blake2b(msgspec.msgpack.encode(options.settings), digest_size=4).hexdigest()
        self._name = f"kvray-cache-{self._node_id}-{options.layout.fingerprint.hex()[:16]}-{settings}"
        self._actor: Any = None

    async def info(self) -> WorkerInfo:
        """Return who serves now. Ask anew when it is lost, and three times in `idle_s` at least, or the cache ends.

        Raises:
            ConfigError: it cannot start as configured; there is too little memory, for instance.
            WorkerError: there is none now.
        """
        failure: Exception = WorkerError("it was not asked")
        for delay_s in _RETRY_DELAYS_S:
            await asyncio.sleep(delay_s)
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(self._find)
                answer: WorkerInfo | ErrorInfo = await self._actor.info.remote()
            except (ray.exceptions.RayError, ValueError) as error:  # ValueError: the node is gone
                failure = error
                self._actor = None
                continue
            if isinstance(answer, ErrorInfo):
                raise error_from_info(answer)
            return answer
        raise WorkerError(f"no node cache on node {self._node_id}: {first_line(failure)}")

    def _find(self) -> Any:
        return RemoteCache.options(
            name=self._name,
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_concurrency=1000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=self._node_id, soft=False),
        ).remote(*self._arguments)
