"""Thoughts through HTTP: replies, deltas, usage, what begins after them."""

from __future__ import annotations

import pytest

#: ends a prompt within a thought, unless the client wants none; shows past thoughts
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endfor %}{% if add_generation_prompt %}<assistant>{{ effort }}{% if enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
QUESTION = [{"role": "user", "content": "Q"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BODY = {"model": "tiny", "messages": QUESTION}


@pytest.fixture
def thinker(serve):
    server = serve(THINKING)
    server.backend.says("Hm.\n</think>\n\nHello")
    return server


def test_the_openai_client_reads_thoughts_whole_and_streamed(thinker):
    message = thinker.client().chat.completions.create(**BODY).choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("Hm.\n", "Hm.\n", "\n\nHello")
    stream = thinker.client().chat.completions.create(**BODY, stream=True)
    pieces = [chunk.choices[0].delta.to_dict() for chunk in stream]
    for name, whole in (("reasoning_content", "Hm.\n"), ("reasoning", "Hm.\n"), ("content", "\n\nHello")):
        assert "".join(piece.get(name) or "" for piece in pieces) == whole
    assert pieces[0]["role"] == "assistant"
    assert not any(piece.get("content") and piece.get("reasoning") for piece in pieces)


def test_usage_counts_the_tokens_of_thoughts(thinker):
    usage = thinker.client().chat.completions.create(**BODY, n=2).usage
    assert usage.completion_tokens_details.reasoning_tokens == 2 * len("Hm.\n")
    assert usage.completion_tokens == 2 * len("Hm.\n</think>\n\nHello.")  # and the end token
    stream = thinker.client().chat.completions.create(**BODY, stream=True, stream_options={"include_usage": True})
    assert [*stream][-1].usage.completion_tokens_details.reasoning_tokens == len("Hm.\n")


def test_a_thought_cut_by_max_tokens_is_all_there_is(thinker):
    body = {**BODY, "max_tokens": 3}
    choice = thinker.client().chat.completions.create(**body).choices[0]
    assert (choice.message.reasoning_content, choice.message.content, choice.finish_reason) == ("Hm.", None, "length")
    chunks = [*thinker.client().chat.completions.create(**body, stream=True)]
    assert "".join(chunk.choices[0].delta.to_dict().get("reasoning_content", "") for chunk in chunks) == "Hm."
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_client_may_want_no_thoughts_shown(thinker):
    body = {**BODY, "include_reasoning": False, "logprobs": True, "return_token_ids": True}
    choice = thinker.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["message"]["content"] == "\n\nHello"
    assert not choice["message"]["reasoning_content"]
    assert choice["logprobs"] is None, "they would tell the thought"
    assert "token_ids" not in choice
    assert "Hm" not in thinker.post("/v1/chat/completions", {**body, "stream": True}).text


def test_tokens_and_logprobs_stay_with_the_pieces(thinker):
    whole = thinker.post("/v1/chat/completions", {**BODY, "logprobs": True, "return_token_ids": True}).json()
    choice = whole["choices"][0]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == len("Hm.\n</think>\n\nHello.")
    stream = thinker.client().chat.completions.create(
        **BODY, logprobs=True, stream=True, extra_body={"return_token_ids": True}
    )
    choices = [chunk.choices[0] for chunk in stream]
    assert [i for each in choices for i in each.token_ids] == choice["token_ids"]
    assert all(len(each.logprobs.content) == len(each.token_ids) for each in choices)


@pytest.mark.parametrize(
    "fields", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}], ids=str
)
def test_thinking_off_leaves_content_as_it_is(thinker, fields):
    thinker.backend.says("Hello <think>x</think>")
    message = thinker.post("/v1/chat/completions", {**BODY, **fields}).json()["choices"][0]["message"]
    assert thinker.prompt().endswith("</think>\n\n")
    assert message["content"] == "Hello <think>x</think>"
    assert not message.get("reasoning_content")


def test_effort_is_a_variable_of_the_template(serve):
    server = serve(THINKING.replace("{{ effort }}", "{{ reasoning_effort }}:"))
    server.post("/v1/chat/completions", {**BODY, "reasoning_effort": "high"})
    assert server.prompt().endswith("<assistant>high:<think>\n")
    kwargs = {"enable_thinking": False}
    server.post("/v1/chat/completions", {**BODY, "reasoning_effort": "high", "chat_template_kwargs": kwargs})
    assert server.prompt().endswith("high:<think>\n\n</think>\n\n")
    reply = server.post("/v1/chat/completions", {**BODY, "reasoning_effort": "hard"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "reasoning_effort"


@pytest.mark.parametrize("name", ["thinking_token_budget", "thinking_budget"])
def test_a_budget_is_refused_by_name(thinker, name):
    reply = thinker.post("/v1/chat/completions", {**BODY, name: 10})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == name


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_past_thoughts_reach_the_template(thinker, name):
    past = {"role": "assistant", "content": "A", name: "T"}
    thinker.post("/v1/chat/completions", {**BODY, "messages": [*QUESTION, past, *QUESTION]})
    assert "<assistant><think>T</think>A<user>" in thinker.prompt()


def test_calls_are_read_after_the_thought_alone(thinker):
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    thinker.backend.says(f"I could {call}</think>\n\n{call}", per_chunk=7)
    choice = thinker.client().chat.completions.create(**BODY, tools=[TOOL]).choices[0]
    assert choice.message.reasoning_content == f"I could {call}"
    assert [each.function.name for each in choice.message.tool_calls] == ["f"]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    with thinker.client().chat.completions.stream(**BODY, tools=[TOOL]) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert [each.function.name for each in streamed.message.tool_calls] == ["f"]
    assert streamed.message.content is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"tools": [TOOL], "tool_choice": "required"}, '[{"name": "f", "parameters": {}}]'),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "{}"),
    ],
    ids=["required", "named"],
)
def test_forced_calls_come_after_the_thought(thinker, fields, answer):
    thinker.backend.says(f"Hm.</think>{answer}")
    choice = thinker.post("/v1/chat/completions", {**BODY, **fields}).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "Hm."
    assert choice["message"]["content"] is None
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ["{}"]
    grammar = thinker.backend.requests[-1].params.grammar
    assert "</think>" in grammar.before
    thinker.backend.says(f"Hm.</think>{answer}", ends=False)
    cut = thinker.post("/v1/chat/completions", {**BODY, **fields, "max_tokens": 3}).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (None, "length")


