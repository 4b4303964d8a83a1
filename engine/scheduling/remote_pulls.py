"""KV that others have: what is asked for, offered, pulled, refused; and what to do about what did not arrive.

Blocks come from the worker that computes the rest of a prompt (KvOffered), and from holders that were asked for them by
name (BlocksOffered): another worker's pool, or a node cache. For what a holder does not give the next one is asked,
then it is computed here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from engine.scheduling.coming import Coming
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import AskBlocks, BlocksOffered, Instruction, KvOffered, PullBlocks, PullEnded, StopAsking
from engine.scheduling.prompt_counts import note_coming
from engine.scheduling.sequence import Phase, RemotePull, Sequence
from kvcache.load_plan import Load
from kvcache.locations import Locations, chosen, is_of_prefix, is_partial, unpack_locations
from messages.errors import InvariantError


class RemotePulls:
    """Moves sequences of `ledger` through their pulls.

    `replan(seq)` says what of a pulling sequence to load from whom, now that what it had asked for will not come.
    """

    def __init__(self, ledger: SequenceLedger, replan: Callable[[Sequence], Items[Load]]) -> None:
        self._ledger = ledger
        self._replan = replan
        self.num_rejected_blocks = 0
        self.num_fallbacks = 0

    def ask(self, seq: Sequence, loads: Items[Load], out: list[Instruction]) -> None:
        """Ask holders for what `loads` says: each once, for all between its first block and its last.

        What was asked for while it waited is not asked for again, nor anything of a holder that may offer more of that.
        """
        pull = _pull_of(seq)
        busy = set(pull.holders)
        spans: dict[str, tuple[int, int]] = {}
        for load in loads:
            lacking = [index for index in range(load.begin, load.end) if index not in pull.asked]
            if not lacking or load.copy.address in busy:
                continue
            pull.asked |= dict.fromkeys(lacking, load.copy)
            begin, end = spans.get(load.copy.address, (lacking[0], lacking[-1] + 1))
            spans[load.copy.address] = (min(begin, lacking[0]), max(end, lacking[-1] + 1))
        for address, (begin, end) in spans.items():
            pull.holders.add(address)
            out.append(AskBlocks(seq.seq_id, address, begin, tuple(seq.names[begin:end]), pull.is_mixed))

    def take_offer(self, seq: Sequence, event: KvOffered, out: list[Instruction]) -> None:
        """Pull what is lacking of a pulling sequence; a block that came badly before is tried again."""
        pull = _pull_of(seq)
        if seq.phase is not Phase.PULLING:
            raise InvariantError(f"sequence {seq.seq_id!r} is {seq.phase.value}, not pulling")
        self._note_offered(seq, pull, event.source, event.blocks)
        pull.has_last_offer = event.is_last
        self._go_on(seq, pull, out)

    def take_blocks(self, seq: Sequence, event: BlocksOffered, out: list[Instruction]) -> None:
        """Pull what a holder offers; ask another for what it does not. Nothing happens where no pull waits for it."""
        pull = seq.pull
        if pull is None or event.source not in pull.holders:
            return
        self._note_offered(seq, pull, event.source, event.blocks)
        if event.is_last:
            pull.holders.discard(event.source)
            if event.is_lost:
                lost = [index for index, copy in pull.asked.items() if copy.address == event.source]
                not_here = (index for index in lost if pull.blocks.state(index) is not Coming.ARRIVED)
                seq.origins.miss(not_here, "holder_lost", event.source)
        self._go_on(seq, pull, out)

    def finish_pull(self, event: PullEnded, out: list[Instruction]) -> None:
        """Name the blocks that arrived well, and go on with the sequence, unless it went on without its pull.

        Raises:
            InvariantError: no pull of that sequence was running.
        """
        if event.seq_id in self._ledger.orphans:
            self._ledger.free_orphans(event.seq_id, event.bad_indexes, event.quarantine_until_s)
            return
        seq = self._ledger.sequences.get(event.seq_id)
        if seq is None or seq.pull is None or not seq.pull.is_pulling:
            raise InvariantError(f"a pull of sequence {event.seq_id!r} ended that was not running")
        pull = seq.pull
        arrived = pull.blocks.arrive(event.bad_indexes)
        self._ledger.commit(seq, arrived[: bisect_left(arrived, pull.end_tokens // seq.block_size)])
        self.num_rejected_blocks += len(event.bad_indexes)
        _note_missed(seq, pull, event)
        if event.quarantine_until_s is not None and event.bad_indexes:
            self.fall_back(seq, out)  # the bad targets become orphans, and from there go to quarantine
            self._ledger.free_orphans(event.seq_id, event.bad_indexes, event.quarantine_until_s)
            return
        pull.blocks.close()
        self._go_on(seq, pull, out)

    def fall_back(self, seq: Sequence, out: list[Instruction]) -> None:
        """Keep what arrived before the first gap; the rest is computed here, tokens emitted already are replayed."""
        pull = _pull_of(seq)
        self.num_fallbacks += 1
        out += [StopAsking(seq.seq_id, address) for address in sorted(pull.holders)]
        num_blocks = pull.first_missing(seq.num_blocks_for(pull.end_tokens))
        if seq.num_output_tokens == 0:
            num_blocks = min(num_blocks, seq.max_match_blocks)  # the last token's logits are wanted
        if not seq.has_emitted:
            take_peer_tokens(seq, num_blocks * seq.block_size)
        self._ledger.end_pull(seq, num_blocks)

    def go_on(self, seq: Sequence, out: list[Instruction]) -> None:
        """Let a mixed sequence go on, also as it begins: over what arrived; it waits where more is on its way."""
        self._go_on(seq, _pull_of(seq), out)

    def _note_offered(self, seq: Sequence, pull: RemotePull, source: str, blocks: bytes) -> None:
        rows = chosen(unpack_locations(blocks), pull.blocks.lacks)
        expected = chosen(rows, lambda rows: _is_expected(seq, pull, rows))
        self.num_rejected_blocks += len(rows) - len(expected)
        pull.blocks.offer(source, expected)

    def _go_on(self, seq: Sequence, pull: RemotePull, out: list[Instruction]) -> None:
        """Pull what was offered meanwhile; else decode when everything is there, or compute what is not."""
        if pull.is_mixed:
            pull.blocks.withdraw_before(seq.num_blocks_for(max(seq.num_computed, seq.planned_end)))
        if not pull.is_pulling and not pull.blocks.has(Coming.OFFERED) and pull.asked:
            self._ask_others(seq, pull, out)
        if not pull.is_pulling and pull.blocks.has(Coming.OFFERED):
            self._pull_next(seq, pull, out)
        if pull.is_mixed:
            self._meet(seq, pull, out)
        elif pull.is_over:
            num_blocks = seq.num_blocks_for(pull.end_tokens)
            if pull.first_missing(num_blocks) < num_blocks:
                self.fall_back(seq, out)
            else:
                self._ledger.end_pull(seq, num_blocks)

    def _ask_others(self, seq: Sequence, pull: RemotePull, out: list[Instruction]) -> None:
        """Ask other holders for what those that have no more to offer did not bring."""
        first = seq.num_computed // seq.block_size
        lacking = [
            index
            for index, copy in pull.asked.items()
            if index >= first and copy.address not in pull.holders and pull.blocks.state(index) is not Coming.ARRIVED
        ]
        if lacking:
            for index in lacking:
                seq.origins.miss((index,), "evicted", pull.asked[index].address)
            pull.failed |= {pull.asked.pop(index) for index in lacking}
            self.ask(seq, self._replan(seq), out)

    def _pull_next(self, seq: Sequence, pull: RemotePull, out: list[Instruction]) -> None:
        """Pull what one source offers: all of it, or, beside the computing of the head, a portion from the tail."""
        source, rows = pull.blocks.begin_pull(pull.portion_blocks, is_tail_first=pull.is_mixed)
        targets = tuple(map(seq.block_table.__getitem__, rows["index"].tolist()))
        out.append(PullBlocks(seq.seq_id, source, rows.tobytes(), targets))

    def _meet(self, seq: Sequence, pull: RemotePull, out: list[Instruction]) -> None:
        """Let a mixed sequence compute what is not on its way, and wait where it has come to what is."""
        if seq.is_in_step:
            return
        self._ledger.pass_arrived(seq)
        index = seq.num_blocks_for(seq.num_computed)
        is_waiting = seq.phase is Phase.PULLING
        if (pull.blocks.state(index) is Coming.OPEN) is not is_waiting:
            (self._ledger.resume if is_waiting else self._ledger.pause)(seq)
        if (
            not pull.is_pulling
            and pull.blocks.last_arrived() < index
            and (pull.is_over or index >= seq.num_blocks_for(pull.end_tokens))
        ):
            out += [StopAsking(seq.seq_id, address) for address in sorted(pull.holders)]
            self._ledger.forget_pull(seq)


def take_peer_tokens(seq: Sequence, num_pulled_tokens: int) -> None:
    """Count what of a pulling sequence's first `num_pulled_tokens` only the worker asked for the rest had."""
    pull = _pull_of(seq)
    seq.num_peer_tokens = count_peer_tokens(seq, num_pulled_tokens)
    if not seq.is_handed_over:
        return
    begin, end = pull.first_index * seq.block_size, min(num_pulled_tokens, seq.num_prompt_tokens)
    note_coming(seq, pull, end)
    seq.origins.fill(begin, min(pull.num_peer_cached_tokens, end), "peer", seq.spec.remote_source)
    seq.origins.fill(begin, end, "computed", seq.spec.remote_source)


