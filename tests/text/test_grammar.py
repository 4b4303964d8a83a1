import functools
import json
import re

import jsonschema
import msgspec
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from messages.errors import ConfigError, RequestError
from messages.request import Grammar
from text.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, GrammarTokenizer, check_grammar
from text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
EOS, PAD = 0, 1


@functools.cache
def bpe() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(['{"name": "cat", "age": 42} true false null'] * 4, trainer)
    return backend


@functools.cache
def grammar_tokenizer(vocab_size: int | None = None) -> GrammarTokenizer:
    backend = bpe()
    return GrammarTokenizer(Tokenizer(backend), vocab_size or backend.get_vocab_size(), [EOS])


def matcher_of(grammar: Grammar, tokenizer: GrammarTokenizer | None = None) -> GrammarMatcher:
    return GrammarMatcher(CompiledGrammar(tokenizer or grammar_tokenizer(), grammar))


def allowed(matcher: GrammarMatcher) -> list[int]:
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()


def walk(grammar: Grammar, seed: int, max_tokens: int = 400) -> str | None:
    """A random output that the masks allow, fed token by token; None if it does not end."""
    matcher, rng, output = matcher_of(grammar), np.random.default_rng(seed), []
    for _ in range(max_tokens):
        choices = allowed(matcher)
        # end where possible, else a walk through strings is long
        token = EOS if EOS in choices else int(rng.choice(choices))
        matcher.accept([token])
        if token == EOS:
            return bpe().decode(output)
        output.append(token)
    return None


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_masks_allow_satisfies_the_schema(seed):
    text = walk(Grammar(kind="json_schema", spec=json.dumps(SCHEMA)), seed)
    assert text is not None
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("seed", range(4))
def test_a_json_object_is_an_object(seed):
    text = walk(Grammar(kind="json_object"), seed)
    assert text is None or isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", range(4))
def test_a_regex_is_matched_whole(seed):
    pattern = r"[a-c]{3,5}-\d{2}"
    text = walk(Grammar(kind="regex", spec=pattern), seed)
    assert text is not None
    assert re.fullmatch(pattern, text)


def test_a_lark_grammar_is_followed():
    assert walk(Grammar(kind="lark", spec='start: "ab" ("," "ab")*'), 0) == "ab"


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=4))
def test_every_choice_can_be_written_and_nothing_else(choices):
    grammar = Grammar(kind="choice", spec=json.dumps(choices))
    for choice in choices:
        matcher = matcher_of(grammar)
        matcher.accept(bpe().encode(choice).ids)
        assert matcher.is_complete
        assert EOS in allowed(matcher)
    assert walk(grammar, 0) in choices


def test_where_nothing_can_follow_only_the_end_is_allowed():
    matcher = matcher_of(Grammar(kind="choice", spec='["ab"]'))
    matcher.accept(bpe().encode("ab").ids)
    assert allowed(matcher) == [EOS]
    matcher.accept([EOS])
    assert allowed(matcher) == [EOS]


def test_a_matcher_fed_with_the_tokens_so_far_continues_as_the_first_would():
    grammar = Grammar(kind="json_schema", spec=json.dumps(SCHEMA))
    ids = bpe().encode('{"name":"x","age":4').ids
    one, other = (matcher_of(grammar) for _ in range(2))
    for token in ids:
        one.mask()
        one.accept([token])
    other.accept(ids)
    assert allowed(one) == allowed(other)


