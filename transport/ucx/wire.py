"""What the two sides of the ucx road say to each other over the link, and how copies become tag messages.

    puller                                                source
    connects to the source's listener              ===>   lets it wait
    Connect(number, own address)                   --->   accepts the client of that address, and no other
                                                   <---   Accepted(number), or Refused

    posts receives; PullRequest                    --->   checks, then sends
                                                   <===   tag messages; or <--- PullRefused, and none
    Disconnect(number), when it gave up

Each direction has a connection of its own. The link is authenticated: an address that came over it proves the client.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import msgspec

from transport.protocol import Copy

#: Larger runs are split: each message that has arrived shows that the pull goes on.
MAX_MESSAGE_BYTES = 8 << 20
#: Runs below this are gathered: 256 scattered ones of 32 KiB then take half the time, of 64 KiB as long or longer.
SMALL_RUN_BYTES = 48 << 10
MAX_GATHERED_BYTES = 1 << 20

_RANGE = struct.Struct("<QQ")  # offset, length
_COUNT = struct.Struct("<I")


class Handle(msgspec.Struct, frozen=True, array_like=True):
    """`RegionInfo.handle` of this road."""

    version: str  #: of UCX
    is_host: bool  #: whether its owner can gather small runs
    host: str  #: where it listens
    port: int


class Connect(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The client with this address is the puller's. It takes the place of an earlier one."""

    number: int  #: chosen by the puller
    host: str
    port: int


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Connection `number` is made on the source's side, too."""

    number: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Connection `number` will not be made."""

    number: int
    reason: str
    is_gone: bool  #: no region of mine can be read any more


class Disconnect(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Connection `number` is closed on the puller's side."""

    number: int


class PullRequest(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Send these ranges of the region over connection `number`. Message i has tag `first_tag` + i, modulo NUM_TAGS."""

    first_tag: int
    number: int
    nonce: bytes
    num_bytes: int  #: of the whole region, as it was described
    ranges: bytes  #: uint64 offset, uint64 length, of all messages
    counts: bytes  #: uint32, ranges of each message; their bytes follow each other in it


class PullRefused(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Nothing was or will be sent for that request."""

    first_tag: int
    reason: str
    is_region: bool  #: the region or a range is at fault, asking again is in vain


NUM_TAGS = 2**64

Body: TypeAlias = Connect | Accepted | Refused | Disconnect | PullRequest | PullRefused

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Body).decode


class Range(NamedTuple):
    """A run of bytes within a region."""

    offset: int
    num_bytes: int


@dataclass(slots=True)
class Message:
    """Copies, or parts of them, that travel together; more than one only if gathered."""

    copies: list[Copy]
    positions: list[int] = field(default_factory=list)  #: of the asked-for copies that have bytes in it
    num_bytes: int = 0

    def add(self, copy: Copy, positions: Sequence[int]) -> None:
        """Let `copy` travel in this message, too."""
        self.copies.append(copy)
        self.positions.extend(positions)
        self.num_bytes += copy.num_bytes


def plan(copies: Sequence[Copy], *, can_gather: bool) -> list[Message]:
    """Plan the messages that carry all bytes of `copies`, about in their order."""
    messages: list[Message] = []
    gathered: Message | None = None
    for run in _merged(copies):
        if not can_gather or run.num_bytes >= SMALL_RUN_BYTES:
            messages.append(run)
            continue
        if gathered is None or gathered.num_bytes + run.num_bytes > MAX_GATHERED_BYTES:
            gathered = Message([])
            messages.append(gathered)
        gathered.add(run.copies[0], run.positions)
    return messages


def _merged(copies: Sequence[Copy]) -> list[Message]:
    """Plan messages of one copy each: what is adjacent on both sides is one, what is large is several."""
    runs: list[Message] = []
    for position, (source, target, num_bytes) in enumerate(copies):
        for done in range(0, num_bytes, MAX_MESSAGE_BYTES):
            part = Copy(source + done, target + done, min(MAX_MESSAGE_BYTES, num_bytes - done))
            last = runs[-1] if runs else None
            if last is not None and _can_follow(last.copies[0], part):
                last.copies[0] = last.copies[0]._replace(num_bytes=last.num_bytes + part.num_bytes)
                last.positions.append(position)
                last.num_bytes += part.num_bytes
            else:
                runs.append(Message([part], [position], part.num_bytes))
    return runs


def _can_follow(copy: Copy, follower: Copy) -> bool:
    return (
        copy.source_offset + copy.num_bytes == follower.source_offset
        and copy.target_offset + copy.num_bytes == follower.target_offset
        and copy.num_bytes + follower.num_bytes <= MAX_MESSAGE_BYTES
    )


def pack_ranges(messages: Sequence[Message]) -> tuple[bytes, bytes]:
    """Pack `ranges` and `counts` of a PullRequest."""
    ranges = b"".join(_RANGE.pack(copy.source_offset, copy.num_bytes) for m in messages for copy in m.copies)
    return ranges, b"".join(_COUNT.pack(len(message.copies)) for message in messages)


def unpack_ranges(request: PullRequest, num_bytes: int) -> list[list[Range]]:
    """Return the ranges of each message of `request`, within a region of `num_bytes`.

    Raises:
        ValueError: the ranges make no sense, or lie outside the region.
    """
    if len(request.ranges) % _RANGE.size or len(request.counts) % _COUNT.size:
        raise ValueError(f"{len(request.ranges)} bytes of ranges, {len(request.counts)} bytes of counts")
    ranges = [Range(*each) for each in _RANGE.iter_unpack(request.ranges)]
    counts = [count for (count,) in _COUNT.iter_unpack(request.counts)]
    if sum(counts) != len(ranges) or 0 in counts:
        raise ValueError(f"{len(ranges)} ranges, but messages of {sum(counts)}")
    for each in ranges:
        if not 0 < each.num_bytes <= num_bytes - each.offset:
            raise ValueError(f"{each} is out of bounds: the region has {num_bytes} bytes")
    remaining = iter(ranges)
    messages = [[next(remaining) for _ in range(count)] for count in counts]
    largest = max((sum(each.num_bytes for each in message) for message in messages if len(message) > 1), default=0)
    if largest > MAX_MESSAGE_BYTES:
        raise ValueError(f"a gathered message of {largest} bytes, at most {MAX_MESSAGE_BYTES} wanted")
    return messages
