"""What tokens write, by decoders that only say it in their own way; and that texts held to grammars are of them."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
import tokenizers
from tokenizers import decoders, models

from messages.errors import ConfigError, RequestError
from messages.request import Grammar
from tests.text.masked_walk import MaskedWalk
from text.detokenizer import Detokenizer
from text.grammar import GrammarTokenizer
from text.tokenizer import Tokenizer
from text.vocabulary import vocabulary_of

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHARACTERS = list('abcdefghijklmnopqrstuvwxyz0123456789{}[]":,.-_<>\\')
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def tokenizer_of(decoder: decoders.Decoder | None, tokens: list[str]) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(dict.fromkeys(["<eos>", "<unk>", *tokens]))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<eos>", "<unk>"])
    backend.add_tokens(["<think>"])
    return Tokenizer(backend)


METASPACE = [*CHARACTERS, *(f"▁{c}" for c in CHARACTERS), "▁", "▁▁", "name", '▁{"', "▁the▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [*CHARACTERS, *(f"##{c}" for c in CHARACTERS), "##name"]


@pytest.mark.parametrize(
    ("decoder", "tokens"),
    [
        pytest.param(decoders.Metaspace(), METASPACE, id="metaspace"),
        pytest.param(decoders.Metaspace(prepend_scheme="never"), METASPACE, id="metaspace, space kept"),
        pytest.param(decoders.Sequence([decoders.Metaspace()]), METASPACE, id="metaspace in a sequence"),
        pytest.param(
            decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
            [*METASPACE, *BYTES],
            id="bytes and metaspace",
        ),
        pytest.param(decoders.Sequence(LLAMA), [*METASPACE, *BYTES], id="llama"),
        pytest.param(decoders.WordPiece(cleanup=False), PIECES, id="pieces of words"),
        pytest.param(decoders.WordPiece(cleanup=True), [*PIECES, "n't"], id="pieces of words, cleaned up"),
    ],
)
def test_texts_held_to_a_grammar_are_what_the_decoder_writes(decoder, tokens):
    tokenizer = tokenizer_of(decoder, tokens)
    walk = MaskedWalk(tokenizer, eos_id=0)
    compiled = walk.compiled(Grammar(kind="json_schema", spec=json.dumps(SCHEMA)))
    for seed in range(10):
        token_ids = walk.token_ids(compiled, seed)
        assert token_ids is not None
        text = tokenizer.decode(token_ids)
        detokenizer = Detokenizer(tokenizer)
        assert detokenizer.push(token_ids) + detokenizer.flush() == text
        jsonschema.validate(json.loads(text), SCHEMA)
    compiled = walk.compiled(Grammar(kind="regex", spec="(a ?)+b|c"))
    for seed in range(10):
        text = tokenizer.decode(walk.token_ids(compiled, seed))
        assert re.fullmatch("(a ?)+b|c", text)


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.Sequence(LLAMA)])
def test_behind_a_prompt_with_text_an_output_is_held_to_its_grammar_by_what_it_adds(decoder):
    tokenizer = tokenizer_of(decoder, [*METASPACE, "yes", "no", "▁yes"])
    walk = MaskedWalk(tokenizer, eos_id=0)
    [prompt] = tokenizer.backend.encode("a", add_special_tokens=False).ids
    compiled = walk.compiled(Grammar(kind="choice", spec='[" yes", "no"]', follows_text=True))
    for seed in range(10):
        text = tokenizer.decode([prompt, *walk.token_ids(compiled, seed)]).removeprefix("a")
        assert text in (" yes", "no")


def test_without_a_decoder_tokens_are_words_with_spaces_between():
    walk = MaskedWalk(tokenizer_of(None, ["a", "b", "c", "yes", "{"]), eos_id=0)
    assert walk.text(walk.compiled(Grammar(kind="choice", spec='["yes"]')), 0) == "yes"
    assert walk.text(walk.compiled(Grammar(kind="regex", spec="a (b )?c")), 1) in ("a c", "a b c")
    with pytest.raises(RequestError, match="no token that writes"):
        walk.compiled(Grammar(kind="json_schema", spec=json.dumps(SCHEMA)))


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_space_at_the_beginning_counts_where_the_decoder_keeps_it(is_kept):
    decoder = decoders.Metaspace(prepend_scheme="never" if is_kept else "always")
    walk = MaskedWalk(tokenizer_of(decoder, METASPACE), eos_id=0)
    compiled = walk.compiled(Grammar(kind="choice", spec='["ab"]'))
    begins = {walk.tokenizer.backend.id_to_token(walk.token_ids(compiled, seed)[0]) for seed in range(20)}
    assert begins == ({"a"} if is_kept else {"a", "▁a", "▁"})


def test_bytes_of_a_byte_fallback_count_as_bytes_beside_a_metaspace():
    tokenizer = tokenizer_of(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]), [*METASPACE, *BYTES])
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.tokens[tokenizer.backend.token_to_id("<0xE4>")] == b"\xe4"
    assert vocabulary.tokens[tokenizer.backend.token_to_id("▁a")] == b" a"
    walk = MaskedWalk(tokenizer, eos_id=0)
    compiled = walk.compiled(Grammar(kind="choice", spec='["ä€"]'))
    assert walk.text(compiled, 0) == "ä€"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace(tokenizers.Regex("a+"), "b")]),
    ],
)
def test_a_decoder_whose_tokens_depend_on_what_follows_has_no_vocabulary(decoder):
    tokenizer = tokenizer_of(decoder, METASPACE)
    with pytest.raises(ConfigError, match="depends on the tokens after it"):
        GrammarTokenizer(tokenizer, tokenizer.vocab_size, [0])


def test_what_no_token_writes_is_refused_and_not_begun():
    walk = MaskedWalk(tokenizer_of(decoders.Metaspace(), ["a", "b", "▁a"]), eos_id=0)
    walk.compiled(Grammar(kind="choice", spec='["ab", "aab"]'))
    for choices in ('["x"]', '["abx"]'):
        with pytest.raises(RequestError, match="no token that writes"):
            walk.compiled(Grammar(kind="choice", spec=choices))
