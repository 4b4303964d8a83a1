"""Who finds room at a worker: slots and blocks, of which long prompts leave a share to short ones."""

from __future__ import annotations

from engine.scheduling.backlog import Backlog
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.sequence import Sequence
from kvcache.price import SHORT_SHARE, SHORT_TOKENS, harm_s

#: Room that costs nothing is waited for up to so many times as long as computing again takes what would be lost.
_PATIENCE = 8.0


class Room:
    """What there is room for beside the sequences of `ledger`.

    `watermark`: share of the pool left free, at least a block, for who runs to grow into. `backlog` tells what
    computing costs.
    """

    def __init__(self, ledger: SequenceLedger, backlog: Backlog, max_num_seqs: int, watermark: float) -> None:
        self._ledger = ledger
        self._backlog = backlog
        self._max_num_seqs = max_num_seqs
        self._watermark = watermark

    @property
    def num_short(self) -> int:
        """Sequences that wait or were admitted as short prompts."""
        admitted = sum(not seq.is_long for seq in self._admitted())
        return admitted + sum(map(self.is_short, self._ledger.waiting))

    def is_short(self, seq: Sequence) -> bool:
        """Tell whether little of a waiting sequence is to be computed, by what the pool holds now."""
        last_index = (seq.num_tokens - SHORT_TOKENS - 1) // seq.block_size
        return last_index < 0 or (last_index < seq.max_match_blocks and self._ledger.pool.holds(seq.names[last_index]))

    def find(self, seq: Sequence, matched: list[int], *, is_short: bool) -> list[str] | None:
        """Find a slot, and blocks for all known tokens of `seq` and of those that run already.

        A long prompt leaves a share of both to short ones, unless it is alone. `matched`: its blocks that the pool has.

        Returns:
            The intakes to end so that there are, none of them a senior's; None where there is no room.
        """
        pool = self._ledger.pool
        share = 0.0 if is_short else SHORT_SHARE
        num_slots = self._max_num_seqs - int(share * self._max_num_seqs)
        admitted = self._admitted()
        if len(admitted) >= num_slots and sum(other.is_long for other in admitted) >= num_slots:
            return None
        available = pool.num_free - sum(pool.num_pins(block_id) == 0 for block_id in matched)
        wanted = self._num_wanted(seq, matched)
        if admitted:
            wanted += self._num_reserved(share)
        ended: list[str] = []
        intake_ids = self._ledger.intakes.ids() if wanted > available else ()
        besides = frozenset(matched) if intake_ids else frozenset()
        for intake_id in reversed(intake_ids):
            other = self._ledger.sequences.get(intake_id)
            if other is None or other.seniority > seq.seniority:
                available += self._ledger.intakes.num_idle(intake_id, besides)
                ended.append(intake_id)
            if wanted <= available:
                break
        return ended if wanted <= available else None

    def num_ahead(self, seq: Sequence, num_lacking: int, num_before: int, load_s: float) -> int:
        """Count how many of `num_lacking` blocks that `seq` waits for may be filled before it is admitted.

        Those who run, and those who wait before it for `num_before` blocks, find all the same what they want. What is
        evicted for it, though only this pool keeps it, may be worth what loading takes, `load_s`, at most.
        """
        pool = self._ledger.pool
        num_reserved = self._num_reserved(SHORT_SHARE)
        num_rest = seq.num_blocks_for(seq.num_tokens) - num_lacking
        num_blocks = min(num_lacking, pool.num_free - num_reserved - num_before - num_rest)
        if num_blocks <= 0:
            return 0
        num_idle = max(0, pool.num_idle(num_blocks + num_reserved) - num_reserved)
        num_displaced = num_blocks - num_idle
        if num_displaced > 0 and self._computing_again_s(seq, num_displaced) > load_s * num_blocks / num_lacking:
            return num_idle
        return num_blocks

    def num_displaced(self, seq: Sequence, matched: list[int]) -> int:
        """Count the blocks that admitting `seq` would evict though only this pool keeps them, and may yet want them."""
        pool = self._ledger.pool
        wanted = self._num_wanted(seq, matched) + sum(map(pool.is_dispensable, matched))
        return wanted - pool.num_idle(wanted)

    def is_too_early(self, seq: Sequence, matched: list[int], ended: list[str], now_s: float) -> bool:
        """Tell whether `seq` had better wait for room that costs nothing.

        While others go on here blocks come free, or are used again by those who wait behind it: that is worth waiting
        for as long as computing them again would take, and harm those beside. `ended`: the intakes that would give way.
        """
        num_displaced = self.num_displaced(seq, matched) - sum(map(self._ledger.intakes.num_unfilled, ended))
        if num_displaced <= 0 or not self._admitted():
            seq.lacks_room_s = None
            return False
        if seq.lacks_room_s is None:
            seq.lacks_room_s = now_s
        return now_s < seq.lacks_room_s + _PATIENCE * self._computing_again_s(seq, num_displaced)

    def _computing_again_s(self, seq: Sequence, num_displaced: int) -> float:
        """Return what is lost where so many kept blocks are evicted for `seq`, in seconds."""
        num_tokens = min(num_displaced * seq.block_size, seq.num_tokens)  # as if of a prompt as long as this one
        computing_s = self._backlog.compute_s(seq.num_tokens - num_tokens, seq.num_tokens)
        computing_s *= self._ledger.pool.reused_share
        return computing_s + harm_s(computing_s, len(self._ledger.running))

    def _num_wanted(self, seq: Sequence, matched: list[int]) -> int:
        """Count the blocks that admitting `seq` takes, beside those that are there, or on their way."""
        num_coming = self._ledger.intakes.num_coming(seq.seq_id)
        return max(0, seq.num_blocks_for(seq.num_tokens) - len(matched) - num_coming)

    def _num_reserved(self, share: float) -> int:
        """Count the blocks that are left to those who run, and, a `share` of the pool, to short prompts."""
        num_blocks = self._ledger.pool.num_blocks
        num_lacking = sum(other.num_lacking_blocks for other in self._ledger.running.values())
        return num_lacking + max(1, int(self._watermark * num_blocks)) + int(share * num_blocks)

    def _admitted(self) -> tuple[Sequence, ...]:
        return (*self._ledger.running.values(), *self._ledger.pulling.values())
