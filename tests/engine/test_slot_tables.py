from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.scheduling.plan import SequenceStep, SlotBegins, StepPlan
from engine.slot_tables import SlotTables, TableRoom
from kvcache.names import pack_tokens
from messages.errors import InvariantError
from messages.request import SamplingParams

BEGINS = SlotBegins(num_prompt_tokens=2, params=SamplingParams(max_tokens=9))


def part(
    seq_id: str, slot: int, *, tokens=(), blocks=(), begins: SlotBegins | None = None, start: int = 0, awaits=False
) -> SequenceStep:
    return SequenceStep(
        seq_id=seq_id,
        slot=slot,
        begins=begins,
        kind="decode",
        start=start,
        num_tokens=1,
        new_token_ids=pack_tokens(tokens),
        new_block_ids=tuple(blocks),
        is_sampled=False,
        awaits_token=awaits,
    )


@pytest.fixture
def tables() -> SlotTables:
    return SlotTables()


def test_parts_append_to_what_their_slot_was_told(tables):
    tables.take_in(
        StepPlan((part("a", 1, tokens=[5, 6], blocks=[9], begins=BEGINS), part("b", 0, blocks=[3], begins=BEGINS)))
    )
    tables.take_in(StepPlan((part("a", 1, tokens=[7], blocks=[4, 2]),)))
    assert tables[1].token_ids.tolist() == [5, 6, 7]
    assert tables[1].begins == BEGINS
    assert tables.block_tables[1, :3].tolist() == [9, 4, 2]
    assert tables.block_tables[0, :1].tolist() == [3]


def test_room_for_slots_and_blocks_is_made_in_place_of_none_and_loses_nothing(tables):
    tables.take_in(StepPlan((part("a", 0, blocks=[1, 2, 3], begins=BEGINS),)))
    assert tables.block_tables.shape == (1, 4)
    before = tables.block_tables
    tables.take_in(StepPlan((part("a", 0, blocks=[4]),)))
    assert tables.block_tables is before, "what has room is written in place"
    tables.take_in(StepPlan((part("a", 0, blocks=[5]), part("b", 4, blocks=[6], begins=BEGINS))))
    assert tables.block_tables.shape == (8, 8)
    assert tables.block_tables[0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert tables.block_tables[4].tolist() == [6, *[0] * 7]


def test_who_leaves_is_told_whether_its_slot_was_freed_or_begins_anew(tables):
    first = (part("a", 0, begins=BEGINS), part("b", 1, begins=BEGINS), part("c", 2, begins=BEGINS))
    assert tables.take_in(StepPlan(first)) == []
    assert tables.take_in(StepPlan((), freed_slots=(1, 7))) == ["b"]
    assert tables.take_in(StepPlan((part("d", 0, begins=BEGINS),), freed_slots=(0,))) == ["a"]
    assert tables.take_in(StepPlan((part("c", 2, tokens=[1], begins=BEGINS),))) == ["c"], "whoever plans began anew"
    assert tables[2].token_ids.tolist() == [1]


def test_a_plan_that_was_lost_or_came_twice_is_noticed_where_it_changes_who_is_where(tables):
    with pytest.raises(InvariantError, match="goes on with 'a' in slot 0; in it is nobody"):
        tables.take_in(StepPlan((part("a", 0),)))
    tables.take_in(StepPlan((part("a", 0, begins=BEGINS),)))
    with pytest.raises(InvariantError, match="goes on with 'b' in slot 0; in it is 'a'"):
        tables.take_in(StepPlan((part("b", 0),)))


@pytest.fixture
def brought() -> list[torch.Tensor]:
    return []


@pytest.fixture
def elsewhere(brought) -> SlotTables:
    """On an accelerator, told what it brings there."""

    def bring(num_words, write):
        words = torch.empty(num_words, dtype=torch.int64)
        write(words.numpy())
        brought.append(words)
        return words

    return SlotTables(TableRoom(torch.device("cpu"), 2, 4, bring))


def test_an_accelerator_is_brought_the_new_entries_and_no_others(elsewhere, brought):
    held = elsewhere.block_tables
    held.fill_(-1)
    for plan in (
        StepPlan((part("a", 0, blocks=[1, 2], begins=BEGINS), part("b", 1, blocks=[3], begins=BEGINS))),
        StepPlan((part("a", 0), part("b", 1))),
        StepPlan((part("a", 0), part("b", 1, blocks=[4, 5]))),
    ):
        elsewhere.take_in(plan)
        elsewhere.bring()
    assert [words.tolist() for words in brought] == [[0, 0, 1, 0, 1, 0, 1, 2, 3], [1, 1, 1, 2, 4, 5]]
    assert elsewhere.host_tables.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0]]
    assert elsewhere.block_tables is held
    assert held.tolist() == [[1, 2, -1, -1], [3, 4, 5, -1]]


