"""Where the KV of a prompt's tokens came from, token by token in runs, and why what was to come did not: for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from messages.miss import MissReason
from messages.request import Copy
from messages.stream import GotRun
from messages.tier import Tier


class _Missed(NamedTuple):
    why: MissReason
    owner: str


class PromptOrigins:
    """Of one sequence. Tokens that nobody notes were computed here."""

    __slots__ = ("_missed", "_runs")

    def __init__(self) -> None:
        self._runs: list[GotRun] = []
        self._missed: dict[int, _Missed] = {}  # by block

    def note(self, begin: int, end: int, source: str, owner: str = "") -> None:
        """Take in where tokens [begin, end) come from, by a field of PromptSources; none where they are none."""
        if begin >= end:
            return
        last = self._runs[-1] if self._runs else None
        if last is not None and (last.end, last.source, last.owner) == (begin, source, owner):
            self._runs[-1] = GotRun(last.begin, end, source, owner)
        else:
            self._runs.append(GotRun(begin, end, source, owner))

    def note_copy(self, begin: int, end: int, copy: Copy) -> None:
        """Take in that tokens [begin, end) come from a holder's copy."""
        self.note(begin, end, source_of(copy.tier), copy.address)

    def miss(self, indexes: Iterable[int], why: MissReason, owner: str) -> None:
        """Take in why blocks did not come from their owner; of several reasons for one the first stays."""
        for index in indexes:
            self._missed.setdefault(index, _Missed(why, owner))

    def clear(self) -> None:
        """Forget it all: the sequence begins anew."""
        self._runs.clear()
        self._missed.clear()

    def fill(self, begin: int, end: int, source: str, owner: str) -> None:
        """Note what of tokens [begin, end) nobody noted."""
        for run in self._in_order(end):
            self.note(begin, min(run.begin, end), source, owner)
            begin = max(begin, run.end)
        self.note(begin, end, source, owner)

    def told(self, num_tokens: int, block_size: int) -> tuple[GotRun, ...]:
        """Return the runs of a prompt of so many tokens, in order, without gaps."""
        runs: list[GotRun] = []
        position = 0
        for run in self._in_order(num_tokens):
            self._compute(position, run.begin, block_size, runs)
            _append(runs, run)
            position = run.end
        self._compute(position, num_tokens, block_size, runs)
        return tuple(runs)

    def _in_order(self, end: int) -> list[GotRun]:
        """Return what was noted of the tokens before `end`, each token once."""
        runs: list[GotRun] = []
        position = 0
        for run in sorted(self._runs, key=lambda run: run.begin):
            begin, stop = max(run.begin, position), min(run.end, end)
            if begin < stop:
                runs.append(GotRun(begin, stop, run.source, run.owner))
                position = stop
        return runs

    def _compute(self, begin: int, end: int, block_size: int, runs: list[GotRun]) -> None:
        """Append runs of tokens [begin, end), computed here, by why they did not come."""
        while begin < end:
            stop = min(end, (begin // block_size + 1) * block_size) if self._missed else end
            missed = self._missed.get(begin // block_size)
            _append(
                runs, GotRun(begin, stop, "computed", missed.owner if missed else "", missed.why if missed else None)
            )
            begin = stop


def source_of(tier: Tier) -> str:
    """Return what PromptSources calls what another holder has in a tier."""
    return "peer" if tier == "device" else tier


def _append(runs: list[GotRun], run: GotRun) -> None:
    last = runs[-1] if runs else None
    if last is not None and (last.end, last.source, last.owner, last.why) == (
        run.begin,
        run.source,
        run.owner,
        run.why,
    ):
        runs[-1] = GotRun(last.begin, run.end, run.source, run.owner, run.why)
    else:
        runs.append(run)
