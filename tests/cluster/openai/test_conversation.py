"""Messages and tools as a chat template sees them, and what is refused before it does."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from cluster.openai.conversation import rendered, template_tools
from cluster.openai.protocol import (
    CalledFunction,
    ChatMessage,
    ContentPart,
    FunctionSpec,
    PastToolCall,
    TokenizeRequest,
    Tool,
)
from messages.errors import RequestError
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer

USER = ChatMessage("user", "Hi")
ALL_IT_IS_GIVEN = "{{ [messages, tools, add_generation_prompt, extra] | tojson }}"


@pytest.fixture
def speaking(tokenizer: Tokenizer) -> Callable[[str], Tokenizer]:
    """The tokenizer with another chat template."""
    special = tokenizer.special_tokens
    return lambda template: Tokenizer(tokenizer.backend, special, {"default": ChatTemplate(template, special)})


@pytest.fixture
def seen(speaking):
    """What the template is given of messages and fields."""

    def see(*messages: ChatMessage, tools: list | None = None, **fields: object) -> list:
        fields = {"chat_template_kwargs": {"extra": None}, **fields}
        return json.loads(
            rendered(speaking(ALL_IT_IS_GIVEN), messages, TokenizeRequest(**fields), tools)  # type: ignore[arg-type]
        )

    return see


def refusal(call: Callable[[], object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call()
    return caught.value


# ------------------------------------------------------------------------------------------------------------ messages


def test_only_what_a_message_has_is_in_it_and_developers_are_the_system(seen):
    [messages, *_] = seen(
        ChatMessage("developer", "Be brief"),
        ChatMessage("user", "Hi", name="Ann"),
        ChatMessage("assistant", "Yes", reasoning_content="Hm"),
        ChatMessage("tool", "3", tool_call_id="c1"),
    )
    assert messages[0] == {"role": "system", "content": "Be brief"}
    assert messages[1] == {"role": "user", "content": "Hi", "name": "Ann"}
    assert messages[2]["reasoning_content"] == "Hm"
    assert messages[3] == {"role": "tool", "content": "3", "tool_call_id": "c1"}


def test_parts_of_text_stay_parts_for_a_template_that_reads_them(speaking):
    parts = "{% for p in m.content %}{{ p.text }}{{ '' if loop.last else '|' }}{% endfor %}"
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}PARTS{% endif %}{% endfor %}"
    )
    message = ChatMessage("user", [ContentPart("text", "a"), ContentPart("text", "b")])
    assert rendered(speaking(template.replace("PARTS", parts)), [message], TokenizeRequest(), None) == "a|b"


def test_an_assistant_may_say_nothing_and_nobody_else(seen):
    call = PastToolCall(CalledFunction("f", '{"a": 1}'), id="c1")
    [messages, *_] = seen(USER, ChatMessage("assistant", tool_calls=[call]), ChatMessage("assistant"))
    assert messages[1]["content"] == messages[2]["content"] == ""
    assert "tool_calls" not in messages[2]
    error = refusal(lambda: seen(USER, ChatMessage("tool")))
    assert (error.param, error.code) == ("messages[1].content", "missing_required_field")


@pytest.mark.parametrize(
    ("arguments", "shown"), [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), (None, {}), ("", {}), ({}, {})]
)
def test_past_calls_have_arguments_that_a_template_can_index(seen, arguments, shown):
    call = PastToolCall(CalledFunction("f", arguments), id="c1", type="whatever")
    [messages, *_] = seen(USER, ChatMessage("assistant", tool_calls=[call]))
    assert messages[1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": shown}}
    ]


def test_parts_that_clients_send_back_of_an_assistant_are_text_and_thoughts_apart(seen):
    parts = [
        ContentPart("thinking", thinking="Hm."),
        "One",
        ContentPart("output_text", "two"),
        ContentPart("input_text", "three"),
        ContentPart("refusal", refusal="no"),
    ]
    [messages, *_] = seen(USER, ChatMessage("assistant", parts))
    assert messages[1]["content"] == "One\ntwo\nthree\nno"
    assert messages[1]["reasoning_content"] == "Hm."


@pytest.mark.parametrize("nothing", [None, "", []])
def test_a_refusal_in_place_of_content_is_what_was_said(seen, nothing):
    [messages, *_] = seen(USER, ChatMessage("assistant", nothing, refusal="I will not."), USER)
    assert messages[1] == {"role": "assistant", "content": "I will not."}


@pytest.mark.parametrize("name", ["prefix", "partial"])
def test_a_message_that_others_would_go_on_from_is_refused_by_the_field_that_says_so(seen, name):
    error = refusal(lambda: seen(USER, ChatMessage("assistant", "Once", **{name: True})))
    assert (error.param, "continue_final_message" in error.message) == (f"messages[1].{name}", True)
    [messages, *_] = seen(USER, ChatMessage("assistant", "Once", **{name: False}))
    assert messages[1] == {"role": "assistant", "content": "Once"}


def test_a_call_under_its_older_name_is_one_and_a_functions_answer_may_be_nothing(seen):
    call = CalledFunction("f", '{"a": 1}')
    [messages, *_] = seen(USER, ChatMessage("assistant", function_call=call), ChatMessage("function", name="f"))
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert messages[2] == {"role": "function", "content": "", "name": "f"}


@pytest.mark.parametrize(
    ("parts", "param", "words"),
    [
        ([ContentPart("text", "a"), ContentPart("image_url")], "messages[1].content[1].type", "no images"),
        ([ContentPart("text")], "messages[1].content[0].text", "missing"),
        ([ContentPart("refusal", "a")], "messages[1].content[0].refusal", "missing"),
    ],
)
def test_a_part_that_is_no_text_is_named_by_its_place(seen, parts, param, words):
    error = refusal(lambda: seen(USER, ChatMessage("user", parts)))
    assert error.param == param
    assert words in error.message


def test_a_conversation_has_a_message(seen):
    assert refusal(seen).param == "messages"


@pytest.mark.parametrize(
    ("fields", "opens"),
    [
        ({}, True),
        ({"add_generation_prompt": True}, True),
        ({"add_generation_prompt": False}, False),
        ({"continue_final_message": False}, True),
    ],
)
def test_the_assistants_turn_is_begun_unless_the_request_says_otherwise(seen, fields, opens):
    assert seen(USER, **fields)[2] is opens


def test_a_message_that_is_continued_opens_no_other_turn(speaking):
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<new>{% endif %}"
    messages = [USER, ChatMessage("assistant", "I am")]
    fields = TokenizeRequest(continue_final_message=True)
    assert rendered(speaking(template), messages, fields, None) == "<user>Hi</><assistant>I am"


def test_tools_and_variables_of_the_client_reach_the_template(seen):
    tools = template_tools([Tool(FunctionSpec("f"))])
    assert seen(USER, tools=tools, chat_template_kwargs={"extra": [1]})[1::2] == [tools, [1]]


def test_a_clients_own_template_is_used_where_the_operator_allows_it(speaking):
    fields = TokenizeRequest(chat_template="<{{ messages[0].content }}>")
    tokenizer = speaking("{{ messages }}")
    assert rendered(tokenizer, [USER], fields, None, takes_template=True) == "<Hi>"
    error = refusal(lambda: rendered(tokenizer, [USER], fields, None))
    assert (error.param, error.code) == ("chat_template", "not_allowed")
    for number in range(100):
        several = TokenizeRequest(chat_template=f"{number}")
        assert rendered(tokenizer, [USER], several, None, takes_template=True) == f"{number}"


def test_a_clients_template_that_is_none_names_the_line(speaking):
    fields = TokenizeRequest(chat_template="ok\n{% if %}")
    error = refusal(lambda: rendered(speaking(""), [USER], fields, None, takes_template=True))
    assert error.param == "chat_template"
    assert "line 2" in error.message


# --------------------------------------------------------------------------------------------------------------- tools


def test_what_a_client_leaves_out_of_a_tool_stays_out():
    schema = {"type": "object"}
    assert template_tools([Tool(FunctionSpec("f")), Tool(FunctionSpec("g", "", schema, strict=False))]) == [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "function": {"name": "g", "description": "", "parameters": schema, "strict": False}},
    ]
    assert template_tools([]) == []


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        (Tool(FunctionSpec("g"), type="retrieval"), "tools[1].type"),
        (Tool(type="custom"), "tools[1].type"),
        (Tool(), "tools[1].function"),
        (Tool(FunctionSpec("f", "another")), "tools[1].function.name"),
    ],
)
def test_a_tool_that_is_no_function_or_whose_name_is_taken_is_named(tool, param):
    assert refusal(lambda: template_tools([Tool(FunctionSpec("f")), tool])).param == param
