"""Blocks that this worker takes in without a sequence that wants them: somebody says that they are worth having.

They go where there are free blocks, copies that other holders keep, or blocks that were used longer ago. One pull at a
time for each intake, as for a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.scheduling.plan import AskBlocks, BlocksOffered, Instruction, PullBlocks, PullEnded, TakeIn
from kvcache.pool import BlockPool
from messages.handoff import BlockLocation

#: Blocks that are taken in at a time: what else wants to be taken in is declined.
_MAX_BLOCKS = 1024


@dataclass(slots=True)
class _Intake:
    source: str
    names: tuple[bytes, ...]
    used_s: float | None  #: when the blocks were last used; None: they are wanted now
    targets: dict[int, int]  #: block id, by position in `names`
    offered: dict[int, BlockLocation] = field(default_factory=dict)  #: to be pulled next
    open: dict[int, BlockLocation] = field(default_factory=dict)  #: being pulled
    is_offered_whole: bool = False  #: the source will offer no more


class Intakes:
    """All that is being taken in, by an id that no sequence has. Pins blocks of `pool` until they are committed."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._intakes: dict[str, _Intake] = {}
        self.num_blocks = 0  #: taken in since the start

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all that is under way."""
        return tuple(self._intakes)

    def has(self, intake_id: str) -> bool:
        """Tell whether an intake of this id is under way."""
        return intake_id in self._intakes

    def targets(self) -> list[int]:
        """Return the ids of the blocks that are pinned for what comes."""
        return [block_id for intake in self._intakes.values() for block_id in intake.targets.values()]

    def begin(self, wanted: TakeIn, out: list[Instruction]) -> None:
        """Ask for those of the blocks that are not here, as far as others here are worth less."""
        under_way = {name for intake in self._intakes.values() for name in intake.names}
        used_s = self._pool.now_s if wanted.used_s is None else wanted.used_s
        room = self._pool.num_worth_less(used_s, max(0, _MAX_BLOCKS - len(self.targets())))
        names = tuple(name for name in wanted.names if not self._pool.holds(name) and name not in under_way)
        names = names[max(0, len(names) - room) :]
        if wanted.intake_id in self._intakes or not names:
            return
        targets = dict(enumerate(self._pool.allocate(len(names))))
        self._intakes[wanted.intake_id] = _Intake(wanted.source, names, wanted.used_s, targets)
        out.append(AskBlocks(wanted.intake_id, wanted.source, 0, names, is_tail_first=False))

    def take_blocks(self, offered: BlocksOffered, out: list[Instruction]) -> None:
        """Pull what the source offers; what it does not offer is not taken in."""
        intake = self._intakes[offered.seq_id]
        intake.is_offered_whole |= offered.is_last
        intake.offered |= {
            location.index: location
            for location in offered.blocks
            if location.index in intake.targets
            and location.name == intake.names[location.index]
            and location.num_tokens == self._pool.block_size
        }
        if not intake.open:
            self._go_on(offered.seq_id, out)

    def finish_pull(self, ended: PullEnded, out: list[Instruction]) -> None:
        """Name what came well, and go on with what was offered meanwhile."""
        intake = self._intakes[ended.seq_id]
        for index, location in intake.open.items():
            block_id = intake.targets[index]
            if index not in ended.bad_indexes:
                self.num_blocks += self._pool.commit(block_id, intake.names[index], location.tenant)
            elif ended.quarantine_until_s is not None:
                self._pool.quarantine([intake.targets.pop(index)], ended.quarantine_until_s)
        intake.open = {}
        self._go_on(ended.seq_id, out)

    def _go_on(self, intake_id: str, out: list[Instruction]) -> None:
        """Pull what was offered; where nothing is, and nothing will be, give back the blocks: those named may stay."""
        intake = self._intakes[intake_id]
        offered = {
            index: location
            for index, location in intake.offered.items()
            if index in intake.targets and self._pool.name(intake.targets[index]) is None  # it may be named twice
        }
        intake.open, intake.offered = offered, {}
        if offered:
            pairs = [(location, intake.targets[index]) for index, location in offered.items()]
            out.append(PullBlocks(intake_id, intake.source, pairs))
        elif intake.is_offered_whole:
            self._intakes.pop(intake_id)
            tails_first = list(intake.targets.values())
            if intake.used_s is None:
                self._pool.unpin(tails_first[::-1])
            else:  # each goes before the one that was put back before it
                self._pool.unpin(tails_first, intake.used_s)
