import itertools
import json
import re

import jinja2
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from messages.errors import ConfigError, RequestError
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and tools %}{%- continue %}{%- endif %}
    {%- if message.role == 'assistant' and message.reasoning_content and loop.index0 > ns.last_user %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.role == 'assistant' %}
            {%- generation %}
                {{- message.content or '' }}
                {%- for call in message.tool_calls or [] %}
                    {{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' }}
                {%- endfor %}
                {{- '<|im_end|>\\n' }}
            {%- endgeneration %}
        {%- else %}
            {{- message.content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, after an initial system message!") }}
    {%- endif %}
{%- endfor %}
"""

PARTS = """\
{%- for message in messages %}
{{ message.role }}: {% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{%- endif %}

{% endfor %}"""

USER = {"role": "user", "content": "What is <b>2</b> & 'two'? 你好"}
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
ANSWER = {"role": "assistant", "content": " Four. \n"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a <place> & a day, größer",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "rain"}

CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "ends with the assistant": [USER, ANSWER],
    "tool call": [USER, {**CALL, "content": ""}, RESULT],
    "nulls": [USER, {**CALL, "content": None}, {**RESULT, "name": None}],
}


def folder_with(tmp_path, *, template=None, files=(), tools_template=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if tools_template is not None:
        config["chat_template"] = [
            {"name": "default", "template": template},
            {"name": "tool_use", "template": tools_template},
        ]
    elif template is not None:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in dict(files).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def both(folder):
    from transformers import AutoTokenizer

    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "parts": PARTS}
#: what a template itself refuses, with or without tools
REFUSED = {("mistral", "tool call"), ("mistral", "nulls")}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_rendered_as_transformers_renders_them(tmp_path, template):
    ours, theirs = both(folder_with(tmp_path, template=TEMPLATES[template]))
    for (name, chat), tools, prompt in itertools.product(CHATS.items(), (None, TOOLS), (True, False)):
        if (template, name) in REFUSED:
            with pytest.raises(jinja2.TemplateError):
                theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=prompt, tokenize=False)
            with pytest.raises(RequestError, match="template refuses"):
                ours.render_chat(chat, tools=tools, add_generation_prompt=prompt)
            continue
        mine = ours.render_chat(chat, tools=tools, add_generation_prompt=prompt)
        other = theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=prompt, tokenize=False)
        assert mine == other
        assert ours.encode(mine, add_special_tokens=False) == theirs.encode(other, add_special_tokens=False)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("content", ["The answer", "The answer ", "  The\nanswer\n", [{"type": "text", "text": "An "}]])
def test_a_final_message_is_continued_as_transformers_does(tmp_path, template, content):
    ours, theirs = both(folder_with(tmp_path, template=template))
    chat = [USER, {"role": "assistant", "content": content}]
    if not isinstance(content, str) and template is not PARTS:
        chat_for_theirs = [USER, {"role": "assistant", "content": content[0]["text"]}]
    else:
        chat_for_theirs = chat
    mine = ours.render_chat(chat, add_generation_prompt=False, continue_final_message=True)
    assert mine == theirs.apply_chat_template(chat_for_theirs, continue_final_message=True, tokenize=False)


def test_template_kwargs_are_variables_of_the_template(tmp_path):
    ours, theirs = both(folder_with(tmp_path, template=CHATML))
    mine = ours.render_chat([USER], template_kwargs={"enable_thinking": False})
    assert mine == theirs.apply_chat_template([USER], add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert mine.endswith("</think>\n\n")
    assert ours.render_chat([USER], template_kwargs={"documents": [{"title": "a", "text": "b"}]})


def test_reasoning_reaches_the_template_under_any_of_its_names(tmp_path):
    ours, _ = both(folder_with(tmp_path, template=CHATML))
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert "<think>why</think>" in ours.render_chat([USER, {**ANSWER, name: "why"}])


def test_arguments_in_json_text_are_rendered_as_the_object(tmp_path):
    ours, _ = both(folder_with(tmp_path, template=CHATML))

    def with_arguments(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        return ours.render_chat([USER, {"role": "assistant", "tool_calls": [call]}])

    assert with_arguments('{"place": "Zürich"}') == with_arguments({"place": "Zürich"})
    assert json.dumps("{broken", ensure_ascii=False) in with_arguments("{broken")


def test_text_parts_are_joined_for_a_template_that_reads_strings(tmp_path):
    chat = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]
    for template, joined in ((CHATML, "one \ntwo"), (MISTRAL, "one \ntwo"), (PARTS, "one two")):
        tokenizer, _ = both(folder_with(tmp_path, template=template))
        assert joined in tokenizer.render_chat(chat)


def test_a_template_that_reads_some_roles_parts_gets_the_others_text_joined(tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    template = (
        "{% for m in messages %}{% if m.role == 'user' and m.content is not string %}"
        "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% elif m.role == 'user' %}<{{ m.content }}>"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    tokenizer, _ = both(folder_with(tmp_path, template=template))
    chat = [{"role": role, "content": parts} for role in ("system", "user", "assistant", "user", "tool")]
    assert tokenizer.render_chat(chat) == "one\ntwo;<one><two>;one\ntwo;<one><two>;one\ntwo;"


def test_named_templates_are_chosen_by_tools(tmp_path):
    ours, theirs = both(folder_with(tmp_path, template=MISTRAL, tools_template=CHATML))
    for tools in (None, TOOLS, []):
        assert ours.render_chat([USER], tools=tools) == theirs.apply_chat_template(
            [USER], tools=tools, add_generation_prompt=True, tokenize=False
        )


def test_template_files_come_before_the_configuration(tmp_path):
    files = {"chat_template.jinja": CHATML, "additional_chat_templates/tool_use.jinja": LLAMA3}
    ours, theirs = both(folder_with(tmp_path, template=MISTRAL, files=files))
    for tools in (None, TOOLS):
        assert ours.render_chat([USER], tools=tools) == theirs.apply_chat_template(
            [USER], tools=tools, add_generation_prompt=True, tokenize=False
        )


def test_a_model_without_a_template_says_so(tmp_path):
    tokenizer = Tokenizer.load(folder_with(tmp_path))
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.render_chat([USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("chat", "param", "message"),
    [
        ([], "messages", "at least one"),
        ([{"content": "x"}], "messages[0].role", "None, wanted a string"),
        (["x"], "messages[0].role", "wanted a string"),
        ([USER, {"role": "wizard", "content": "x"}], "messages[1].role", "'wizard', wanted one of assistant"),
        ([{"role": "user", "content": 3}], "messages[0].content", "int, wanted a string"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}],
            "messages[0].content[1]",
            "reads text only",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "wanted 'text'"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "of type 'str'"),
        ([{"role": "user"}], "messages", "template refuses"),
    ],
)
def test_bad_messages_name_the_field(chat, param, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        ChatTemplate(CHATML, {}).render(chat)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_what_the_template_raises_reaches_the_client():
    with pytest.raises(RequestError, match="must alternate"):
        ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}).render([USER, USER])


def test_a_role_that_the_template_names_is_allowed():
    assert "rain" in ChatTemplate(LLAMA3, {"bos_token": ""}).render([USER, {"role": "ipython", "content": "rain"}])


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_template_kwargs_may_not_replace_the_request(name):
    with pytest.raises(RequestError, match="its own field") as caught:
        ChatTemplate(CHATML, {}).render([USER], template_kwargs={name: []})
    assert caught.value.param == f"chat_template_kwargs.{name}"


def test_continuing_and_opening_a_turn_exclude_each_other():
    with pytest.raises(RequestError, match="at most one"):
        ChatTemplate(CHATML, {}).render([USER, ANSWER], continue_final_message=True)
    with pytest.raises(RequestError, match="is empty"):
        ChatTemplate(CHATML, {}).render([USER, CALL], continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(RequestError, match="cannot be continued"):
        ChatTemplate("{{ messages[0].content }}", {}).render(
            [USER, ANSWER], continue_final_message=True, add_generation_prompt=False
        )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
        "{{ dict.__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(RequestError, match="refuses"):
        ChatTemplate(source, {}).render([USER])


def test_a_syntax_error_names_its_line():
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("{{ 1 }}\n{% if %}", {})


@pytest.mark.parametrize("source", ["{{ " + "(" * 3000 + " }}", "{% for x in y %}" * 40 + "{% endfor %}" * 40])
def test_a_template_nested_too_deep_is_refused(source):
    with pytest.raises(ConfigError, match="nested too deep"):
        ChatTemplate(source, {})
