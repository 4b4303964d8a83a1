"""Bytes on a channel: one msgpack document, a tagged union of all messages."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from messages.cache import BlocksKnown, CacheAnswer, CacheQuestion, WhereBlocks
from messages.explain import (
    ExplainPlacement,
    IndexAnswer,
    IndexQuestion,
    PlacementExplained,
    RecordAnswer,
    RecordQuestion,
)
from messages.fleet import (
    GetStats,
    KvEvents,
    LoadReport,
    NodeCacheFound,
    SpareBlocks,
    Stats,
    Subscribe,
    TakeBlocks,
)
from messages.handoff import (
    BlocksFound,
    BlocksRequest,
    BlocksWritten,
    DescribeRegions,
    KvHandoff,
    PrefetchBlocks,
    PrefillFailed,
    PrefillRequest,
    RegionsDescribed,
    ReleaseLease,
    RenewLease,
    RoadMessage,
    RoomGranted,
    RoomRequest,
)
from messages.request import CancelRequest, GenerateRequest
from messages.responses import StoredAnswer, StoredQuestion
from messages.route import Placement, RequestEnded, RouteFailed, RouteRequest
from messages.stream import TokenBatch
from messages.view import AskView, ViewTold


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Client to server, once a heartbeat; answered by Pong. Either side that hears nothing for long enough gives up."""


class Pong(msgspec.Struct, frozen=True, tag=True):
    """Server to client: the answer to a Ping."""


Message: TypeAlias = (
    Ping
    | Pong
    | GenerateRequest
    | CancelRequest
    | TokenBatch
    | PrefillRequest
    | BlocksRequest
    | PrefetchBlocks
    | BlocksFound
    | RoomRequest
    | RoomGranted
    | BlocksWritten
    | KvHandoff
    | PrefillFailed
    | RenewLease
    | ReleaseLease
    | DescribeRegions
    | RegionsDescribed
    | RoadMessage
    | RouteRequest
    | Placement
    | RouteFailed
    | RequestEnded
    | Subscribe
    | KvEvents
    | NodeCacheFound
    | SpareBlocks
    | TakeBlocks
    | LoadReport
    | GetStats
    | Stats
    | WhereBlocks
    | BlocksKnown
    | AskView
    | ViewTold
    | CacheQuestion
    | CacheAnswer
    | StoredQuestion
    | StoredAnswer
    | ExplainPlacement
    | PlacementExplained
    | RecordQuestion
    | RecordAnswer
    | IndexQuestion
    | IndexAnswer
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return `message` as one msgpack document."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Return the message in `data`.

    Raises:
        msgspec.DecodeError: `data` is no message of ours (a ValidationError where it is msgpack of another shape).
    """
    return _decoder.decode(data)
