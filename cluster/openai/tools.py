"""What a request's tools mean: what the template is shown, what the output must be, how calls are read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import Any, Literal, NamedTuple

import msgspec

from cluster.openai.call_formats import CallFormat
from cluster.openai.conversation import template_tools
from cluster.openai.errors import bad_field
from cluster.openai.protocol import ChatRequest, FunctionSpec, ToolChoice
from cluster.openai.tool_calls import CallDelta, CallParser, ForcedCallParser, ToolCallParser
from cluster.openai.value_types import ToolSchema
from messages.errors import RequestError
from messages.request import Grammar
from text.json_schema.embedding import embedded

_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """The use that one request makes of tools."""

    template_tools: list[dict[str, Any]] | None = None  #: what the template is given
    kind: CallFormat | None = None  #: how calls are written; None: the output has no calls, or nothing but calls
    named: str | None = None  #: the function that must be called
    tools: Mapping[str, ToolSchema] = field(default_factory=dict)
    allowed: frozenset[str] | None = None  #: only calls of these are any; None: whatever has the form of a call
    grammar: Grammar | None = None  #: what the output must be
    grammar_param: str = "tools"  #: the field that the grammar is made of
    is_single: bool = False  #: the client takes one call at most
    num_past_calls: int | None = None  #: in the conversation, where ids of calls count on; None: ids are random

    @property
    def is_forced(self) -> bool:
        """Whether the output is nothing but calls."""
        return self.grammar is not None

    @property
    def begins(self) -> tuple[str, ...]:
        """What an output may begin with that is a call; nothing where that is not known."""
        if self.kind is None:
            return ()
        bare = [f'{{"name": "{name}"' for name in self.tools] + [f'{{"name":"{name}"' for name in self.tools]
        return (
            *filter(None, self.kind.opens or self.kind.heads),
            *(bare if "{" in self.kind.weak_opens else ()),
            *(f"[{name}(" for name in self.tools if self.kind.arguments == "python" and "[" in self.kind.weak_opens),
        )

    def parser(self) -> CallParser | None:
        """Make a fresh parser for one choice; None where all output is content."""
        if self.is_forced:
            return ForcedCallParser(self.named)
        return None if self.kind is None else ToolCallParser(self.kind, self.tools, self.allowed)

    def call_id(self, call: CallDelta) -> str:
        """Return the id of a call, of which `call` is the first piece: the model's own, or one in its form."""
        if call.id is not None or self.num_past_calls is None:
            return call.id or f"call_{token_hex(12)}"
        return f"functions.{call.name}:{self.num_past_calls + call.index}"


class _Choice(NamedTuple):
    """What `tool_choice` comes to, and the tools that it leaves, with their places in the request."""

    mode: Literal["none", "auto", "required", "named"]
    tools: list[tuple[int, FunctionSpec]]
    is_limited: bool = False  #: they are not all of the request's


def plan_tools(request: ChatRequest, kind: CallFormat | None) -> ToolPlan:
    """Plan what `tools`, `tool_choice` and `parallel_tool_calls` mean. `kind`: how this model writes calls, if it can.

    Raises:
        RequestError: a tool is no function, or the choice contradicts the tools.
    """
    shown = template_tools(request.tools or [])
    choice = _choice(request)
    if choice.mode == "none":
        return ToolPlan()
    names = [tool.name for _, tool in choice.tools]
    plan = ToolPlan(
        template_tools=[tool for tool in shown if choice.mode == "named" or tool["function"]["name"] in names],
        tools={tool.name: ToolSchema(tool.parameters) for _, tool in choice.tools},
        allowed=frozenset(names) if choice.is_limited else None,
        is_single=request.parallel_tool_calls is False,
        num_past_calls=_num_past_calls(request) if kind is not None and kind.has_ids else None,
    )
    if choice.mode == "named":
        [(index, tool)] = choice.tools
        param = f"tools[{index}].function.parameters"
        return replace(plan, named=tool.name, grammar=_grammar(_parameters(tool)), grammar_param=param)
    if choice.mode == "required":
        schema = _calls_schema(choice.tools, is_single=plan.is_single)
        return replace(plan, grammar=_grammar(schema))
    return replace(plan, kind=kind)


