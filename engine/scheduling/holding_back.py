"""Sequences that wait while another one writes what they lack, so that it is computed only once."""

from __future__ import annotations

import math

from engine.scheduling.backlog import Backlog
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.sequence import Sequence
from kvcache.price import Computation, compute_s, harm_s


def hold_back(seq: Sequence, num_matched: int, ledger: SequenceLedger, backlog: Backlog, now_s: float) -> bool:
    """Tell whether another is about to write the next block that `seq` lacks, and note for what it waits, how long.

    It waits for the last of the blocks that that one is to write for it: looked at again and again meanwhile, many that
    wait for one long prompt would leave no time for others.

    Who runs is waited for until it ends. Who pulls is waited for by others that are to pull, and by those
    that would need longer without it, as long as was predicted: nobody waits beside an idle engine.
    """
    in_flight, names, num_blocks = ledger.in_flight, seq.names, seq.max_match_blocks
    seq.held_for, seq.expected_match_tokens = None, 0
    if num_matched >= num_blocks:
        return False
    writer = in_flight.get(names[num_matched])
    if writer is None or writer.spec.priority > seq.spec.priority:  # the urgent do not wait for the patient
        return False
    written = num_matched
    while written < num_blocks and in_flight.get(names[written]) is writer:
        written += 1
    end = written
    while end < num_blocks and (names[end] in in_flight or ledger.pool.holds(names[end])):
        end += 1
    until_s = math.inf
    if writer.pull is not None and not writer.pull.is_mixed and not seq.wants_remote:
        until_s = writer.pull.expected_s
        computation = Computation.of(num_matched * seq.block_size, end * seq.block_size)
        backlog.remember()
        alone_s = backlog.seconds() + harm_s(compute_s(backlog.price, computation), len(ledger.running))
        if not 0 < until_s - now_s <= alone_s:
            return False
    seq.held_for, seq.held_until_s = names[written - 1], until_s
    seq.expected_match_tokens = end * seq.block_size
    backlog.note(seq)
    return True
