"""A sequence's counts and names: which blocks may be reused, which tokens are left, who is sooner."""

from __future__ import annotations

import pytest

from engine.scheduling.coming import ComingBlocks
from engine.scheduling.plan import SequenceSpec
from engine.scheduling.sequence import Phase, RemotePull, Sequence
from kvcache.locations import BlockLocation, pack_locations, unpack_locations
from kvcache.names import BlockNamer, block_names, pack_tokens, split_names
from messages.request import Grammar, SamplingParams


def sequence(num_prompt: int, num_generated: int = 0, *, order: int = 0, **fields: object) -> Sequence:
    params = {
        "max_tokens": 9,
        **{name: fields.pop(name) for name in SamplingParams.__struct_fields__ if name in fields},
    }
    spec = SequenceSpec(
        seq_id="s",
        token_ids=list(range(num_prompt + num_generated)),
        num_prompt_tokens=num_prompt,
        params=SamplingParams(**params),  # type: ignore[arg-type]  # of whatever kind the field is
        **fields,  # type: ignore[arg-type]  # likewise
    )
    return Sequence(spec, order=order, namer=BlockNamer(b"model", b"", 4), block_size=4)


def names(num_tokens: int) -> list[bytes]:
    return split_names(block_names(b"model", b"", pack_tokens(range(num_tokens)), 4))


def test_it_begins_waiting_with_nothing_computed_and_its_full_blocks_named():
    seq = sequence(11)
    assert (seq.phase, seq.num_computed, seq.block_table, seq.slot) == (Phase.WAITING, 0, [], None)
    assert seq.names == names(11)
    assert len(seq.names) == 2


def test_a_block_has_one_name_whether_its_tokens_were_given_or_generated_at_once_or_one_by_one():
    seq = sequence(6)
    for token_id in range(6, 13):
        seq.token_ids.append(token_id)
        seq.extend_names()
        assert seq.names == names(seq.num_tokens)
    assert seq.names == sequence(13).names == sequence(2, 11).names


def test_the_tokens_that_were_handed_over_stay_as_they_are():
    seq = sequence(5)
    seq.token_ids.append(99)
    assert seq.spec.token_ids == list(range(5))
    assert (seq.num_tokens, seq.num_output_tokens) == (6, 1)


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_reuse_leaves_a_token_to_compute(num_tokens, blocks):
    assert sequence(num_tokens).max_match_blocks == blocks
    assert sequence(1, num_tokens - 1).max_match_blocks == blocks
    assert sequence(num_tokens, prompt_logprobs=0).max_match_blocks == 0, "logprobs want every token's logits"


@pytest.mark.parametrize(
    ("num_prompt", "num_generated", "num_computed", "is_decoding"),
    [
        (5, 0, 4, False),  # the prompt's last token is prefill
        (5, 1, 4, False),
        (5, 1, 5, True),
        (5, 2, 5, False),  # the first generated token is replayed before
        (5, 2, 6, True),
        (1, 1, 1, True),
    ],
)
def test_it_decodes_when_only_its_last_generated_tokens_kv_is_missing(
    num_prompt, num_generated, num_computed, is_decoding
):
    seq = sequence(num_prompt, num_generated)
    seq.num_computed = num_computed
    assert seq.is_decoding is is_decoding


def test_while_steps_run_with_it_the_next_one_goes_on_behind_the_last_of_them():
    seq = sequence(5)
    assert (seq.is_in_step, seq.next_start, seq.num_expected_tokens, seq.will_decode) == (False, 0, 5, False)
    seq.num_steps, seq.num_awaited, seq.planned_end = 1, 1, 5
    assert (seq.is_in_step, seq.next_start, seq.num_expected_tokens, seq.will_decode) == (True, 5, 6, True)
    seq.num_steps, seq.num_awaited, seq.planned_end = 2, 2, 6
    assert (seq.next_start, seq.num_expected_tokens, seq.will_decode) == (6, 7, True)


