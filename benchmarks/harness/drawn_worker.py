"""A worker as harness.worker_process runs it, of a model whose weights are drawn; with a node cache if one is wanted.

    running_worker("decode", options, secret, script=(str(DRAWN_WORKER),))

The model's directory has a config.json and no more. What a request's id says of loading and computing is done, as in
harness.planned_worker. The node cache, wanted by `options.cache`, is the real process,
supervised by this one; {"cache": its address} is said once the worker uses it.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent))  # after it: files there are named like rooms

import engine.worker
import harness.planned_worker  # noqa: F401 - its import forces what a request's id says
from decode.worker import DecodeWorker
from engine.model.load import load_model
from engine.worker import WorkerOptions
from harness import worker_process
from harness.worker_process import say
from messages.fleet import WorkerInfo
from nodecache.process import CacheOptions
from nodecache.supervisor import Supervisor
from transport.secret import ClusterSecret

DRAWN_WORKER = Path(__file__).resolve()
SEED = 0


class OwnCache:
    """The node cache of this process's worker, started when it is looked for."""

    def __init__(self) -> None:
        self.secret: ClusterSecret | None = None  #: known once the worker is made
        self._supervisor: Supervisor | None = None
        self._info: WorkerInfo | None = None

    async def find(self, options: CacheOptions) -> WorkerInfo:
        """Be the worker's `engine.worker.FindCache`."""
        if self._info is None:
            assert self.secret is not None
            self._supervisor = Supervisor(options, self.secret)
            self._info = await self._supervisor.start()
            asyncio.get_running_loop().call_soon(say, {"cache": self._info.address})
        return self._info

    async def close(self) -> None:
        """End its process."""
        if self._supervisor is not None:
            await self._supervisor.close()


async def main() -> None:
    cache = OwnCache()

    def make(
        worker_id: str,
        host: str,
        options: WorkerOptions,
        secret: ClusterSecret,
        on_crash: Callable[[BaseException], None],
    ) -> DecodeWorker:
        cache.secret = secret
        return DecodeWorker(worker_id, host, options, secret, on_crash, find_cache=cache.find)

    engine.worker.load_model = functools.partial(load_model, drawn_seed=SEED)
    worker_process.WORKERS["decode"] = make  # type: ignore[assignment]  # typed as the class that is made
    try:
        await worker_process.main()
    finally:
        await cache.close()


if __name__ == "__main__":
    asyncio.run(main())
