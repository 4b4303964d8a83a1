"""KV from another worker: what is offered, pulled, refused; and what to do about what did not arrive."""

from __future__ import annotations

from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import Instruction, KvOffered, PullBlocks, PullEnded
from engine.scheduling.sequence import OfferedBlock, Phase, RemotePull, Sequence
from messages.errors import InvariantError
from messages.handoff import BlockLocation


class RemotePulls:
    """Moves sequences of `ledger` through the pulling phase and out of it."""

    def __init__(self, ledger: SequenceLedger) -> None:
        self._ledger = ledger
        self.num_rejected_blocks = 0
        self.num_fallbacks = 0

    def take_offer(self, seq: Sequence, event: KvOffered, out: list[Instruction]) -> None:
        """Pull what is lacking of a pulling sequence; a block that came badly before is tried again."""
        pull = _pull_of(seq)
        for location in event.blocks:
            index = location.index
            if not pull.first_index <= index < len(seq.block_table) or index in pull.arrived or index in pull.open:
                continue
            if _is_expected(seq, location):
                pull.offered[index] = OfferedBlock(event.source, location)
            else:
                self.num_rejected_blocks += 1
        pull.has_last_offer = event.is_last
        self._go_on(seq, pull, out)

    def finish_pull(self, event: PullEnded, out: list[Instruction]) -> None:
        """Name the blocks that arrived well, and go on with the sequence, unless it went on without its pull.

        Raises:
            InvariantError: no pull of that sequence was running.
        """
        if event.seq_id in self._ledger.orphans:
            self._ledger.free_orphans(event.seq_id, event.bad_indexes, event.quarantine_until_s)
            return
        seq = self._ledger.pulling.get(event.seq_id)
        if seq is None or seq.pull is None or not seq.pull.open:
            raise InvariantError(f"a pull of sequence {event.seq_id!r} ended that was not running")
        pull = seq.pull
        for index in pull.open:
            if index in event.bad_indexes:
                self.num_rejected_blocks += 1
                continue
            pull.arrived.add(index)
            if (index + 1) * seq.block_size <= seq.num_prompt_tokens:
                self._ledger.commit(seq, index)
        if event.quarantine_until_s is not None and len(pull.arrived.intersection(pull.open)) < len(pull.open):
            self.fall_back(seq)  # the bad targets become orphans, and from there go to quarantine
            self._ledger.free_orphans(event.seq_id, event.bad_indexes, event.quarantine_until_s)
            return
        pull.open = {}
        self._go_on(seq, pull, out)

    def fall_back(self, seq: Sequence) -> None:
        """Keep what arrived before the first gap; the rest is computed here, tokens emitted already are replayed."""
        pull = _pull_of(seq)
        self.num_fallbacks += 1
        num_blocks = pull.first_missing(len(seq.block_table))
        if seq.num_output_tokens == 0:
            num_blocks = min(num_blocks, seq.max_match_blocks)  # the last token's logits are wanted
        if not seq.has_emitted:
            seq.num_peer_tokens = count_peer_tokens(seq, num_blocks * seq.block_size)
        self._ledger.end_pull(seq, num_blocks)

    def _go_on(self, seq: Sequence, pull: RemotePull, out: list[Instruction]) -> None:
        """Pull what was offered meanwhile; else decode when everything is there, or compute what is not."""
        if pull.offered and not pull.open:
            source = next(iter(pull.offered.values())).source  # the others' turn comes when this pull has ended
            pull.open = {index: block for index, block in pull.offered.items() if block.source == source}
            pull.offered = {index: block for index, block in pull.offered.items() if block.source != source}
            pairs = [(block.location, seq.block_table[index]) for index, block in pull.open.items()]
            out.append(PullBlocks(seq.seq_id, source, pairs))
        if not pull.is_over:
            return
        if pull.first_missing(len(seq.block_table)) < len(seq.block_table):
            self.fall_back(seq)
        else:
            self._ledger.end_pull(seq, len(seq.block_table))


def count_peer_tokens(seq: Sequence, num_pulled_tokens: int) -> int:
    """Count, of a pulling sequence's first `num_pulled_tokens`, those not held here that the peer had cached."""
    cached = min(_pull_of(seq).num_peer_cached_tokens, num_pulled_tokens, seq.num_prompt_tokens)
    return max(0, cached - seq.num_device_tokens)


def _is_expected(seq: Sequence, location: BlockLocation) -> bool:
    """Tell whether an offered block is the one that this sequence has at that index."""
    num_tokens = min(seq.block_size, seq.num_prompt_tokens - location.index * seq.block_size)
    name = seq.names[location.index] if num_tokens == seq.block_size else b""
    return location.num_tokens == num_tokens and location.name == name


def _pull_of(seq: Sequence) -> RemotePull:
    if seq.pull is None or seq.phase is not Phase.PULLING:
        raise InvariantError(f"sequence {seq.seq_id!r} is {seq.phase.value}, not pulling")
    return seq.pull
