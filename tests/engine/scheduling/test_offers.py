"""What lower tiers are told of the blocks that a sequence wrote."""

from __future__ import annotations

import pytest

from engine.scheduling.plan import KvOffered, OffloadBlocks, PullEnded
from kvcache.locations import pack_locations
from messages.handoff import BlockHint
from messages.request import CacheHint
from tests.engine.scheduling.scheduler_bench import PROMPT, Bench, emitted


def offloaded(bench: Bench, **fields) -> list[OffloadBlocks]:
    """All that is told of a sequence of 18 tokens, blocks of 4, and 3 that follow."""
    told = [item for item in bench.add("a", 18, max_tokens=3, **fields) if isinstance(item, OffloadBlocks)]
    while bench.start():
        told += [item for item in bench.finish() if isinstance(item, OffloadBlocks)]
    return told


def test_whose_they_are_and_what_is_wanted_of_them_is_told_with_the_prompt_and_with_the_answer():
    hints = (CacheHint(0, None, None, 60.0),)
    told = offloaded(Bench(has_lower_tiers=True), tenant=7, hints=hints)
    assert [len(chain.names) for chain in told] == [4, 5]
    assert [(chain.tenant, chain.hints) for chain in told] == [(7, (BlockHint(0, None, None, 60.0),))] * 2


@pytest.mark.parametrize(
    ("hint", "wanted"),
    [
        (CacheHint(0, 8, None, 9.0), BlockHint(0, 2, None, 9.0)),
        (CacheHint(3, 9, None, 9.0), BlockHint(0, 3, None, 9.0)),
        (CacheHint(4, 5, 2, 0.0), BlockHint(1, 2, 2, 0.0)),
        (CacheHint(3, 9, -1, 0.0), BlockHint(1, 2, -1, 0.0)),
        (CacheHint(4, None, -2, 0.0), BlockHint(1, None, -2, 0.0)),
    ],
)
def test_a_block_with_some_of_the_tokens_is_kept_and_one_with_all_of_them_demoted(hint, wanted):
    [told, *_] = offloaded(Bench(has_lower_tiers=True), hints=(hint,))
    assert told.hints == (wanted,)


def test_without_lower_tiers_nobody_is_told():
    assert offloaded(Bench(), hints=(CacheHint(0, None, 2, 0.0),)) == []


def test_the_first_token_tells_how_long_its_sequence_waited_and_then_pulled():
    bench = Bench(max_num_seqs=1)
    bench.add("before", 8, max_tokens=1)
    bench.now_s = 1.0
    bench.add("a", PROMPT, remote_s=0.0, remote_source="owner")
    bench.now_s = 3.0
    bench.run()
    bench.now_s = 5.0
    bench.post(KvOffered("a", "owner", pack_locations(bench.locations(PROMPT)), False, None, None, 0))
    bench.now_s = 6.0
    bench.post(PullEnded("a", frozenset()))
    bench.now_s = 7.0
    [first] = emitted(bench.post(KvOffered("a", "owner", b"", True, 7, None, 0)))
    assert (first.plan.queued_s, first.plan.pulled_s) == (2.0, 4.0)


def test_what_is_computed_at_once_neither_waited_nor_pulled():
    bench = Bench()
    bench.now_s = 5.0
    bench.add("a", PROMPT, max_tokens=1)
    bench.now_s = 8.0
    bench.step()
    [first] = emitted(bench.out)
    assert (first.plan.queued_s, first.plan.pulled_s) == (0.0, 0.0)
