"""Small chat templates, one for each way to write tool calls, and what a model says in it."""

from __future__ import annotations

import json
from typing import Any

from text.chat_template import ChatTemplate

_JSON = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
_VALUE = "{{ v if v is string else v | tojson }}"
_GEMMA = """\
{%- macro value(v) -%}
{%- if v is string %}QUOTE{{ v }}QUOTE
{%- elif v is mapping %}{{ '{' }}
{%- for k, w in v.items() %}{{ k }}:{{ value(w) }}{{ '' if loop.last else ',' }}{% endfor %}{{ '}' }}
{%- elif v is sequence %}[{% for w in v %}{{ value(w) }}{{ '' if loop.last else ',' }}{% endfor %}]
{%- else %}{{ v | tojson }}
{%- endif %}
{%- endmacro -%}
"""
_ELEMENTS = """\
{%- macro inner(v) -%}
{%- if v is mapping %}{% for k, w in v.items() %}NS<{{ k }}>{{ inner(w) }}NS</{{ k }}>{% endfor %}
{%- elif v is string %}{{ v }}
{%- elif v is sequence %}{% for w in v %}NS<item>{{ inner(w) }}NS</item>{% endfor %}
{%- else %}{{ v | tojson }}
{%- endif %}
{%- endmacro -%}
"""


