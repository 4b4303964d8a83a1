"""Log-probabilities in the shapes that clients know: which tokens, under which text, at which offset."""

from __future__ import annotations

import math

import pytest

from cluster.openai.logprobs import chat_logprobs, completion_logprobs, echoed_logprobs, joined, prompt_logprobs
from cluster.openai.replies import ChatTopLogprob, CompletionLogprobs, PromptLogprob
from cluster.openai.transcript import LoggedToken
from messages.stream import TokenLogprob
from text.token_texts import TokenTexts
from text.tokenizer import Tokenizer


@pytest.fixture
def a_b_c(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("abc", add_special_tokens=False)


@pytest.fixture
def halves(tokenizer: Tokenizer) -> list[int]:
    """Both bytes of one character: neither is text by itself."""
    return tokenizer.encode("é", add_special_tokens=False)


def logged(tokenizer: Tokenizer, entries: list[TokenLogprob]) -> list[LoggedToken]:
    """The tokens of an output that is nothing else."""
    texts = TokenTexts(tokenizer)
    return [LoggedToken(entry, texts.take(entry.token_id, None, [i for i, _ in entry.top])) for entry in entries]


def written(tokenizer: Tokenizer, entries: list[TokenLogprob], num_top: int = 0) -> CompletionLogprobs:
    return completion_logprobs(logged(tokenizer, entries), num_top, offset=0)


def echoed(tokenizer: Tokenizer, ids: list[int], entries: list[TokenLogprob | None], **changes) -> CompletionLogprobs:
    fields = {"text": tokenizer.decode(ids), "skipped": tokenizer.special_ids, **changes}
    return echoed_logprobs(tokenizer, ids, entries, 0, **fields)


def test_a_chat_shows_as_many_alternatives_as_were_asked_for(tokenizer, a_b_c):
    a, b, c = a_b_c
    entry = TokenLogprob(a, -0.5, 1, ((a, -0.5), (b, -1.0), (c, -2.0)))
    tokens = logged(tokenizer, [entry])
    [shown] = chat_logprobs(tokens, 2).content
    assert (shown.token, shown.logprob, shown.bytes) == ("a", -0.5, [97])
    assert shown.top_logprobs == [ChatTopLogprob("a", -0.5, [97]), ChatTopLogprob("b", -1.0, [98])]
    assert chat_logprobs(tokens, 0).content[0].top_logprobs == []


def test_a_characters_tokens_have_its_bytes_and_the_last_of_them_its_text(tokenizer, halves):
    entries = [TokenLogprob(half, -1.0, 1) for half in halves]
    content = chat_logprobs(logged(tokenizer, entries), 0).content
    assert [entry.token for entry in content] == ["", "é"]
    assert bytes(byte for entry in content for byte in entry.bytes) == "é".encode()


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e6])
def test_what_json_cannot_say_is_the_lowest(tokenizer, a_b_c, logprob):
    a, b, _ = a_b_c
    entry = TokenLogprob(a, logprob, 9, ((b, logprob),))
    [shown] = chat_logprobs(logged(tokenizer, [entry]), 1).content
    assert (shown.logprob, shown.top_logprobs[0].logprob) == (-9999.0, -9999.0)
    piece = written(tokenizer, [entry], 1)
    assert (piece.token_logprobs, piece.top_logprobs) == ([-9999.0], [{"b": -9999.0, "a": -9999.0}])
    [by_id] = prompt_logprobs(tokenizer, [a], [entry])
    assert by_id == {b: PromptLogprob(-9999.0, 1, "b"), a: PromptLogprob(-9999.0, 9, "a")}


def test_offsets_of_a_completion_run_on_from_its_prompt_through_its_pieces(tokenizer, a_b_c, halves):
    a, b, c = a_b_c
    tokens = logged(tokenizer, [TokenLogprob(token_id, -2.0, 1) for token_id in [*halves, c]])
    prompt = echoed(tokenizer, [a, b], [None, TokenLogprob(b, -1.0, 1)])
    pieces = [completion_logprobs(part, 0, offset=2) for part in (tokens[:2], [], tokens[2:])]
    whole = joined([prompt, *pieces])
    assert whole.tokens == ["a", "b", "", "é", "c"]
    assert whole.text_offset == [0, 1, 2, 2, 3]
    assert whole.token_logprobs == [None, -1.0, -2.0, -2.0, -2.0]
    assert whole.top_logprobs == [None, {"b": -1.0}, {"": -2.0}, {"é": -2.0}, {"c": -2.0}]