def test_entries_that_could_not_be_brought_are_brought_when_their_step_is_tried_again(elsewhere, brought, monkeypatch):
    plan = StepPlan((part("a", 0, blocks=[1, 2], begins=BEGINS),))
    elsewhere.take_in(plan)
    with monkeypatch.context() as patch:
        patch.setattr(elsewhere, "_bring_entries", lambda *_: torch.zeros(1 << 60))
        with pytest.raises(RuntimeError, match="memory"):
            elsewhere.bring()
    elsewhere.take_in(dataclasses.replace(plan, is_told=True))
    elsewhere.bring()
    assert elsewhere.block_tables[0].tolist() == [1, 2, 0, 0]


def test_tables_of_an_accelerator_never_move_and_what_has_no_room_is_said():
    tables = SlotTables(TableRoom(torch.device("cpu"), 2, 3, lambda *_: torch.zeros(0)))
    with pytest.raises(InvariantError, match="3 slots of 0 blocks are wanted, there are 2 of 3"):
        tables.take_in(StepPlan((part("a", 2, begins=BEGINS),)))
    with pytest.raises(InvariantError, match="1 slots of 4 blocks are wanted, there are 2 of 3"):
        tables.take_in(StepPlan((part("a", 0, blocks=[1, 2, 3, 4], begins=BEGINS),)))


# ------------------------------------------------------------------------------------------------------ awaited tokens


def test_a_token_that_a_later_step_awaits_is_kept_when_it_comes_back(tables):
    tables.take_in(StepPlan((part("a", 0, tokens=[5, 6], begins=BEGINS),)))
    behind = part("a", 0, start=2, awaits=True)
    tables.take_in(StepPlan((behind,)))
    assert tables[0].num_awaited == 1
    assert tables[0].tokens_of(behind).tolist() == [0]
    tables[0].take_sampled(7)
    assert (tables[0].num_awaited, tables[0].token_ids.tolist()) == (0, [5, 6, 7])


def test_a_token_that_came_back_before_the_step_that_awaits_it_was_launched_is_the_same(tables):
    tables.take_in(StepPlan((part("a", 0, tokens=[5, 6], begins=BEGINS),)))
    tables[0].take_sampled(7)
    behind = part("a", 0, start=2, awaits=True)
    tables.take_in(StepPlan((behind,)))
    assert tables[0].tokens_of(behind).tolist() == [7]
    tables[0].take_sampled(8)
    assert tables[0].token_ids.tolist() == [5, 6, 7]


def test_a_token_that_a_plan_tells_is_there_once(tables):
    tables.take_in(StepPlan((part("a", 0, tokens=[5, 6], begins=BEGINS),)))
    tables[0].take_sampled(7)
    tables.take_in(StepPlan((part("a", 0, tokens=[7], start=2),)))
    assert tables[0].token_ids.tolist() == [5, 6, 7]
    tables[0].take_sampled(8)
    tables.take_in(StepPlan((part("a", 0, start=3, awaits=True),)))
    assert tables[0].token_ids.tolist() == [5, 6, 7, 8]


def test_what_was_sampled_is_left_by_slot_and_room_for_more_slots_loses_none(tables):
    tables.take_in(StepPlan((part("a", 2, begins=BEGINS), part("b", 0, begins=BEGINS))))
    tables.leave_sampled(torch.tensor([2, 0]), torch.tensor([30, 10]))
    tables.take_in(StepPlan((part("c", 5, begins=BEGINS),)))
    tables.leave_sampled(torch.tensor([5]), torch.tensor([50]))
    assert tables.sampled_ids.tolist() == [10, 0, 30, 0, 0, 50, 0, 0]
