"""What was last heard of block names that nobody holds any more: a bounded memory, so that misses can be explained.

A table of 2^20 places, 8 MiB. A name has one place, by its bits, and takes it from whichever name was there. So what
was heard of a name is known for sure until the next change, and is still known with probability exp(-n / 2^20) once n
changes of other names came after it; a name that is forgotten counts as never seen.

    a word    48 bits of the name | 16 bits: 0 nothing, 1 evicted, else the number of the holder that stored it last
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcache.names import NAME_BYTES
from kvrouter.index import Holder
from messages.miss import MissedRun, MissReason

_NUM_PLACES = 1 << 20
_NUMBER = np.uint64(0xFFFF)
_NAME = ~_NUMBER
_EVICTED = 1
_FIRST_HOLDER = 2
_MAX_PENDING = 8192  #: names, some 0.3 ms
_MAX_RUNS = 8  #: of one prompt: what lies behind them counts as its last one does

_Words = npt.NDArray[np.uint64]


class Last(NamedTuple):
    """What was last heard of a name that nobody holds."""

    why: MissReason
    holder: str = ""  #: worker id of who had it, where it was lost with it


_NEVER_SEEN, _WAS_EVICTED = Last("never_seen"), Last("evicted")


class NameMemory:
    """Follows what the index is told. One thread."""

    def __init__(self, num_places: int = _NUM_PLACES) -> None:
        """Remember about so many names. `num_places`: a power of two."""
        self._words: _Words = np.zeros(num_places, np.uint64)
        self._mask = np.uint64(num_places - 1)
        self._numbers: dict[Holder, int] = {}
        self._holders: list[Holder | None] = [None] * _FIRST_HOLDER  # by number
        self._is_there = np.zeros(int(_NUMBER) + 1, np.bool_)
        self._next = _FIRST_HOLDER
        self._stored: list[tuple[int, bytes]] = []  # that are not written down yet, with the holders' numbers
        self._removed: list[tuple[int, bytes]] = []
        self._num_pending = 0  # bytes of both

    def note(self, holder: Holder, stored: bytes, removed: bytes) -> None:
        """Take in that a holder stored blocks, and then dropped some: concatenated names.

        What it drops is evicted, unless another one stored it later, and is there. It counts from the next `flush` on,
        some microseconds for each event being more than the index itself takes.
        """
        number = self._numbers.get(holder)
        if number is None:
            number = self._take_number(holder)
        if stored:
            self._stored.append((number, stored))
        if removed:
            self._removed.append((number, removed))
        self._num_pending += len(stored) + len(removed)
        if self._num_pending > _MAX_PENDING * NAME_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write down what was noted: all that was stored, then all that was dropped."""
        if self._stored:
            places, names, numbers = self._split(self._stored)
            self._words[places] = names | numbers
        if self._removed:
            places, names, numbers = self._split(self._removed)
            words = self._words[places]
            last = words & _NUMBER
            is_others = (words & _NAME == names) & (last != numbers) & self._is_there[last]
            self._words[places[~is_others]] = names[~is_others] | np.uint64(_EVICTED)
        self._stored.clear()
        self._removed.clear()
        self._num_pending = 0

    def lose(self, worker_id: str) -> None:
        """Take in that a worker is gone, with all that it held."""
        self.flush()
        for holder in [holder for holder in self._numbers if holder.worker_id == worker_id]:
            self._is_there[self._numbers.pop(holder)] = False

    def last(self, name: bytes) -> Last:
        """Return what was last heard of a name that nobody holds."""
        word = int(self._words[int.from_bytes(name[:8], "little") & int(self._mask)])
        number = word & int(_NUMBER)
        if not number or (word ^ int.from_bytes(name[8:], "little")) & int(_NAME):
            return _NEVER_SEEN
        if number == _EVICTED or self._is_there[number]:
            return _WAS_EVICTED  # who stored it last is there, and does not hold it
        holder = self._holders[number]
        return Last("holder_lost", holder.worker_id if holder else "")

    def missing(self, names: bytes, begin: int) -> tuple[MissedRun, ...]:
        """Say of the blocks of a prompt from number `begin` on, which nobody holds, why that is, in runs.

        Where a block and the prompt's last one say the same, so does, nearly always, what lies between.
        """
        runs: list[MissedRun] = []
        num = len(names) // NAME_BYTES
        while begin < num:
            now = self._at(names, begin)
            end = num
            if len(runs) < _MAX_RUNS - 1 and self._at(names, num - 1) != now:
                end = self._end_of(now, names, begin, num)
            runs.append(MissedRun(begin, end, now.why, now.holder))
            begin = end
        return tuple(runs)

    def _at(self, names: bytes, index: int) -> Last:
        return self.last(names[index * NAME_BYTES : (index + 1) * NAME_BYTES])

    def _end_of(self, now: Last, names: bytes, begin: int, num: int) -> int:
        """Return where something else begins to be said: by steps that double, then by halving the last one."""
        step = 1
        while begin + step < num and self._at(names, begin + step) == now:
            begin, step = begin + step, 2 * step
        end = min(begin + step, num - 1)
        while end - begin > 1:
            middle = (begin + end) // 2
            if self._at(names, middle) == now:
                begin = middle
            else:
                end = middle
        return end

    def _split(self, noted: Sequence[tuple[int, bytes]]) -> tuple[npt.NDArray[np.int64], _Words, _Words]:
        """Return of all names that were noted the places, the bits that are kept, and whose they are."""
        names = b"".join(each for _, each in noted)
        lengths = [len(each) // NAME_BYTES for _, each in noted]
        numbers = np.repeat(np.array([number for number, _ in noted], np.uint64), lengths)
        halves = np.frombuffer(names, np.dtype("<u8")).reshape(-1, 2)
        return (halves[:, 0] & self._mask).astype(np.int64), halves[:, 1] & _NAME, numbers

    def _take_number(self, holder: Holder) -> int:
        number = self._next
        self._next = number + 1 if number < int(_NUMBER) else _FIRST_HOLDER
        if number < len(self._holders):  # after 65,534 holders: what was said by this number is another's by now
            before = self._holders[number]
            if before is not None and self._numbers.get(before) == number:
                del self._numbers[before]
            self._holders[number] = holder
        else:
            self._holders.append(holder)
        self._numbers[holder] = number
        self._is_there[number] = True
        return number