def count_peer_tokens(seq: Sequence, num_pulled_tokens: int) -> int:
    """Count, of a pulling sequence's first `num_pulled_tokens`, those that only the worker asked for the rest had."""
    pull = _pull_of(seq)
    cached = min(pull.num_peer_cached_tokens, num_pulled_tokens, seq.num_prompt_tokens)
    others = sum(
        min(seq.block_size, cached - index * seq.block_size)
        for index in {*pull.found, *pull.asked}
        if index * seq.block_size < cached
    )
    return max(0, cached - pull.first_index * seq.block_size - others)


def _note_missed(seq: Sequence, pull: RemotePull, event: PullEnded) -> None:
    """Note why blocks did not come whole from whom they were asked of."""
    for index in sorted(event.bad_indexes):
        copy = pull.asked.get(index)
        is_damaged = index in event.damaged_indexes
        address = seq.spec.remote_source if copy is None else copy.address
        seq.origins.miss((index,), "damaged" if is_damaged else "holder_lost", address)


def _is_expected(seq: Sequence, pull: RemotePull, rows: Locations) -> npt.NDArray[np.bool_]:
    """Tell which offered blocks are those that this sequence has at their indexes."""
    if not len(rows):
        return np.zeros(0, bool)
    begin, end = int(rows["index"].min()), int(rows["index"].max()) + 1
    num_full, rest = divmod(pull.end_tokens, seq.block_size)
    is_expected = is_of_prefix(rows, begin, seq.names[begin : min(end, num_full)], seq.block_size)
    if rest and end > num_full:
        is_expected |= is_partial(rows, num_full, rest)
    return is_expected


def _pull_of(seq: Sequence) -> RemotePull:
    if seq.pull is None:
        raise InvariantError(f"sequence {seq.seq_id!r} is {seq.phase.value}, and does not pull")
    return seq.pull