@pytest.mark.parametrize(("text", "offsets"), [("ab", [0, 0, 1]), ("<|bos|>ab", [0, 7, 8])])
def test_a_special_token_of_an_echoed_prompt_takes_no_room_unless_the_client_wrote_it(tokenizer, text, offsets):
    ids = tokenizer.encode("<|bos|>ab", add_special_tokens=False)
    lists = echoed(tokenizer, ids, [], text=text)
    assert (lists.tokens, lists.text_offset) == (["<|bos|>", "a", "b"], offsets)


def test_a_prompt_that_was_told_only_in_part_has_nothing_for_the_rest(tokenizer, a_b_c):
    a, b, _ = a_b_c
    part = echoed(tokenizer, a_b_c, [None, TokenLogprob(b, -1.0, 1)])
    assert part.tokens == ["a", "b", "c"]
    assert part.token_logprobs == [None, -1.0, None]
    assert echoed(tokenizer, [a], []).token_logprobs == [None]


def test_a_completions_chosen_token_is_among_its_alternatives_beyond_their_number(tokenizer, a_b_c):
    a, b, c = a_b_c
    piece = written(tokenizer, [TokenLogprob(c, -4.0, 3, ((a, -0.5), (b, -1.0)))], 1)
    assert piece.top_logprobs == [{"a": -0.5, "c": -4.0}]


def test_of_alternatives_with_one_text_the_likeliest_is_told(tokenizer, a_b_c):
    a, _, _ = a_b_c
    lead, other = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "é你")
    entry = TokenLogprob(a, -0.1, 1, ((a, -0.1), (lead, -2.0), (other, -3.0)))
    assert written(tokenizer, [entry], 3).top_logprobs == [{"a": -0.1, "": -2.0}]


@pytest.mark.parametrize(("chosen", "logprob"), [(0, -0.1), (1, -3.0)])
def test_under_the_chosen_tokens_text_stands_its_own_logprob(tokenizer, a_b_c, chosen, logprob):
    """Clients tell from it whether the likeliest token was chosen."""
    a, _, _ = a_b_c
    leads = [tokenizer.encode(text, add_special_tokens=False)[0] for text in "é你"]
    entry = TokenLogprob(leads[chosen], logprob, 1, ((leads[0], -0.1), (a, -2.0), (leads[1], -3.0)))
    assert written(tokenizer, [entry], 3).top_logprobs == [{"": logprob, "a": -2.0}]


def test_an_alternative_shows_what_it_would_have_made_of_the_bytes_before_it(tokenizer, a_b_c, halves):
    first, last = halves
    a, _, _ = a_b_c
    [other] = tokenizer.encode("è", add_special_tokens=False)[1:]
    entries = [TokenLogprob(first, -1.0, 1), TokenLogprob(last, -1.0, 1, ((last, -1.0), (other, -2.0), (a, -3.0)))]
    assert written(tokenizer, entries, 3).top_logprobs[1] == {"é": -1.0, "è": -2.0, "\ufffda": -3.0}


def test_prompt_logprobs_are_ranked_by_place_and_the_prompts_own_token_by_its_rank(tokenizer, a_b_c):
    a, b, c = a_b_c
    entries = [None, TokenLogprob(c, -5.0, 17, ((a, -0.5), (b, -1.0))), TokenLogprob(a, -0.5, 1, ((a, -0.5),))]
    first, second, third = prompt_logprobs(tokenizer, [a, c, a], entries)
    assert first is None
    assert second == {
        a: PromptLogprob(-0.5, 1, "a"),
        b: PromptLogprob(-1.0, 2, "b"),
        c: PromptLogprob(-5.0, 17, "c"),
    }
    assert third == {a: PromptLogprob(-0.5, 1, "a")}
