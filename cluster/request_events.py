"""The contract between deciding (`cluster.request_table`) and doing (`cluster.dispatch`): events in, instructions out.

All of it stays inside one ingress; nothing here has behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from messages.fleet import WorkerInfo
from messages.request import CancelRequest, GenerateRequest
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.stream import TokenChunk

# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class RequestAdded:
    """A client asks for these sequences, at least one. No other ever has their ids; the first one's names them all."""

    sequences: tuple[GenerateRequest, ...]


@dataclass(frozen=True, slots=True)
class RequestLeft:
    """Nobody reads the request's tokens any more; unknown and ended ones are ignored."""

    request_id: str  #: of its first sequence


@dataclass(frozen=True, slots=True)
class SequenceCancelled:
    """One sequence is not wanted any more, though its siblings are; unknown and ended ones are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class FleetChanged:
    """The workers that are there now, by id. Who is missing gets nothing new; what it has goes on."""

    workers: Mapping[str, WorkerInfo]


@dataclass(frozen=True, slots=True)
class RouterFound:
    """There is a router to ask."""


@dataclass(frozen=True, slots=True)
class RouterLost:
    """The router, or the channel to it, is gone, and with it all that it was told on this channel."""


@dataclass(frozen=True, slots=True)
class ChunksArrived:
    """A decode worker's step gave this, in order."""

    worker_id: str
    chunks: Sequence[TokenChunk]


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker, or the channel to it, is gone: nothing more comes of what was sent to it."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Some time passed: what is due is looked at. Wanted several times a second while there are requests."""


Event: TypeAlias = (
    RequestAdded
    | RequestLeft
    | SequenceCancelled
    | FleetChanged
    | RouterFound
    | RouterLost
    | Placement
    | RouteFailed
    | ChunksArrived
    | WorkerLost
    | TimePassed
)

# ------------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True, slots=True)
class SendToRouter:
    """Send `message` to the router, on the channel that was up at RouterFound; comes only while there is one."""

    message: RouteRequest | RequestEnded


@dataclass(frozen=True, slots=True)
class SendToWorker:
    """Send `message` to a decode worker; connect if need be. WorkerLost tells if it does not arrive."""

    worker_id: str
    address: str
    message: GenerateRequest | CancelRequest


class Deliver(msgspec.Struct, frozen=True):  # one for every token: made in a fifth of a dataclass's time
    """Give `chunk` to whoever reads the request's tokens; chunks of one request in the order of their instructions."""

    request_id: str  #: of the request's first sequence
    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more will be delivered for the request. Comes once for each."""

    request_id: str  #: of the request's first sequence


@dataclass(frozen=True, slots=True)
class Warn:
    """Write `message` into the operator's log."""

    message: str


Instruction: TypeAlias = SendToRouter | SendToWorker | Deliver | End | Warn
