"""What is told of the blocks that sequences wrote: to who waits for a prompt, who asks by name, and lower tiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

import numpy as np

from engine.scheduling.coming import Coming
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import BlocksWanted, Instruction, LendBlocks, OfferBlocks, OffloadBlocks
from engine.scheduling.prompt_counts import note_coming
from engine.scheduling.sequence import Phase, Sequence
from kvcache.locations import LOCATION, Locations, name_column
from messages.handoff import BlockHint
from messages.request import CacheHint
from messages.stream import PlannedRun, PromptPlan, PromptSources


class Offers:
    """Offers blocks of the sequences and the pool of `ledger`."""

    def __init__(self, ledger: SequenceLedger) -> None:
        self._ledger = ledger
        self._pool = ledger.pool

    def offer(self, seq: Sequence, out: list[Instruction], *, is_last: bool) -> None:
        """Offer the prompt blocks of a kept sequence written since its last offer; at last the partial one, too."""
        num_written = min(seq.num_computed, seq.num_prompt_tokens)
        end = seq.num_blocks_for(num_written) if is_last else num_written // seq.block_size
        begin, num_full = seq.num_offered_blocks, min(end, num_written // seq.block_size)
        rows = self._rows(range(begin, end), seq.block_table[begin:end])
        rows["name"][: num_full - begin] = name_column(seq.names[begin:num_full])
        rows["num_tokens"][num_full - begin :] = num_written % seq.block_size
        seq.num_offered_blocks = end
        if len(rows) or is_last:
            out.append(OfferBlocks(seq.seq_id, rows.tobytes(), is_last, seq.num_cached_tokens))

    def publish(self, seq_id: str, out: list[Instruction]) -> None:
        """Offer what came of a sequence that is kept: others wait for it. Other ids are ignored."""
        seq = self._ledger.sequences.get(seq_id)
        if seq is not None and seq.spec.is_kept and seq.phase in (Phase.RUNNING, Phase.PULLING):
            self.offer(seq, out, is_last=False)

    def lend(self, wanted: BlocksWanted, out: list[Instruction]) -> None:
        """Pin what the pool has of the blocks that somebody wants, and say where they lie."""
        pool = self._pool
        found = [pool.find(name) for name in wanted.names]
        places = [place for place, block_id in enumerate(found) if block_id is not None]
        block_ids = [block_id for block_id in found if block_id is not None]
        rows = self._rows([wanted.first_index + place for place in places], block_ids)
        rows["name"] = name_column([wanted.names[place] for place in places])
        rows["tenant"] = [pool.tenant(block_id) for block_id in block_ids]
        self._ledger.lend(wanted.lease_id, block_ids)
        out.append(LendBlocks(wanted.lease_id, rows.tobytes()))

    def offload(self, seq: Sequence, out: list[Instruction]) -> None:
        """Tell lower tiers what a sequence has written, if it filled a block since they were last told."""
        num_blocks = seq.num_computed // seq.block_size
        if num_blocks > seq.num_offloaded_blocks:
            seq.num_offloaded_blocks = num_blocks
            hints = tuple(_block_hint(hint, seq.block_size) for hint in seq.spec.hints)
            out.append(OffloadBlocks(tuple(seq.names[:num_blocks]), seq.spec.tenant, hints))

    def _rows(self, indexes: Items[int], block_ids: Items[int]) -> Locations:
        """Return rows of full blocks, without names: of these positions and ids in the pool."""
        rows = np.zeros(len(block_ids), LOCATION)
        rows["index"], rows["block_id"], rows["num_tokens"] = indexes, block_ids, self._pool.block_size
        rows["generation"] = self._pool.generations(rows["block_id"])
        return rows


def _block_hint(hint: CacheHint, block_size: int) -> BlockHint:
    """Say of which blocks a hint about tokens is: of those that have some of them, or, to their loss, nothing else."""
    begin, end = hint.begin, hint.end
    if hint.priority is not None and hint.priority < 0:
        return BlockHint(-(-begin // block_size), None if end is None else end // block_size, hint.priority, hint.ttl_s)
    return BlockHint(begin // block_size, None if end is None else -(-end // block_size), hint.priority, hint.ttl_s)


def prompt_sources(seq: Sequence) -> PromptSources:
    """Say where the KV of a prompt came from; where its first token came before its last block, as it is expected."""
    device, loaded = seq.num_device_tokens, Counter(seq.num_loaded_tokens)
    if seq.pull is not None:
        for index in seq.pull.found:
            brought = seq.brought.get(index)
            if brought is None:
                device += seq.block_size
            else:
                loaded[brought.tier] += seq.block_size
        for copy in seq.pull.asked.values():
            loaded[copy.tier] += seq.block_size
    return PromptSources(
        device=device,
        peer=seq.num_peer_tokens + loaded["device"],
        host=loaded["host"],
        disk=loaded["disk"],
        remote=loaded["remote"],
        computed=seq.num_prompt_tokens - device - seq.num_peer_tokens - loaded.total(),
    )


def prompt_plan(seq: Sequence, block_bytes: int, now_s: float) -> PromptPlan:
    """Say how the KV of a prompt was to be had, what was moved for it so far, and what it took."""
    plan, size = seq.plan, seq.block_size
    if seq.pull is not None:
        note_coming(seq, seq.pull, seq.num_prompt_tokens)
    began_s = now_s if seq.began_s is None else seq.began_s
    num_moved = seq.num_loaded_tokens.total() // size + (
        seq.pull.blocks.num(Coming.ARRIVED) - len(seq.pull.found) if seq.pull else 0
    )
    num_moved += seq.num_pulled_tokens // size
    is_idle = seq.pull is None and seq.pull_ended_s is None
    return PromptPlan(
        runs=tuple(
            PlannedRun(load.begin * size, load.end * size, load.copy.tier, load.copy.address) for load in plan.loads
        ),
        is_mixed=plan.is_mixed,
        load_s=plan.load_s,
        compute_s=plan.compute_s,
        handed_over_by=seq.spec.remote_source if seq.is_handed_over else "",
        num_moved_bytes=num_moved * block_bytes,
        got=seq.origins.told(seq.num_prompt_tokens, size),
        queued_s=began_s - seq.arrived_s,
        prefill_s=now_s - began_s,
        pulled_s=0.0 if is_idle else (now_s if seq.pull_ended_s is None else seq.pull_ended_s) - began_s,
    )
