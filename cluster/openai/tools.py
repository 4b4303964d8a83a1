"""What a request's tools mean: what the template is shown, what the output must be, how calls are read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.openai.conversation import template_tools
from cluster.openai.errors import bad_field
from cluster.openai.protocol import ChatRequest, NamedToolChoice, Tool
from cluster.openai.tool_calls import SPECIAL_TOKEN_FORMATS, NamedCallParser, ToolCallParser, ToolFormat
from messages.errors import RequestError
from messages.request import Grammar
from text.json_schema.embedding import embedded

_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    """The use that one request makes of tools."""

    template_tools: list[dict[str, Any]] | None = None  #: what the template is given
    kind: ToolFormat | None = None  #: how calls are written; None: no calls, or a named function
    named: str | None = None  #: the function that must be called
    names: frozenset[str] = frozenset()
    grammar: Grammar | None = None  #: what the output must be
    grammar_param: str = "tools"  #: the field that the grammar is made of
    is_single: bool = False  #: the client takes one call at most

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether the marks of calls are special tokens, which the text must keep until it is parsed."""
        return self.kind in SPECIAL_TOKEN_FORMATS

    def parser(self) -> ToolCallParser | NamedCallParser | None:
        """Make a fresh parser for one choice; None where all output is content."""
        if self.named is not None:
            return NamedCallParser(self.named)
        return None if self.kind is None else ToolCallParser(self.kind, self.names)


def plan_tools(request: ChatRequest, kind: ToolFormat | None) -> ToolPlan:
    """Plan what `tools`, `tool_choice` and `parallel_tool_calls` mean. `kind`: how this model writes calls, if it can.

    Raises:
        RequestError: the choice contradicts the tools.
    """
    tools = request.tools or []
    wanted = _wanted(request, tools)
    if wanted == "none":
        return ToolPlan()
    shown_tools = template_tools(tools)
    names = frozenset(tool.function.name for tool in tools)
    is_single = request.parallel_tool_calls is False
    if isinstance(wanted, NamedToolChoice):
        name = wanted.function.name
        index = next(index for index, tool in enumerate(tools) if tool.function.name == name)
        return ToolPlan(
            template_tools=shown_tools,
            named=name,
            names=names,
            grammar=_grammar(_parameters(tools[index])),
            grammar_param=f"tools[{index}].function.parameters",
        )
    if wanted == "required":
        return ToolPlan(
            template_tools=shown_tools,
            kind="list",
            names=names,
            grammar=_grammar(_calls_schema(tools, is_single=is_single)),
            is_single=is_single,
        )
    return ToolPlan(template_tools=shown_tools, kind=kind, names=names, is_single=is_single)


def _wanted(request: ChatRequest, tools: list[Tool]) -> str | NamedToolChoice:
    wanted = request.tool_choice
    if wanted is None:
        return "auto" if tools else "none"
    if isinstance(wanted, str):
        if wanted not in _CHOICES:
            raise bad_field("tool_choice", wanted, f"{', '.join(_CHOICES)}, or an object that names a function")
        if wanted == "required" and not tools:
            raise bad_field("tool_choice", wanted, "tools to choose from")
        return wanted if tools else "none"
    if wanted.type != "function":
        raise bad_field("tool_choice.type", wanted.type, "function")
    names = [tool.function.name for tool in tools]
    if wanted.function.name not in names:
        raise bad_field("tool_choice.function.name", wanted.function.name, f"the name of a tool: {', '.join(names)}")
    return wanted


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar(kind="json_schema", spec=msgspec.json.encode(schema).decode())


def _calls_schema(tools: list[Tool], *, is_single: bool) -> dict[str, Any]:
    """Make the schema of a list of calls of any of `tools`; what is refused of one names it."""
    places = {f"tools[{index}].function.parameters": tool for index, tool in enumerate(tools)}
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(tool, place) for place, tool in places.items()]},
        "$defs": embedded({place: _parameters(tool) for place, tool in places.items()}),
    }
    if is_single:
        schema["maxItems"] = 1
    return schema


def _call_schema(tool: Tool, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "parameters": {"$ref": f"#/$defs/{place}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def check_no_other_structure(plan: ToolPlan, param: str) -> None:
    """Check that a forced call, a structure of its own, is the only one.

    Raises:
        RequestError: the request asks for another one too, in field `param`.
    """
    if plan.grammar is not None:
        raise RequestError(
            f"{param}: got it together with a tool_choice that forces a call, want one of the two",
            param=param,
            code="invalid_value",
        )
