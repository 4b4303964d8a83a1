"""What the runner keeps of the sequences that run: tokens and block tables, by slot, as plans tell of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from engine.scheduling.plan import SequenceStep, SlotBegins, StepPlan
from kvcache.names import token_array
from messages.errors import InvariantError


@dataclass(slots=True)
class SlotSequence:
    """The sequence in a slot, as far as plans told of it."""

    seq_id: str
    begins: SlotBegins
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    num_blocks: int = 0
    num_awaited: int = 0  #: tokens behind those that a step computes with, though they did not come back yet
    untold: int | None = None  #: the token that came back last, until a plan tells of it or awaits it

    def tell(self, part: SequenceStep) -> None:
        """Take in what a plan tells of the tokens, or that it awaits one, which may have come back by now."""
        self.token_ids += token_array(part.new_token_ids)
        untold, self.untold = self.untold, None
        if not part.awaits_token:
            return
        if untold is None:
            self.num_awaited += 1
        else:
            self.token_ids.append(untold)

    def take_sampled(self, token_id: int) -> None:
        """Take in a token that came back."""
        if self.num_awaited:
            self.token_ids.append(token_id)
            self.num_awaited -= 1
        else:
            self.untold = token_id

    def tokens_of(self, part: SequenceStep) -> array[int]:
        """Return the tokens that `part` computes; 0 in place of one that did not come back yet."""
        found = self.token_ids[part.start : part.end]
        return array("I", [0]) if self.num_awaited and not found else found


@dataclass(frozen=True, slots=True)
class TableRoom:
    """Room for tables on an accelerator: all that will ever be wanted, since captured steps know where they lie."""

    device: torch.device
    num_slots: int
    max_blocks: int  #: of a sequence
    #: puts so many words, int64, that it lets be written on the host, there
    bring: Callable[[int, Callable[[npt.NDArray[np.int64]], None]], torch.Tensor]


class SlotTables:
    """The slots of one runner. On a CPU room for more of them, and for longer tables, is made by doubling.

    Attributes:
        host_tables: `[num_slots, max_blocks]` int32. What follows a sequence's last block is 0, or an earlier one's.
        block_tables: the same on the runner's device; on a CPU the same memory. On an accelerator it stays the same
            tensor, where new entries alone are written, without waiting for it.
        sampled_ids: `[num_slots]` int64 on the runner's device: what was sampled last for each slot; as lasting.
    """

    def __init__(self, room: TableRoom | None = None) -> None:
        """Make tables on the host, and in `room`, where that is on an accelerator."""
        self._sequences: dict[int, SlotSequence] = {}
        self._room = room
        #: slot, then which entries of its table, [begin, end): those that the device does not have yet, be it that
        #: bringing them failed for lack of memory
        self._unbrought: list[tuple[int, int, int]] = []
        shape = (room.num_slots, room.max_blocks) if room else (0, 0)
        self.host_tables: npt.NDArray[np.int32] = np.zeros(shape, np.int32)  # pages that nobody writes cost nothing
        self.block_tables = torch.from_numpy(self.host_tables)
        self.sampled_ids = torch.zeros(shape[0], dtype=torch.int64)
        if room:
            self.block_tables = torch.zeros(shape, dtype=torch.int32, device=room.device)
            self.sampled_ids = torch.zeros(shape[0], dtype=torch.int64, device=room.device)

    def __getitem__(self, slot: int) -> SlotSequence:
        """Return who is in a slot that has begun; not to be changed."""
        return self._sequences[slot]

    def take_in(self, plan: StepPlan) -> list[str]:
        """Bring the slots up to date with `plan`, on the host; every plan once, in order.

        Returns:
            The ids of the sequences that left their slots.

        Raises:
            InvariantError: a part goes on with a sequence that is not in its slot.
        """
        if plan.is_told:
            return []
        left = [self._sequences.pop(slot) for slot in plan.freed_slots if slot in self._sequences]
        for part in plan.parts:
            if part.begins is not None:
                if part.slot in self._sequences:  # whoever plans began anew
                    left.append(self._sequences[part.slot])
                self._reserve(part.slot + 1, 0)
                self._sequences[part.slot] = SlotSequence(part.seq_id, part.begins)
            sequence = self._sequence_of(part)
            sequence.tell(part)
            if part.new_block_ids:
                begin, end = sequence.num_blocks, sequence.num_blocks + len(part.new_block_ids)
                self._reserve(part.slot + 1, end)
                self.host_tables[part.slot, begin:end] = part.new_block_ids
                sequence.num_blocks = end
                if self._room:
                    self._unbrought.append((part.slot, begin, end))
        return [sequence.seq_id for sequence in left]

    def bring(self) -> None:
        """Put what plans told of block tables on its way to an accelerator, where they are there."""
        if self._room and self._unbrought:
            self._bring_entries(self._unbrought, self._room)
            self._unbrought.clear()

    def leave_sampled(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Leave what was sampled for `slots`, both `[n]` int64 on the device, to parts that await it."""
        self.sampled_ids[slots] = token_ids

    def _sequence_of(self, part: SequenceStep) -> SlotSequence:
        sequence = self._sequences.get(part.slot)
        if sequence is None or sequence.seq_id != part.seq_id:
            found = "nobody" if sequence is None else repr(sequence.seq_id)
            raise InvariantError(f"a step goes on with {part.seq_id!r} in slot {part.slot}; in it is {found}")
        return sequence

    def _reserve(self, num_slots: int, max_blocks: int) -> None:
        old = self.host_tables
        if num_slots <= old.shape[0] and max_blocks <= old.shape[1]:
            return
        if self._room:
            raise InvariantError(
                f"{num_slots} slots of {max_blocks} blocks are wanted, there are {old.shape[0]} of {old.shape[1]}"
            )
        shape = [max(have, _grown(want)) for have, want in zip(old.shape, (num_slots, max_blocks), strict=True)]
        self.host_tables = np.zeros(shape, np.int32)
        for slot, sequence in self._sequences.items():
            if sequence.num_blocks:
                self.host_tables[slot, : sequence.num_blocks] = old[slot, : sequence.num_blocks]
        self.block_tables = torch.from_numpy(self.host_tables)
        self.sampled_ids = torch.cat([self.sampled_ids, self.sampled_ids.new_zeros(shape[0] - old.shape[0])])

    def _bring_entries(self, written: Sequence[tuple[int, int, int]], room: TableRoom) -> None:
        """Put entries of the host's tables into the device's, in one transfer."""
        slots = np.repeat([slot for slot, _, _ in written], [end - begin for _, begin, end in written])
        columns = np.concatenate([np.arange(begin, end) for _, begin, end in written])

        def write(words: npt.NDArray[np.int64]) -> None:
            entries = words.reshape(3, -1)
            entries[0], entries[1], entries[2] = slots, columns, self.host_tables[slots, columns]

        entries = room.bring(3 * len(slots), write).view(3, -1)
        self.block_tables[entries[0], entries[1]] = entries[2].int()


def _grown(wanted: int) -> int:
    """Round `wanted` up to a power of two, so that tables are seldom made anew."""
    return 1 << max(0, wanted - 1).bit_length()
