"""Tools through HTTP: shown to the template, forced by a grammar, read back."""

from __future__ import annotations

import json

import pytest

USER = [{"role": "user", "content": "Weather?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TREE = {
    "type": "function",
    "function": {
        "name": "plant",
        "parameters": {
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/Tree"}},
            "$defs": {"Tree": {"type": "object", "properties": {"child": {"$ref": "#/$defs/Tree"}}}},
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
LLAMA_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{{ m.content }}{% endfor %}{{ tools }}"
)
MISTRAL_TEMPLATE = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}]{% endif %}'
    "{{ m.content }}{% endfor %}{{ tools }}"
)


def create(server, **fields):
    return server.client().chat.completions.create(model="tiny", messages=USER, **fields)


def test_tools_are_shown_and_a_call_is_read_back(server):
    server.backend.says(f"I look.\n{CALL}")
    reply = create(server, tools=[WEATHER])
    assert server.prompt().startswith("<tools>{")
    assert '"name": "get_weather"' in server.prompt()
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert call.id.startswith("call_")


def test_a_reply_of_calls_only_has_no_content(server):
    server.backend.says(CALL)
    assert create(server, tools=[WEATHER]).choices[0].message.content is None


def test_calls_stream_as_deltas(server):
    server.backend.says(f"I look.\n{CALL}{CALL}", per_chunk=3)
    content, ids, names, arguments, finish = "", [], [], {}, []
    for chunk in create(server, tools=[WEATHER], stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        finish += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or []:
            if call.id:
                ids.append(call.id)
                names.append(call.function.name)
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert content == "I look."
    assert names == ["get_weather", "get_weather"]
    assert len(set(ids)) == 2
    assert [json.loads(arguments[i]) for i in (0, 1)] == [{"city": "Oslo"}] * 2
    assert finish == ["tool_calls"]


def test_plain_text_with_tools_stays_text(server):
    reply = create(server, tools=[WEATHER])
    assert reply.choices[0].message.content == "Hello, world"
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].finish_reason == "stop"


def test_without_tools_marks_are_only_text(server):
    server.backend.says(CALL)
    assert create(server).choices[0].message.content == CALL
    assert create(server, tools=[WEATHER], tool_choice="none").choices[0].message.content == CALL
    assert "<tools>" not in server.prompt()


def test_one_call_at_most_when_parallel_calls_are_off(server):
    server.backend.says(CALL + CALL)
    assert len(create(server, tools=[WEATHER], parallel_tool_calls=False).choices[0].message.tool_calls) == 1


def test_a_required_call_is_forced_by_a_grammar(server):
    server.backend.says('[{"name": "get_weather", "parameters": {"city": "Rome"}}]')
    reply = create(server, tools=[WEATHER, TREE], tool_choice="required")
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.tool_calls[0].function.name == "get_weather"
    spec = server.backend.requests[0].params.grammar.spec
    assert '{"const": "get_weather"}' in spec
    assert '{"const": "plant"}' in spec


def test_required_schemas_keep_their_own_references(tokenizer):
    import msgspec

    from cluster.openai.protocol import ChatRequest
    from cluster.openai.tools import plan_tools
    from text.grammar import CompiledGrammar, GrammarMatcher, GrammarTokenizer

    body = {"messages": USER, "tools": [WEATHER, TREE], "tool_choice": "required"}
    plan = plan_tools(msgspec.convert(body, ChatRequest), "hermes")
    grammars = GrammarTokenizer(tokenizer, 264, [tokenizer.eos_token_id])
    compiled = CompiledGrammar(grammars, plan.grammar)

    def accepts(text: str) -> bool:
        matcher = GrammarMatcher(compiled)
        for token_id in tokenizer.encode(text, add_special_tokens=False):
            if not matcher.mask()[token_id // 32] >> (token_id % 32) & 1:
                return False
            matcher.accept([token_id])
        return matcher.is_complete

    assert accepts('[{"name":"plant","parameters":{"tree":{"child":{"child":{}}}}}]')
    assert accepts('[{"name":"get_weather","parameters":{"city":"x"}}]')
    assert not accepts('[{"name":"plant","parameters":{"tree":3}}]')
    assert not accepts('[{"name":"get_weather","parameters":{}}]')
    assert not accepts("[]")


def test_a_named_call_is_its_arguments(server):
    server.backend.says('{"city": "Rome"}')
    named = {"type": "function", "function": {"name": "get_weather"}}
    reply = create(server, tools=[WEATHER], tool_choice=named)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.tool_calls[0].function.arguments == '{"city": "Rome"}'
    schema = json.loads(server.backend.requests[0].params.grammar.spec)[0]["json_schema"]
    assert schema["$defs"]["d0"] == WEATHER["function"]["parameters"]
    deltas = [c.choices[0].delta for c in create(server, tools=[WEATHER], tool_choice=named, stream=True)]
    assert "".join(d.tool_calls[0].function.arguments for d in deltas if d.tool_calls) == '{"city": "Rome"}'


def test_past_calls_and_results_are_rendered(server):
    messages = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    server.client().chat.completions.create(model="tiny", messages=messages)
    assert CALL in server.prompt()
    assert "<tool>rain" in server.prompt()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (LLAMA_TEMPLATE, '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Oslo"}}'),
        (LLAMA_TEMPLATE, '{"name": "get_weather", "parameters": {"city": "Oslo"}}'),
        (MISTRAL_TEMPLATE, '<|other|>[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}]'),
    ],
)
def test_other_formats_are_found_from_the_template_and_their_special_tokens_read(serve, template, text):
    server = serve(template)
    server.backend.says(text)
    choice = create(server, tools=[WEATHER]).choices[0]
    assert choice.message.content is None
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    assert choice.finish_reason == "tool_calls"


def test_the_format_can_be_configured(serve):
    server = serve("{{ messages[0].content }}", tool_parser="hermes")
    server.backend.says(CALL)
    assert create(server, tools=[WEATHER]).choices[0].message.tool_calls[0].function.name == "get_weather"


def test_a_model_that_writes_no_calls_answers_in_text(serve):
    server = serve("{{ messages[0].content }}")
    server.backend.says(CALL)
    assert create(server, tools=[WEATHER]).choices[0].message.content == CALL
