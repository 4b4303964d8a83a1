"""Sequences that wait while another one writes what they lack, so that it is computed only once."""

from __future__ import annotations

import math

from engine.scheduling.backlog import Backlog
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.sequence import Sequence
from kvcache.price import Computation, compute_s, harm_s


def hold_back(seq: Sequence, num_matched: int, ledger: SequenceLedger, backlog: Backlog, now_s: float) -> bool:
    """Tell whether another is about to write the next block that `seq` lacks, and note for what it waits, how long.

    Who runs is waited for until it ends. Who pulls is waited for by others that are to pull, and by those
    that would need longer without it, as long as was predicted: nobody waits beside an idle engine.
    """
    in_flight = ledger.in_flight
    seq.held_for, seq.expected_match_tokens = None, 0
    if num_matched >= seq.max_match_blocks:
        return False
    writer = in_flight.get(seq.names[num_matched])
    if writer is None or writer.spec.priority > seq.spec.priority:  # the urgent do not wait for the patient
        return False
    end = num_matched
    while end < seq.max_match_blocks and (seq.names[end] in in_flight or ledger.pool.holds(seq.names[end])):
        end += 1
    until_s = math.inf
    if writer.pull is not None and not writer.pull.is_mixed and not seq.wants_remote:
        until_s = writer.pull.expected_s
        computation = Computation.of(num_matched * seq.block_size, end * seq.block_size)
        alone_s = backlog.seconds() + harm_s(compute_s(backlog.price, computation), len(ledger.running))
        if not 0 < until_s - now_s <= alone_s:
            return False
    seq.held_for, seq.held_until_s = seq.names[num_matched], until_s
    seq.expected_match_tokens = end * seq.block_size
    return True