def _template(each: str, before: str = "", after: str = "", between: str = "", macros: str = "", head: str = "") -> str:
    """A template that shows calls: `before`, `each` of them with `between`, `after`."""
    return (
        f"{macros}{head}{{% for tool in tools or [] %}}<tool>{{{{ tool | tojson }}}}</tool>{{% endfor %}}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
        f"{{% if m.tool_calls %}}{before}{{% for c in m.tool_calls %}}{{% set f = c.function %}}{each}"
        f"{{% if not loop.last %}}{between}{{% endif %}}{{% endfor %}}{after}{{% endif %}}<|end|>{{% endfor %}}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


def _pairs(head: str, open_: str, close: str, end: str) -> str:
    return f"{head}{{% for k, v in f.arguments.items() %}}{open_}{_VALUE}{close}{{% endfor %}}{end}"


def _tags(invoke: str, parameter: str, prefix: str = "", attribute: str = "") -> str:
    return _pairs(
        f'<{prefix}{invoke} name="{{{{ f.name }}}}">\n',
        f'<{prefix}{parameter} name="{{{{ k }}}}"{attribute}>',
        f"</{prefix}{parameter}>\n",
        f"</{prefix}{invoke}>\n",
    )


def _keys(tag: str = "", between: str = "\n", kind: str = "") -> str:
    return _pairs(
        f"<{tag}tool_call>{{{{ f.name }}}}{between}",
        f"<{tag}arg_key>{{{{ k }}}}</{tag}arg_key>{kind}<{tag}arg_value>",
        f"</{tag}arg_value>",
        f"</{tag}tool_call>",
    )


_FUNCTIONS = _pairs("<function={{ f.name }}>\n", "<parameter={{ k }}>\n", "\n</parameter>\n", "</function>\n")
_PYTHON = (
    "{{ f.name }}({% for k, v in f.arguments.items() %}"
    "{{ k }}={{ v | tojson }}{{ '' if loop.last else ', ' }}{% endfor %})"
)
_DSML = "｜DSML｜"
_STRING = " string=\"{{ 'true' if v is string else 'false' }}\""

#: by the name that each is recognised as
TEMPLATES: dict[str, str] = {
    "hermes": _template(f"<tool_call>\n{_JSON}\n</tool_call>", between="\n"),
    "ernie45": _template(f"<tool_call>\n{_JSON}\n</tool_call>", between="\n", head="{# <response> #}"),
    "granite": _template(_JSON, "<|tool_call|> [", "]", ", "),
    "granite-20b-fc": _template(f"<function_call> {_JSON}", between=" "),
    "hunyuan_a13b": _template(_JSON, "<tool_calls>[", "]</tool_calls>", ", ", head="{# 助手： #}"),
    "jamba": _template(_JSON, "<tool_calls>[\n", "\n]</tool_calls>", ",\n"),
    "nemotron_json": _template(_JSON, "<TOOLCALL>[", "]</TOOLCALL>", ", "),
    "apertus": _template(
        '{"{{ f.name }}": {{ f.arguments | tojson }}}', "<|tools_prefix|>[", "]<|tools_suffix|>", ", "
    ),
    "cohere_command3": _template(
        '{"tool_call_id": "0", "tool_name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
        "<|START_ACTION|>[\n",
        "\n]<|END_ACTION|>",
        ",\n",
    ),
    "gigachat3": _template(f"<|function_call|>{_JSON}"),
    "inkling": _template(
        '<|message_model|><|content_invoke_tool_json|>{"name":"{{ f.name }}","args":{{ f.arguments | tojson }}}'
        "<|end_message|>"
    ),
    "internlm": _template(f"<|action_start|><|plugin|>\n{_JSON}<|action_end|>\n"),
    "longcat": _template(f"<longcat_tool_call>\n{_JSON}\n</longcat_tool_call>\n"),
    "phi4_mini_json": _template(_JSON, "functools[", "]", ", "),
    "xlam": _template(_JSON, "[", "]", ", "),
    "llama3_json": _template('{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}', between="; "),
    "mistral": _template("[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ c.id }}[ARGS]{{ f.arguments | tojson }}"),
    "kimi_k2": _template(
        "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ f.arguments | tojson }}<|tool_call_end|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
    ).replace("{{ c.id }}", "functions.{{ f.name }}:{{ loop.index0 }}"),
    "kimi_k3": _template(
        _pairs(
            '<|open|>call tool="{{ f.name }}" index="{{ loop.index }}"<|sep|>',
            "<|open|>argument key=\"{{ k }}\" type=\"{{ 'string' if v is string else 'number' if v is number else "
            "'object' }}\"<|sep|>",
            "<|close|>argument<|sep|>",
            "<|close|>call<|sep|>",
        ),
        "<|open|>tools<|sep|>",
        "<|close|>tools<|sep|>",
    ),
    "deepseek_v3": _template(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n```json\n{{ f.arguments | tojson }}\n```"
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "\n",
    ),
    "deepseek_v31": _template(
        "<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>{{ f.arguments | tojson }}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseek_v32": _template(
        _tags("invoke", "parameter", _DSML, _STRING), f"<{_DSML}function_calls>\n", f"</{_DSML}function_calls>"
    ),
    "deepseek_v4": _template(
        _tags("invoke", "parameter", _DSML, _STRING), f"<{_DSML}tool_calls>\n", f"</{_DSML}tool_calls>"
    ),
    "deepseek_v41": _template(
        _tags("invoke", "parameter", f"{_DSML} ", _STRING), f"<{_DSML} calls>\n", f"</{_DSML} calls>"
    ),
    "step3": _template(
        "<｜tool_call_begin｜>function<｜tool_sep｜>"
        + _tags("invoke", "parameter", "steptml:")
        + "<｜tool_call_end｜>",
        "<｜tool_calls_begin｜>",
        "<｜tool_calls_end｜>",
    ),
    "minimax_m2": _template(_tags("invoke", "parameter"), "<minimax:tool_call>\n", "</minimax:tool_call>"),
    "dots": _template(_tags("invoke", "parameter"), "<dots_function_call>\n", "</dots_function_call>"),
    "muse_glimmer": _template(
        "<|start|>assistant to={{ f.name }}<|message|><atem:function_calls>\n"
        + _tags("invoke", "parameter", "atem:")
        + "</atem:function_calls><|eom|>"
    ),
    "minicpm5": _template(
        _pairs(
            '<function name="{{ f.name }}">',
            "<param name=\"{{ k }}\">{{ '<![CDATA[' if v is string }}",
            "{{ ']]>' if v is string }}</param>",
            "</function>\n",
        )
    ),
    "k2_horizon": _template(
        _keys("ifm|", "", "<ifm|arg_type>{{ 'string' if v is string else 'object' }}</ifm|arg_type>").replace(
            "</ifm|tool_call>", "</ifm|tool_call>\n"
        ),
        "<ifm|tool_calls>\n",
        "</ifm|tool_calls>",
    ).replace("'object' }}</ifm|arg_type>", "'integer' if v is integer else 'object' }}</ifm|arg_type>"),
    "plamo3": _template(
        "<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>{{ f.name }}<|plamo:end_tool_name:plamo|>"
        "<|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>{{ f.arguments | tojson }}"
        "<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|>",
        "<|plamo:begin_tool_requests:plamo|>",
        "<|plamo:end_tool_requests:plamo|>",
    ),
    "minimax_m3": _template(
        'NS<invoke name="{{ f.name }}">{{ inner(f.arguments) }}NS</invoke>\n',
        "NS<tool_call>\n",
        "NS</tool_call>",
        macros=_ELEMENTS,
    ).replace("NS", "]<]minimax[>["),
    "gemma4": _template(
        "<|tool_call>call:{{ f.name }}{{ value(f.arguments) }}<tool_call|>",
        macros=_GEMMA.replace("QUOTE", '<|"|>'),
    ),
    "functiongemma": _template(
        "<start_function_call>call:{{ f.name }}{{ value(f.arguments) }}<end_function_call>",
        macros=_GEMMA.replace("QUOTE", "<escape>"),
    ),
    "openai": _template(
        "<|start|>assistant<|channel|>commentary to=functions.{{ f.name }} <|constrain|>json<|message|>"
        "{{ f.arguments | tojson }}<|call|>"
    ),
    "solar_open": _template(
        "<|tool_call:begin|>{{ c.id }}<|tool_call:name|>{{ f.name }}<|tool_call:args|>{{ f.arguments | tojson }}"
        "<|tool_call:end|>",
        "<|tool_calls|>",
        "<|calls|>",
    ),
    "functionary_v31": _template("<function={{ f.name }}>{{ f.arguments | tojson }}</function>"),
    "qwen3_xml": _template(f"<tool_call>\n{_FUNCTIONS}</tool_call>", between="\n"),
    "seed_oss": _template(f"<seed:tool_call>\n{_FUNCTIONS}</seed:tool_call>", between="\n"),
    "glm45": _template(_keys(), between="\n"),
    "hy_v3": _template(
        _keys().replace("{{ f.name }}\n", "{{ f.name }}<tool_sep>\n"), "<tool_calls>\n", "</tool_calls>", "\n"
    ),
    "hy_v4": _template(_keys(between=""), "<tool_calls>", "</tool_calls>"),
    "lfm2": _template(_PYTHON, "<|tool_call_start|>[", "]<|tool_call_end|>", ", "),
    "olmo3": _template(_PYTHON, "<function_calls>\n", "\n</function_calls>", "{{ '\\n' }}"),
    "pythonic": _template(_PYTHON, "[", "]", ", "),
    "llama4_pythonic": _template(_PYTHON, "<|python_start|>[", "]<|python_end|>", ", ", head="{# <|header_start|> #}"),
}
#: other templates of the same formats
MORE_TEMPLATES: list[tuple[str, str]] = [
    # Hermes 2 Pro: arguments before the name
    (
        "hermes",
        _template('<tool_call>\n{"arguments": {{ f.arguments | tojson }}, "name": "{{ f.name }}"}\n</tool_call>\n'),
    ),
    (
        "mistral",
        _template('{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}', "[TOOL_CALLS] [", "]", ", "),
    ),
    ("mistral", _template("[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}")),
    ("glm45", _template(_keys(between=""))),
    ("lfm2", _template(_PYTHON + "\n", "<|tool_call_start|>\n```python\n", "```\n<|tool_call_end|>")),  # MiniCPM3
    (
        "openai",
        _template(
            "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{"
            " f.arguments | tojson }}<|call|>"
        ),
    ),
    ("gigachat3", _template(f"<|message_sep|>\n\nfunction call<|role_sep|>\n{_JSON}")),
    ("jamba", _template(_JSON + "\n", "<tool_calls>\n", "</tool_calls>")),  # MiniMax M1
    (
        "cohere_command3",
        _template(
            '{"tool_call_id": "0", "tool_name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
            "<|START_TEXT|><|END_TEXT|><|START_ACTION|>[",
            "]<|END_ACTION|>",
            ", ",
        ),
    ),
]


def spoken(template: str, calls: list[tuple[str, dict[str, Any]]], content: str = "") -> str:
    """What a model says that was trained with `template`: `content`, and then `calls`."""
    past = [
        {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content, "tool_calls": past}]
    text = ChatTemplate(template, {}).render(messages, add_generation_prompt=False)
    return text.rpartition("<|assistant|>")[2].removesuffix("<|end|>")


def as_pairs(calls: list[Any]) -> list[tuple[str, Any]]:
    """Names and arguments of calls in a reply."""
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]
