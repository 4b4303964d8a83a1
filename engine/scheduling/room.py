"""Who finds room at a worker: slots and blocks, of which long prompts leave a share to short ones."""

from __future__ import annotations

from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.sequence import Sequence
from kvcache.price import SHORT_SHARE, SHORT_TOKENS

#: Prompts that are pulled at a time where more would cost what the pool keeps: one is computed while one is pulled.
_MAX_PULLING = 2


class Room:
    """What there is room for beside the sequences of `ledger`.

    `watermark`: share of the pool left free, at least a block, for who runs to grow into.
    """

    def __init__(self, ledger: SequenceLedger, max_num_seqs: int, watermark: float) -> None:
        self._ledger = ledger
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

    def is_too_early(self, seq: Sequence, num_matched: int) -> bool:
        """Tell whether admitting `seq` would evict what only this pool keeps, before anything can be done for `seq`.

        Those that are computed before it, or pulled, are there: until it is its turn it only would sit on its blocks.
        """
        if seq.num_blocks_for(seq.num_tokens) - num_matched <= self._ledger.pool.num_dispensable:
            return False
        if seq.wants_remote or len(self._ledger.pulling) >= _MAX_PULLING:
            return len(self._ledger.pulling) >= _MAX_PULLING
        num_lacking = seq.num_tokens - num_matched * seq.block_size
        return any(
            not other.is_decoding and other.num_tokens - other.num_computed <= num_lacking
            for other in self._ledger.running.values()
        )

    def _admitted(self) -> tuple[Sequence, ...]:
        return (*self._ledger.running.values(), *self._ledger.pulling.values())
