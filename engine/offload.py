"""Writes blocks of this worker's pool into the arena of its node's cache, beside the steps.

    sequence has its prompt, or ends ---room asked---> granted ---pinned, copied, hashed in one pass---> told, unpinned

The cache says which blocks it has room for; the worker copies them itself: no byte goes through a socket or another
process. What was evicted meanwhile is left out. Where more wait than are kept, those go of which requests said nothing:
nobody would say it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import numpy as np

from engine.memory.checksums import BlockChecksums
from engine.peers import Peers
from engine.scheduling.plan import BlocksReleased, BlocksWanted, Event, LendBlocks, OffloadBlocks
from kvcache.locations import Locations, num_locations, unpack_locations
from messages.handoff import BlocksWritten, RoomGranted, RoomRequest
from transport.memory import SharedView
from transport.protocol import RegionError, RegionMemory
from transport.shm import open_region

logger = logging.getLogger(__name__)

#: Chains that wait to be offered; of more the oldest are dropped, and those with hints last.
_MAX_WAITING = 256
#: Questions about one chain: a cache grants no more than half of its arena at a time.
_MAX_TRIES = 4
#: After so long whoever wrote would know that the cache was lost before it heard of it: channels notice within 5 s.
_HEARD_AFTER_S = 5.0
#: Of a worker that leaves, for what waits: 256 chains of some megabytes each are a second at 1 GB/s.
_FINISH_S = 20.0
_FINISH_POLL_S = 0.05
_NAME = "offload"


class Offloader:
    """The way down from one pool. All methods belong to one event loop.

    `post` is the scheduler's, `spawn` runs a coroutine for as long as the worker lives.
    """

    def __init__(
        self,
        peers: Peers,
        memory: RegionMemory,
        checksums: BlockChecksums,
        post: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Write down blocks of the pool in `memory`, of which `checksums` are."""
        self._peers = peers
        self._memory = memory
        self._checksums = checksums
        self._post = post
        self._spawn = spawn
        self._address: str | None = None  #: of the cache
        self._arena: SharedView | None = None  #: its region, writable
        self._waiting: deque[OffloadBlocks] = deque()
        self._granted: RoomGranted | None = None  #: what is being copied
        self._asked: str | None = None  #: the question under way
        self._chain: OffloadBlocks | None = None  #: what it is about
        self._num_tries = 0  #: questions about that in a row
        self._told: OffloadBlocks | None = None  #: written and told; the next answer shows that it was heard, or 5 s
        self._num_asked = 0
        self.num_blocks = 0  #: written since the start
        self.num_dropped = 0  #: chains that were never offered, as too many waited

    def use(self, address: str | None) -> None:
        """Write to the cache at `address` from now on; None: there is none."""
        if address == self._address:
            return
        for chain in (self._chain if self._asked is not None else None, self._told):
            if chain is not None:
                self._wait_first(chain)  # nobody knows what became of it
        self._address, self._arena, self._asked, self._told = address, None, None, None
        if address is not None:
            self._peers.connect(address)
            self.go_on()

    def offer(self, chain: OffloadBlocks) -> None:
        """Take in a sequence's blocks, all of its chain, which the cache may want."""
        self._waiting.append(chain)
        self._bound()
        self.go_on()

    def go_on(self) -> None:
        """Ask for room for what waits, unless a question is under way, or nobody is there to ask."""
        if self._address is None or (self._arena is None and not self._map()):
            return
        if self._asked is not None or not self._waiting:
            return
        chain = self._waiting.popleft()
        self._num_tries = self._num_tries + 1 if chain is self._chain else 1
        self._chain = chain
        self._num_asked += 1
        self._asked = f"{_NAME} {self._num_asked}"
        self._peers.send(
            self._address,
            RoomRequest(
                request_id=self._asked,
                names=b"".join(chain.names),
                indexes=list(range(len(chain.names))),
                tenant=chain.tenant,
                hints=chain.hints,
                is_again=self._num_tries > 1,
            ),
        )

    async def finish(self) -> None:
        """Wait until nothing is left to be offered or written, or nobody is there to write it to, or for 20 s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FINISH_S):
                while self._address is not None and (self._asked is not None or self._waiting):  # noqa: ASYNC110
                    await asyncio.sleep(_FINISH_POLL_S)

    def on_granted(self, granted: RoomGranted) -> None:
        """Pin what room was granted for, as far as it is still here."""
        if granted.request_id != self._asked:
            return
        self._told = None
        if not granted.blocks:
            self._asked = self._chain = None
            self.go_on()
            return
        self._granted = granted
        names = unpack_locations(granted.blocks)["name"].tolist()
        self._post(BlocksWanted(granted.request_id, 0, tuple(names)))

    def is_own(self, lent: LendBlocks) -> bool:
        """Tell whether these blocks were pinned for this."""
        return lent.lease_id == self._asked and self._granted is not None

    def on_pinned(self, lent: LendBlocks) -> None:
        """Copy what is pinned into the arena, in a thread."""
        self._spawn(self._copy(lent))

    async def _copy(self, lent: LendBlocks) -> None:
        granted, arena, address = self._granted, self._arena, self._address
        self._granted = None
        assert granted is not None
        written = b""
        if arena is not None and address is not None:
            sources = unpack_locations(lent.blocks)
            targets = unpack_locations(granted.blocks)[sources["index"]]
            written = await asyncio.to_thread(partial(self._write, arena, address, targets, sources))
            self._peers.send(address, BlocksWritten(request_id=granted.request_id, blocks=written))
        self.num_blocks += num_locations(written)
        self._post(BlocksReleased(lent.lease_id))
        if self._asked == lent.lease_id:
            is_whole = len(written) == len(granted.blocks) and not granted.num_left
            if written and not is_whole and self._chain is not None and self._num_tries < _MAX_TRIES:
                self._wait_first(self._chain)  # there may have been no room for all of it at once
            else:
                self._told, self._chain = self._chain, None
                asyncio.get_running_loop().call_later(_HEARD_AFTER_S, self._take_as_heard, self._told)
            self._asked = None
            self.go_on()

    def _take_as_heard(self, told: OffloadBlocks | None) -> None:
        if self._told is told:
            self._told = None

    def _wait_first(self, chain: OffloadBlocks) -> None:
        self._waiting.appendleft(chain)
        self._bound()

    def _bound(self) -> None:
        """Drop the oldest chain without hints, or the oldest, where one waits that is too much."""
        if len(self._waiting) > _MAX_WAITING:
            del self._waiting[next((i for i, chain in enumerate(self._waiting) if not chain.hints), 0)]
            self.num_dropped += 1

    def _write(
        self,
        arena: SharedView,
        address: str,
        targets: Locations,
        sources: Locations,
    ) -> bytes:
        """Copy each block to its place, unless the room was taken back, and hash it; return what was written."""
        layout = self._peers.layout_of(address)
        if layout is None:
            return b""
        generations = np.frombuffer(arena.view, np.uint64, layout.num_blocks)
        # Copied between two looks at whether the room was taken back: below 1 ms.
        num_at_once = max(1, self._checksums.batch_bytes // layout.block_bytes)
        written: list[Locations] = []
        for begin in range(0, len(targets), num_at_once):
            into, lent = targets[begin : begin + num_at_once], sources[begin : begin + num_at_once]
            is_granted = generations[into["block_id"]] == into["generation"]  # the room was not taken back
            into = into[is_granted]
            into["num_tokens"] = lent["num_tokens"][is_granted]
            into["checksum"] = self._checksums.copy_out(
                lent["block_id"][is_granted].tolist(), arena.view, layout.block_offsets(into["block_id"]).tolist()
            )
            written.append(into)
        return b"".join(rows.tobytes() for rows in written)

    def _map(self) -> bool:
        """Map the arena once the cache has described it; False where that is not so, or it cannot be reached."""
        assert self._address is not None
        region = self._peers.region_of(self._address, "shm")
        if region is None:
            return False
        try:
            self._arena = open_region(region, is_writable=True)
        except RegionError as error:
            logger.warning("nothing goes into the node cache at %s: %s", self._address, error.message)
            self._address = None
            self.num_dropped += len(self._waiting)
            self._waiting.clear()
            return False
        # The first touch of a page costs as much as copying it nine times over; a device wants pages that are locked.
        self._memory.prepare(self._arena)
        return True
