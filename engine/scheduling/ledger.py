"""Who is in which phase, and who holds which blocks: the scheduler's books.

A block is pinned once for each table that holds it. Blocks that a step or a pull in progress touches stay pinned until
it ends, whatever became of the sequence meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence as Items
from typing import assert_never

from engine.scheduling.coming import Coming, ComingBlocks
from engine.scheduling.intake import Intakes, PullTarget
from engine.scheduling.plan import Instruction, StopAsking
from engine.scheduling.prompt_counts import PromptCounts, count_arrived, count_head
from engine.scheduling.sequence import Phase, RemotePull, Sequence
from engine.scheduling.slots import SlotPool
from kvcache.pool import BlockPool
from messages.errors import InvariantError
from messages.request import Copy

#: Blocks of ended sequences that are given back at once; the rest waits for the next event, or until it is wanted.
_MAX_GIVEN_BACK = 32_768


class SequenceLedger:
    """All sequences that have not ended, by phase, and their claims on `pool`. Nobody else pins its blocks."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.slots = SlotPool()
        self.sequences: dict[str, Sequence] = {}
        self.waiting: list[Sequence] = []  #: by seniority
        self.ready: list[Sequence] = []  #: of those, who could be admitted but for the room
        self.pulling: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.dying: list[Sequence] = []  #: ended, with blocks that a running step uses
        self.dead: deque[Sequence] = deque()  #: ended, with blocks that are still to be given back
        self._num_given_back = 0  # blocks of ended sequences, in this event
        self.orphans: dict[str, list[PullTarget]] = {}  #: of open pulls, by the id of the sequence they were for
        self.intakes = Intakes(pool, self.orphans)
        self.lent: dict[str, list[int]] = {}  #: blocks that others read, by the id of their lease
        self.in_flight: dict[bytes, Sequence] = {}  #: names of blocks that one who runs or pulls will commit
        self._abandoned: list[Instruction] = []  # to holders that were asked for what a step took the room of
        self._left: list[str] = []  # who ended while they waited
        self.num_preemptions = 0
        self.prompt_counts = PromptCounts()

    # --------------------------------------------------------------------------------------------------------- phases

    def enqueue(self, seq: Sequence) -> None:
        """Take in a new sequence: it waits."""
        self.sequences[seq.seq_id] = seq
        self._begin_waiting(seq)

    def note_ready(self, seq: Sequence) -> None:
        """Take in that a waiting sequence may have all that it lacked."""
        if seq.phase is Phase.WAITING and seq.is_ready and self._find(self.ready, seq) is None:
            insort(self.ready, seq, key=_seniority)

    def position(self, seq: Sequence) -> int:
        """Return where a waiting sequence is among those that are ready, or would be."""
        return bisect_left(self.ready, seq.seniority, key=_seniority)

    def admit(self, seq: Sequence, matched: list[int]) -> None:
        """Move `seq` from waiting to running; the blocks in `matched`, the head of its prefix, are reused."""
        self._stop_waiting(seq)
        self.pool.pin(matched)
        seq.block_table = matched
        seq.num_computed = len(matched) * seq.block_size
        seq.num_passed_over = 0
        seq.lacks_room_s = None
        if not seq.has_emitted:
            count_head(seq, len(matched))
        seq.first_in_flight = len(matched)
        for name in seq.names[len(matched) :]:
            self.in_flight.setdefault(name, seq)
        self._begin_running(seq)

    def begin_pull(
        self, seq: Sequence, deadline_s: float, num_blocks: int | None = None, *, is_mixed: bool = False
    ) -> RemotePull:
        """Give a running `seq` blocks for what others have: its first `num_blocks`, full ones, or (None) its prompt.

        What the pool has beyond the head is reused. It is pulling then, or, where it `is_mixed`, computes its head.
        Where an intake for it is being pulled, it waits for that, and for what the source offers besides.
        """
        begin = len(seq.block_table)
        coming: dict[int, int] = {}
        intake = self.intakes.pop(seq.seq_id)
        if intake is not None:
            self.pool.unpin(intake.idle_head_first())
            coming = {index: intake.targets[index] for index in intake.blocks.indexes(Coming.OPEN)}
            num_blocks = None if num_blocks is None else max(num_blocks, *(index + 1 for index in coming))
        end_tokens = seq.num_prompt_tokens if num_blocks is None else num_blocks * seq.block_size
        end = seq.num_blocks_for(end_tokens)
        found = {
            index: block_id
            for index in range(begin, end_tokens // seq.block_size)
            if index not in coming and (block_id := self.pool.find(seq.names[index])) is not None
        }
        self.pool.pin(list(found.values()))
        fresh = iter(self.pool.allocate(end - begin - len(found) - len(coming)))
        known = found | coming
        seq.block_table += [known[index] if index in known else next(fresh) for index in range(begin, end)]
        seq.pull = RemotePull(
            first_index=begin,
            end_tokens=end_tokens,
            deadline_s=deadline_s,
            blocks=ComingBlocks(begin, end, found),
            is_mixed=is_mixed,
            found=frozenset(found),
        )
        if intake is not None:
            seq.pull.blocks.take_over(intake.source, intake.blocks)
            seq.pull.asked = {
                index: Copy(intake.source, copy.tier)
                for index, copy in seq.brought.items()
                if index in intake.targets and begin <= index < end and index not in found
            }
            seq.pull.holders = set() if intake.is_offered_whole else {intake.source}
        if not is_mixed:
            self.pause(seq)
        return seq.pull

    def pause(self, seq: Sequence) -> None:
        """Move `seq` from running to pulling: what it would compute next is on its way."""
        self._stop_running(seq)
        seq.phase = Phase.PULLING
        self.pulling[seq.seq_id] = seq

    def resume(self, seq: Sequence) -> None:
        """Move a mixed `seq` from pulling to running: there is something to compute before more arrives."""
        del self.pulling[seq.seq_id]
        seq.num_passed_over = 0
        self._begin_running(seq)

    def pass_arrived(self, seq: Sequence) -> None:
        """Go on over blocks that arrived, where the computing of a mixed `seq` has come to them."""
        pull = _pull_of(seq)
        index, rest = divmod(seq.num_computed, seq.block_size)
        while not rest and pull.blocks.state(index) is Coming.ARRIVED:
            count_arrived(seq, pull, index)
            index += 1
            seq.num_computed = index * seq.block_size
            self._forget_in_flight(seq, seq.names[index - 1 : index])

    def forget_pull(self, seq: Sequence) -> None:
        """Note that a running, mixed `seq` wants nothing more: nothing is on its way, it came to all that arrived."""
        seq.pull, seq.pull_ended_s = None, self.pool.now_s

    def end_pull(self, seq: Sequence, num_blocks: int) -> None:
        """End the pull of `seq`, which then runs with its first `num_blocks` blocks; the others are given back.

        A mixed one keeps the blocks that it came to, computed or passed.
        """
        pull = _pull_of(seq)
        seq.pull_ended_s = self.pool.now_s
        if pull.is_mixed:
            self._drop_tail(seq, seq.num_blocks_for(max(seq.num_computed, seq.planned_end)))
        else:
            self._drop_tail(seq, num_blocks)
            seq.num_computed = min(num_blocks * seq.block_size, pull.end_tokens)
            for index in pull.found | pull.asked.keys():
                if index < num_blocks:
                    count_arrived(seq, pull, index)
            seq.num_pulled_tokens = max(0, min(seq.num_computed, seq.num_prompt_tokens) - seq.num_cached_tokens)
            if seq.has_emitted:
                self.prompt_counts.take(seq)
        if seq.phase is Phase.PULLING:
            self.resume(seq)

    def keep(self, seq: Sequence) -> None:
        """Move `seq` from running to kept: nothing more is computed, the blocks stay."""
        self._stop_running(seq)
        self._forget_in_flight(seq, seq.names[seq.first_in_flight :])
        seq.phase = Phase.KEPT

    def preempt(self, seq: Sequence) -> None:
        """Move `seq` from running back to waiting. Its full blocks stay named: most of it comes back by reuse."""
        if seq.pull is not None:
            self._abandoned += [StopAsking(seq.seq_id, address) for address in sorted(seq.pull.holders)]
            self._drop_tail(seq, seq.num_blocks_for(seq.num_computed))
        self._stop_running(seq)
        seq.extend_names()
        self._forget_in_flight(seq, seq.names[seq.first_in_flight :])
        self._give_back(seq)
        seq.num_computed = seq.planned_end = 0
        seq.num_offered_blocks = 0
        if not seq.has_emitted:
            seq.num_device_tokens = seq.num_peer_tokens = seq.num_pulled_tokens = 0
            seq.num_loaded_tokens.clear()
            seq.origins.clear()
            seq.prompt_logprobs = [None]
        seq.phase = Phase.WAITING
        self._begin_waiting(seq)
        self.num_preemptions += 1

    def take_abandoned(self) -> list[Instruction]:
        """Return what holders are to be told that are to offer nothing more, as a step took the room for it."""
        abandoned, self._abandoned = self._abandoned, []
        return abandoned

    def take_left(self) -> list[str]:
        """Return who ended while they waited since this was asked last."""
        left, self._left = self._left, []
        return left

    def end(self, seq: Sequence) -> None:
        """Forget `seq`, and give its blocks back as soon as no step and no pull uses them."""
        del self.sequences[seq.seq_id]
        if seq.pull is not None:
            self._drop_tail(seq, seq.num_blocks_for(max(seq.num_computed, seq.planned_end)) if seq.is_in_step else 0)
        match seq.phase:
            case Phase.WAITING:
                self._stop_waiting(seq)
                self.end_intake(seq.seq_id, [])
                self._left.append(seq.seq_id)
            case Phase.PULLING:
                del self.pulling[seq.seq_id]
            case Phase.RUNNING:
                self._stop_running(seq)
            case Phase.KEPT:
                pass
            case Phase.ENDED:
                raise InvariantError(f"sequence {seq.seq_id!r} ended twice")
            case _ as unreachable:
                assert_never(unreachable)
        seq.phase = Phase.ENDED
        self._forget_in_flight(seq, seq.names[seq.first_in_flight :])
        if seq.is_in_step:
            self.dying.append(seq)
        else:
            self._bury(seq)

    def bury(self) -> None:
        """Give back the blocks of ended sequences that the step used which has just ended, and no other does."""
        for seq in self.dying:
            if not seq.is_in_step:
                self._bury(seq)
        self.dying = [seq for seq in self.dying if seq.is_in_step]

    def begin_event(self) -> None:
        """Give back what earlier events left, as far as one event does: many may end at once, with long tables each."""
        self._num_given_back = 0
        for _ in range(len(self.dead)):
            self._bury(self.dead.popleft())

    def _bury(self, seq: Sequence) -> None:
        if self._num_given_back < _MAX_GIVEN_BACK:
            self._num_given_back += len(seq.block_table)
            self._give_back(seq)
        else:
            self.dead.append(seq)

    def _begin_waiting(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=_seniority)
        self.note_ready(seq)

    def _stop_waiting(self, seq: Sequence) -> None:
        for queue in (self.waiting, self.ready):
            position = self._find(queue, seq)
            if position is not None:
                del queue[position]

    def _find(self, queue: list[Sequence], seq: Sequence) -> int | None:
        position = bisect_left(queue, seq.seniority, key=_seniority)
        return position if position < len(queue) and queue[position] is seq else None

    def _begin_running(self, seq: Sequence) -> None:
        seq.slot = self.slots.take()
        seq.phase = Phase.RUNNING
        self.running[seq.seq_id] = seq

    def _stop_running(self, seq: Sequence) -> None:
        """Give back the slot of `seq`: a step that still runs needs it no more, and the next one comes after."""
        if seq.slot is None:
            raise InvariantError(f"sequence {seq.seq_id!r} is {seq.phase.value}, and has no slot")
        self.slots.give_back(seq.slot)
        seq.slot = None
        del self.running[seq.seq_id]

    # --------------------------------------------------------------------------------------------------------- blocks

    def reserve(self, seq: Sequence, end: int) -> bool:
        """Make the table of `seq` cover `end` tokens; end intakes and preempt its juniors for that if need be.

        The most senior sequence can preempt all others, so one always goes on; who finds no room keeps its blocks and
        waits.
        """
        num_lacking = seq.num_blocks_for(end) - len(seq.block_table)
        if num_lacking <= 0:
            return True
        while self.pool.num_free < num_lacking:
            if self.dead:
                self._give_back(self.dead.popleft())
                continue
            if self.intakes:
                self.end_intake(self.intakes.ids()[-1], self._abandoned)
                continue
            victim = max((s for s in self.running.values() if s.block_table), key=_seniority, default=seq)
            if victim.seniority <= seq.seniority:
                return False
            self.preempt(victim)
        seq.block_table += self.pool.allocate(num_lacking)
        return True

    def would_take(self, seq: Sequence, end: int) -> bool:
        """Tell whether `reserve` would take blocks from others, whom a step that runs may be writing them for."""
        num_lacking = seq.num_blocks_for(end) - len(seq.block_table)
        while self.dead and self.pool.num_free < num_lacking:
            self._give_back(self.dead.popleft())
        if self.pool.num_free >= num_lacking:
            return False
        return bool(self.intakes) or any(s.block_table and s.seniority > seq.seniority for s in self.running.values())

    def extend_match(self, seq: Sequence) -> None:
        """Take blocks that came to be held since admission: others wrote them, or they follow a bad one of a pull.

        Not while a step runs with it: then its table reaches beyond what is computed.
        """
        begin = len(seq.block_table)
        if seq.num_computed != begin * seq.block_size or begin >= seq.max_match_blocks:
            return
        matched = self.pool.match(seq.names[i] for i in range(begin, seq.max_match_blocks))
        if not matched:
            return
        self.pool.pin(matched)
        self._forget_in_flight(seq, seq.names[begin : begin + len(matched)])
        seq.block_table += matched
        num_before = min(seq.num_computed, seq.num_prompt_tokens)
        seq.num_computed += len(matched) * seq.block_size
        if not seq.has_emitted:
            num_now = min(seq.num_computed, seq.num_prompt_tokens)
            seq.num_device_tokens += num_now - num_before
            seq.origins.note(num_before, num_now, "device")

    def commit_up_to(self, seq: Sequence, end: int) -> None:
        """Note that the KV of all tokens before `end` is written, and name the blocks that became full."""
        begin_block, end_block = seq.num_computed // seq.block_size, end // seq.block_size
        seq.num_computed = end
        if end_block > len(seq.names):
            seq.extend_names()
        self.commit(seq, range(begin_block, end_block))

    def commit(self, seq: Sequence, indexes: Items[int]) -> None:
        """Name the blocks at these places of the table, which are full, and right."""
        names = list(map(seq.names.__getitem__, indexes))
        self.pool.commit_all(list(map(seq.block_table.__getitem__, indexes)), names, seq.spec.tenant)
        self._forget_in_flight(seq, names)

    def may_pull(self, seq: Sequence) -> bool:
        """Tell whether a pull may begin for `seq`: there is one at a time, and one that it did not wait for may run."""
        return seq.seq_id not in self.orphans

    def end_intake(self, intake_id: str, out: list[Instruction]) -> None:
        """Wait no more for what an intake brings: its blocks are given back, those being written are orphans first.

        Unknown ids are ignored.
        """
        intake = self.intakes.pop(intake_id)
        if intake is None:
            return
        if not intake.is_offered_whole:
            out.append(StopAsking(intake_id, intake.source))
        self.pool.unpin(intake.idle_head_first())
        if intake.is_pulling:
            self.orphans[intake_id] = intake.open_targets()

    def free_orphans(self, seq_id: str, bad_indexes: frozenset[int], quarantine_until_s: float | None) -> None:
        """End the pull of a sequence that did not wait for it: name what is good for others, give back the rest."""
        for target in self.orphans.pop(seq_id, []):
            is_bad = target.index in bad_indexes
            if is_bad and quarantine_until_s is not None:
                self.pool.quarantine([target.block_id], quarantine_until_s)
                continue
            if target.name and not is_bad:
                self.pool.commit(target.block_id, target.name, target.tenant)
            self.pool.unpin([target.block_id])

    def lend(self, lease_id: str, block_ids: list[int]) -> None:
        """Pin blocks of the pool, head first, for whoever reads them; what was lent under that lease is given back."""
        self.end_lending(lease_id)
        if block_ids:
            self.pool.pin(block_ids)
            self.lent[lease_id] = block_ids

    def end_lending(self, lease_id: str) -> None:
        """Give back what was lent under this lease; unknown ids are ignored."""
        self.pool.unpin(self.lent.pop(lease_id, []))

    def _drop_tail(self, seq: Sequence, num_blocks: int) -> None:
        """Give back a pulling sequence's blocks from index `num_blocks` on; those being written are orphans first."""
        pull = _pull_of(seq)
        num_named, tenant = pull.end_tokens // seq.block_size, seq.spec.tenant
        targets = [
            PullTarget(i, seq.block_table[i], seq.names[i] if i < num_named else b"", tenant)
            for i in pull.blocks.indexes(Coming.OPEN)
        ]
        if targets:
            self.orphans[seq.seq_id] = targets
        orphaned = {target.index for target in targets}
        self.pool.unpin([seq.block_table[i] for i in range(num_blocks, len(seq.block_table)) if i not in orphaned])
        seq.block_table = seq.block_table[:num_blocks]
        seq.pull = None

    def _give_back(self, seq: Sequence) -> None:
        self.pool.unpin(seq.block_table)
        seq.block_table = []

    def _forget_in_flight(self, seq: Sequence, names: Items[bytes]) -> None:
        in_flight = self.in_flight
        for name in names if in_flight else ():
            other = in_flight.pop(name, seq)
            if other is not seq:
                in_flight[name] = other

    # ------------------------------------------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        """Raise InvariantError where the books do not agree, those of the pool included."""
        self.pool.check_invariants()
        for seq in self.sequences.values():
            self._check_sequence(seq)
        groups = (self.waiting, self.pulling.values(), self.running.values())
        _require(
            sorted(seq.order for group in groups for seq in group)
            == sorted(seq.order for seq in self.sequences.values() if seq.phase is not Phase.KEPT),
            "every sequence is in the one list of its phase",
        )
        slots = [seq.slot.index for seq in self.running.values() if seq.slot is not None]
        _require(len(slots) == len(self.running) and self.slots.is_whole(slots), "who runs has a slot of its own")
        _require(self.waiting == sorted(self.waiting, key=_seniority), "the queue is in order")
        _require(self.ready == [seq for seq in self.waiting if seq.is_ready], "who is ready is in the queue of those")
        pins = [0] * self.pool.num_blocks
        for seq in [*self.sequences.values(), *self.dying, *self.dead]:
            for block_id in seq.block_table:
                pins[block_id] += 1
        for targets in self.orphans.values():
            for target in targets:
                pins[target.block_id] += 1
        for block_ids in (*self.lent.values(), self.intakes.targets()):
            for block_id in block_ids:
                pins[block_id] += 1
        _require(
            pins == [self.pool.num_pins(block_id) for block_id in range(self.pool.num_blocks)],
            "a block is pinned once for each table that holds it, and each lease",
        )
        _require(
            all(seq.phase is Phase.WAITING for seq in self.sequences.values() if self.intakes.find(seq.seq_id)),
            "blocks are taken in ahead for who waits",
        )
        _require(self.orphans.keys().isdisjoint(self.intakes.ids()), "nobody takes in while an earlier pull still runs")
        _require(
            all(seq.phase in (Phase.RUNNING, Phase.PULLING) for seq in self.in_flight.values()),
            "only who runs or pulls is waited for",
        )

    def _check_sequence(self, seq: Sequence) -> None:
        table, pool = seq.block_table, self.pool
        match seq.phase:
            case Phase.WAITING:
                _require(not table and not seq.num_computed and not seq.is_in_step, "who waits holds nothing")
            case Phase.PULLING:
                _require(seq.pull is not None, "who waits for blocks has a pull")
            case Phase.RUNNING:
                _require(seq.num_computed < seq.num_tokens, "who runs has something to compute")
            case Phase.KEPT:
                _require(seq.num_computed >= seq.num_prompt_tokens, "what is kept is whole")
            case Phase.ENDED:
                raise InvariantError(f"sequence {seq.seq_id!r} ended and is still in the books")
            case _ as unreachable:
                assert_never(unreachable)
        if seq.slot is not None:
            _require(seq.phase is Phase.RUNNING, "only who runs has a slot")
            _require(
                seq.slot.num_told_tokens <= seq.num_expected_tokens and seq.slot.num_told_blocks <= len(table),
                "the runner was told of nothing that is not so",
            )
        if seq.pull is not None:
            _require(seq.pull.is_mixed or seq.phase is Phase.PULLING, "who pulls, and nobody else, has a pull")
            _require(len(table) >= seq.num_blocks_for(seq.pull.end_tokens), "a pull has all its targets")
            _require(self.may_pull(seq), "nobody pulls while an earlier pull of theirs still runs")
        _require(len(table) >= seq.num_blocks_for(seq.num_computed), "tables cover what is computed")
        num_full = seq.num_computed // seq.block_size
        _require(
            all(pool.name(table[i]) in (None, seq.names[i]) for i in range(num_full)),
            "blocks have the names of their sequences",
        )
        unfinished = [] if seq.pull else table[num_full:]
        _require(
            all(pool.name(block_id) is None and pool.num_pins(block_id) == 1 for block_id in unfinished),
            "what is still to be written is nobody else's",
        )


def _pull_of(seq: Sequence) -> RemotePull:
    if seq.pull is None:
        raise InvariantError(f"sequence {seq.seq_id!r} is {seq.phase.value}, and has no pull")
    return seq.pull


def _seniority(seq: Sequence) -> tuple[int, int]:
    return seq.seniority


def _require(is_true: bool, what: str) -> None:
    if not is_true:
        raise InvariantError(f"scheduler: not true that {what}")
