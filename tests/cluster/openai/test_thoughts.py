"""Thoughts told from content: every format, however the text is split; from templates; through HTTP."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cluster.openai.call_formats import FORMATS
from cluster.openai.format_or_call import format_or_call
from cluster.openai.output_parser import OutputParser, ThoughtDelta
from cluster.openai.thought_formats import THOUGHT_FORMATS
from cluster.openai.thought_grammar import written_before, written_lead
from cluster.openai.thought_recognition import format_of, recognised, thought_format
from cluster.openai.thoughts import plan_thought
from cluster.openai.tool_calls import CallDelta
from cluster.openai.tools import ToolPlan
from cluster.openai.transcript import Delta, TextOptions, Transcript
from messages.request import Grammar
from messages.stream import TokenChunk
from text.chat_template import ChatTemplate
from text.grammar import GrammarCompiler, GrammarMatcher, GrammarTokenizer, check_grammar
from text.tokenizer import Tokenizer

PROMPT = "<|user|>Q<|assistant|>"
THOUGHT = "\nIs 2 < 3?\n\nYé"
ANSWER = "\n\nIt is <b>so</b>."
#: vLLM's parser whose thoughts are content
KEPT = "minimax_m2_append_think"
NAMES = [name for name in THOUGHT_FORMATS if name != KEPT]


def read(plan, pieces):
    """Thought, content and the number of the thought's tokens, of a text whose tokens are `pieces`."""
    reader = plan.reader()
    thought = content = ""
    for piece in pieces:
        more = reader.push(piece)
        thought, content = thought + more.thought, content + more.content
    more = reader.flush("")
    return thought + more.thought, content + more.content, reader.num_tokens


def read_alike(plan, text):
    """Thought and content of a text, the same in one piece and split anywhere."""
    whole = read(plan, [text])[:2]
    assert read(plan, list(text))[:2] == whole
    for at in range(1, len(text)):
        assert read(plan, [text[:at], text[at:]])[:2] == whole
    return whole


def written(kind, *, is_opened=False):
    return ("" if is_opened else kind.opens[0]) + THOUGHT + kind.closes[0] + kind.between + kind.lead + ANSWER


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", NAMES)
def test_a_thought_is_read_whether_the_output_or_the_prompt_opens_it(name):
    kind = THOUGHT_FORMATS[name]
    plan = plan_thought(kind, PROMPT, {})
    assert read_alike(plan, written(kind)) == (THOUGHT, ANSWER)
    opened = plan_thought(kind, f"{PROMPT}{kind.opens[0]}\n", {})
    assert read_alike(opened, written(kind, is_opened=True)) == (THOUGHT, ANSWER)
    assert read_alike(opened, written(kind)) == (THOUGHT, ANSWER), "a model may repeat the mark"


@pytest.mark.parametrize("name", NAMES)
def test_every_other_mark_does_as_well(name):
    kind = THOUGHT_FORMATS[name]
    plan = plan_thought(kind, PROMPT, {})
    for open_ in kind.opens:
        assert read_alike(plan, open_ + "T" + kind.closes[-1] + "A") == ("T", "A")
    for mark in kind.yields:
        thought, _ = read_alike(plan, kind.opens[0] + "T" + mark)
        assert thought == "T"


@pytest.mark.parametrize("name", NAMES)
def test_without_any_mark_the_output_is_a_thought_where_the_format_implies_one(name):
    kind = THOUGHT_FORMATS[name]
    plan = plan_thought(kind, PROMPT, {})
    assert read_alike(plan, "\nHello") == (("\nHello", "") if kind.is_implied else ("", "\nHello"))
    if kind.is_implied:
        assert read_alike(plan, f"{THOUGHT}{kind.closes[0]}{ANSWER}") == (THOUGHT, ANSWER)


@pytest.mark.parametrize("name", NAMES)
def test_a_thought_that_is_cut_is_nothing_but_one(name):
    kind = THOUGHT_FORMATS[name]
    plan = plan_thought(kind, PROMPT + kind.opens[0], {})
    for size in range(len(kind.closes[0])):
        assert read_alike(plan, f"{THOUGHT}{kind.closes[0][:size]}")[1] == ""


