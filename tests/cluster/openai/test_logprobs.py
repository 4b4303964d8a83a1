"""Log-probabilities in the shapes that clients know: which tokens, under which text, at which offset."""

from __future__ import annotations

import math

import pytest

from cluster.openai.logprobs import CompletionLogprobList, chat_logprobs, joined, prompt_logprobs
from cluster.openai.replies import ChatTopLogprob, PromptLogprob
from messages.stream import TokenLogprob
from text.tokenizer import Tokenizer


@pytest.fixture
def a_b_c(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("abc", add_special_tokens=False)


@pytest.fixture
def halves(tokenizer: Tokenizer) -> list[int]:
    """Both bytes of one character: neither is text by itself."""
    return tokenizer.encode("é", add_special_tokens=False)


def test_a_chat_shows_as_many_alternatives_as_were_asked_for(tokenizer, a_b_c):
    a, b, c = a_b_c
    entry = TokenLogprob(a, -0.5, 1, ((a, -0.5), (b, -1.0), (c, -2.0)))
    [shown] = chat_logprobs(tokenizer, [entry], 2).content
    assert (shown.token, shown.logprob, shown.bytes) == ("a", -0.5, [97])
    assert shown.top_logprobs == [ChatTopLogprob("a", -0.5, [97]), ChatTopLogprob("b", -1.0, [98])]
    assert chat_logprobs(tokenizer, [entry], 0).content[0].top_logprobs == []


def test_a_chat_tells_the_bytes_of_what_is_no_character(tokenizer, halves):
    entries = [TokenLogprob(half, -1.0, 1) for half in halves]
    content = chat_logprobs(tokenizer, entries, 0).content
    assert [entry.token for entry in content] == ["\ufffd", "\ufffd"]
    assert bytes(byte for entry in content for byte in entry.bytes) == "é".encode()


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e6])
def test_what_json_cannot_say_is_the_lowest(tokenizer, a_b_c, logprob):
    a, b, _ = a_b_c
    entry = TokenLogprob(a, logprob, 9, ((b, logprob),))
    [shown] = chat_logprobs(tokenizer, [entry], 1).content
    assert (shown.logprob, shown.top_logprobs[0].logprob) == (-9999.0, -9999.0)
    piece = CompletionLogprobList(tokenizer, 1).piece([entry])
    assert (piece.token_logprobs, piece.top_logprobs) == ([-9999.0], [{"b": -9999.0, "a": -9999.0}])
    [by_id] = prompt_logprobs(tokenizer, [entry])
    assert by_id == {b: PromptLogprob(-9999.0, 1, "b"), a: PromptLogprob(-9999.0, 9, "a")}


def test_offsets_of_a_completion_run_on_from_its_prompt_through_its_pieces(tokenizer, a_b_c, halves):
    a, b, c = a_b_c
    lists = CompletionLogprobList(tokenizer, 0)
    parts = [
        lists.prompt([a, b], [None, TokenLogprob(b, -1.0, 1)]),
        lists.piece([TokenLogprob(half, -2.0, 1) for half in halves]),
        lists.piece([]),
        lists.piece([TokenLogprob(c, -3.0, 1)]),
    ]
    whole = joined(parts)
    assert whole.tokens == ["a", "b", "\ufffd", "\ufffd", "c"]
    assert whole.text_offset == [0, 1, 2, 3, 4]
    assert whole.token_logprobs == [None, -1.0, -2.0, -2.0, -3.0]
    assert whole.top_logprobs == [None, {"b": -1.0}, {"\ufffd": -2.0}, {"\ufffd": -2.0}, {"c": -3.0}]


def test_a_prompt_that_was_told_only_in_part_has_nothing_for_the_rest(tokenizer, a_b_c):
    a, b, _ = a_b_c
    part = CompletionLogprobList(tokenizer, 0).prompt(a_b_c, [None, TokenLogprob(b, -1.0, 1)])
    assert part.tokens == ["a", "b", "c"]
    assert part.token_logprobs == [None, -1.0, None]
    assert CompletionLogprobList(tokenizer, 0).prompt([a], []).token_logprobs == [None]


def test_a_completions_chosen_token_is_among_its_alternatives_beyond_their_number(tokenizer, a_b_c):
    a, b, c = a_b_c
    piece = CompletionLogprobList(tokenizer, 1).piece([TokenLogprob(c, -4.0, 3, ((a, -0.5), (b, -1.0)))])
    assert piece.top_logprobs == [{"a": -0.5, "c": -4.0}]


def test_of_alternatives_with_one_text_the_likeliest_is_told(tokenizer, a_b_c, halves):
    a, _, _ = a_b_c
    entry = TokenLogprob(a, -0.1, 1, ((a, -0.1), (halves[0], -2.0), (halves[1], -3.0)))
    assert CompletionLogprobList(tokenizer, 3).piece([entry]).top_logprobs == [{"a": -0.1, "\ufffd": -2.0}]


@pytest.mark.parametrize(("chosen", "logprob"), [(0, -0.1), (1, -3.0)])
def test_under_the_chosen_tokens_text_stands_its_own_logprob(tokenizer, a_b_c, halves, chosen, logprob):
    """Clients tell from it whether the likeliest token was chosen."""
    a, _, _ = a_b_c
    entry = TokenLogprob(halves[chosen], logprob, 1, ((halves[0], -0.1), (a, -2.0), (halves[1], -3.0)))
    piece = CompletionLogprobList(tokenizer, 3).piece([entry])
    assert piece.top_logprobs == [{"\ufffd": logprob, "a": -2.0}]


def test_prompt_logprobs_are_ranked_by_place_and_the_prompts_own_token_by_its_rank(tokenizer, a_b_c):
    a, b, c = a_b_c
    entries = [None, TokenLogprob(c, -5.0, 17, ((a, -0.5), (b, -1.0))), TokenLogprob(a, -0.5, 1, ((a, -0.5),))]
    first, second, third = prompt_logprobs(tokenizer, entries)
    assert first is None
    assert second == {
        a: PromptLogprob(-0.5, 1, "a"),
        b: PromptLogprob(-1.0, 2, "b"),
        c: PromptLogprob(-5.0, 17, "c"),
    }
    assert third == {a: PromptLogprob(-0.5, 1, "a")}
