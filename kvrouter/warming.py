"""A worker that joins takes in what was matched last, before it takes traffic. Pure.

    joins --snapshot--> asked to take in some blocks at a time, from who has them at hand --all came, too long--> ready

What is worth most is what prompts that were placed lately found held, the last one first. It is pulled beside the
steps, as far as the worker has room.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from kvcache.names import NAME_BYTES, split_names
from kvrouter.fit import can_hand_over
from kvrouter.index import Holder, Run
from messages.fleet import TakeBlocks, WorkerInfo

_MAX_S = 5.0  #: from joining until it takes traffic at the latest
_MAX_SHARE = 0.5  #: of its blocks
_MAX_OPEN = 512  #: blocks that it was asked to take in and does not have yet
_MAX_AT_ONCE = 256  #: blocks in one question
_MAX_REMEMBERED = 1 << 17  #: blocks of prompts, in all


class _Prefix(NamedTuple):
    names: bytes
    matched_s: float


@dataclass(slots=True)
class _Warm:
    until_s: float
    waiting: deque[TakeBlocks] | None = None  #: None: it has not said what it holds
    open: set[bytes] = field(default_factory=set)  #: names that it was asked to take in


class Warming:
    """Who is warming, and with what. `runs(names)` tells who has a prompt, `info_of(worker_id)` who that is."""

    def __init__(self, runs: Callable[[bytes], list[Run]], info_of: Callable[[str], WorkerInfo]) -> None:
        self._runs = runs
        self._info_of = info_of
        self._recent: OrderedDict[bytes, _Prefix] = OrderedDict()  # by the name of its last block
        self._lengths: Counter[int] = Counter()  # of those prefixes, in blocks: where one may end in another
        self._num_remembered = 0
        self._warming: dict[str, _Warm] = {}
        self.num_asked = 0  #: blocks that were to be taken in

    def note(self, names: bytes, now_s: float) -> None:
        """Remember a prefix that was found held: concatenated names, head first. It replaces those that it goes on."""
        if not names:
            return
        num_names = len(names) // NAME_BYTES
        for length in [length for length in self._lengths if length <= num_names]:
            self._forget(names[(length - 1) * NAME_BYTES : length * NAME_BYTES])
        self._recent[names[-NAME_BYTES:]] = _Prefix(names, now_s)
        self._lengths[num_names] += 1
        self._num_remembered += num_names
        while self._num_remembered > _MAX_REMEMBERED:
            self._forget(next(iter(self._recent)))

    def begin(self, worker_id: str, now_s: float) -> None:
        """Take in that a worker joined: it is warming, if there is anything to warm it with."""
        if self._recent:
            self._warming[worker_id] = _Warm(now_s + _MAX_S)

    def forget(self, worker_id: str) -> None:
        """Take in that a worker left."""
        self._warming.pop(worker_id, None)

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """Workers whose traffic others should take."""
        return tuple(self._warming)

    def on_snapshot(self, worker_id: str, num_held: int, now_s: float) -> list[TakeBlocks]:
        """Take in that a worker said what it holds; return what to ask it for, if it is warming."""
        warm = self._warming.get(worker_id)
        if warm is None or warm.waiting is not None:
            return []
        info = self._info_of(worker_id)
        warm.waiting = deque(self._wanted(info, int(info.num_blocks * _MAX_SHARE) - num_held, now_s))
        return self._go_on(worker_id, warm)

    def on_stored(self, worker_id: str, names: bytes) -> list[TakeBlocks]:
        """Take in what a worker holds now, too; return what to ask it for next."""
        warm = self._warming.get(worker_id)
        if warm is None or warm.waiting is None:
            return []
        warm.open.difference_update(split_names(names))
        return self._go_on(worker_id, warm)

    def on_time(self, now_s: float) -> None:
        """Let those take traffic that had their time."""
        self._warming = {key: warm for key, warm in self._warming.items() if now_s < warm.until_s}

    def _go_on(self, worker_id: str, warm: _Warm) -> list[TakeBlocks]:
        asked: list[TakeBlocks] = []
        while warm.waiting and len(warm.open) < _MAX_OPEN:
            asked.append(warm.waiting.popleft())
            warm.open.update(split_names(asked[-1].names))
        self.num_asked += sum(len(take.names) // NAME_BYTES for take in asked)
        if not warm.open:
            del self._warming[worker_id]
        return asked

    def _wanted(self, info: WorkerInfo, room: int, now_s: float) -> Iterator[TakeBlocks]:
        """Yield what fills `room` blocks: the prefix matched last first, of each the head; names as for TakeBlocks."""
        seen: set[bytes] = set()
        for prefix in reversed(self._recent.values()):
            if room <= 0:
                return
            sources = [(self._source(run.holders, info), run) for run in self._runs(prefix.names)]
            for address, group in groupby(sources, key=lambda source: source[0]):
                runs = [run for _, run in group]
                between = prefix.names[runs[0].begin * NAME_BYTES : runs[-1].end * NAME_BYTES]
                names = [name for name in split_names(between) if name not in seen]
                seen.update(names)
                for begin in range(0, len(names) if address else 0, _MAX_AT_ONCE):
                    taken = names[begin : begin + _MAX_AT_ONCE][: max(0, room)]
                    room -= len(taken)
                    if taken:
                        yield TakeBlocks(
                            address=address, names=b"".join(reversed(taken)), age_s=now_s - prefix.matched_s
                        )

    def _source(self, holders: Sequence[Holder], info: WorkerInfo) -> str:
        """Return the address of who has blocks at hand for this worker; "": nobody, or it has them itself."""
        at_hand = [holder for holder in holders if holder.tier in ("device", "host")]
        if any(holder.worker_id == info.worker_id for holder in at_hand):
            return ""
        infos = (self._info_of(holder.worker_id) for holder in at_hand)
        return next((other.address for other in infos if can_hand_over(other, info)), "")

    def _forget(self, last_name: bytes) -> None:
        prefix = self._recent.pop(last_name, None)
        if prefix is not None:
            num_names = len(prefix.names) // NAME_BYTES
            self._num_remembered -= num_names
            self._lengths[num_names] -= 1
            if not self._lengths[num_names]:
                del self._lengths[num_names]
