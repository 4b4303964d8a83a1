"""Thoughts of past messages, in the form that a template takes."""

from __future__ import annotations

import pytest

from text.chat_template import ChatTemplate

QUESTION = {"role": "user", "content": "Q"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "R"}
NAMED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.NAME %}<think>{{ m.NAME }}</think>{% endif %}{{ m.content }}"
    "{% endfor %}"
)
#: takes content as a list of parts, a thought among them
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'thinking' %}[THINK]{{ p.thinking }}[/THINK]{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
#: refuses a thought beside content in a message with calls
ONE_OF_BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}"
    "{% if m.content and m.thinking %}{{ raise_exception('one of both') }}{% endif %}"
    "[{{ m.thinking or m.content }}]{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% else %}{% if m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("sent", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_found_under_whichever_name_the_template_reads(read, sent):
    template = ChatTemplate(NAMED.replace("NAME", read), {})
    text = template.render([QUESTION, {"role": "assistant", "content": "A", sent: "T"}])
    assert text == "<user>Q<assistant><think>T</think>A"


def test_a_template_that_takes_thoughts_as_parts_gets_them_so():
    template = ChatTemplate(PARTS, {})
    assert template.render([QUESTION, {"role": "assistant", "content": "A", "reasoning": "T"}]) == (
        "<user>Q<assistant>[THINK]T[/THINK]A"
    )
    assert template.render([QUESTION, {"role": "assistant", "content": "A"}]) == "<user>Q<assistant>A"
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    assert template.render([{"role": "assistant", "content": parts, "reasoning": "T"}]) == (
        "<assistant>[THINK]T[/THINK]AB"
    )
    assert template.render([{"role": "assistant", "content": "", "reasoning": "T"}]) == "<assistant>[THINK]T[/THINK]"


def test_content_goes_with_the_thought_where_a_call_may_have_one_of_both():
    template = ChatTemplate(ONE_OF_BOTH, {})
    message = {"role": "assistant", "content": "A", "tool_calls": [CALL], "reasoning_content": "T"}
    assert template.render([QUESTION, message, RESULT]) == '<user>Q<assistant>[T\n\nA]{"a": "b"}<tool>R'
    without = {**message, "content": ""}
    assert template.render([QUESTION, without, RESULT]) == '<user>Q<assistant>[T]{"a": "b"}<tool>R'
    assert template.render([QUESTION, {"role": "assistant", "content": "A", "reasoning": "T"}]) == (
        "<user>Q<assistant>[T]A"
    )


def test_a_template_that_shows_no_thoughts_is_left_alone():
    template = ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}", {})
    assert template.render([QUESTION, {"role": "assistant", "content": "A", "reasoning": "T"}]) == "Q;A;"
