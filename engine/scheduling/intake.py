"""Blocks that come before a sequence that runs wants them: one that waits will, or they are said to be worth it.

    asked ---offered, pulled---> offered whole, last pull ended ---> named, and pinned by nobody
      |                 '-- its sequence is admitted --> the sequence goes on with that pull
      '-- its sequence ended, or it took too long --> what is not here yet is not waited for

They go where there are free blocks, copies that other holders keep, or blocks that are worth less. One pull at a time
for each intake, as for a sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from engine.scheduling.coming import Coming, ComingBlocks
from engine.scheduling.plan import AskBlocks, BlocksOffered, Instruction, PullBlocks, PullEnded, TakeIn
from kvcache.locations import is_of_prefix, unpack_locations
from kvcache.pool import BlockPool

#: Blocks that are taken in at a time because somebody says so: what else wants to be taken in is declined.
_MAX_BLOCKS = 1024
#: So many seconds blocks are pinned for what a source said that it has: as long as a prefill worker is waited for.
_MAX_S = 30.0


@dataclass(frozen=True, slots=True)
class PullTarget:
    """A block into which a pull still writes that nobody waits for: its sequence went on or ended, or its intake."""

    index: int
    block_id: int
    name: bytes  #: b"" for a partial block
    tenant: int  #: whose it is


@dataclass(slots=True)
class Intake:
    """Blocks that one source is asked for, by their positions: in the sequence that waits for them, or among names."""

    source: str
    first_index: int  #: of the first name
    names: tuple[bytes, ...]
    targets: dict[int, int]  #: block id, by position, of those that are wanted
    deadline_s: float
    blocks: ComingBlocks  #: of the names
    used_s: float | None = None  #: when the blocks were last used; None: they are wanted now
    is_head_first: bool = True
    portion_blocks: int = sys.maxsize  #: in one pull
    tenant: int | None = None  #: whose they are; None: the source knows
    is_offered_whole: bool = False  #: the source will offer no more

    def name(self, index: int) -> bytes:
        """Return the name of the block at a position."""
        return self.names[index - self.first_index]

    @property
    def is_pulling(self) -> bool:
        """Whether blocks are being pulled."""
        return self.blocks.has(Coming.OPEN)

    def open_targets(self) -> list[PullTarget]:
        """Return the targets of what is being pulled, head first, with names, and whose they will be."""
        rows = self.blocks.rows(Coming.OPEN)
        return [
            PullTarget(index, self.targets[index], self.name(index), tenant if self.tenant is None else self.tenant)
            for index, tenant in zip(rows["index"].tolist(), rows["tenant"].tolist(), strict=True)
        ]

    def idle_head_first(self) -> list[int]:
        """Return the ids of the targets that no pull writes to, head first."""
        indexes = sorted(self.targets.keys() - set(self.blocks.indexes(Coming.OPEN)), reverse=not self.is_head_first)
        return [self.targets[index] for index in indexes]


class Intakes:
    """All that is being taken in, by the id of the sequence that waits for it, or by one that no sequence has.

    Pins blocks of `pool` until the intake is over. `orphans` are being written by pulls that nobody waits for.
    """

    def __init__(self, pool: BlockPool, orphans: Mapping[str, Items[PullTarget]]) -> None:
        self._pool = pool
        self._orphans = orphans
        self._intakes: dict[str, Intake] = {}
        self.num_blocks = 0  #: taken in since the start

    def __len__(self) -> int:
        return len(self._intakes)

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all that is under way."""
        return tuple(self._intakes)

    def find(self, intake_id: str) -> Intake | None:
        """Return the intake of this id; None where none is under way."""
        return self._intakes.get(intake_id)

    def targets(self) -> list[int]:
        """Return the ids of the blocks that are pinned for what comes."""
        return [block_id for intake in self._intakes.values() for block_id in intake.targets.values()]

    def num_coming(self, intake_id: str) -> int:
        """Count the blocks that an intake holds for what has not come yet; none where none is under way."""
        intake = self._intakes.get(intake_id)
        return 0 if intake is None else sum(self._pool.name(each) is None for each in intake.targets.values())

    def num_idle(self, intake_id: str, besides: frozenset[int]) -> int:
        """Count the blocks, `besides` those, that would be free without this intake: no pull writes to them."""
        targets = self._intakes[intake_id].idle_head_first()
        return sum(self._pool.num_pins(each) == 1 and each not in besides for each in targets)

    def num_unfilled(self, intake_id: str) -> int:
        """Count the blocks that hold nothing, and no pull writes to: without this intake they cost nobody anything."""
        return sum(self._pool.name(each) is None for each in self._intakes[intake_id].idle_head_first())

    def overdue(self) -> list[str]:
        """Return the ids of those that took too long."""
        return [intake_id for intake_id, intake in self._intakes.items() if intake.deadline_s <= self._pool.now_s]

    def begin(self, wanted: TakeIn, out: list[Instruction]) -> None:
        """Ask for those of the blocks that are not here, as far as others here are worth less."""
        used_s = self._pool.now_s if wanted.used_s is None else wanted.used_s
        room = self._pool.num_worth_less(used_s, max(0, _MAX_BLOCKS - len(self.targets())))
        names = tuple(self.lacking(wanted.names))
        names = names[max(0, len(names) - room) :]
        if wanted.intake_id not in self._intakes and names:
            intake = self._intake(wanted.source, 0, names, range(len(names)))
            intake.used_s, intake.is_head_first = wanted.used_s, False
            self._begin(wanted.intake_id, intake, out)

    def begin_ahead(
        self,
        seq_id: str,
        source: str,
        first_index: int,
        names: tuple[bytes, ...],
        wanted: Collection[int],
        portion_blocks: int,
        tenant: int,
        out: list[Instruction],
    ) -> None:
        """Ask for blocks of a sequence that waits, for whom there is room: those at the positions `wanted`.

        They are pulled head first, `portion_blocks` at a time, and are `tenant`'s.
        """
        intake = self._intake(source, first_index, names, wanted)
        intake.portion_blocks, intake.tenant = portion_blocks, tenant
        self._begin(seq_id, intake, out)

    def lacking(self, names: Iterable[bytes]) -> list[bytes]:
        """Return those of `names` that are not here, not taken in already, nor by a pull that nobody waits for."""
        under_way = {name for intake in self._intakes.values() for name in intake.names}
        under_way |= {target.name for targets in self._orphans.values() for target in targets}
        return [name for name in names if not self._pool.holds(name) and name not in under_way]

    def pop(self, intake_id: str) -> Intake | None:
        """Forget an intake; its targets are the caller's, pinned once each. None where none is under way."""
        return self._intakes.pop(intake_id, None)

    def take_blocks(self, offered: BlocksOffered, out: list[Instruction]) -> None:
        """Pull what the source offers; what it does not offer is not taken in. Unknown ids are ignored."""
        intake = self._intakes.get(offered.seq_id)
        if intake is None or intake.source != offered.source:
            return
        intake.is_offered_whole |= offered.is_last
        rows = unpack_locations(offered.blocks)
        rows = rows[is_of_prefix(rows, intake.first_index, intake.names, self._pool.block_size)]
        rows = rows[intake.blocks.lacks(rows)]
        is_wanted = [index in intake.targets for index in rows["index"].tolist()]
        intake.blocks.offer(offered.source, rows[np.array(is_wanted, bool)])
        if not intake.is_pulling:
            self._go_on(offered.seq_id, intake, out)

    def finish_pull(self, ended: PullEnded, out: list[Instruction]) -> None:
        """Name what came well, and go on with what was offered meanwhile."""
        intake = self._intakes[ended.seq_id]
        for target in intake.open_targets():
            if target.index not in ended.bad_indexes:
                self.num_blocks += self._pool.commit(target.block_id, target.name, target.tenant)
            elif ended.quarantine_until_s is not None:
                self._pool.quarantine([intake.targets.pop(target.index)], ended.quarantine_until_s)
        intake.blocks.arrive(ended.bad_indexes)
        intake.blocks.close()
        self._go_on(ended.seq_id, intake, out)

    def _intake(self, source: str, first_index: int, names: tuple[bytes, ...], wanted: Collection[int]) -> Intake:
        targets = dict(zip(wanted, self._pool.allocate(len(wanted)), strict=True))
        blocks = ComingBlocks(first_index, first_index + len(names))
        return Intake(source, first_index, names, targets, self._pool.now_s + _MAX_S, blocks)

    def _begin(self, intake_id: str, intake: Intake, out: list[Instruction]) -> None:
        self._intakes[intake_id] = intake
        out.append(AskBlocks(intake_id, intake.source, intake.first_index, intake.names, is_tail_first=False))

    def _go_on(self, intake_id: str, intake: Intake, out: list[Instruction]) -> None:
        """Pull what was offered; where nothing is, and nothing will be, give back the blocks: those named may stay."""
        if intake.blocks.has(Coming.OFFERED):
            source, rows = intake.blocks.begin_pull(intake.portion_blocks)
            targets = tuple([intake.targets[index] for index in rows["index"].tolist()])
            out.append(PullBlocks(intake_id, source, rows.tobytes(), targets))
        elif intake.is_offered_whole:
            del self._intakes[intake_id]
            blocks = intake.idle_head_first()
            if intake.used_s is None:
                self._pool.unpin(blocks)
                self._pool.expect(blocks if intake.is_head_first else ())
            else:  # each goes before the one that was put back before it
                self._pool.unpin(blocks[::-1], intake.used_s)
