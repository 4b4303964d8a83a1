"""Items of a conversation as chat messages."""

from __future__ import annotations

import pytest

from cluster.openai.protocol import ChatMessage, ContentPart
from cluster.openai.responses.items import chat_messages
from cluster.openai.responses.protocol import InputItem, InputPart
from messages.errors import RequestError


def messages_of(*items: InputItem):
    return chat_messages((f"input[{index}]", item) for index, item in enumerate(items))


def said(text: str) -> InputItem:
    return InputItem(role="assistant", content=[InputPart("output_text", text)])


def called(call_id: str) -> InputItem:
    return InputItem(type="function_call", call_id=call_id, name="f", arguments="{}")


def result(call_id: str) -> InputItem:
    return InputItem(type="function_call_output", call_id=call_id, output="x")


def thought(text: str) -> InputItem:
    return InputItem(type="reasoning", content=[InputPart("reasoning_text", text)])


USER = InputItem(role="user", content="Hi")


def shape(message: ChatMessage):
    calls = [call.id for call in message.tool_calls or ()]
    return (message.role, message.reasoning_content, message.content, calls)


def test_what_was_thought_said_and_called_is_one_turn():
    messages, places = messages_of(USER, thought("Hm."), said("I look."), called("a"), called("b"), result("a"))
    assert [shape(message) for message in messages] == [
        ("user", None, "Hi", []),
        ("assistant", "Hm.", "I look.", ["a", "b"]),
        ("tool", None, "x", []),
    ]
    assert places == ["input[0]", "input[1]", "input[5]"]


def test_text_after_a_call_belongs_to_its_turn():
    messages, _ = messages_of(USER, said("One."), called("a"), said("Two."), result("a"))
    assert messages[1].content == [ContentPart("text", "One."), ContentPart("text", "Two.")]
    assert [message.role for message in messages] == ["user", "assistant", "tool"]


def test_two_messages_in_a_row_stay_two():
    messages, _ = messages_of(USER, said("One."), said("Two."), USER)
    assert [message.content for message in messages] == ["Hi", "One.", "Two.", "Hi"]


def test_a_thought_that_led_to_nothing_is_left_out():
    messages, places = messages_of(USER, thought("Hm."), USER, thought("Hm?"))
    assert [message.role for message in messages] == ["user", "user"]
    assert places == ["input[0]", "input[2]"]


def test_thoughts_are_read_from_content_else_from_the_summary():
    summary = [InputPart("summary_text", "short"), InputPart("summary_text", "and sweet")]
    messages, _ = messages_of(InputItem(type="reasoning", summary=summary), said("One."))
    assert messages[0].reasoning_content == "short\nand sweet"
    messages, _ = messages_of(InputItem(type="reasoning", summary=[], encrypted_content="x"), said("One."))
    assert messages[0].reasoning_content is None


def test_refusals_are_text():
    messages, _ = messages_of(InputItem(role="assistant", content=[InputPart("refusal", refusal="No.")]))
    assert messages[0].content == "No."


@pytest.mark.parametrize(
    ("item", "param"),
    [
        (InputItem(content="x"), "input[0].role"),
        (InputItem(role="tool", content="x"), "input[0].role"),
        (InputItem(role="user"), "input[0].content"),
        (InputItem(role="user", content=[InputPart("input_image")]), "input[0].content[0].type"),
        (InputItem(role="user", content=[InputPart("input_text")]), "input[0].content[0].text"),
        (InputItem(role="user", content=[InputPart("refusal")]), "input[0].content[0].refusal"),
        (InputItem(type="function_call", call_id="a", name="f"), "input[0].arguments"),
        (InputItem(type="function_call", call_id="a", arguments="{}"), "input[0].name"),
        (InputItem(type="function_call", name="f", arguments="{}"), "input[0].call_id"),
        (InputItem(type="function_call_output", output="x"), "input[0].call_id"),
        (InputItem(type="function_call_output", call_id="a", output="x"), "input[0].call_id"),
        (InputItem(type="reasoning", content=[InputPart("output_text", "x")]), "input[0].content[0].type"),
        (InputItem(type="reasoning", summary=[InputPart("text", "x")]), "input[0].summary[0].type"),
        (InputItem(type="web_search_call"), "input[0].type"),
        (InputItem(type="computer_call_output", call_id="a"), "input[0].type"),
        (InputItem(type="custom_tool_call", call_id="a", name="f"), "input[0].type"),
        (InputItem(type="mcp_call"), "input[0].type"),
    ],
)
def test_what_is_no_item_is_told_by_its_place(item, param):
    with pytest.raises(RequestError) as raised:
        messages_of(item)
    assert (raised.value.param, raised.value.status) == (param, 400)
    assert raised.value.message.startswith(param)


def test_a_call_without_its_output_field_is_told():
    with pytest.raises(RequestError, match=r"^input\[1\]\.output: missing"):
        messages_of(called("a"), InputItem(type="function_call_output", call_id="a"))
