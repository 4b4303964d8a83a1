"""Tools through HTTP: shown to the template, forced by a grammar, read back."""

from __future__ import annotations

import json

import pytest

from cluster.openai.backend import HttpLimits
from tests.cluster.openai.call_templates import TEMPLATES, spoken

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


def test_a_format_of_the_content_holds_no_forced_call(server):
    arguments = '{"city": "Rome"}'
    named = {"type": "function", "function": {"name": "get_weather"}}
    said: dict[str, object] = {f'[{{"name": "get_weather", "parameters": {arguments}}}]': "required", arguments: named}
    for text, choice in said.items():
        server.backend.says(text)
        reply = create(server, tools=[WEATHER], tool_choice=choice, response_format={"type": "json_object"})
        assert reply.choices[0].message.content is None
        assert reply.choices[0].message.tool_calls[0].function.arguments == arguments
        create(server, tools=[WEATHER], tool_choice=choice)
        with_format, plain = server.backend.requests[-2:]
        assert with_format.params.grammar == plain.params.grammar


def test_required_schemas_keep_their_own_references(tokenizer):
    import msgspec

    from cluster.openai.call_formats import FORMATS
    from cluster.openai.protocol import ChatRequest
    from cluster.openai.tools import plan_tools
    from text.grammar import CompiledGrammar, GrammarMatcher, GrammarTokenizer

    body = {"messages": USER, "tools": [WEATHER, TREE], "tool_choice": "required"}
    plan = plan_tools(msgspec.convert(body, ChatRequest), FORMATS["hermes"])
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


ALLOWED = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}


def test_only_allowed_tools_are_shown_and_called(server):
    choice = {"type": "allowed_tools", "allowed_tools": ALLOWED}
    other = '<tool_call>{"name": "plant", "arguments": {}}</tool_call>'
    server.backend.says(CALL + other)
    reply = create(server, tools=[TREE, WEATHER], tool_choice=choice).choices[0]
    assert [call.function.name for call in reply.message.tool_calls] == ["get_weather"]
    assert reply.message.content == other
    assert '"plant"' not in server.prompt()


def test_allowed_tools_may_be_required(server):
    server.backend.says('[{"name": "get_weather", "parameters": {"city": "Rome"}}]')
    choice = {"type": "allowed_tools", "allowed_tools": {**ALLOWED, "mode": "required"}}
    assert create(server, tools=[TREE, WEATHER], tool_choice=choice).choices[0].finish_reason == "tool_calls"
    spec = server.backend.requests[0].params.grammar.spec
    assert '{"const": "get_weather"}' in spec
    assert '{"const": "plant"}' not in spec


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "run"}}]}, "tools[0].type", '"custom"'),
        ({"tools": [WEATHER, {"type": "web_search"}]}, "tools[1].type", '"web_search"'),
        ({"tools": [{"type": "custom"}], "tool_choice": "none"}, "tools[0].type", '"custom"'),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "custom", "custom": {"name": "f"}}},
            "tool_choice.type",
            '"custom"',
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "missing"),
        (
            {"tools": [TREE], "tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED}},
            "tool_choice.allowed_tools.tools[0].function.name",
            "plant",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {**ALLOWED, "mode": "any"}}},
            "tool_choice.allowed_tools.mode",
            "auto or required",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            },
            "tool_choice.allowed_tools.tools",
            "at least one",
        ),
    ],
)
def test_what_is_no_function_is_refused_by_name(server, fields, param, words):
    reply = server.post("/v1/chat/completions", {"messages": USER, **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


FORCED = '[{"name":"get_weather","parameters":{"city":"Rome"}},{"name":"get_weather","parameters":{"city":"Oslo"}}]'
NAMED_CHOICE = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    ("said", "choice", "max_tokens", "cities"),
    [
        (FORCED, "required", 5, []),
        (FORCED, "required", 70, ["Rome"]),
        (FORCED, "required", len(FORCED) - 3, ["Rome"]),
        (FORCED, "required", len(FORCED), ["Rome", "Oslo"]),
        ('{"city":"Rome"}', NAMED_CHOICE, 8, []),
        ('{"city":"Rome"}', NAMED_CHOICE, 15, ["Rome"]),
    ],
)
def test_forced_calls_that_are_cut_off_are_those_that_are_whole_and_nothing_else(
    server, said, choice, max_tokens, cities
):
    server.backend.says(said)
    fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": max_tokens}
    whole = create(server, **fields).choices[0]
    assert whole.finish_reason == "length"
    assert whole.message.content is None
    calls = whole.message.tool_calls or []
    assert [json.loads(call.function.arguments)["city"] for call in calls] == cities
    deltas = [chunk.choices[0].delta for chunk in create(server, **fields, stream=True)]
    assert not any(delta.content for delta in deltas)
    streamed = [call for delta in deltas for call in delta.tool_calls or []]
    assert [json.loads(call.function.arguments)["city"] for call in streamed] == cities


@pytest.mark.slow
def test_ids_of_calls_count_on_where_the_model_gives_them(serve, served_model):
    server = serve(TEMPLATES["kimi_k2"], model=served_model(max_model_len=4096, max_prompt_tokens=4000))
    server.backend.says(spoken(TEMPLATES["kimi_k2"], [("get_weather", {"city": "Oslo"})]))
    call = create(server, tools=[WEATHER]).choices[0].message.tool_calls[0]
    assert call.id == "functions.get_weather:0"
    server.backend.says(FORCED)
    past = [
        *USER,
        {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": call.function.to_dict()}]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    reply = server.client().chat.completions.create(
        model="tiny", messages=past, tools=[WEATHER], tool_choice="required"
    )
    assert [call.id for call in reply.choices[0].message.tool_calls] == [
        "functions.get_weather:1",
        "functions.get_weather:2",
    ]


def test_special_tokens_that_are_marks_are_read_and_others_are_not_shown(serve):
    server = serve(TEMPLATES["mistral"])
    server.backend.says('<|other|>Hm.<|other|>[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}')
    choice = create(server, tools=[WEATHER]).choices[0]
    assert choice.message.content == "Hm."
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    assert choice.finish_reason == "tool_calls"
    assert create(server).choices[0].message.content == 'Hm.get_weather[ARGS]{"city": "Oslo"}'


def test_the_format_can_be_configured(serve):
    server = serve("{{ messages[0].content }}", tool_parser="hermes")
    server.backend.says(CALL)
    assert create(server, tools=[WEATHER]).choices[0].message.tool_calls[0].function.name == "get_weather"


def test_a_model_that_writes_no_calls_answers_in_text(serve):
    server = serve("{{ messages[0].content }}")
    server.backend.says(CALL)
    assert create(server, tools=[WEATHER]).choices[0].message.content == CALL


def test_a_clients_template_is_refused_unless_the_operator_allows_it(server, serve):
    body = {"messages": USER, "chat_template": "<<{{ messages[0].content }}>>"}
    for path in ("/v1/chat/completions", "/tokenize"):
        reply = server.post(path, body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "chat_template")
    allowing = serve(limits=HttpLimits(takes_chat_template=True))
    assert allowing.post("/v1/chat/completions", body).status_code == 200
    assert allowing.prompt() == "<<Weather?>>"