@pytest.mark.slow
def test_a_structure_is_wanted_after_the_thought(thinker):
    thinker.backend.says('Hm.</think>{"a":1}')
    body = {**BODY, "response_format": {"type": "json_object"}}
    message = thinker.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", '{"a":1}')
    assert "</think>" in thinker.backend.requests[-1].params.grammar.before
    thinker.post("/v1/chat/completions", {**body, "reasoning_effort": "none"})
    assert thinker.backend.requests[-1].params.grammar.before == ""


def test_text_completions_have_no_thoughts(thinker):
    choice = thinker.client().completions.create(model="tiny", prompt="<think>\n", max_tokens=40).choices[0]
    assert choice.text == "Hm.\n</think>\n\nHello"


def test_an_operator_may_name_the_format(serve):
    plain = THINKING.replace("<think>\n{% endif %}{% endif %}", "{% endif %}{% endif %}")
    server = serve(plain, reasoning_parser="deepseek_r1")
    server.backend.says("Hm.</think>A")
    message = server.post("/v1/chat/completions", BODY).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "A")


def test_without_a_format_of_thoughts_replies_are_as_they_were(server):
    server.backend.says("<think>x</think>A")
    reply = server.post("/v1/chat/completions", BODY).json()
    assert reply["choices"][0]["message"].keys() == {"role", "content", "refusal"}
    assert "completion_tokens_details" not in reply["usage"]
    assert reply["choices"][0]["message"]["content"] == "<think>x</think>A"


# -------------------------------------------------------------------------------------------------------------- harmony


HARMONY = (
    "{% for m in messages %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}{% for c in m.tool_calls or [] %}<|start|>assistant<|channel|>commentary to=functions."
    "{{ c.function.name }} <|constrain|>json<|message|>{{ c.function.arguments | tojson }}<|call|>{% endfor %}"
    "{% if m.role == 'assistant' %}{% if m.content %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "<|end|>{% endif %}{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_TOKENS = (
    *("<|return|>", "<|bos|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|call|>"),
    "<|other|>",
)
ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


@pytest.fixture
def gpt_oss(serve, served_model):
    return serve(HARMONY, HARMONY_TOKENS, model=served_model(vocab_size=268, eos_token_ids=(256,)))


def said(server, body, text, *, per_chunk=1):
    """The message, whole and put together from a stream, which are alike."""
    server.backend.says(text, per_chunk=per_chunk)
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]
    joined: dict[str, str] = {}
    for chunk in server.client().chat.completions.create(**body, stream=True):
        for name, piece in chunk.choices[0].delta.to_dict().items():
            if isinstance(piece, str) and name != "role":
                joined[name] = joined.get(name, "") + piece
    for name in ("content", "reasoning", "reasoning_content"):
        assert joined.get(name, "") == (whole["message"][name] or "")
    return whole


@pytest.mark.parametrize("per_chunk", [1, 2, 7, 100])
def test_gpt_oss_channels_are_thought_content_and_calls(gpt_oss, per_chunk):
    final = said(gpt_oss, BODY, f"{ANALYSIS}<|channel|>final<|message|>Hello", per_chunk=per_chunk)
    assert (final["message"]["reasoning"], final["message"]["content"]) == ("Hm.", "Hello")
    preamble = f"{ANALYSIS}<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'
    called = said(gpt_oss, {**BODY, "tools": [TOOL]}, preamble + call, per_chunk=per_chunk)
    assert (called["message"]["reasoning"], called["message"]["content"]) == ("Hm.", "Wait.")
    assert [each["function"]["arguments"] for each in called["message"]["tool_calls"]] == ['{"a": 1}']
    assert called["finish_reason"] == "tool_calls"


@pytest.mark.slow
def test_gpt_oss_gives_a_structure_in_its_last_channel(gpt_oss):
    body = {**BODY, "response_format": {"type": "json_object"}}
    choice = said(gpt_oss, body, f'{ANALYSIS}<|channel|>final <|constrain|>json<|message|>{{"a": 1}}')
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("Hm.", '{"a": 1}')
    beside = gpt_oss.post("/v1/chat/completions", {**body, "tools": [TOOL]})
    assert beside.status_code == 200


def test_an_agent_shows_gpt_oss_its_thoughts_again(gpt_oss):
    gpt_oss.backend.says(f"{ANALYSIS}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{}}")
    message = gpt_oss.post("/v1/chat/completions", {**BODY, "tools": [TOOL]}).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "R"}
    gpt_oss.post("/v1/chat/completions", {**BODY, "tools": [TOOL], "messages": [*QUESTION, message, result]})
    assert "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary" in gpt_oss.prompt()
