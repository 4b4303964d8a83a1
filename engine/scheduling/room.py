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

    def has(self, seq: Sequence, matched: list[int], *, is_short: bool) -> bool:
        """Tell whether there is a slot, and blocks for all known tokens of `seq` and of those that run already.

        A long prompt leaves a share of both to short ones, unless it is alone. `matched`: its blocks that the pool has.
        """
        pool, ledger = self._ledger.pool, self._ledger
        share = 0.0 if is_short else SHORT_SHARE
        num_slots = self._max_num_seqs - int(share * self._max_num_seqs)
        admitted = self._admitted()
        if len(admitted) >= num_slots and sum(other.is_long for other in admitted) >= num_slots:
            return False
        available = pool.num_free - sum(pool.num_pins(block_id) == 0 for block_id in matched)
        wanted = seq.num_blocks_for(seq.num_tokens) - len(matched)
        if admitted:
            wanted += sum(other.num_lacking_blocks for other in ledger.running.values())
            wanted += max(1, int(self._watermark * pool.num_blocks)) + int(share * pool.num_blocks)
        return wanted <= available

    def num_displaced(self, seq: Sequence, matched: list[int]) -> int:
        """Count the blocks that admitting `seq` would evict though only this pool keeps them, and may yet want them."""
        pool = self._ledger.pool
        wanted = seq.num_blocks_for(seq.num_tokens) - len(matched)
        wanted += sum(map(pool.is_dispensable, matched))
        return wanted - pool.num_idle(wanted)

    def is_too_early(self, seq: Sequence, matched: list[int], now_s: float) -> bool:
        """Tell whether `seq` had better wait for room that costs nothing.

        While others go on here blocks come free, or are used again by those who wait behind it: that is worth waiting
        for as long as computing them again would take, and harm those beside.
        """
        num_displaced = self.num_displaced(seq, matched)
        if num_displaced <= 0 or not self._admitted():
            seq.lacks_room_s = None
            return False
        if seq.lacks_room_s is None:
            seq.lacks_room_s = now_s
        num_tokens = min(num_displaced * seq.block_size, seq.num_tokens)  # as if of a prompt as long as this one
        computing_s = self._backlog.compute_s(seq.num_tokens - num_tokens, seq.num_tokens)
        computing_s *= self._ledger.pool.reused_share
        return now_s < seq.lacks_room_s + _PATIENCE * (computing_s + harm_s(computing_s, len(self._ledger.running)))

    def _admitted(self) -> tuple[Sequence, ...]:
        return (*self._ledger.running.values(), *self._ledger.pulling.values())