@pytest.mark.parametrize("name", [name for name in NAMES if not THOUGHT_FORMATS[name].is_repeated])
def test_where_the_client_wants_none_nothing_is_parsed_as_one(name):
    kind = THOUGHT_FORMATS[name]
    closed = f"{PROMPT}{kind.opens[0]}\n\n{kind.closes[0]}\n\n"
    text = f"A{kind.opens[0]}B{kind.closes[0]}C"
    for plan in (
        plan_thought(kind, closed, {}),
        plan_thought(kind, PROMPT, {"enable_thinking": False}),
        plan_thought(kind, PROMPT, {"thinking": False}),
    ):
        assert plan is None or read_alike(plan, text) == ("", text)


def test_marks_in_an_answer_are_text():
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    assert read_alike(plan, "<think>T</think>write <think>x</think>") == ("T", "write <think>x</think>")
    assert read_alike(plan, "<think>a <thin> b</think>A") == ("a <thin> b", "A")


def test_a_blank_thought_is_none():
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    assert read_alike(plan, "<think>\n\n</think>\n\nA") == ("", "\n\nA")


def test_thoughts_between_contents_are_read_where_a_format_has_them():
    plan = plan_thought(THOUGHT_FORMATS["openai_gptoss"], "<|start|>assistant", {})
    text = (
        "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>two<|end|>"
        "<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}<|return|>"
    )
    assert read_alike(plan, text) == ("onetwo", "Wait.{}")


def test_vllms_parser_that_keeps_thoughts_puts_their_mark_before_them():
    plan = plan_thought(THOUGHT_FORMATS[KEPT], PROMPT, {})
    assert read_alike(plan, "T</think>A") == ("", "<think>T</think>A")
    assert read(plan, ["T</think>", "A"])[2] == 0


def test_tokens_are_counted_without_marks_however_many_those_are_made_of():
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    assert read(plan, ["<think>", "a", "b ", "</think>", "A", "B"])[2] == 2
    assert read(plan, [*"<think>", "a", "b ", *"</think>", "A"])[2] == 2
    assert read(plan, ["a", "<", "/", "b", "</think>"])[2] == 4
    assert read(plan, ["<think>a</think>A"])[2] == 1
    assert read(plan, ["a", "", "b", "<", "/"])[2] == 5, "without its end all of it is a thought"


def test_a_continued_message_says_itself_whether_it_is_within_a_thought():
    kind = THOUGHT_FORMATS["qwen3"]
    assert read(plan_thought(kind, "...", {}, continued="<think>Let me"), ["x</think>A"])[:2] == ("x", "A")
    assert plan_thought(kind, "...", {}, continued="<think>x</think>An") is None
    assert plan_thought(kind, "...", {}, continued="An") is None


# --------------------------------------------------------------------------------------------------------- transcripts


MARKS = sorted(
    {
        *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|open|>", "<|close|>", "<|sep|>"),
        *("[THINK]", "[/THINK]", "<|channel>", "<channel|>", "<|eom|>", "<think>", "</think>"),
        *("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|START_TEXT|>"),
        *("<|content_thinking|>", "<|content_text|>", "<|end_message|>", "<|message_model|>"),
    }
)
EOS, VOCAB = 256, 320


