"""Blocks that this worker takes in without a sequence that wants them: others are about to lose them, or it is warming.

They go where there are free blocks, copies that other holders keep, or blocks that were used longer ago. One pull at a
time for each intake, as for a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.scheduling.plan import AskBlocks, BlocksOffered, Instruction, PullBlocks, PullEnded, TakeIn
from kvcache.pool import BlockPool
from messages.errors import InvariantError
from messages.handoff import BlockLocation

#: Blocks that are taken in at a time: what else wants to be taken in is declined.
_MAX_BLOCKS = 1024


@dataclass(slots=True)
class _Intake:
    source: str
    names: tuple[bytes, ...]
    targets: dict[int, int]  #: block id, by position in `names`
    open: dict[int, BlockLocation] = field(default_factory=dict)  #: being pulled
    is_offered: bool = False


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
        room = self._pool.num_worth_less(wanted.used_s, max(0, _MAX_BLOCKS - len(self.targets())))
        names = tuple(name for name in wanted.names if not self._pool.holds(name) and name not in under_way)[:room]
        if wanted.intake_id in self._intakes or not names:
            return
        targets = dict(enumerate(self._pool.allocate(len(names))))
        self._intakes[wanted.intake_id] = _Intake(wanted.source, names, targets)
        out.append(AskBlocks(wanted.intake_id, wanted.source, 0, names, is_tail_first=False))

    def take_blocks(self, offered: BlocksOffered, out: list[Instruction]) -> None:
        """Pull what the source offers; what it does not offer is not taken in."""
        intake = self._intakes[offered.seq_id]
        if intake.open or intake.is_offered:
            raise InvariantError(f"{offered.seq_id!r} was offered twice")
        intake.is_offered = offered.is_last
        locations = {location.index: location for location in offered.blocks if location.index in intake.targets}
        intake.open = {
            index: location
            for index, location in locations.items()
            if location.name == intake.names[index] and location.num_tokens == self._pool.block_size
        }
        if intake.open:
            pairs = [(location, intake.targets[index]) for index, location in intake.open.items()]
            out.append(PullBlocks(offered.seq_id, intake.source, pairs))
        else:
            self._end(offered.seq_id)

    def finish_pull(self, ended: PullEnded) -> None:
        """Name what came well, and give back the rest."""
        intake = self._intakes[ended.seq_id]
        for index in intake.open:
            block_id = intake.targets[index]
            if index not in ended.bad_indexes:
                self.num_blocks += self._pool.commit(block_id, intake.names[index])
            elif ended.quarantine_until_s is not None:
                self._pool.quarantine([intake.targets.pop(index)], ended.quarantine_until_s)
        self._end(ended.seq_id)

    def _end(self, intake_id: str) -> None:
        self._pool.unpin(list(self._intakes.pop(intake_id).targets.values()))
