"""What clients ask for, written in llguidance's own language: a list of grammars in JSON, of which the first begins."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

import llguidance
import msgspec
from llguidance.gbnf_to_lark import gbnf_to_lark

from messages.errors import RequestError
from messages.request import Grammar
from text.json_schema.places import shown
from text.json_schema.translation import followable

#: `\uXXXX` is left out, for a name could be written in several ways with it, and come twice. The library then has no
#: control characters that have no letter of their own.
_ESCAPES: Final = 'nrbtf\\"'
_REGEX_SPECIAL: Final = frozenset("\\.+*?()|[]{}^$#&-~/")
#: The model chooses how a text is tokenized: were it forced, a special token whose text a grammar holds would be.
_OPTIONS: Final = '%llguidance {"no_forcing": true}'
_MAX_WRITTEN_CHARS: Final = 2**20

#: which keyword the library means where its message does not say
_KEYWORDS_OF: Final = {
    "required property": "required",
    "required item": "minItems",
    "patternProperty": "patternProperties",
    "multipleOf": "multipleOf",
    "is equal to exclusive": "minimum",
    "regex": "pattern",
    "Regex is empty": "pattern",
    "incompatible types": "type",
    "incompatible boolean": "const",
    "circular reference": "$ref",
    "min/maxProperties": "minProperties",
    "prefixItems": "prefixItems",
    "anyOf": "anyOf",
    "items": "minItems",
}

_COMMENT_OR_STRING: Final = re.compile(r"#[^\n]*|//[^\n]*|\"(?:[^\"\\\n]|\\.)*\"|/(?:[^/\\\n]|\\.)+/")
_CONTINUED: Final = re.compile(r"\n\s*(?=\|)")
_CODE_POINT: Final = re.compile(r"\\(\\)|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")


def written(grammar: Grammar) -> Grammar:
    """Write a grammar in the library's language, without looking at what only compiling it shows.

    Raises:
        RequestError: it is malformed, asks for what cannot be followed, or grows too large.
    """
    if grammar.kind == "written":
        return grammar
    spec = json.dumps(_sources(grammar))
    if len(spec) > _MAX_WRITTEN_CHARS:
        raise refused_grammar(f"it grows to {len(spec)} characters, want at most {_MAX_WRITTEN_CHARS}")
    return Grammar(kind="written", spec=spec, before=grammar.before, follows_text=grammar.follows_text)


def whole_grammar(grammar: Grammar, *, has_space: bool) -> str:
    """Return the text that the library compiles of a written grammar; with a space before it where `has_space`."""
    space = '" " ' if has_space else ""
    before = "before " if grammar.before else ""
    lark = f"{_OPTIONS}\nstart: {space}{before}@g0\n{grammar.before}"
    first = json.dumps({"name": "output", "lark_grammar": lark})
    return f'{{"grammars": [{first}, {grammar.spec[1:-1]}]}}'


def refused_grammar(reason: str) -> RequestError:
    """Make the error that refuses a grammar."""
    return RequestError(f"grammar refused: {one_line(reason)}", code="bad_grammar")


def library_refusal(grammar: Grammar, message: str) -> RequestError:
    """Make the error for what the library says of a written grammar; of a JSON schema's it names the keyword."""
    keyword = ""
    if '"json_schema"' in grammar.spec:
        keyword = next((f"{keyword}: " for words, keyword in _KEYWORDS_OF.items() if words in message), "")
    return refused_grammar(keyword + message)


def one_line(message: str) -> str:
    """Return a message without line breaks, cut to 300 characters."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:297] + "..."


def _sources(grammar: Grammar) -> list[dict[str, Any]]:
    """Return the grammars that `grammar` is made of, the first of which is it, named g0, g1, ..."""
    if grammar.kind != "any_of":
        return [{"name": "g0", **_source(grammar)}]
    sources: list[dict[str, Any]] = []
    starts: list[str] = []
    rules: list[str] = []
    for number, option in enumerate(msgspec.json.decode(grammar.spec, type=list[Grammar]), start=1):
        sources.append({"name": f"g{number}", **_source(option)})
        starts.append(f"{'before ' if option.before else ''}@g{number}")
        rules += filter(None, [option.before])
    lines = [f"start: {' | '.join(starts)}", *dict.fromkeys(rules)]
    return [{"name": "g0", "lark_grammar": "\n".join(lines)}, *sources]


def _source(grammar: Grammar) -> dict[str, Any]:
    """Write one grammar as a member of the list."""
    match grammar.kind:
        case "json_schema":
            schema = _parsed(grammar)
            if not isinstance(schema, dict):
                raise refused_grammar(f"{shown(schema)} is no JSON schema, wanted an object")
            return {"json_schema": _json_source(grammar, schema)}
        case "json_object":
            return {"json_schema": _json_source(grammar, {"type": "object"})}
        case "choice":
            choices = _parsed(grammar)
            if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
                raise refused_grammar(f"{shown(choices)}, wanted a list of one or more strings")
            return _regex_source("|".join(_escaped(choice) for choice in choices))
        case "regex":
            return _regex_source(grammar.spec)
        case "lark":
            return {"lark_grammar": _lark_of(grammar) if _is_ebnf(grammar.spec) else grammar.spec}
        case _:
            raise refused_grammar("wanted a grammar that is not made of others")


def _json_source(grammar: Grammar, schema: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"json_allowed_escapes": _ESCAPES, "whitespace_flexible": False}
    if grammar.whitespace:
        options["whitespace_pattern"] = grammar.whitespace
    try:
        return {"x-guidance": options, **followable(schema)}
    except RequestError as error:
        raise refused_grammar(error.message) from error
    except RecursionError as error:
        raise refused_grammar("it is nested too deep") from error


def _regex_source(pattern: str) -> dict[str, Any]:
    source: dict[str, Any] = json.loads(llguidance.LLMatcher.grammar_from_regex(pattern))["grammars"][0]
    return {"lark_grammar": source["lark_grammar"]}


def _parsed(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.spec, parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        raise refused_grammar(f"{shown(grammar.spec)} is not JSON: {error}") from error
    except RecursionError as error:
        raise refused_grammar("it is nested too deep") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number that a double holds")
    return value


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in _REGEX_SPECIAL else character for character in text)


def _is_ebnf(text: str) -> bool:
    """Tell whether rules are written with `::=`."""
    return "::=" in _COMMENT_OR_STRING.sub("", text)


def _lark_of(grammar: Grammar) -> str:
    """Write a grammar in EBNF, as llama.cpp and vLLM's documentation have it, in Lark's language."""
    # The converter ends a rule at the end of its line, and loses zeros that a code point begins with.
    text = _CODE_POINT.sub(_character, _CONTINUED.sub(" ", grammar.spec.replace("\r\n", "\n")))
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises a bare Exception for most faults of a grammar
        reason = str(error) or "it ends too soon"
        raise refused_grammar(f"{reason}, want EBNF with a rule named root, or Lark") from error


def _character(match: re.Match[str]) -> str:
    if match[1]:
        return match[0]
    code = int(match[2] or match[3], 16)
    if code < 0x100:
        return f"\\x{code:02x}"
    return chr(code) if code <= 0x10FFFF and not 0xD800 <= code < 0xE000 else match[0]
