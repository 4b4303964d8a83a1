"""For how long an owner keeps blocks for whoever asked for them. Pure: events in, instructions out.

    asked ---published whole---> leased ---released, asker lost, expired---> gone
      '----------------released, asker lost, failed-------------------------'

A lease runs from the publication of the last block, or from the last renewal. Before that the blocks are still being
made, for as long as the request's own deadline allows and its asker is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from messages.errors import InvariantError


@dataclass(frozen=True, slots=True)
class Asked:
    """Blocks for this request are wanted; one that moved belongs to who asked last, and begins anew."""

    request_id: str
    asker: bytes


@dataclass(frozen=True, slots=True)
class Published:
    """All blocks of this request were offered: the lease begins."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """The asker's pull makes progress."""

    request_id: str
    asker: bytes


@dataclass(frozen=True, slots=True)
class Released:
    """The asker wants nothing more of the request's blocks."""

    request_id: str
    asker: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The request's blocks could not be made; they are free already."""

    request_id: str


@dataclass(frozen=True, slots=True)
class AskerLost:
    """The asker is gone, with all it asked for."""

    asker: bytes


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Some time passed: leases that ended by now are looked for."""


LeaseEvent: TypeAlias = Asked | Published | Renewed | Released | Failed | AskerLost | TimePassed


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """Stop making the request's blocks and unpin them."""

    request_id: str
    is_expired: bool = False


@dataclass(slots=True)
class _Lease:
    asker: bytes
    ends_s: float | None = None  #: None while its blocks are made


class LeaseBook:
    """All blocks that are made or held for an asker. Nobody renews or releases what another asked for last."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._leases: dict[str, _Lease] = {}
        self.num_expired = 0

    @property
    def num_open(self) -> int:
        """Requests whose blocks are made or held."""
        return len(self._leases)

    @property
    def num_leased(self) -> int:
        """Requests whose blocks wait to be pulled."""
        return sum(lease.ends_s is not None for lease in self._leases.values())

    def asker_of(self, request_id: str) -> bytes | None:
        """Return who asked for the request's blocks; None where nobody did, or its lease ended."""
        lease = self._leases.get(request_id)
        return None if lease is None else lease.asker

    def on_event(self, event: LeaseEvent, now_s: float) -> list[FreeBlocks]:
        """Take in `event`; return what is to be freed, each once. Unknown ids are ignored; `now_s` never goes back."""
        match event:
            case Asked(request_id, asker):
                freed = self._free([request_id] if request_id in self._leases else [])
                self._leases[request_id] = _Lease(asker)
                return freed
            case Published(request_id):
                if request_id in self._leases:
                    self._leases[request_id].ends_s = now_s + self.lease_s
            case Renewed(request_id, asker):
                lease = self._leases.get(request_id)
                if lease is not None and lease.asker == asker and lease.ends_s is not None:
                    lease.ends_s = now_s + self.lease_s
            case Released(request_id, asker):
                return self._free([request_id] if self.asker_of(request_id) == asker else [])
            case Failed(request_id):
                self._leases.pop(request_id, None)
            case AskerLost(asker):
                return self._free([key for key, lease in self._leases.items() if lease.asker == asker])
            case TimePassed():
                ended = [
                    key for key, lease in self._leases.items() if lease.ends_s is not None and lease.ends_s < now_s
                ]
                self.num_expired += len(ended)
                return self._free(ended, is_expired=True)
            case _ as unreachable:
                assert_never(unreachable)
        return []

    def check_invariants(self, held_ids: Iterable[str]) -> None:
        """Raise InvariantError where this book and `held_ids`, the sequences that the scheduler has, differ."""
        held = set(held_ids)
        if held != self._leases.keys():
            raise InvariantError(f"leases {sorted(self._leases)} and sequences {sorted(held)} are not the same")

    def _free(self, request_ids: list[str], *, is_expired: bool = False) -> list[FreeBlocks]:
        for request_id in request_ids:
            del self._leases[request_id]
        return [FreeBlocks(request_id, is_expired) for request_id in request_ids]
