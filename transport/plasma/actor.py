"""The vaults of `transport.plasma` as Ray actors, one per node."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from messages.errors import ErrorInfo, first_line
from messages.handoff import RegionInfo
from transport.checksum import Bytes
from transport.plasma.road import Range
from transport.plasma.vault import DEFAULT_LIMITS, Vault, VaultLimits
from transport.protocol import RegionError, TransferError

logger = logging.getLogger(__name__)

_NAMESPACE = "kvray"
_NUM_THREADS = 4  #: exports that one vault makes at a time; more wait
_MAX_CALLS = 1000  # at a time; most of them wait
#: Between tries to reach a vault: one that ends keeps its name for a moment.
_RETRY_DELAYS_S = (0.0, 0.1, 0.4)


class VaultActor:
    """A node's vault: what it puts it owns, so that it outlives whom it was read from. Ends itself when idle."""

    def __init__(self, limits: VaultLimits) -> None:
        self._vault = Vault(ray.put, limits)
        self._limits = limits
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="vault")
        self._called_s = time.monotonic()
        self._self = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, name="vault-watch", daemon=True).start()

    async def export(
        self, export_id: bytes, region: RegionInfo, segments: Sequence[Sequence[Range]]
    ) -> list[object] | ErrorInfo:
        """Do as `Vault.export`, but return its error in wire form: Ray would wrap what is raised."""
        self._called_s = time.monotonic()
        self._vault.expect(export_id)  # here, as a release may overtake what waits for a thread
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._vault.export, export_id, region, segments)
        except TransferError as error:
            return error.info()

    async def release(self, export_id: bytes) -> None:
        """Release an export, as `Vault.release`; unknown ids are ignored."""
        self._called_s = time.monotonic()
        self._vault.release(export_id)

    def _is_idle(self) -> bool:
        return self._vault.num_holds == 0 and time.monotonic() - self._called_s > self._limits.idle_s

    def _watch(self) -> None:
        """Expire exports and end an idle vault, in a thread of its own: one that is never called has no other life."""
        while True:
            time.sleep(min(1.0, self._limits.idle_s / 4))
            self._vault.expire(time.monotonic())
            if self._is_idle():
                # Not exit_actor: that waits for what this process asked of others, and meanwhile calls are lost here.
                ray.kill(self._self)


RemoteVault = ray.remote(VaultActor)


class RayVaults:
    """`transport.plasma.road.Vaults` as Ray actors. Belongs to one event loop of a process that is connected to Ray."""

    def __init__(self, limits: VaultLimits = DEFAULT_LIMITS) -> None:
        """Use the vaults of all nodes; `limits` are those of the vaults that this process makes."""
        self.node_id: str = ray.get_runtime_context().get_node_id()
        self._limits = limits
        self._actors: dict[str, Any] = {}  # by node

    async def export(
        self, node_id: str, export_id: bytes, region: RegionInfo, segments: Sequence[Sequence[Range]]
    ) -> list[object]:
        """Have the vault of `node_id` read `segments` of its node's `region`; it is made if there is none.

        Raises:
            RegionError: the region cannot be read as described, or a range is out of bounds.
            TransferError: no vault can be had, it died, or it holds too much.
        """
        failure: Exception = TransferError("it was not asked")
        for delay_s in _RETRY_DELAYS_S:
            await asyncio.sleep(delay_s)
            vault = self._actors.get(node_id)
            try:
                if vault is None:
                    vault = self._actors[node_id] = await asyncio.to_thread(self._find, node_id)
                answer = await vault.export.remote(export_id, region, segments)
            except (ray.exceptions.RayError, ValueError) as error:  # ValueError: no node has this id
                # Often one that ended because it was idle. Nothing was handed out yet: another one can do it.
                failure = error
                if self._actors.get(node_id) is vault:
                    self._actors.pop(node_id, None)
                continue
            if isinstance(answer, ErrorInfo):
                kind = RegionError if answer.kind == RegionError.__name__ else TransferError
                raise kind(answer.message, code=answer.code)
            return cast("list[object]", answer)
        raise TransferError(f"plasma: no vault on node {node_id}: {first_line(failure)}")

    async def segment(self, reference: object) -> Bytes:
        """Return a segment's bytes, once Ray has brought it to this node; TransferError when its vault has died."""
        try:
            return cast("Bytes", await cast("Any", reference))
        except ray.exceptions.RayError as error:
            raise TransferError(f"plasma: a segment was lost: {first_line(error)}") from None

    def release(self, node_id: str, export_id: bytes) -> None:
        """Tell the vault to let go of an export, without waiting: one that does not hear it lets go later."""
        vault = self._actors.get(node_id)
        if vault is not None:
            vault.release.remote(export_id)

    def _find(self, node_id: str) -> Any:
        return RemoteVault.options(
            name=f"kvray-vault-{node_id}",
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_concurrency=_MAX_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        ).remote(self._limits)
