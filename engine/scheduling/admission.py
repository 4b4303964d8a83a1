"""Who of those that wait starts: by seniority, until one finds no room; then short ones, to their share."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TypeAlias

from engine.scheduling.backlog import Backlog
from engine.scheduling.holding_back import hold_back
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import Instruction
from engine.scheduling.room import Room
from engine.scheduling.sequence import Sequence

#: Sequences that are looked at in vain, at most, before steps go on.
_MAX_PASSED = 32
#: Sequences of which, at an event, one is looked for that is short, where the others find no room: below 1 ms.
_MAX_SEARCHED = 1024
#: Blocks of sequences that are looked at, at most, before other events are: some 5 ms.
_MAX_LOOKED_AT = 16_384

#: Takes a sequence that starts, its blocks that the pool has, the time, and a list of what is to be done.
Start: TypeAlias = Callable[[Sequence, list[int], float, list[Instruction]], None]


class Admission:
    """Looks at the sequences of `ledger` that wait and are ready, and has `start` begin with those that find room."""

    def __init__(self, ledger: SequenceLedger, backlog: Backlog, room: Room, max_num_seqs: int, start: Start) -> None:
        self._ledger = ledger
        self._backlog = backlog
        self._room = room
        self._max_num_seqs = max_num_seqs
        self._start = start
        self._blocked: Sequence | None = None  # the most senior one that could start but for the room
        self._is_full = False  # no short prompt finds room either
        self._shorts_from = 0  # where among those that are ready the next short one is looked for
        self._look_again_s = -math.inf  # until then those that wait need not be looked at as others come

    @property
    def is_blocked(self) -> bool:
        """Whether somebody could start but for the room."""
        return self._blocked is not None

    def look_at_all(self) -> None:
        """Take in that there may be more room than there was."""
        self._blocked, self._look_again_s = None, -math.inf

    def look_at_seniors(self) -> None:
        """Take in that others wait besides those that were looked at."""
        self._look_again_s = -math.inf

    def take_arrival(self, seq: Sequence) -> None:
        """Take in that a sequence came: it may find room where others do not, or be their senior."""
        if self._blocked is not None and (
            seq.seniority < self._blocked.seniority or (not self._is_full and self._room.is_short(seq))
        ):
            self.look_at_all()

    def admit(self, now_s: float, out: list[Instruction], new: Sequence | None) -> None:
        """Take sequences out of the queue, by seniority, until one finds no room; then short ones, to their share.

        Where nothing happened but that `new` came since all were looked at, it alone is.
        """
        if self._blocked is not None:
            return
        ledger = self._ledger
        position, end, last, num_passed, num_looked_at = 0, sys.maxsize, sys.maxsize, 0, 0
        is_alone = new is not None and now_s < self._look_again_s
        if new is not None and is_alone:
            position = ledger.position(new)
            end = position + new.is_ready
        else:
            self._look_again_s = math.inf
        num_free_slots = self._num_free_slots()
        while position < min(end, last, len(ledger.ready)) and num_passed < _MAX_PASSED:
            if num_free_slots <= 0 or num_looked_at > _MAX_LOOKED_AT:
                self._look_again_s = -math.inf
                return
            seq = ledger.ready[position]
            is_held_back = seq.held_for in ledger.in_flight and now_s < seq.held_until_s
            if not is_held_back:
                is_short = self._room.is_short(seq)
                if self._blocked is not None and not is_short:
                    position += 1
                    continue
                num_looked_at += seq.max_match_blocks
                matched = ledger.pool.match(seq.names[: seq.max_match_blocks])
                is_held_back = hold_back(seq, len(matched), ledger, self._backlog, now_s)
            if is_held_back:
                self._look_again_s = min(self._look_again_s, seq.held_until_s)
                position += 1
                continue
            ended = self._room.find(seq, matched, is_short=is_short)
            if ended is not None and not self._room.is_too_early(seq, matched, ended, now_s):
                for intake_id in ended:
                    ledger.end_intake(intake_id, out)
                seq.is_long = not is_short
                self._start(seq, matched, now_s, out)
                num_free_slots = self._num_free_slots()
                end, last = end - 1, last - 1
                continue
            self._is_full = is_short and ended is None
            if self._is_full:
                self._blocked = self._blocked or seq
                return
            position += 1
            num_passed += 1
            if self._blocked is None:  # of those behind it only short ones are of interest, some of them at a time
                self._blocked = seq
                position = max(position, self._shorts_from)
                last = position + _MAX_SEARCHED
        if not is_alone:
            self._shorts_from = position if position == last else 0

    def _num_free_slots(self) -> int:
        return self._max_num_seqs - len(self._ledger.running) - len(self._ledger.pulling)
