"""Past calls, in the form in which a template takes them."""

from __future__ import annotations

import json

import pytest

from messages.errors import RequestError
from text.chat_template import ChatTemplate
from text.past_calls import PastCallForm

START = "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}{% set f = c.function %}"
END = "{% endfor %}{% if not m.tool_calls %}{{ m.content }}{% endif %}{% endfor %}"
WANTS_OBJECT = START + "{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}" + END
TAKES_BOTH = START + "{{ f.arguments | tojson }}" + END
CONCATENATES = START + "{{ 'call ' + f.name + ' ' + f.arguments }}" + END
PUTS_IN = START + "{{ f.arguments }}" + END
ONLY_NULL = (
    "{% for m in messages %}{% if m.content is none %}"
    + START.partition("%}")[2]
    + "{{ f.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
SHORT_IDS = (
    START + "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ c.id }}"
    "{{ f.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}{{ m.content }}{% endfor %}"
)
NAMED = (
    START
    + "{{ f.arguments | tojson }}{% endfor %}{% if m.role == 'tool' and not m.name %}{{ raise_exception('name') }}"
    "{% endif %}{{ m.name }}{{ m.content }}{% endfor %}"
)
SINGLE = (
    "{% for m in messages %}{% if (m.tool_calls or []) | length > 1 %}{{ raise_exception('one') }}"
    "{% endif %}{% endfor %}" + TAKES_BOTH
)


def call(arguments, name="f", call_id="call_of_a_client"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(*calls):
    results = [{"role": "tool", "tool_call_id": each["id"], "content": f"result {i}"} for i, each in enumerate(calls)]
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": list(calls)}, *results]


def shown(template, *calls):
    return ChatTemplate(template, {}).render(conversation(*calls), add_generation_prompt=False)


@pytest.mark.parametrize("arguments", ['{"a": "é"}', {"a": "é"}])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (WANTS_OBJECT, "a=é;"),
        (TAKES_BOTH, '{"a": "é"}'),
        (CONCATENATES, 'call f {"a": "é"}'),
        (PUTS_IN, '{"a": "é"}'),
        (ONLY_NULL, '{"a": "é"}'),
    ],
)
def test_arguments_are_an_object_or_a_text_as_the_template_wants_them(template, text, arguments):
    assert text in shown(template, call(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "{broken",
        "[1]",
        "7",
        "null",
        '{"a": "\\ud800"}',
        '{"\\udc00": [{"b": "x\\ud83d"}]}',
        '{"a": NaN}',
        "[" * 5000,
    ],
)
@pytest.mark.parametrize(
    "template", [WANTS_OBJECT, TAKES_BOTH, CONCATENATES, PUTS_IN, ONLY_NULL, SHORT_IDS, NAMED, SINGLE]
)
def test_whatever_a_model_once_wrote_is_accepted_for_ever(template, arguments):
    shown(template, call(arguments)).encode()


def test_half_a_surrogate_pair_becomes_a_replacement_character_and_a_pair_its_character():
    assert '{"a": "\ufffd😀"}' in shown(TAKES_BOTH, call('{"a": "\\ud800\\ud83d\\ude00"}'))


def test_arguments_that_are_no_object_are_shown_as_they_are_where_that_can_be():
    assert json.dumps("{broken") in shown(TAKES_BOTH, call("{broken"))
    assert "arguments={broken;" in shown(WANTS_OBJECT, call("{broken"))


def test_ids_are_as_short_as_the_template_wants_them_and_stay_apart():
    text = shown(SHORT_IDS, call({}, call_id="call_1"), call({}, call_id="call_2"), call({}, call_id="Abc123xyz"))
    assert "call_1" not in text
    assert "Abc123xyz{}" in text
    first, second = (text.split("{}")[number][-9:] for number in (0, 1))
    assert first != second
    assert text.count(first) == text.count(second) == 2, "of the call and of its result"


def test_results_are_named_where_the_template_wants_it_and_nowhere_else():
    assert "fresult 0" in shown(NAMED, call({}))
    assert "name" not in PastCallForm().fitted(conversation(call({})))[2]


def test_several_calls_become_messages_of_one_where_the_template_takes_no_more():
    calls = [call({"n": number}, call_id=f"call_{number}") for number in range(3)]
    messages = conversation(*calls)
    messages[1]["content"] = "Look."
    messages[2:] = [messages[4], messages[2], messages[3]]
    text = ChatTemplate(SINGLE, {}).render(messages, add_generation_prompt=False)
    steps = [f'<assistant>{{"n": {number}}}<tool>result {number}' for number in range(3)]
    assert text == "<user>?" + "".join(steps)
    fitted = PastCallForm(has_single_calls=True).fitted(messages)
    assert [message["content"] for message in fitted[1::2]] == ["Look.", "", ""]


def test_a_template_that_refuses_calls_says_so_when_a_request_has_one():
    refuses = "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    with pytest.raises(RequestError, match="no tools"):
        shown(refuses, call({}))
    assert ChatTemplate(refuses, {}).render([{"role": "user", "content": "?"}]) == ""
