"""Of a block that several pools hold, which one keeps it: the others' copies are spare, and the first to go.

So that the pools of a cluster hold one cache, and not each the same: without it a prefill worker and the decode
workers that pull from it would fill up with the same blocks. One holder keeps, or two would give up their copies at
once, each in the belief that the other has it: whoever got it last, for it uses it, until it says that it has no use
for it any more. A node cache always keeps: its memory is the larger, and every pool of its node reaches it.

This is for the plain index; the compiled one does the same itself (`index.cpp`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvrouter.index import Appointed, Holder
from messages.errors import InvariantError
from messages.tier import AT_HAND


class _Shared(NamedTuple):
    """A block that several hold."""

    keeper: str
    spares: tuple[str, ...]  #: other workers with a copy in their pools


class Keepers:
    """Appoints keepers. One thread.

    `holders(name)` tells who holds a block, `share(worker_id)` which share of a worker's `num_blocks(worker_id)` holds
    any, spare copies included.
    """

    def __init__(
        self,
        holders: Callable[[bytes], tuple[Holder, ...]],
        share: Callable[[str], float],
        num_blocks: Callable[[str], int],
    ) -> None:
        self._holders = holders
        self._share = share
        self._num_blocks = num_blocks
        self._shared: dict[bytes, _Shared] = {}
        self._num_spare: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._shared)

    def num_spare(self, worker_id: str) -> int:
        """Return how many of a worker's copies are spare."""
        return self._num_spare[worker_id]

    def on_change(self, names: Iterable[bytes], stored_by: str | None) -> list[Appointed]:
        """Take in that the holders of these blocks changed, if by one that has them now, then by `stored_by`.

        It uses them, and so keeps them; who had them before has a spare copy. None: nobody began to use them; who kept
        a block goes on with it, else whoever keeps least for its size begins to.
        """
        return self._appoint(names, lambda now: stored_by if stored_by in now else None)

    def on_dropped(self, names: Iterable[bytes], worker_id: str) -> list[Appointed]:
        """Take in that a worker holds nothing any more, nor remembers what it was told of these blocks, which it held.

        `names` are those that others hold, too.
        """
        told = self.on_change(names, None)
        del self._num_spare[worker_id]
        return told

    def check_invariants(self) -> None:
        """Raise InvariantError where somebody is said to keep, or to have spare, what is not so."""
        num_spare: Counter[str] = Counter()
        for name, shared in self._shared.items():
            now = [holder for holder in self._holders(name) if holder.tier in AT_HAND]
            spares = {holder.worker_id for holder in now if holder.tier == "device"} - {shared.keeper}
            hosts = {holder.worker_id for holder in now if holder.tier == "host"}
            if len(now) < 2 or set(shared.spares) != spares or len(shared.spares) != len(spares):
                raise InvariantError(f"keepers: {now} hold block {name.hex()}, {shared.spares} are said to be spare")
            if shared.keeper not in (hosts or {holder.worker_id for holder in now}):
                raise InvariantError(f"keepers: {now} hold block {name.hex()}, {shared.keeper!r} is said to keep it")
            num_spare.update(shared.spares)
        if num_spare != self._num_spare:
            raise InvariantError(f"keepers: {self._num_spare} spare copies are counted, {num_spare} are there")

    def _kept_share(self, worker_id: str) -> float:
        return self._share(worker_id) - self._num_spare[worker_id] / self._num_blocks(worker_id)

    def _appoint(self, names: Iterable[bytes], prefer: Callable[[list[str]], str | None]) -> list[Appointed]:
        told: dict[str, tuple[list[bytes], list[bytes]]] = {}
        for name in names:
            now = [holder for holder in self._holders(name) if holder.tier in AT_HAND]
            before = self._shared.pop(name, _NOBODY)
            after = _NOBODY
            if len(now) > 1:
                workers = [holder.worker_id for holder in now]
                hosts = [holder.worker_id for holder in now if holder.tier == "host"]
                keeper = hosts[0] if hosts else prefer(workers)
                if keeper is None:
                    keeper = before.keeper if before.keeper in workers else min(workers, key=self._kept_share)
                others = (holder.worker_id for holder in now if holder.tier == "device")
                after = self._shared[name] = _Shared(keeper, tuple(other for other in others if other != keeper))
            self._num_spare.subtract(before.spares)
            self._num_spare.update(after.spares)
            remaining = {holder.worker_id for holder in now if holder.tier == "device"}
            for worker_id in before.spares:
                if worker_id in remaining and worker_id not in after.spares:
                    told.setdefault(worker_id, ([], []))[1].append(name)
            for worker_id in after.spares:
                if worker_id not in before.spares:
                    told.setdefault(worker_id, ([], []))[0].append(name)
        return [Appointed(worker_id, b"".join(spare), b"".join(kept)) for worker_id, (spare, kept) in told.items()]


_NOBODY = _Shared("", ())