@pytest.mark.parametrize("extra", [1, 31, 32, 37])
def test_ids_that_only_the_model_has_are_never_allowed(extra):
    size = bpe().get_vocab_size() + extra
    matcher = matcher_of(Grammar(kind="regex", spec="(.|\n)*"), grammar_tokenizer(size))
    assert matcher.mask().shape == ((size + 31) // 32,)
    assert max(allowed(matcher)) < bpe().get_vocab_size()
    assert PAD not in allowed(matcher)


def test_ids_that_only_the_tokenizer_has_are_cut_off():
    size = bpe().get_vocab_size() - 5
    matcher = matcher_of(Grammar(kind="regex", spec="(.|\n)*"), grammar_tokenizer(size))
    assert matcher.mask().shape == ((size + 31) // 32,)
    assert max(allowed(matcher)) == size - 1


def test_a_token_that_was_not_allowed_ends_the_sequence_with_an_error():
    matcher = matcher_of(Grammar(kind="regex", spec="a+"))
    with pytest.raises(RequestError, match="cannot follow its grammar"):
        matcher.accept(bpe().encode("b").ids)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", "{", "is not JSON"),
        ("json_schema", "3", "wanted an object"),
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", '{"type": "integer", "minimum": 100000000000000000000}', "minimum"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "minimum"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "example.com"),
        ("json_schema", '{"items":' * 100_000 + "{}" + "}" * 100_000, "nested too deep"),
        ("choice", "[]", "one or more strings"),
        ("choice", '["a", 1]', "one or more strings"),
        ("choice", '"a"', "one or more strings"),
        ("lark", "start: nothing", "nothing"),
        ("lark", "", "no start rule"),
        ("lark", "root ::= missing", "missing"),
        ("lark", "rule ::= 'a'", "want EBNF with a rule named root"),
        ("lark", 'root ::= "a', "want EBNF"),
        ("any_of", '[{"kind": "any_of", "spec": "[]"}]', "not made of others"),
        ("regex", r"[^\x00-\x{10ffff}]", "no output"),
    ],
)
def test_a_bad_grammar_is_refused_at_once(kind, spec, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        check_grammar(grammar_tokenizer(), Grammar(kind=kind, spec=spec))
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("json_schema", json.dumps(SCHEMA)),
        ("regex", ""),
        ("choice", '["a"]'),
        ("json_object", ""),
        ("lark", "start: /a/"),
    ],
)
def test_a_good_grammar_passes(kind, spec):
    check_grammar(grammar_tokenizer(), Grammar(kind=kind, spec=spec))


def optional_properties(count: int) -> Grammar:
    properties = {f"p{index}": {"type": "integer"} for index in range(count)}
    return Grammar(kind="json_schema", spec=json.dumps({"type": "object", "properties": properties}))


def test_what_is_too_complex_only_after_its_first_token_is_refused_by_the_check():
    grammar = optional_properties(600)
    matcher = matcher_of(grammar)
    matcher.mask()
    with pytest.raises(RequestError, match="items"):
        matcher.accept(bpe().encode("{").ids)
    with pytest.raises(RequestError, match=r"first tokens lead to what is too complex, .*items"):
        check_grammar(grammar_tokenizer(), grammar)
    check_grammar(grammar_tokenizer(), optional_properties(100))


@functools.cache
def added_tokens() -> GrammarTokenizer:
    """`<think>` added as an ordinary token, `<tool>` as a special one, which replies leave out."""
    backend = tokenizers.Tokenizer.from_str(bpe().to_str())
    backend.add_tokens(["<think>"])
    backend.add_special_tokens(["<tool>"])
    tokenizer = Tokenizer(backend)
    return GrammarTokenizer(tokenizer, tokenizer.vocab_size, [EOS])


@pytest.mark.parametrize("text", ["<think>ok<tool>", '{"<think>":1,"<tool>":"<tool><think>"}'])
def test_the_text_of_an_added_token_can_be_written_and_whatever_is_allowed_is_taken(text):
    backend = tokenizers.Tokenizer.from_str(bpe().to_str())
    backend.add_tokens(["<think>"])
    backend.add_special_tokens(["<tool>"])
    think, tool = backend.token_to_id("<think>"), backend.token_to_id("<tool>")
    if text.startswith("{"):
        schema = {"const": json.loads(text)}
        grammar = Grammar(kind="json_schema", spec=json.dumps(schema))
    else:
        grammar = Grammar(kind="regex", spec=text)
    compiled = CompiledGrammar(added_tokens(), grammar)
    outputs = set()
    for seed in range(20):
        matcher, rng, output = GrammarMatcher(compiled), np.random.default_rng(seed), []
        while EOS not in (choices := allowed(matcher)):
            output.append(think if think in choices and seed % 2 else int(rng.choice(choices)))
            matcher.accept(output[-1:])
        assert backend.decode(output) == text
        assert tool not in output
        outputs.add(tuple(output))
    assert any(think in output for output in outputs)
    assert any(think not in output for output in outputs)


