"""The format of a model's calls, told from its template and its tokens."""

from __future__ import annotations

import logging

import pytest
import tokenizers

from cluster.openai.call_formats import FORMATS
from cluster.openai.call_recognition import format_of, recognised, tool_format
from tests.cluster.openai.call_templates import MORE_TEMPLATES, TEMPLATES
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def model(template: str | None, *tokens: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    backend.add_tokens(list(tokens))
    return Tokenizer(backend, {}, {} if template is None else {"default": ChatTemplate(template, {})})


@pytest.mark.parametrize(("kind", "template"), [*TEMPLATES.items(), *MORE_TEMPLATES])
def test_the_format_of_a_past_call_is_the_models(kind, template):
    found = recognised(model(template))
    assert found is not None
    assert FORMATS[found] == FORMATS[kind]


def test_a_past_call_that_an_earlier_template_shows_only_in_one_form_is_seen_too():
    call = (
        '<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments + \'}\n</tool_call>'
    )
    calls = f"{{% for c in m.tool_calls %}}{{{{ '{call}' }}}}{{% endfor %}}"
    shows = f"{{% if m.tool_calls and m.content is none %}}{calls}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    concatenates = f"{{% for m in messages %}}{shows}{{% endfor %}}"
    assert recognised(model(concatenates)) == "hermes"


def test_without_past_calls_what_the_model_is_told_of_tools_counts():
    told = '{% if tools %}Answer with <tool_call>\n{"name": ...}\n</tool_call>{% endif %}'
    assert recognised(model(told + PLAIN)) == "hermes"
    told = "{% if tools %}<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>{% endif %}"
    assert recognised(model(told + PLAIN)) == "qwen3_xml"
    told = "{% if tools %}respond with <|tool_call|> followed by a JSON list{% endif %}"
    assert recognised(model(told + PLAIN)) == "granite"


def test_what_a_template_says_without_tools_tells_nothing():
    assert recognised(model("<tool_call>" + PLAIN.replace("m.content", "m.content ~ '<tool_call>'"))) is None


def test_past_calls_without_a_mark_are_taken_for_what_the_model_is_told():
    bare = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}" + (
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}{% endfor %}'
    )
    assert FORMATS[recognised(model(bare))] == FORMATS["llama3_json"]
    assert recognised(model("{% if tools %}prefix calls with functools[...]{% endif %}" + bare)) == "phi4_mini_json"


def test_a_template_that_refuses_calls_may_still_have_their_marks_in_it():
    refuses = (
        "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no') }}<|tool_calls_section_begin|>"
        "<|tool_call_begin|>{% endif %}{{ m.content }}{% endfor %}"
    )
    assert recognised(model(refuses)) == "kimi_k2"


def test_tokens_tell_where_only_one_format_has_them():
    assert recognised(model(PLAIN, "<|tool_call_start|>")) == "lfm2"
    assert recognised(model(PLAIN, "<tool_call>")) is None
    assert recognised(model(PLAIN, "<｜tool▁calls▁begin｜>")) is None


def test_a_suffix_is_read_off_the_tokens():
    template = TEMPLATES["hy_v3"]
    for tag in ("tool_calls", "tool_call", "tool_sep", "arg_key", "arg_value"):
        template = template.replace(f"{tag}>", f"{tag}:x>")
    tokenizer = model(template, "<tool_calls:x>")
    assert recognised(tokenizer) == "hy_v3"
    assert format_of("hy_v3", tokenizer).opens == ("<tool_calls:x>",)


@pytest.mark.parametrize(("shows", "level"), [("{{ tools }}", logging.WARNING), ("", logging.INFO)])
def test_a_format_that_is_not_seen_is_named_in_one_line_that_lists_the_choices(caplog, shows, level):
    with caplog.at_level(logging.INFO):
        assert tool_format(model(shows + PLAIN)) is None
    [record] = caplog.records
    assert record.levelno == level
    assert "\n" not in record.getMessage()
    assert all(name in record.getMessage() for name in FORMATS)


def test_a_format_that_is_named_and_a_model_without_a_template_need_no_word(caplog):
    assert tool_format(model(PLAIN), "hermes") == FORMATS["hermes"]
    assert tool_format(model(None)) is None
    assert not caplog.records