def _num_past_calls(request: ChatRequest) -> int:
    return sum(len(message.tool_calls or ()) for message in request.messages)


def _choice(request: ChatRequest) -> _Choice:
    wanted = request.tool_choice
    tools = [(index, tool.function) for index, tool in enumerate(request.tools or ()) if tool.function is not None]
    if isinstance(wanted, ToolChoice):
        return _named(wanted, tools) if wanted.type == "function" else _allowed(wanted, tools)
    if wanted is not None and wanted not in _CHOICES:
        raise bad_field("tool_choice", wanted, f"{', '.join(_CHOICES)}, or an object that names a function")
    if wanted == "required" and not request.tools:
        raise bad_field("tool_choice", wanted, "tools to choose from")
    if wanted == "none" or not request.tools:
        return _Choice("none", tools)
    return _Choice("required" if wanted == "required" else "auto", tools)


def _named(wanted: ToolChoice, tools: list[tuple[int, FunctionSpec]]) -> _Choice:
    if wanted.function is None:
        param = "tool_choice.function"
        raise RequestError(f"{param}: missing, want the name of a tool", param=param, code="missing_required_field")
    return _Choice("named", [_tool("tool_choice.function.name", wanted.function.name, tools)])


def _allowed(wanted: ToolChoice, tools: list[tuple[int, FunctionSpec]]) -> _Choice:
    if wanted.type != "allowed_tools":
        raise bad_field(
            "tool_choice.type", wanted.type, "function or allowed_tools: other kinds of tools are not served"
        )
    param = "tool_choice.allowed_tools"
    if wanted.allowed_tools is None:
        raise RequestError(f"{param}: missing, want a mode and tools", param=param, code="missing_required_field")
    mode, allowed = wanted.allowed_tools.mode, wanted.allowed_tools.tools
    if mode not in ("auto", "required"):
        raise bad_field(f"{param}.mode", mode, "auto or required")
    if not allowed:
        raise bad_field(f"{param}.tools", [], "at least one tool")
    left: dict[int, FunctionSpec] = {}
    for number, entry in enumerate(allowed):
        place = f"{param}.tools[{number}]"
        if entry.type != "function" or entry.function is None:
            raise bad_field(f"{place}.type", entry.type, '"function", with the name of one')
        left |= dict([_tool(f"{place}.function.name", entry.function.name, tools)])
    return _Choice("auto" if mode == "auto" else "required", sorted(left.items()), is_limited=True)


def _tool(param: str, name: str, tools: list[tuple[int, FunctionSpec]]) -> tuple[int, FunctionSpec]:
    """Return the tool of that name, with its place."""
    for place, tool in tools:
        if tool.name == name:
            return place, tool
    raise bad_field(param, name, f"the name of a tool: {', '.join(tool.name for _, tool in tools)}")


def _parameters(tool: FunctionSpec) -> dict[str, Any]:
    return tool.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", spec=msgspec.json.encode(schema).decode())


def _calls_schema(tools: list[tuple[int, FunctionSpec]], *, is_single: bool) -> dict[str, Any]:
    """Make the schema of a list of calls of any of `tools`; what is refused of one names it."""
    places = {f"tools[{index}].function.parameters": tool for index, tool in tools}
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(tool, place) for place, tool in places.items()]},
        "$defs": embedded({place: _parameters(tool) for place, tool in places.items()}),
    }
    if is_single:
        schema["maxItems"] = 1
    return schema


def _call_schema(tool: FunctionSpec, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/{place}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def check_no_other_structure(param: str) -> None:
    """Check that a forced call, a structure of its own, may come with the structure that field `param` asks for.

    OpenAI's `response_format` holds the content alone, and some clients always send it; others hold the whole output.

    Raises:
        RequestError: it may not.
    """
    if not param.startswith("response_format"):
        raise RequestError(
            f"{param}: got it together with a tool_choice that forces a call, want one of the two",
            param=param,
            code="invalid_value",
        )
