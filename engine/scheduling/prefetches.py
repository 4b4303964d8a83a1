"""What sequences that wait will load, made ready by its holders and brought here before they are admitted.

    arrives, nobody said where its blocks lie --asked--> told --> may be admitted
    waits, and would load from a slow tier   --asked--> told --> ... read up, and told again
    waits, and would load what is at hand    --taken in, source by source--> in the pool, pinned by nobody
                                                  '-- admitted: it goes on with the pull --- ended --> StopAsking

Who waits longest comes first, and only some of those that wait. What is taken in takes no room that others want, and a
share of the pool at most; it comes while nobody who was admitted pulls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.scheduling.coming import Coming
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import AskAhead, FoundAhead, Instruction, StopAsking
from engine.scheduling.sequence import Phase, Sequence
from kvcache.load_plan import Load, LoadPlan, with_found
from messages.tier import SLOW_TIERS

#: Sequences that wait, for which holders are asked at a time: more than are admitted until a disk has read for one.
_MAX_SEQUENCES = 8
#: Of them, those that pull at a time: one is asked for while another comes.
_MAX_INTAKES = 2
#: A portion of blocks takes about so long to pull: who is admitted meanwhile waits for that one, then goes its own way
_PORTION_S = 0.05
#: Of a pool, what may be filled for those that wait.
_MAX_SHARE = 0.25


@dataclass(slots=True)
class _Ahead:
    """What is done for one that waits."""

    asked: dict[str, tuple[int, int]] = field(default_factory=dict)  #: by holder: blocks that it was asked for
    loads: list[Load] | None = None  #: what is at hand and not taken in yet; None: to be planned
    load_s: float = 0.0  #: of a block of them
    num_blocks: int = 0  #: taken in, or on their way


class Prefetches:
    """Asks ahead and takes in for the waiting sequences of `ledger`; `plan(seq)` says what one would load now.

    `num_ahead` tells for how many blocks there is room, as `Room.num_ahead`.
    """

    def __init__(
        self,
        ledger: SequenceLedger,
        plan: Callable[[Sequence], LoadPlan],
        num_ahead: Callable[[Sequence, int, int, float], int],
    ) -> None:
        self._ledger = ledger
        self._plan = plan
        self._num_ahead = num_ahead
        self._max_blocks = int(_MAX_SHARE * ledger.pool.num_blocks)
        self.cache_address = ""  #: of the node cache of this node; "": there is none
        self._aheads: dict[str, _Ahead] = {}  # by sequence: of all that wait, where nobody says who holds blocks
        self._num_blocks = 0  # of them all

    def look_up(self, seq: Sequence, out: list[Instruction]) -> None:
        """Ask this node's cache what it has of a sequence that arrived, where nobody said who holds its blocks."""
        num_held = len(self._ledger.pool.match(seq.names[: seq.max_match_blocks]))
        if seq.spec.held is None and self.cache_address and num_held < seq.max_match_blocks:
            seq.lacks_holders = True
            self._aheads[seq.seq_id] = _Ahead(loads=[])
            self._ask(seq, self.cache_address, num_held, seq.max_match_blocks, out)

    def take_found(self, found: FoundAhead) -> None:
        """Take in where a holder has what it was asked for, unless the sequence is not waiting any more."""
        ahead = self._aheads.get(found.seq_id)
        seq = self._ledger.sequences.get(found.seq_id)  # its time may have ended just now
        if ahead is not None and seq is not None and found.source in ahead.asked:
            seq.lacks_holders = False
            self._ledger.note_ready(seq)
            seq.held = with_found(seq.held, found.source, *ahead.asked[found.source], found.runs)
            ahead.loads = None

    def go_on(self, out: list[Instruction]) -> None:
        """Stop asking for those that ended; ask, and take in, for the most senior ones that wait."""
        for intake_id in self._ledger.intakes.overdue():
            self._ledger.end_intake(intake_id, out)
        for seq_id in self._ledger.take_left():
            self.end(seq_id, out)
        for seq in self._ledger.waiting[:_MAX_SEQUENCES]:
            if seq.seq_id not in self._aheads:
                self._begin(seq, out)
            elif self._aheads[seq.seq_id].loads is None:
                self._plan_intakes(seq, self._plan(seq))
        self._take_in(out)

    def end(self, seq_id: str, out: list[Instruction]) -> int:
        """Ask no more for a sequence: it is admitted, or ended.

        Returns:
            The index of the first block that is being pulled for it: an admitted one goes on with that pull.
        """
        ahead = self._aheads.pop(seq_id, None)
        self._num_blocks -= ahead.num_blocks if ahead else 0
        out += [StopAsking(seq_id, source) for source in (ahead.asked if ahead else ())]
        intake = self._ledger.intakes.find(seq_id)
        if intake is not None and intake.is_pulling:
            return intake.blocks.indexes(Coming.OPEN)[0]
        self._ledger.end_intake(seq_id, out)
        return sys.maxsize

    def check_invariants(self) -> list[str]:
        """Return what does not hold."""
        sequences = self._ledger.sequences
        strangers = [key for key in self._aheads if key not in sequences or sequences[key].phase is not Phase.WAITING]
        wrong = [f"{key!r} does not wait, and is asked for ahead" for key in strangers]
        num_blocks = sum(ahead.num_blocks for ahead in self._aheads.values())
        return (
            wrong
            if num_blocks == self._num_blocks
            else [*wrong, f"of {num_blocks} taken in, {self._num_blocks} counted"]
        )

    # -------------------------------------------------------------------------------------------------- slow tiers

    def _begin(self, seq: Sequence, out: list[Instruction]) -> None:
        self._aheads[seq.seq_id] = _Ahead()
        plan = self._plan(seq)
        spans: dict[str, tuple[int, int]] = {}
        for load in plan.loads:
            if load.copy.tier in SLOW_TIERS:
                begin, _ = spans.get(load.copy.address, (load.begin, load.end))
                spans[load.copy.address] = (begin, load.end)
        for source, (begin, end) in spans.items():
            self._ask(seq, source, begin, end, out)
        self._plan_intakes(seq, plan)

    def _ask(self, seq: Sequence, source: str, begin: int, end: int, out: list[Instruction]) -> None:
        self._aheads[seq.seq_id].asked[source] = (begin, end)
        out.append(AskAhead(seq.seq_id, source, begin, tuple(seq.names[begin:end])))

    # ------------------------------------------------------------------------------------------------- into the pool

    def _plan_intakes(self, seq: Sequence, plan: LoadPlan) -> None:
        """Note what of a plan is at hand: of a source that still reads something up for it nothing is, yet.

        What a prefill worker hands over ends with the prompt, so that nothing is brought behind that meanwhile.
        """
        reading = {load.copy.address for load in plan.loads if load.copy.tier in SLOW_TIERS}
        end = seq.num_prompt_tokens // seq.block_size if seq.wants_remote else sys.maxsize
        ahead = self._aheads[seq.seq_id]
        ahead.loads = [
            load._replace(end=min(load.end, end))
            for load in plan.loads
            if load.copy.address not in reading and load.begin < end
        ]
        ahead.load_s = plan.load_s / max(1, sum(load.end - load.begin for load in plan.loads))

    def _take_in(self, out: list[Instruction]) -> None:
        """Begin intakes, the most senior sequence's first, as far as there is room."""
        ledger = self._ledger
        admitted = (*ledger.pulling.values(), *ledger.running.values())
        if not any(self._aheads[seq.seq_id].loads for seq in ledger.waiting[:_MAX_SEQUENCES]) or any(
            seq.pull is not None and seq.pull.is_pulling for seq in admitted
        ):
            return  # those that were admitted have the road to themselves
        room = self._max_blocks - self._num_blocks
        num_before = 0
        for seq in ledger.waiting[:_MAX_SEQUENCES]:
            if room <= 0 or sum(seq_id in self._aheads for seq_id in ledger.intakes.ids()) >= _MAX_INTAKES:
                return
            ahead = self._aheads[seq.seq_id]
            is_busy = ledger.intakes.find(seq.seq_id) is not None or not ledger.may_pull(seq)
            if ahead.loads and not is_busy:
                num_blocks = self._take_in_for(seq, ahead, ahead.loads, room, num_before, out)
                if num_blocks is None:
                    return
                room -= num_blocks
            num_before += seq.num_blocks_for(seq.num_tokens)

    def _take_in_for(
        self, seq: Sequence, ahead: _Ahead, loads: list[Load], room: int, num_before: int, out: list[Instruction]
    ) -> int | None:
        """Ask one source for what it has of it, and count that; None if there is not even room for half of it."""
        source = loads[0].copy.address
        num_wanted = sum(load.end - load.begin for load in loads if load.copy.address == source)
        num_blocks = min(room, self._num_ahead(seq, num_wanted, num_before, num_wanted * ahead.load_s))
        if 2 * num_blocks < min(num_wanted, self._max_blocks):
            return None
        ahead.loads = [load for load in loads if load.copy.address != source]
        here = [load for load in loads if load.copy.address == source]
        names = seq.names[here[0].begin : here[-1].end]
        lacking = {*self._ledger.intakes.lacking(names)} - self._ledger.in_flight.keys()
        copies = {
            index: load.copy for load in here for index in range(load.begin, load.end) if seq.names[index] in lacking
        }
        wanted = list(copies)[:num_blocks]
        if not wanted:
            return 0
        if ahead.asked.pop(source, None) is not None:
            out.append(StopAsking(seq.seq_id, source))
        seq.brought |= {index: copies[index] for index in wanted}
        asked = tuple(seq.names[wanted[0] : wanted[-1] + 1])
        portion_blocks = max(1, int(_PORTION_S / ahead.load_s)) if ahead.load_s else sys.maxsize
        self._ledger.intakes.begin_ahead(
            seq.seq_id, source, wanted[0], asked, wanted, portion_blocks, seq.spec.tenant, out
        )
        ahead.num_blocks += len(wanted)
        self._num_blocks += len(wanted)
        return len(wanted)