SQL = """
root ::= select_statement  # the example of vLLM's documentation
select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 "
    | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"""


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (SQL, r"SELECT col_[12]  from table_[12]  where col_[12] = [12] "),
        (r'root ::= [a-c]{2,3} ("\u00e9" | "\x41" | "\n")', "[a-c]{2,3}(\u00e9|A|\n)"),
        ('root ::= "::=" ', "::="),
        ('start: "::=" | /a::=b/', "::=|a::=b"),
    ],
)
def test_a_grammar_may_be_in_ebnf_or_lark(grammar, pattern):
    for seed in range(8):
        text = walk(Grammar(kind="lark", spec=grammar), seed)
        assert text is not None
        assert re.fullmatch(pattern, text)


def test_one_of_several_grammars_holds():
    options = [Grammar(kind="json_schema", spec='{"const": {"a": 1}}'), Grammar(kind="regex", spec="x{2}")]
    grammar = Grammar(kind="any_of", spec=msgspec.json.encode(options).decode())
    texts = {walk(grammar, seed) for seed in range(20)}
    assert texts == {'{"a":1}', "xx"}


@pytest.mark.parametrize(
    ("whitespace", "pattern"),
    [("", r'\{"a":\[1,2\]\}'), (r" |\n {0,2}", r'\{( |\n {0,2})?"a"( |\n {0,2})?:.*\}')],
)
def test_json_is_as_compact_as_its_grammar_says(whitespace, pattern):
    texts = set()
    for seed in range(10):
        text = walk(Grammar(kind="json_schema", spec='{"const": {"a": [1, 2]}}', whitespace=whitespace), seed)
        assert re.fullmatch(pattern, text, re.DOTALL)
        assert json.loads(text) == {"a": [1, 2]}
        texts.add(text)
    assert (len(texts) == 1) == (not whitespace)


def test_a_written_grammar_means_what_it_was_written_from():
    grammar = Grammar(kind="json_schema", spec=json.dumps(SCHEMA))
    checked = check_grammar(grammar_tokenizer(), grammar)
    assert checked.kind == "written"
    assert check_grammar(grammar_tokenizer(), checked) == checked
    assert [walk(checked, seed) for seed in range(5)] == [walk(grammar, seed) for seed in range(5)]


def test_a_grammar_is_compiled_once_and_its_sequences_are_apart():
    compiler, grammar = GrammarCompiler(grammar_tokenizer()), Grammar(kind="choice", spec='["ab", "cd"]')
    assert compiler.find(grammar) is None
    compiled = compiler.compile(grammar)
    assert compiler.compile(Grammar(kind="choice", spec='["ab", "cd"]')) is compiled
    one, other = GrammarMatcher(compiled), GrammarMatcher(compiled)
    one.accept(bpe().encode("ab").ids)
    assert one.is_complete
    assert not other.is_complete
    other.accept(bpe().encode("cd").ids)
    assert other.is_complete


def test_only_grammars_that_nobody_holds_or_asks_for_are_given_up():
    compiler = GrammarCompiler(grammar_tokenizer())
    grammars = [Grammar(kind="choice", spec=json.dumps([f"a{index}"])) for index in range(65)]
    for grammar in grammars[:64]:
        compiler.compile(grammar)
    held = compiler.compile(grammars[1])
    compiler.compile(grammars[0])
    compiler.compile(grammars[64])
    assert compiler.find(grammars[2]) is None
    assert compiler.find(grammars[0]) is not None
    for grammar in grammars[3:]:
        compiler.compile(grammar)
    assert compiler.find(grammars[1]) is held


def test_a_model_without_an_end_token_has_no_structured_output():
    with pytest.raises(ConfigError, match="end token"):
        GrammarTokenizer(Tokenizer(bpe()), 300, [])


def test_any_of_several_end_tokens_may_end_it():
    tokenizer = GrammarTokenizer(Tokenizer(bpe()), bpe().get_vocab_size(), [EOS, PAD])
    matcher = matcher_of(Grammar(kind="regex", spec=""), tokenizer)
    assert allowed(matcher) == [EOS, PAD]
