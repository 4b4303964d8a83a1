"""Thoughts as items of a response."""

from __future__ import annotations

import pytest

from tests.cluster.openai.test_reasoning import THINKING, TOOL

ASKED = {"model": "tiny", "input": "Q"}
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.fixture
def thinker(serve):
    server = serve(THINKING)
    server.backend.says("Hm.\n</think>\n\nHello")
    return server


def test_a_thought_is_an_item_before_the_message_whole_and_streamed(thinker):
    responses = thinker.client().responses
    with responses.stream(**ASKED) as stream:
        events = list(stream)
    for response in (responses.create(**ASKED), events[-1].response):
        thought, message = response.output
        assert (thought.type, thought.status, thought.summary) == ("reasoning", "completed", [])
        assert [(part.type, part.text) for part in thought.content] == [("reasoning_text", "Hm.\n")]
        assert message.content[0].text == "\n\nHello"
        assert response.usage.output_tokens_details.reasoning_tokens == len("Hm.\n")
    of_thought = [event for event in events if getattr(event, "output_index", None) == 0]
    assert {event.item_id for event in of_thought if hasattr(event, "item_id")} == {events[-1].response.output[0].id}
    assert [event.type for event in of_thought if event.type != "response.reasoning_text.delta"] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    deltas = [event.delta for event in of_thought if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "Hm.\n"
    assert all(deltas)
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_call_may_follow_a_thought_and_both_are_shown_to_the_next_turn(thinker):
    thinker.backend.says(f"Hm.\n</think>\n\n{CALL}")
    tool = {"type": "function", **TOOL["function"]}
    first = thinker.client().responses.create(**ASKED, tools=[tool])
    assert [item.type for item in first.output if item.type != "message"] == ["reasoning", "function_call"]
    call = first.output[-1]
    given = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    thinker.client().responses.create(
        model="tiny", input=[given], tools=[tool], previous_response_id=first.id, max_output_tokens=1
    )
    prompt = thinker.prompt()
    assert "<think>Hm." in prompt
    assert prompt.index("<think>Hm.") < prompt.index('"name": "f"') < prompt.index("<tool>5")


def test_a_thought_that_is_cut_off_is_incomplete_and_nothing_follows(thinker):
    response = thinker.client().responses.create(**ASKED, max_output_tokens=3)
    [thought] = response.output
    assert (thought.type, thought.status, thought.content[0].text) == ("reasoning", "incomplete", "Hm.")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_only_the_text_of_a_message_has_log_probabilities(thinker):
    response = thinker.client().responses.create(**ASKED, include=["message.output_text.logprobs"])
    told = "".join(entry.token for entry in response.output[1].content[0].logprobs)
    assert "Hello" in told
    assert "Hm" not in told
