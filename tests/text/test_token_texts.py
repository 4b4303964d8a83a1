"""Where a sequence's tokens stand, and what they write there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.kinds import KINDS, texts, tokenizer_of
from text.detokenizer import Context, Detokenizer
from text.token_texts import TokenText, TokenTexts
from text.tokenizer import Tokenizer


def told(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, skip: bool) -> tuple[str, list[TokenText]]:
    """Return an output's text, and what is told of its tokens."""
    context = Context.of(tokenizer, prompt, skip_special_tokens=skip)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, context=context)
    follower = TokenTexts(tokenizer, context)
    text, found = "", []
    for token_id in ids:
        given = detokenizer.push([token_id])
        text += given
        is_hidden = skip and token_id in tokenizer.special_ids
        found.append(follower.pass_by(token_id) if is_hidden else follower.take(token_id, given))
    return text + detokenizer.flush(), found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(texts=st.lists(texts, min_size=1, max_size=3), place=st.floats(0, 1), skip=st.booleans())
def test_texts_of_tokens_add_up_and_stand_at_their_offsets(kind, texts, place, skip):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("<eos>".join(["", *texts]), add_special_tokens=False)
    cut = round(place * len(ids))
    text, tokens = told(tokenizer, ids[:cut], ids[cut:], skip=skip)
    shown = [token for token, i in zip(tokens, ids[cut:], strict=True) if not (skip and i in tokenizer.special_ids)]
    assert "".join(token.written.text for token in shown) == text
    offsets = [token.offset for token in tokens]
    assert offsets == sorted(offsets)
    for token in shown:
        assert text[token.offset :].startswith(token.written.text)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "gemma_like", "metaspace_first"])
@settings(max_examples=80, deadline=None)
@given(text=texts)
def test_bytes_of_tokens_add_up_to_the_text(kind, text):
    tokenizer = tokenizer_of(kind)
    text, tokens = told(tokenizer, [], tokenizer.encode(text, add_special_tokens=False), skip=True)
    assert b"".join(token.written.data for token in tokens) == text.encode()


def test_bytes_that_make_no_character_count_as_many_as_they_show():
    tokenizer = tokenizer_of("byte_fallback")
    bad = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in (0xF0, 0x9F, 0xFF)]
    words = tokenizer.encode("the cat", add_special_tokens=False)
    text, tokens = told(tokenizer, words, [*bad, *words], skip=True)
    assert text == "\ufffd\ufffd\ufffd the cat"
    assert [token.offset for token in tokens[:4]] == [0, 0, 0, 3]
    assert all(text[token.offset :].startswith(token.written.text) for token in tokens[3:])


def test_alternatives_show_what_they_would_have_written_there():
    tokenizer = tokenizer_of("byte_fallback")
    word = tokenizer.backend.token_to_id("▁c")
    first, *_, last = (tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "🦊".encode())
    texts = TokenTexts(tokenizer)
    assert [other.text for other in texts.take(word, others=[word, first, last]).others] == ["c", "", "\ufffd"]
    assert [other.text for other in texts.take(first, others=[word, first]).others] == [" c", ""]
    texts = TokenTexts(tokenizer, Context.of(tokenizer, [word]))
    assert [other.text for other in texts.pass_by(tokenizer.eos_token_id, others=[word]).others] == [" c"]
