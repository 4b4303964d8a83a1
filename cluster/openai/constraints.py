"""Which structure a request wants its output to have: OpenAI's `response_format`, vLLM's two spellings."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.openai.errors import bad_field
from cluster.openai.protocol import ResponseFormat, SharedFields, StructuredOutputs
from messages.errors import RequestError
from messages.request import Grammar

_MAX_CHOICES = 4096
#: white space between JSON's tokens: one space, or one line break and what indents: a small model gets lost in more
PRETTY = r" |\r?\n[ \t]{0,32}"


def constraint_of(request: SharedFields, whitespace: str = "") -> tuple[str, Grammar] | None:
    """Return the field that asks for a structure, and the grammar it means; None where the output is free.

    Args:
        request: what the client sent.
        whitespace: what may stand between JSON's tokens, unless the request says it (`messages.request.Grammar`).

    Raises:
        RequestError: more than one structure is asked for, or one that is malformed or not served.
    """
    wanted = request.structured_outputs or StructuredOutputs()
    if wanted.structural_tag is not None:
        raise bad_field("structured_outputs.structural_tag", wanted.structural_tag, "another structure")
    found = [*_of_response_format(request.response_format), *_of_structured_outputs(wanted)]
    found += _of_values(
        "guided_",
        request.guided_json,
        request.guided_regex,
        request.guided_choice,
        request.guided_grammar,
    )
    if len(found) > 1:
        names = " and ".join(param for param, _ in found)
        raise RequestError(f"{found[1][0]}: got {names}, want one structure", param=found[1][0], code="invalid_value")
    if not found:
        return None
    param, grammar = found[0]
    pattern = wanted.whitespace_pattern or request.guided_whitespace_pattern
    if pattern is None:
        pattern = "" if wanted.disable_any_whitespace else whitespace
    if grammar.kind in ("json_schema", "json_object") and pattern:
        grammar = msgspec.structs.replace(grammar, whitespace=pattern)
    return param, grammar


def _of_response_format(wanted: ResponseFormat | None) -> list[tuple[str, Grammar]]:
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [("response_format", Grammar(kind="json_object"))]
    if wanted.type != "json_schema":
        raise bad_field("response_format.type", wanted.type, "text, json_object or json_schema")
    param = "response_format.json_schema.schema"
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise RequestError(f"{param}: missing, want a JSON schema", param=param, code="missing_required_field")
    return [(param, json_grammar(param, wanted.json_schema.schema_))]


def _of_structured_outputs(wanted: StructuredOutputs) -> list[tuple[str, Grammar]]:
    prefix = "structured_outputs."
    if wanted.disable_additional_properties:
        raise bad_field(f"{prefix}disable_additional_properties", True, "additionalProperties: false in the schema")
    found = _of_values(prefix, wanted.json_, wanted.regex, wanted.choice, wanted.grammar)
    if wanted.json_object:
        found.append((f"{prefix}json_object", Grammar(kind="json_object")))
    return found


def _of_values(
    prefix: str, schema: Any, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[tuple[str, Grammar]]:
    found: list[tuple[str, Grammar]] = []
    if schema is not None:
        found.append((f"{prefix}json", json_grammar(f"{prefix}json", schema)))
    if regex is not None:
        found.append((f"{prefix}regex", Grammar(kind="regex", spec=regex)))
    if choice is not None:
        found.append((f"{prefix}choice", _choice_grammar(f"{prefix}choice", choice)))
    if grammar is not None:
        found.append((f"{prefix}grammar", Grammar(kind="lark", spec=grammar)))
    return found


def json_grammar(param: str, schema: Any) -> Grammar:
    """Make the grammar of a JSON schema, given as an object or as JSON text.

    Raises:
        RequestError: `schema` is neither, or nested too deeply.
    """
    try:
        value = msgspec.json.decode(schema) if isinstance(schema, str) else schema
        if isinstance(value, dict):
            return Grammar(kind="json_schema", spec=msgspec.json.encode(value).decode())
    except (msgspec.DecodeError, RecursionError):
        pass
    raise bad_field(param, schema, "a JSON schema, as an object or as JSON text")


def _choice_grammar(param: str, choices: list[str]) -> Grammar:
    if not 1 <= len(choices) <= _MAX_CHOICES or not all(choices):
        raise bad_field(param, choices, f"1 to {_MAX_CHOICES} strings, none empty")
    return Grammar(kind="choice", spec=msgspec.json.encode(choices).decode())
