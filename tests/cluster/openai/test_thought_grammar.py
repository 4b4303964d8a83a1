"""Structures begin after the thought, in every format."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from cluster.openai.format_or_call import format_or_call
from cluster.openai.thought_formats import THOUGHT_FORMATS
from cluster.openai.thought_grammar import written_before, written_lead
from cluster.openai.thought_recognition import format_of
from cluster.openai.thoughts import plan_thought
from messages.request import Grammar
from tests.cluster.openai.test_thoughts import PROMPT, byte_tokenizer
from text.grammar import GrammarCompiler, GrammarMatcher, GrammarTokenizer, check_grammar
from text.tokenizer import Tokenizer

EOS, VOCAB = 256, 320
SCHEMA = Grammar(
    kind="json_schema",
    spec=json.dumps({"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}),
)


def follows(tokenizer, compiled, text):
    """Whether each token of the text is one that the grammar allows, and the output may end there."""
    matcher = GrammarMatcher(compiled)
    for token_id in [*tokenizer.encode(text, add_special_tokens=False), EOS]:
        if not np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[token_id]:
            return False
        matcher.accept([token_id])
    return True


@pytest.mark.parametrize("is_special", [False, True])
def test_a_structure_begins_after_the_thought_in_every_format(is_special):
    tokenizer = byte_tokenizer(is_special=is_special)
    vocabulary = GrammarTokenizer(tokenizer, VOCAB, [EOS])
    compiler = GrammarCompiler(vocabulary)
    checked = check_grammar(vocabulary, SCHEMA)
    for name in THOUGHT_FORMATS:
        kind = format_of(name, tokenizer)
        for is_opened in (False, True):
            plan = plan_thought(kind, PROMPT + kind.opens[0] * is_opened, {})
            before = written_before(plan, tokenizer, lead=written_lead(plan, tokenizer))
            compiled = compiler.compile(msgspec.structs.replace(checked, before=before))
            opened = kind.opens[0] * (not is_opened)
            thought = opened + 'é {"b": <\n' + plan.close + kind.between + kind.lead
            assert follows(tokenizer, compiled, thought + '{"a":1}'), name
            assert not follows(tokenizer, compiled, thought + "no"), name
            assert not follows(tokenizer, compiled, opened + "never ended"), name
            assert follows(tokenizer, compiled, kind.lead + '{"a":1}') == (not plan.begins_inside), name


def test_a_token_that_ends_a_thought_and_begins_the_structure_is_held_to_it():
    tokenizer = byte_tokenizer(is_special=False)
    tokenizer.backend.add_tokens(['></think>{"', "></think>no"])
    tokenizer = Tokenizer(tokenizer.backend)
    vocabulary = GrammarTokenizer(tokenizer, VOCAB, [EOS])
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    grammar = msgspec.structs.replace(SCHEMA, before=written_before(plan, tokenizer, lead=""))
    compiled = GrammarCompiler(vocabulary).compile(grammar)
    assert follows(tokenizer, compiled, 'T></think>{"a":1}')
    assert not follows(tokenizer, compiled, "T></think>no")


def test_without_a_thought_nothing_stands_before_a_structure():
    tokenizer = byte_tokenizer(is_special=False)
    plan = plan_thought(THOUGHT_FORMATS["hunyuan_a13b"], f"{PROMPT}<think>\n\n</think>\n", {})
    assert not plan.begins_inside
    assert written_before(plan, tokenizer, lead="") == ""


def test_a_lead_stands_before_the_structure_and_not_before_a_call():
    tokenizer = byte_tokenizer(is_special=True)
    vocabulary = GrammarTokenizer(tokenizer, VOCAB, [EOS])
    plan = plan_thought(THOUGHT_FORMATS["openai_gptoss"], "<|start|>assistant", {})
    call = "<|channel|>commentary to=functions.f"
    either = format_or_call(SCHEMA, [call], tokenizer, written_lead(plan, tokenizer))
    checked = check_grammar(vocabulary, either)
    before = written_before(plan, tokenizer, lead="")
    compiled = GrammarCompiler(vocabulary).compile(msgspec.structs.replace(checked, before=before))
    thought = "<|channel|>analysis<|message|>T<|end|><|start|>assistant"
    final = '<|channel|>final<|message|>{"a":1}'
    for text in (final, thought + final, f"{call}<|message|>", f"{thought}{call}<|message|>"):
        assert follows(tokenizer, compiled, text)
    assert not follows(tokenizer, compiled, thought + '{"a":1}')
