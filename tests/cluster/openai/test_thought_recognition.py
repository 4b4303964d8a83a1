"""The format of a model's thoughts, told from its template and its tokens."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import models

from cluster.openai.thought_formats import THOUGHT_FORMATS
from cluster.openai.thought_recognition import format_of, recognised, thought_format
from cluster.openai.thoughts import plan_thought
from tests.cluster.openai.test_thoughts import NAMES, PROMPT, read_alike
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer


def model(template: str | None, *tokens: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.add_tokens(list(tokens))
    return Tokenizer(backend, {}, {} if template is None else {"default": ChatTemplate(template, {})})


def shows(kind) -> str:
    """A template that shows past thoughts in a format."""
    before = json.dumps(kind.opens[0])
    after = json.dumps(kind.closes[0] + kind.between)
    return (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}{{ " + before + " ~ m.reasoning_content ~ "
        f"{after} }}}}{{% endif %}}{{{{ {json.dumps(kind.lead)} }}}}{{{{ m.content }}}}{{% endfor %}}"
    )


def marks_of(kind):
    return kind.opens, kind.closes


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("hy_v3", "hy_v4")])
def test_a_format_is_recognised_by_how_past_thoughts_are_shown(name):
    found = recognised(model(shows(THOUGHT_FORMATS[name])))
    assert found is not None
    assert set(marks_of(THOUGHT_FORMATS[name])[1]) & set(marks_of(THOUGHT_FORMATS[found])[1])
    assert THOUGHT_FORMATS[found].opens[0] == THOUGHT_FORMATS[name].opens[0]


PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def test_a_format_is_recognised_by_how_a_prompt_ends():
    for mark in ("<seed:think>", "<think>\n", "<|channel>thought\n"):
        found = recognised(model(PLAIN + "{% if add_generation_prompt %}" + mark + "{% endif %}"))
        assert THOUGHT_FORMATS[found].opens[0].strip() == mark.strip()
    asked = "{% if add_generation_prompt and enable_thinking %}<mm:think>{% endif %}"
    assert recognised(model(PLAIN + asked)) == "minimax_m3"


def test_else_the_template_and_then_the_tokens_tell():
    cuts = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert THOUGHT_FORMATS[recognised(model(cuts))].opens == ("<think>",)
    assert recognised(model(PLAIN, "[THINK]", "[/THINK]")) == "mistral"
    assert recognised(model(None, "<think>", "</think>")) is not None
    assert recognised(model(PLAIN)) is None
    assert thought_format(model(PLAIN)) is None


def test_a_suffix_is_read_off_the_tokens():
    tokenizer = model(PLAIN, "<think:v1>", "</think:v1>")
    assert marks_of(format_of("hy_v3", tokenizer)) == (("<think:v1>",), ("</think:v1>",))
    assert marks_of(thought_format(tokenizer)) == (("<think:v1>",), ("</think:v1>",))


def test_a_recognised_model_thinks_only_where_something_says_so():
    found = thought_format(model(shows(THOUGHT_FORMATS["qwen3"])))
    assert read_alike(plan_thought(found, PROMPT, {}), "Hello") == ("", "Hello")
    assert thought_format(model(PLAIN), "deepseek_r1").is_implied


def test_of_formats_with_the_same_marks_the_frames_of_the_answer_tell():
    think = (
        "{% for m in messages %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    )
    plain = think + "\n{{ m.content }}{% endfor %}"
    assert THOUGHT_FORMATS[recognised(model(plain))] == THOUGHT_FORMATS["qwen3"]
    assert recognised(model(think + "<answer>\n{{ m.content }}\n</answer>{% endfor %}")) == "hunyuan_a13b"
    for name in ("cohere_command3", "cohere_command4"):
        assert recognised(model(shows(THOUGHT_FORMATS[name]))) == name


def test_a_mark_that_ends_thoughts_too_tells_of_formats_that_are_alike_else():
    cuts = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert recognised(model(cuts + "<|tool_calls_section_begin|>")) == "kimi_k2"
    assert recognised(model(shows(THOUGHT_FORMATS["kimi_k2"]), "<|tool_calls_section_begin|>")) == "kimi_k2"
