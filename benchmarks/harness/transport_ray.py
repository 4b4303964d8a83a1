"""A Ray of one's own for as long as a block lasts, and Ray's put and get as a rival of the roads.

with own_ray(object_store_bytes) as address:      this process is connected to it
...
with joined(address):                             another process is, too
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil

from harness.transport_pool import filled, python_path
from transport.memory import Memory
from transport.protocol import Copy

_NAMESPACE = "kvray-benchmark"


@contextlib.contextmanager
def own_ray(object_store_bytes: int) -> Iterator[str]:
    """Start a Ray that shares nothing with any other; gives its address. What it started is killed at the end."""
    others = set(psutil.Process().children(recursive=True))
    # Right below /tmp: Ray puts unix sockets there, whose paths may not be longer than 107 bytes.
    directory = tempfile.mkdtemp(prefix="kvb-", dir="/tmp")
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": directory,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": python_path(),
    }
    import ray  # reads its environment when it is imported

    try:
        ray.init(
            address="local",
            namespace=_NAMESPACE,
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield ray.get_runtime_context().gcs_address
    finally:
        family = set(psutil.Process().children(recursive=True)) - others
        ray.shutdown()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Connect this process to a Ray that runs, until the block ends."""
    import ray

    ray.init(address=address, namespace=_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


class _PutActor:
    """The owner of a pool, as a Ray actor."""

    def __init__(self, num_bytes: int, seed: int) -> None:
        self._pool = np.frombuffer(filled(num_bytes, seed).view, np.uint8)

    def put(self, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        """Put these blocks into the object store, all in one object; a list, or Ray would resolve the reference."""
        import ray

        return [ray.put([self._pool[offset : offset + length] for offset, length in ranges])]


class RayRival:
    """An actor puts blocks into the object store; this process gets them and copies them into place."""

    def __init__(self, num_bytes: int, seed: int, target: Memory) -> None:
        import ray

        self._ray = ray
        self._target = np.frombuffer(target.view, np.uint8)
        self._actor = ray.remote(_PutActor).options(num_cpus=0.5).remote(num_bytes, seed)

    def pull(self, copies: Sequence[Copy]) -> None:
        """Pull by one call of the actor and one object."""
        ranges = [(copy.source_offset, copy.num_bytes) for copy in copies]
        (reference,) = self._ray.get(self._actor.put.remote(ranges))
        for copy, block in zip(copies, self._ray.get(reference), strict=True):
            self._target[copy.target_offset : copy.target_offset + copy.num_bytes] = block

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)