@pytest.mark.parametrize(("is_kept", "max_model_len", "most"), [(False, 99, 9), (False, 8, 8), (True, 99, 6)])
def test_it_is_known_by_how_many_tokens_it_is_at_its_end(is_kept, max_model_len, most):
    seq = sequence(5, max_tokens=4, is_kept=is_kept)
    assert [seq.is_at_length(max_model_len, n) for n in (most - 1, most, most + 1)] == [False, True, True]


@pytest.mark.parametrize(
    ("fields", "must_be_known"),
    [
        ({}, False),
        ({"repetition_penalty": 1.2, "logprobs": 1}, False),
        ({"prompt_logprobs": 0}, True),
        ({"grammar": Grammar(kind="regex", spec="a")}, True),
    ],
)
def test_what_follows_a_token_is_planned_before_it_is_known_unless_it_depends_on_it_here(fields, must_be_known):
    seq = sequence(5, **fields)
    seq.num_steps, seq.planned_end = 1, 4
    assert not seq.must_be_known, "all that it computes with is known"
    seq.num_awaited, seq.planned_end = 1, 5
    assert seq.must_be_known is must_be_known


@pytest.mark.parametrize(
    ("fields", "num_generated", "wants_logprobs", "wants_remote"),
    [
        ({}, 0, False, False),
        ({"remote_s": 0.0}, 0, False, True),
        ({"prompt_logprobs": 0}, 0, True, False),
        ({"prompt_logprobs": 0, "remote_s": 0.0}, 0, True, False),  # nobody else's logits are here
        ({"prompt_logprobs": 0, "remote_s": 0.0}, 1, False, True),  # it moved: they were told already
    ],
)
def test_what_it_wants_follows_from_what_was_asked_and_whether_it_moved(
    fields, num_generated, wants_logprobs, wants_remote
):
    seq = sequence(8, num_generated, **fields)
    assert (seq.wants_prompt_logprobs, seq.wants_remote) == (wants_logprobs, wants_remote)


def test_priority_comes_before_arrival():
    late_urgent, early, late = sequence(1, order=2, priority=-1), sequence(1, order=0), sequence(1, order=1)
    assert sorted([late, early, late_urgent], key=lambda seq: seq.seniority) == [late_urgent, early, late]


def test_blocks_are_counted_whole_and_never_below_none():
    seq = sequence(5)
    assert [seq.num_blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert seq.num_lacking_blocks == 2
    seq.block_table = [3]
    assert seq.num_lacking_blocks == 1
    seq.block_table = [3, 4, 5]
    assert seq.num_lacking_blocks == 0


# --------------------------------------------------------------------------------------------------------------- pulls


def test_the_first_missing_block_is_the_first_gap_after_what_was_held():
    def first_missing(num_blocks: int, *arrived: int) -> int:
        blocks = ComingBlocks(2, 6, arrived)
        return RemotePull(first_index=2, end_tokens=0, deadline_s=0.0, blocks=blocks).first_missing(num_blocks)

    assert [first_missing(n) for n in (2, 5)] == [2, 2]
    assert first_missing(5, 2, 4) == 3
    assert [first_missing(n, 2, 3, 4) for n in (4, 5, 6)] == [4, 5, 5]
    assert first_missing(0, 2, 3, 4) == 0
    assert first_missing(6, 2, 3, 4, 5) == 6


def test_a_pull_is_over_when_the_last_offer_came_and_nothing_of_it_is_left():
    pull = RemotePull(first_index=0, end_tokens=4, deadline_s=0.0, blocks=ComingBlocks(0, 1))
    assert not pull.is_over
    pull.has_last_offer = True
    assert pull.is_over
    pull.blocks.offer("owner", unpack_locations(pack_locations([BlockLocation(0, 7, 1, b"name".ljust(16), 4)])))
    assert not pull.is_over
    pull.blocks.begin_pull()
    assert not pull.is_over
    pull.blocks.arrive(frozenset())
    assert pull.is_over
