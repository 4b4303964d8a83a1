"""What a choice got, split into thoughts, content and calls."""

from __future__ import annotations

import pytest

from cluster.openai.call_formats import FORMATS
from cluster.openai.output_parser import OutputParser, ThoughtDelta
from cluster.openai.thought_formats import THOUGHT_FORMATS
from cluster.openai.thoughts import plan_thought
from cluster.openai.tool_calls import CallDelta
from cluster.openai.tools import ToolPlan
from cluster.openai.transcript import Delta
from tests.cluster.openai.test_thoughts import read_alike


def test_calls_begin_after_the_thought_and_pieces_come_in_order():
    tools = ToolPlan(template_tools=[], kind=FORMATS["hermes"])
    parser = OutputParser(tools)
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert parser.split(Delta(reasoning=call)) == [ThoughtDelta(call)]
    assert not parser.has_calls
    pieces = parser.split(Delta(reasoning="T", text=f"A{call}", finish_reason="stop"))
    assert pieces == [ThoughtDelta("T"), "A", CallDelta(0, "f", "{}")]
    assert OutputParser(tools, shows_thoughts=False).split(Delta(reasoning="T", text="A")) == ["A"]


HARMONY_CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"


@pytest.mark.parametrize("start", ["", "<|start|>assistant"])
def test_what_a_parser_of_calls_reads_is_left_to_it(start):
    kind = FORMATS["openai"]
    plan = plan_thought(THOUGHT_FORMATS["openai_gptoss"], "<|start|>assistant", {}, call_marks=kind.marks)
    text = f"<|channel|>analysis<|message|>T<|end|>{start}{HARMONY_CALL}"
    thought, content = read_alike(plan, text)
    parser = OutputParser(ToolPlan(template_tools=[], kind=kind))
    pieces = parser.split(Delta(reasoning=thought, text=content, finish_reason="stop"))
    assert pieces == [ThoughtDelta("T"), CallDelta(0, "f", "{}")]
