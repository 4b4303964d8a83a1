"""Events of answers, folded: what each endpoint sends."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.answers import AnswerReader, Fault, refusal


def reader(max_tokens: int = 2) -> AnswerReader:
    return AnswerReader(began_s=10.0, num_sent_tokens=0, max_tokens=max_tokens, wants_all=False)


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def test_times_are_of_events_with_tokens():
    answer = reader()
    answer.feed(event(choices=[{"delta": {"role": "assistant", "content": ""}}]), 10.1)
    answer.feed(event(choices=[{"delta": {"reasoning_content": "hm"}}]), 10.25)
    answer.feed(event(choices=[{"delta": {"content": "x"}, "finish_reason": "stop"}]), 10.75)
    answer.feed(event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2}) + b"data: [DONE]\n\n", 11.0)
    outcome = answer.close(11.0)
    assert (outcome.ttft_s, outcome.gaps_s, outcome.e2e_s) == (0.25, [0.5], 1.0)
    assert (outcome.num_prompt_tokens, outcome.num_output_tokens, outcome.num_cached_tokens) == (3, 2, None)


def test_responses_are_read_by_their_own_events():
    answer = reader()
    answer.feed(b"event: response.created\n" + event(type="response.created", response={"usage": None}), 10.1)
    answer.feed(event(type="response.output_text.delta", delta="x"), 10.5)
    used = {"input_tokens": 8, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4}}
    answer.feed(event(type="response.completed", response={"usage": used}), 11.0)
    outcome = answer.close(11.0)
    assert (outcome.ttft_s, outcome.num_prompt_tokens, outcome.num_cached_tokens) == (0.5, 8, 4)


def test_a_failed_response_is_a_fault_with_its_message():
    failed = {"error": {"message": "no room"}}
    with pytest.raises(Fault, match="error in the stream") as raised:
        reader().feed(event(type="response.failed", response=failed), 10.1)
    assert raised.value.detail == "no room"


def test_an_answer_that_stopped_by_itself_may_be_short():
    answer = reader(max_tokens=9)
    answer.feed(event(choices=[{"text": "x", "finish_reason": "stop"}]), 10.1)
    answer.feed(event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 1}), 10.1)
    assert answer.close(10.2).num_output_tokens == 1


@given(st.binary(max_size=300), st.integers(1, 50))
def test_any_bytes_are_an_answer_or_a_fault(data, size):
    answer = reader()
    with contextlib.suppress(Fault):
        for begin in range(0, len(data), size):
            answer.feed(data[begin : begin + size], 10.0)
        answer.close(11.0)


@pytest.mark.slow
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3))
def test_any_json_is_an_answer_or_a_fault(value):
    for name in ("choices", "usage", "error", "kvray", "type", "response"):
        answer = reader()
        with contextlib.suppress(Fault):
            answer.feed(b"data: " + json.dumps({name: value}).encode() + b"\n\n", 10.0)
            answer.close(11.0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "no", "code": 3}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"message": "no"}', "no"),
        (b"[1]", "[1]"),
        (b"<html>", "<html>"),
        (b"\xff", "\ufffd"),
    ],
)
def test_what_a_refusal_says_is_found(body, said):
    assert refusal(body) == said
