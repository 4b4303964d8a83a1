"""What sequences that wait will load, made ready by its holders before they are admitted; and where it lies.

    arrives, nobody said where its blocks lie --asked--> told --> may be admitted
    waits, and would load from a slow tier   --asked--> told --> ... read up, and told again
                                                  '-- admitted, ended --> StopAsking

Only holders make ready: nothing is pinned for it. Who waits longest comes first, and only some of those that wait.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import AskAhead, FoundAhead, Instruction, StopAsking
from engine.scheduling.sequence import Phase, Sequence
from kvcache.load_plan import LoadPlan, with_found

#: Sequences that wait, for which holders are asked at a time: more than are admitted until a disk has read for one.
_MAX_SEQUENCES = 8


class Prefetches:
    """Asks ahead for the waiting sequences of `ledger`; `plan(seq)` says what one would load now."""

    def __init__(self, ledger: SequenceLedger, plan: Callable[[Sequence], LoadPlan]) -> None:
        self._ledger = ledger
        self._plan = plan
        self.cache_address = ""  #: of the node cache of this node; "": there is none
        self._asked: dict[str, dict[str, tuple[int, int]]] = {}  # by sequence and holder: the blocks asked for

    def look_up(self, seq: Sequence, out: list[Instruction]) -> None:
        """Ask this node's cache what it has of a sequence that arrived, where nobody said who holds its blocks."""
        num_held = len(self._ledger.pool.match(seq.names[: seq.max_match_blocks]))
        if seq.spec.held is None and self.cache_address and num_held < seq.max_match_blocks:
            seq.lacks_holders = True
            self._asked[seq.seq_id] = {}
            self._ask(seq, self.cache_address, num_held, seq.max_match_blocks, out)

    def take_found(self, found: FoundAhead) -> None:
        """Take in where a holder has what it was asked for, unless the sequence is not waiting any more."""
        span = self._asked.get(found.seq_id, {}).get(found.source)
        seq = self._ledger.sequences.get(found.seq_id)  # its time may have ended just now
        if span is not None and seq is not None:
            seq.lacks_holders = False
            seq.held = with_found(seq.held, found.source, *span, found.runs)

    def go_on(self, out: list[Instruction]) -> None:
        """Stop asking for those that ended, and ask for the most senior ones that wait."""
        for seq_id in [seq_id for seq_id in self._asked if seq_id not in self._ledger.sequences]:
            self.end(seq_id, out)
        for seq in self._ledger.waiting[:_MAX_SEQUENCES]:
            if seq.seq_id not in self._asked:
                self._begin(seq, out)

    def end(self, seq_id: str, out: list[Instruction]) -> None:
        """Ask no more for a sequence: it is admitted, or ended."""
        out += [StopAsking(seq_id, source) for source in self._asked.pop(seq_id, {})]

    def check_invariants(self) -> list[str]:
        """Return what does not hold."""
        sequences = self._ledger.sequences
        strangers = [key for key in self._asked if key not in sequences or sequences[key].phase is not Phase.WAITING]
        return [f"{key!r} does not wait, and is asked for ahead" for key in strangers]

    def _begin(self, seq: Sequence, out: list[Instruction]) -> None:
        self._asked[seq.seq_id] = {}
        spans: dict[str, tuple[int, int]] = {}
        for load in self._plan(seq).loads:
            if load.copy.tier in ("disk", "remote"):
                begin, _ = spans.get(load.copy.address, (load.begin, load.end))
                spans[load.copy.address] = (begin, load.end)
        for source, (begin, end) in spans.items():
            self._ask(seq, source, begin, end, out)

    def _ask(self, seq: Sequence, source: str, begin: int, end: int, out: list[Instruction]) -> None:
        self._asked[seq.seq_id][source] = (begin, end)
        out.append(AskAhead(seq.seq_id, source, begin, tuple(seq.names[begin:end])))
