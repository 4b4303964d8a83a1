"""How models write tool calls: one table, by the names that vLLM's --tool-call-parser has.

A text has areas of calls. What opens and closes an area, what stands before and after a call's name and how its
arguments are written is all that formats differ in; `cluster.openai.tool_calls` reads them.

    object    {"name": "f", "arguments": {"a": 1}}, or in a list; `parameters` is as good as `arguments`
    json      HEAD f NAME_END {"a": 1} CALL_CLOSE
    pairs     HEAD f NAME_END (OPEN a VALUE 1 CLOSE)... CALL_CLOSE
    elements  HEAD f NAME_END <a>1</a>... CALL_CLOSE, in which elements may nest
    gemma     HEAD f NAME_END a:1,b:QUOTE text QUOTE} CALL_CLOSE
    python    f(a=1, b="text")
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

from cluster.openai.marks import suffixed

Arguments = Literal["object", "json", "pairs", "elements", "gemma", "python"]

_NAME: Final = re.compile(
    r"""\s*(?:"(?P<double>[^"]{1,256})"[^{<]*|'(?P<single>[^']{1,256})'[^{<]*|(?P<bare>[^\s"'<>{}()\[\]]{1,256})\s*)"""
)
#: functions.f:0, where what stands there is the call's id too
_KIMI_NAME: Final = re.compile(r"\s*(?P<id>(?:functions\.)?(?P<bare>[^\s<>{}]{1,256}?):\d+)\s*")
_MISTRAL_NAME: Final = re.compile(r"(?P<bare>[A-Za-z0-9_.-]{1,256})(?:\[CALL_ID\][A-Za-z0-9]{1,64})?\s*")
#: gpt-oss writes further headers before its message, in either order
_HARMONY_NAME: Final = re.compile(r"(?P<bare>[^\s<>{}]{1,256})[^{}]*")
#: a call's id before its name
_SOLAR_NAME: Final = re.compile(r"[^<>{}]*<\|tool_call:name\|>(?P<bare>[^\s<>{}]{1,256})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """How arguments are written that are pairs of a key and the text of a value."""

    open: str  #: before a key, which may stand in quotes, with attributes behind it
    value: str  #: before a value
    close: str  #: after it
    is_trimmed: bool = False  #: one line break at either end of a value is layout
    has_cdata: bool = False  #: a value may stand in <![CDATA[...]]>
    whole: str | None = None  #: instead of `open`: the value is all arguments, in JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """One way to write calls. Marks are literal texts; the longest that fits is taken."""

    arguments: Arguments = "object"
    opens: tuple[str, ...] = ()  #: begin an area of calls
    closes: tuple[str, ...] = ()  #: end it
    fillers: tuple[str, ...] = ()  #: stand between its calls, or around their arguments, and mean nothing
    #: begin an area only where a call of a known tool follows: they are ordinary text otherwise
    weak_opens: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()  #: stand before a call's name, in an area or without one
    has_bare_names: bool = False  #: names stand in an area without a head
    name: re.Pattern[str] = _NAME  #: what stands between head and arguments, with the name as one of its groups
    name_ends: tuple[str, ...] = ()  #: between name and arguments
    call_closes: tuple[str, ...] = ()  #: after the arguments
    pairs: Pairs | None = None
    quote: str = ""  #: around strings, in gemma's arguments
    namespace: str = ""  #: before each tag of `elements`
    takes_objects: bool = False  #: a JSON object that names its function is a call too
    is_keyed: bool = False  #: such an object's only key is the name
    separators: str = " \t\r\n"  #: characters between calls that mean nothing
    #: frames around what is no call, not meant for clients; {} in one stands for each tool's name
    drops: tuple[str, ...] = ()
    template_marks: tuple[str, ...] = ()  #: stand in a template of this format, and of no other that writes calls alike

    @property
    def marks(self) -> tuple[str, ...]:
        """Whatever a text of this format must keep until it is read, if it is a special token."""
        pairs = self.pairs
        return (
            *self.opens,
            *self.closes,
            *self.fillers,
            *self.heads,
            *self.name_ends,
            *self.call_closes,
            *self.drops,
            *((pairs.open, pairs.value, pairs.close, pairs.whole or "") if pairs else ()),
            self.quote,
            self.namespace,
            "[CALL_ID]" if self.name is _MISTRAL_NAME else "",
            "<|tool_call:name|><|constrain|><|channel|>" if self.name in (_HARMONY_NAME, _SOLAR_NAME) else "",
        )

    @property
    def has_ids(self) -> bool:
        """Whether the model gives its calls ids of a form of their own, and expects to see them again."""
        return "id" in self.name.groupindex

    def with_suffix(self, suffix: str) -> CallFormat:
        """Return the format with `suffix` in all tags: <tool_call> is then <tool_callSUFFIX>."""
        assert self.pairs is not None
        open_, value, close = suffixed((self.pairs.open, self.pairs.value, self.pairs.close), suffix)
        return replace(
            self,
            opens=suffixed(self.opens, suffix),
            closes=suffixed(self.closes, suffix),
            heads=suffixed(self.heads, suffix),
            name_ends=suffixed(self.name_ends, suffix),
            call_closes=suffixed(self.call_closes, suffix),
            pairs=replace(self.pairs, open=open_, value=value, close=close),
        )


def _objects(open_: str, close: str | None, **more: object) -> CallFormat:
    """Objects between two marks, or lists of objects."""
    return replace(
        CallFormat(
            opens=(open_,), closes=() if close is None else (close,), takes_objects=True, separators=" \t\r\n[],"
        ),
        **more,  # type: ignore[arg-type]
    )


def _tags(open_: str, close: str, invoke: str, parameter: str, prefix: str = "", **more: object) -> CallFormat:
    """Tags with a name attribute: <INVOKE name="f"><PARAMETER name="a">1</PARAMETER></INVOKE>."""
    return replace(
        CallFormat(
            arguments="pairs",
            opens=(open_,) if open_ else (),
            closes=(close,) if close else (),
            heads=(f"<{prefix}{invoke} name=",),
            name_ends=(">",),
            call_closes=(f"</{prefix}{invoke}>",),
            pairs=Pairs(open=f"<{prefix}{parameter} name=", value=">", close=f"</{prefix}{parameter}>"),
        ),
        **more,  # type: ignore[arg-type]
    )


def _functions(open_: str, close: str, *, is_trimmed: bool = True) -> CallFormat:
    """<function=f><parameter=a>1</parameter></function>, as Qwen's coders write it."""
    return CallFormat(
        arguments="pairs",
        opens=(open_,),
        closes=(close,),
        heads=("<function=",),
        name_ends=(">",),
        call_closes=("</function>",),
        pairs=Pairs(open="<parameter=", value=">", close="</parameter>", is_trimmed=is_trimmed),
    )


def _keys(*, opens: tuple[str, ...] = (), closes: tuple[str, ...] = (), name_ends: tuple[str, ...] = ()) -> CallFormat:
    """<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>, as GLM writes it."""
    return CallFormat(
        arguments="pairs",
        opens=opens,
        closes=closes,
        heads=("<tool_call>",),
        name_ends=name_ends,
        call_closes=("</tool_call>",),
        pairs=Pairs(open="<arg_key>", value="<arg_value>", close="</arg_value>"),
    )


def _python(open_: str | None, close: str | None, **more: object) -> CallFormat:
    return replace(
        CallFormat(
            arguments="python",
            opens=() if open_ is None else (open_,),
            closes=() if close is None else (close,),
            separators=" \t\r\n[],;",
        ),
        **more,  # type: ignore[arg-type]
    )


_HERMES: Final = _objects("<tool_call>", "</tool_call>")
_QWEN_XML: Final = _functions("<tool_call>", "</tool_call>")
_GLM: Final = _keys()
_LLAMA_JSON: Final = CallFormat(
    opens=("<|python_tag|>",), weak_opens=("{",), takes_objects=True, separators=" \t\r\n;,"
)
_COHERE: Final = _objects(
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    drops=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
_LFM2: Final = _python(
    "<|tool_call_start|>", "<|tool_call_end|>", takes_objects=True, fillers=("```python", "```json", "```")
)
_DSML: Final = "｜DSML｜"
_DEEPSEEK_V4: Final = _tags(
    f"<{_DSML}tool_calls>",
    f"</{_DSML}tool_calls>",
    "invoke",
    "parameter",
    _DSML,
)
_MINIMAX: Final = "]<]minimax[>["

#: What a client's tool_choice forces: a list of objects, with nothing around it.
FORCED: Final = CallFormat(takes_objects=True, separators=" \t\r\n[],")

#: By the names of vLLM 0.32, then our own. A template is taken for the first format that reads its past call.
FORMATS: Final[dict[str, CallFormat]] = {
    # marks that no other format has
    "openai": CallFormat(
        arguments="json",
        heads=(
            "<|channel|>commentary to=functions.",
            "<|channel|>analysis to=functions.",
            "<|start|>assistant to=functions.",
            "<|start|>assistant<|channel|>commentary to=functions.",
            "<|start|>assistant<|channel|>analysis to=functions.",
            " to=functions.",
        ),
        name=_HARMONY_NAME,
        name_ends=("<|message|>",),
        call_closes=("<|call|>",),
        drops=(
            "<|start|>assistant",
            "<|channel|>final<|message|>",
            "<|channel|>commentary<|message|>",
            "<|channel|>analysis<|message|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
        ),
    ),
    "kimi_k2": CallFormat(
        arguments="json",
        opens=("<|tool_calls_section_begin|>",),
        closes=("<|tool_calls_section_end|>",),
        heads=("<|tool_call_begin|>",),
        name=_KIMI_NAME,
        name_ends=("<|tool_call_argument_begin|>",),
        call_closes=("<|tool_call_end|>",),
    ),
    "kimi_k3": CallFormat(
        arguments="pairs",
        opens=("<|open|>tools<|sep|>",),
        closes=("<|close|>tools<|sep|>",),
        heads=("<|open|>call tool=",),
        name_ends=("<|sep|>",),
        call_closes=("<|close|>call<|sep|>",),
        pairs=Pairs(
            open="<|open|>argument key=",
            value="<|sep|>",
            close="<|close|>argument<|sep|>",
            whole='<|open|>json type="object"<|sep|>',
        ),
        fillers=("<|close|>json<|sep|>",),
        drops=(
            "<|open|>response<|sep|>",
            "<|close|>response<|sep|>",
            "<|close|>message<|sep|>",
            "<|end_of_msg|>",
        ),
    ),
    "deepseek_v3": CallFormat(
        arguments="json",
        opens=("<｜tool▁calls▁begin｜>",),
        closes=("<｜tool▁calls▁end｜>",),
        heads=("<｜tool▁call▁begin｜>function<｜tool▁sep｜>",),
        name_ends=("\n```json\n", "\n```json"),
        fillers=("```",),
        call_closes=("<｜tool▁call▁end｜>",),
    ),
    "deepseek_v31": CallFormat(
        arguments="json",
        opens=("<｜tool▁calls▁begin｜>",),
        closes=("<｜tool▁calls▁end｜>",),
        heads=("<｜tool▁call▁begin｜>",),
        name_ends=("<｜tool▁sep｜>",),
        call_closes=("<｜tool▁call▁end｜>",),
    ),
    "deepseek_v32": replace(_DEEPSEEK_V4, opens=(f"<{_DSML}function_calls>",), closes=(f"</{_DSML}function_calls>",)),
    "deepseek_v4": _DEEPSEEK_V4,
    "deepseek_v41": _tags(f"<{_DSML} calls>", f"</{_DSML} calls>", "invoke", "parameter", f"{_DSML} "),
    "step3": _tags(
        "<｜tool_calls_begin｜>",
        "<｜tool_calls_end｜>",
        "invoke",
        "parameter",
        "steptml:",
        fillers=("<｜tool_call_begin｜>", "function<｜tool_sep｜>", "<｜tool_call_end｜>"),
    ),
    "minimax_m3": CallFormat(
        arguments="elements",
        namespace=_MINIMAX,
        opens=(f"{_MINIMAX}<tool_call>",),
        closes=(f"{_MINIMAX}</tool_call>",),
        heads=(f"{_MINIMAX}<invoke name=",),
        name_ends=(">",),
        call_closes=(f"{_MINIMAX}</invoke>",),
    ),
    "minimax_m2": _tags("<minimax:tool_call>", "</minimax:tool_call>", "invoke", "parameter"),
    "dots": _tags("<dots_function_call>", "</dots_function_call>", "invoke", "parameter"),
    "muse_glimmer": _tags(
        "<atem:function_calls>",
        "</atem:function_calls>",
        "invoke",
        "parameter",
        "atem:",
        drops=("<|start|>assistant", " to={}<|message|>", " to=user<|message|>", " to=self<|message|>", "<|eom|>"),
    ),
    "minicpm5": replace(
        _tags("", "", "function", "param"),
        pairs=Pairs(open="<param name=", value=">", close="</param>", has_cdata=True),
    ),
    "k2_horizon": CallFormat(
        arguments="pairs",
        takes_objects=True,
        opens=("<ifm|tool_calls>",),
        closes=("</ifm|tool_calls>",),
        heads=("<ifm|tool_call>",),
        call_closes=("</ifm|tool_call>",),
        pairs=Pairs(open="<ifm|arg_key>", value="<ifm|arg_value>", close="</ifm|arg_value>"),
    ),
    "plamo3": CallFormat(
        arguments="json",
        opens=("<|plamo:begin_tool_requests:plamo|>",),
        closes=("<|plamo:end_tool_requests:plamo|>",),
        fillers=(
            "<|plamo:begin_tool_request:plamo|>",
            "<|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>",
            "<|plamo:end_tool_request:plamo|>",
        ),
        heads=("<|plamo:begin_tool_name:plamo|>",),
        name_ends=("<|plamo:end_tool_name:plamo|>",),
        call_closes=("<|plamo:end_tool_arguments:plamo|>",),
    ),
    "gemma4": CallFormat(
        arguments="gemma",
        heads=("<|tool_call>call:", "<|tool_call>:"),
        name_ends=("{",),
        call_closes=("<tool_call|>",),
        quote='<|"|>',
    ),
    "functiongemma": CallFormat(
        arguments="gemma",
        heads=("<start_function_call>call:",),
        name_ends=("{",),
        call_closes=("<end_function_call>",),
        quote="<escape>",
    ),
    "apertus": _objects("<|tools_prefix|>", "<|tools_suffix|>", is_keyed=True),
    "cohere_command3": _COHERE,
    "cohere_command4": _COHERE,
    "gigachat3": _objects(
        "<|function_call|>",
        None,
        opens=("<|function_call|>", "function call<|role_sep|>\n"),
        drops=("<|message_sep|>",),
    ),
    "inkling": _objects(
        "<|content_invoke_tool_json|>",
        "<|end_message|>",
        drops=("<|message_model|>", "<|content_text|>", "<|end_message|>", "<|content_model_end_sampling|>"),
    ),
    "internlm": _objects("<|action_start|><|plugin|>", "<|action_end|>"),
    "longcat": _objects("<longcat_tool_call>", "</longcat_tool_call>"),
    "granite-20b-fc": _objects("<function_call>", None),
    "phi4_mini_json": _objects("functools[", None, opens=("functools[", "functools [")),
    "hunyuan_a13b": _objects("<tool_calls>", "</tool_calls>", drops=("助手：",), template_marks=("助手：",)),
    "jamba": _objects("<tool_calls>", "</tool_calls>"),
    "lfm2": _LFM2,
    "olmo3": _python("<function_calls>", "</function_calls>"),
    "llama4_pythonic": _python(
        "<|python_start|>", "<|python_end|>", weak_opens=("[",), template_marks=("<|header_start|>",)
    ),
    "mistral": CallFormat(
        arguments="json",
        opens=("[TOOL_CALLS]",),
        takes_objects=True,
        has_bare_names=True,
        name=_MISTRAL_NAME,
        name_ends=("[ARGS]",),
        separators=" \t\r\n[],",
    ),
    "seed_oss": _functions("<seed:tool_call>", "</seed:tool_call>"),
    "hy_v3": replace(
        _keys(opens=("<tool_calls>",), closes=("</tool_calls>",), name_ends=("<tool_sep>",)),
        template_marks=("<tool_sep",),
    ),
    "hy_v4": replace(_keys(opens=("<tool_calls>",), closes=("</tool_calls>",)), template_marks=("<tool_calls",)),
    # one mark, <tool_call>: what follows tells them apart
    "qwen3_xml": _QWEN_XML,
    "qwen3_coder": _QWEN_XML,
    "step3p5": _QWEN_XML,
    "mimo": _functions("<tool_call>", "</tool_call>", is_trimmed=False),
    "glm45": _GLM,
    "glm47": _GLM,
    "ling3": _GLM,
    "poolside_v1": _GLM,
    "ernie45": replace(_HERMES, drops=("<response>", "</response>"), template_marks=("<response>",)),
    "hermes": _HERMES,
    "qwen3_json": _HERMES,
    "granite4": _HERMES,
    "granite": _objects("<|tool_call|>", None, opens=("<|tool_call|>", "<tool_call>")),
    # no mark at all: a call of a tool that the client has
    "xlam": _objects(
        "[TOOL_CALLS]",
        "</tool_call>",
        opens=("[TOOL_CALLS]", "<tool_call>"),
        closes=("```", "</tool_call>"),
        weak_opens=("[", "```json", "```"),
    ),
    "pythonic": _python(None, None, weak_opens=("[",)),
    "llama3_json": _LLAMA_JSON,
    "llama4_json": _LLAMA_JSON,
    # not in vLLM
    "minicpm3": _LFM2,
    "nemotron_json": _objects("<TOOLCALL>", "</TOOLCALL>"),
    "solar_open": CallFormat(
        arguments="json",
        opens=("<|tool_calls|>",),
        closes=("<|calls|>",),
        heads=("<|tool_call:begin|>",),
        name=_SOLAR_NAME,
        name_ends=("<|tool_call:args|>",),
        call_closes=("<|tool_call:end|>",),
    ),
    "functionary_v31": CallFormat(
        arguments="json", heads=("<function=",), name_ends=(">",), call_closes=("</function>",)
    ),
}
