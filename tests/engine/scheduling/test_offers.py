"""What lower tiers are told of the blocks that a sequence wrote."""

from __future__ import annotations

import pytest

from engine.scheduling.plan import OffloadBlocks
from messages.handoff import BlockHint
from messages.request import CacheHint
from tests.engine.scheduling.scheduler_bench import Bench


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
