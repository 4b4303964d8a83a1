"""Text from tokens as they come: pieces add up to the decoding, behind every prompt, by decoders of every kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.kinds import KINDS, texts, tokenizer_of
from text.detokenizer import Context, Detokenizer, prompt_text
from text.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int], cuts: list[int], *, skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    found, at = [], 0
    while at < len(ids):
        size = cuts[at % len(cuts)] if cuts else 1
        found.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*found, detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(1, 4), max_size=5), skip=st.booleans())
def test_pieces_of_a_text_add_up_to_its_decoding(kind, text, cuts, skip):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text + "<eos>" + text, add_special_tokens=False)
    found = pieces(tokenizer, ids, cuts, skip=skip)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), cuts=st.lists(st.integers(1, 3), max_size=4), skip=st.booleans())
def test_pieces_of_any_tokens_add_up_to_their_decoding(kind, data, cuts, skip):
    tokenizer = tokenizer_of(kind)
    size = tokenizer.vocab_size
    any_token = st.integers(0, size + 2)  # two that nobody knows
    # byte tokens come in runs that are valid, broken off, or nonsense
    spaces = [i for i in range(size) if (tokenizer.backend.id_to_token(i) or "x").strip("▁Ġ ") == ""]
    few = st.sampled_from([*spaces, *range(1, min(4, size)), *range(size // 2, size // 2 + 3), size - 1, size - 2])
    ids = data.draw(st.lists(st.one_of(any_token, few), max_size=20))
    found = pieces(tokenizer, ids, cuts, skip=skip)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=12), rest=st.sampled_from(["", "hello", " ", "你"]))
def test_invalid_runs_of_byte_tokens_decode_as_the_tokenizer_would(data, rest):
    tokenizer = tokenizer_of("byte_fallback")
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in data]
    ids += tokenizer.encode(rest, add_special_tokens=False) + ids
    assert "".join(pieces(tokenizer, ids, [], skip=True)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "gemma_like", "metaspace"])
@given(text=texts)
@settings(max_examples=50, deadline=None)
def test_no_piece_of_a_valid_text_ends_inside_a_character(kind, text):
    text = text.replace("\ufffd", "")
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, ids, [], skip=True))


def test_a_character_comes_with_its_last_byte_and_not_later():
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) == 4
    assert pieces(tokenizer, ids, [], skip=True) == ["", "", "", "🦊", ""]


def test_what_remains_of_an_incomplete_character_comes_with_flush():
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("a🦊", add_special_tokens=False)[:-1]
    assert pieces(tokenizer, ids, [], skip=True) == ["a", "", "", "", "\ufffd"]


def test_a_word_comes_at_once():
    tokenizer = tokenizer_of("byte_fallback")
    ids = tokenizer.encode("hello the cat", add_special_tokens=False)
    found = pieces(tokenizer, ids, [], skip=True)
    assert all(found[:-1])
    assert found[-1] == ""


# ------------------------------------------------------------------------------------------------ behind a prompt


def continued(tokenizer: Tokenizer, prompt: list[int], output: list[int], *, skip: bool) -> tuple[str, str]:
    """Return the text of a prompt of token ids, and of what follows it."""
    context = Context.of(tokenizer, prompt, skip_special_tokens=skip)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, context=context)
    found = "".join(detokenizer.push([token_id]) for token_id in output) + detokenizer.flush()
    return prompt_text(tokenizer, prompt, context, skip_special_tokens=skip), found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(texts, min_size=1, max_size=3), place=st.floats(0, 1), skip=st.booleans())
def test_a_prompts_text_and_its_outputs_are_the_decoding_of_both(kind, texts, place, skip):
    """Wherever it is cut: between words, inside a character, before and behind special tokens."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("<eos>".join(["", *texts]), add_special_tokens=False)
    cut = round(place * len(ids))
    prompt, output = continued(tokenizer, ids[:cut], ids[cut:], skip=skip)
    assert prompt + output == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"byte_level", "word_suffix", "no_decoder"}))
@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_tokens_go_on_from_any_others_that_hold_no_bytes(kind, data, skip):
    tokenizer = tokenizer_of(kind)
    size = tokenizer.vocab_size
    plain = [i for i in range(size) if tokenizer.decoding.byte_of(tokenizer.backend.id_to_token(i) or "") is None]
    spaces = [i for i in plain if (tokenizer.backend.id_to_token(i) or "x").strip("▁ ") == ""]
    token_ids = st.lists(st.sampled_from([*spaces * 5, *plain]), max_size=8)
    prompt, output = data.draw(token_ids), data.draw(token_ids)
    found = continued(tokenizer, prompt, output, skip=skip)
    assert "".join(found) == tokenizer.decode([*prompt, *output], skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace", "metaspace_first"])
def test_a_word_behind_a_prompt_keeps_its_space(kind):
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("hello world", add_special_tokens=False)
    output = tokenizer.encode("the cat", add_special_tokens=False)
    assert continued(tokenizer, prompt, output, skip=True) == ("hello world", " the cat")
    assert continued(tokenizer, [], output, skip=True) == ("", "the cat")


def test_hidden_tokens_are_no_text_to_go_on_from():
    tokenizer = tokenizer_of("byte_fallback")
    eos = tokenizer.eos_token_id
    assert Context.of(tokenizer, [eos, eos]).token_ids == []
    assert Context.of(tokenizer, [eos], skip_special_tokens=False).token_ids == [eos]
    assert Context.of(tokenizer, [eos], skip_special_tokens=False, hidden_ids={eos}).token_ids == []


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_that_a_prompt_begins_belongs_to_what_follows(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("a🦊", add_special_tokens=False)
    prompt, output = continued(tokenizer, ids[:-1], ids[-1:], skip=True)
    assert (prompt.strip(), output) == ("a", "🦊")
    assert continued(tokenizer, ids[:-1], [], skip=True)[1].strip("\ufffd") == ""


def test_a_byte_that_fits_nothing_behind_a_prompts_last_bytes_holds_up_no_text():
    tokenizer = tokenizer_of("byte_fallback")
    bad = tokenizer.backend.token_to_id("<0xFF>")
    prompt = tokenizer.encode("🦊", add_special_tokens=False)
    output = [bad, *tokenizer.encode("the cat", add_special_tokens=False)]
    assert continued(tokenizer, prompt, output, skip=True)[1].lstrip("\ufffd") == " the cat"


def test_of_a_long_prompt_only_the_end_is_looked_at():
    tokenizer = tokenizer_of("byte_fallback")
    word = tokenizer.backend.token_to_id("▁c")
    assert Context.of(tokenizer, [word] * 100_000).token_ids == [word]
    tokenizer = tokenizer_of("word_suffix")
    assert len(Context.of(tokenizer, [1] * 100_000).token_ids) == 64


def test_of_a_long_run_of_bytes_only_the_end_is_looked_at_and_whole_characters_of_it():
    tokenizer = tokenizer_of("byte_fallback")
    fox = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "🦊".encode()]
    for prompt in (fox * 10_000, fox * 10_000 + fox[:3], [*fox * 10_000, fox[0]], fox[1:2] * 10_000):
        assert len(Context.of(tokenizer, prompt).token_ids) <= 512
    for size in range(1, 4):
        prompt, output = fox * 1000 + fox[:size], [*fox[size:], *tokenizer.encode("the cat", add_special_tokens=False)]
        assert continued(tokenizer, prompt, output, skip=True) == ("🦊" * 1000, "🦊 the cat")