def byte_tokenizer(*, is_special: bool) -> Tokenizer:
    """One token a byte, and marks of thoughts that are tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    (backend.add_special_tokens if is_special else backend.add_tokens)(MARKS)
    return Tokenizer(backend)


def deltas(tokenizer, text, size, **options):
    transcript = Transcript(tokenizer, TextOptions(**options))
    ids = tokenizer.encode(text, add_special_tokens=False)
    taken = []
    for at in range(0, len(ids), size):
        last = at + size >= len(ids)
        chunk = TokenChunk(request_id="r", token_ids=ids[at : at + size], finish_reason="length" if last else None)
        taken.append(transcript.take(chunk))
        if transcript.is_finished:
            break
    return taken, transcript


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_strings_are_looked_for_after_the_thought(size):
    tokenizer = byte_tokenizer(is_special=False)
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    text = "<think>stop, no: stop</think>go on, stop here"
    taken, transcript = deltas(tokenizer, text, size, stop=("stop",), thought=plan)
    assert "".join(delta.reasoning for delta in taken) == "stop, no: stop"
    assert "".join(delta.text for delta in taken) == "go on, "
    assert (taken[-1].finish_reason, taken[-1].stop_reason) == ("stop", "stop")
    assert transcript.num_reasoning_tokens == len("stop, no: stop")
    assert transcript.num_tokens == len("stop, no: stopgo on, stop") + 2


@pytest.mark.parametrize("size", [1, 3, 100])
def test_special_tokens_that_mark_thoughts_are_read_and_not_shown(size):
    tokenizer = byte_tokenizer(is_special=True)
    plan = plan_thought(THOUGHT_FORMATS["mistral"], PROMPT, {})
    shown = {tokenizer.backend.token_to_id(mark) for mark in ("[THINK]", "[/THINK]")}
    options = {"skips_special_tokens": False, "hidden_ids": tokenizer.special_ids - shown, "thought": plan}
    taken, transcript = deltas(tokenizer, "[THINK]T<|end|>[/THINK]A<eos>", size, **options)
    assert "".join(delta.reasoning for delta in taken) == "T"
    assert "".join(delta.text for delta in taken) == "A"
    assert transcript.num_reasoning_tokens == 2


# ---------------------------------------------------------------------------------------------------------------- calls


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


# ------------------------------------------------------------------------------------------------------------- grammars


SCHEMA = Grammar(
    kind="json_schema",
    spec=json.dumps({"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}),
)


def follows(tokenizer, compiled, text):
    """Whether each token of the text is one that the grammar allows, and the output may end there."""
    matcher = GrammarMatcher(compiled)
    for token_id in [*tokenizer.encode(text, add_special_tokens=False), EOS]:
        if not np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[token_id]:
            return False
        matcher.accept([token_id])
    return True


@pytest.mark.parametrize("is_special", [False, True])
def test_a_structure_begins_after_the_thought_in_every_format(is_special):
    tokenizer = byte_tokenizer(is_special=is_special)
    vocabulary = GrammarTokenizer(tokenizer, VOCAB, [EOS])
    compiler = GrammarCompiler(vocabulary)
    checked = check_grammar(vocabulary, SCHEMA)
    for name in THOUGHT_FORMATS:
        kind = format_of(name, tokenizer)
        for is_opened in (False, True):
            plan = plan_thought(kind, PROMPT + kind.opens[0] * is_opened, {})
            before = written_before(plan, tokenizer, lead=written_lead(plan, tokenizer))
            compiled = compiler.compile(msgspec.structs.replace(checked, before=before))
            opened = kind.opens[0] * (not is_opened)
            thought = opened + 'é {"b": <\n' + plan.close + kind.between + kind.lead
            assert follows(tokenizer, compiled, thought + '{"a":1}'), name
            assert not follows(tokenizer, compiled, thought + "no"), name
            assert not follows(tokenizer, compiled, opened + "never ended"), name
            assert follows(tokenizer, compiled, kind.lead + '{"a":1}') == (not plan.begins_inside), name


def test_a_token_that_ends_a_thought_and_begins_the_structure_is_held_to_it():
    tokenizer = byte_tokenizer(is_special=False)
    tokenizer.backend.add_tokens(['></think>{"', "></think>no"])
    tokenizer = Tokenizer(tokenizer.backend)
    vocabulary = GrammarTokenizer(tokenizer, VOCAB, [EOS])
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    grammar = msgspec.structs.replace(SCHEMA, before=written_before(plan, tokenizer, lead=""))
    compiled = GrammarCompiler(vocabulary).compile(grammar)
    assert follows(tokenizer, compiled, 'T></think>{"a":1}')
    assert not follows(tokenizer, compiled, "T></think>no")


def test_without_a_thought_nothing_stands_before_a_structure():
    tokenizer = byte_tokenizer(is_special=False)
    plan = plan_thought(THOUGHT_FORMATS["hunyuan_a13b"], f"{PROMPT}<think>\n\n</think>\n", {})
    assert not plan.begins_inside
    assert written_before(plan, tokenizer, lead="") == ""


def test_a_lead_stands_before_the_structure_and_not_before_a_call():
    tokenizer = byte_tokenizer(is_special=True)
    vocabulary = GrammarTokenizer(tokenizer, VOCAB, [EOS])
    plan = plan_thought(THOUGHT_FORMATS["openai_gptoss"], "<|start|>assistant", {})
    call = "<|channel|>commentary to=functions.f"
    either = format_or_call(SCHEMA, [call], tokenizer, written_lead(plan, tokenizer))
    checked = check_grammar(vocabulary, either)
    before = written_before(plan, tokenizer, lead="")
    compiled = GrammarCompiler(vocabulary).compile(msgspec.structs.replace(checked, before=before))
    thought = "<|channel|>analysis<|message|>T<|end|><|start|>assistant"
    final = '<|channel|>final<|message|>{"a":1}'
    for text in (final, thought + final, f"{call}<|message|>", f"{thought}{call}<|message|>"):
        assert follows(tokenizer, compiled, text)
    assert not follows(tokenizer, compiled, thought + '{"a":1}')


# ---------------------------------------------------------------------------------------------------------- recognition


def model(template: str | None, *tokens: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.add_tokens(list(tokens))
    return Tokenizer(backend, {}, {} if template is None else {"default": ChatTemplate(template, {})})


def shows(kind) -> str:
    """A template that shows past thoughts in a format."""
    before = json.dumps(kind.opens[0])
    after = json.dumps(kind.closes[0] + kind.between)
    return (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}{{ " + before + " ~ m.reasoning_content ~ "
        f"{after} }}}}{{% endif %}}{{{{ {json.dumps(kind.lead)} }}}}{{{{ m.content }}}}{{% endfor %}}"
    )


def marks_of(kind):
    return kind.opens, kind.closes


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("hy_v3", "hy_v4")])
def test_a_format_is_recognised_by_how_past_thoughts_are_shown(name):
    found = recognised(model(shows(THOUGHT_FORMATS[name])))
    assert found is not None
    assert set(marks_of(THOUGHT_FORMATS[name])[1]) & set(marks_of(THOUGHT_FORMATS[found])[1])
    assert THOUGHT_FORMATS[found].opens[0] == THOUGHT_FORMATS[name].opens[0]


PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def test_a_format_is_recognised_by_how_a_prompt_ends():
    for mark in ("<seed:think>", "<think>\n", "<|channel>thought\n"):
        found = recognised(model(PLAIN + "{% if add_generation_prompt %}" + mark + "{% endif %}"))
        assert THOUGHT_FORMATS[found].opens[0].strip() == mark.strip()
    asked = "{% if add_generation_prompt and enable_thinking %}<mm:think>{% endif %}"
    assert recognised(model(PLAIN + asked)) == "minimax_m3"


def test_else_the_template_and_then_the_tokens_tell():
    cuts = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    assert THOUGHT_FORMATS[recognised(model(cuts))].opens == ("<think>",)
    assert recognised(model(PLAIN, "[THINK]", "[/THINK]")) == "mistral"
    assert recognised(model(None, "<think>", "</think>")) is not None
    assert recognised(model(PLAIN)) is None
    assert thought_format(model(PLAIN)) is None


def test_a_suffix_is_read_off_the_tokens():
    tokenizer = model(PLAIN, "<think:v1>", "</think:v1>")
    assert marks_of(format_of("hy_v3", tokenizer)) == (("<think:v1>",), ("</think:v1>",))
    assert marks_of(thought_format(tokenizer)) == (("<think:v1>",), ("</think:v1>",))


def test_a_recognised_model_thinks_only_where_something_says_so():
    found = thought_format(model(shows(THOUGHT_FORMATS["qwen3"])))
    assert read_alike(plan_thought(found, PROMPT, {}), "Hello") == ("", "Hello")
    assert thought_format(model(PLAIN), "deepseek_r1").is_implied


def test_of_formats_with_the_same_marks_the_frames_of_the_answer_tell():
    think = (
        "{% for m in messages %}{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    )
    plain = think + "\n{{ m.content }}{% endfor %}"
    assert THOUGHT_FORMATS[recognised(model(plain))] == THOUGHT_FORMATS["qwen3"]
    assert recognised(model(think + "<answer>\n{{ m.content }}\n</answer>{% endfor %}")) == "hunyuan_a13b"
    for name in ("cohere_command3", "cohere_command4"):
        assert recognised(model(shows(THOUGHT_FORMATS[name]))) == name


# ----------------------------------------------------------------------------------------------------------------- http


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
