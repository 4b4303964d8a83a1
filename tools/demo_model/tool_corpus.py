"""Conversations with tools, and records read from a text: what the demo model learns besides notes and chat.

Calls are trained as the chat template writes them, and as structured output makes them: a list of calls where a call is
required, the bare arguments where the function is named, and the fields of a record. JSON is compact everywhere, as
structured output is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tools.demo_model import corpus, words
from tools.demo_model.corpus import (
    ANSWER_WEIGHT,
    ARGUMENT_WEIGHT,
    CALL,
    CALL_END,
    END,
    TEXT_WEIGHT,
    TOOLS,
    Segment,
    listed,
)
from tools.demo_model.tool_families import FAMILIES, SEARCHES, Family, Kind, Value, any_family

NO_TOOL = "I have no tool for that."
#: Shares of the forms in which a call is written: as the template does, as a list of calls, as the arguments alone.
_FORMS = {"call": 0.6, "list": 0.25, "arguments": 0.15}

Draw = Callable[[Kind, random.Random], Value]


class Ask(NamedTuple):
    """A tool as the API takes it, a question, and what the tool must be called with."""

    tool: dict[str, Any]
    question: str
    arguments: dict[str, Value]

    @property
    def name(self) -> str:
        """The tool's name."""
        name: str = self.tool["function"]["name"]
        return name


class Toolset:
    """One tool made of a family, and questions for it."""

    def __init__(self, rng: random.Random, family: Family) -> None:
        """Draw a name for the tool and for each of its fields."""
        self.family = family
        self.name = rng.choice(family.names)
        self._kinds = dict(family.fields)
        self._required = set(family.fields)
        for slot, kind in family.more.items():
            if rng.random() < 0.5 and len(self._kinds) < 3:
                self._kinds[slot] = kind
                if rng.random() < 0.3:
                    self._required.add(slot)
        self._names: dict[str, str] = {}
        for slot, kind in self._kinds.items():
            free = [name for name in kind.names if name not in self._names.values()]
            self._names[slot] = rng.choice(free or [slot])

    @property
    def tool(self) -> dict[str, Any]:
        """The tool as the API takes it."""
        properties = {self._names[slot]: _property(kind) for slot, kind in self._kinds.items()}
        required = [self._names[slot] for slot in self._kinds if slot in self._required]
        parameters = {"type": "object", "properties": properties, "required": required}
        return {"type": "function", "function": {"name": self.name, "parameters": parameters}}

    def ask(self, rng: random.Random, draw: Draw = Kind.value) -> Ask:
        """Draw a question, and the arguments it names in the order of the tool's fields."""
        question = rng.choice(self.family.questions)
        values = {slot: draw(kind, rng) for slot, kind in self._kinds.items()}
        given = set(self.family.fields)
        for slot in self._kinds:
            if slot not in given and (slot in self._required or rng.random() < 0.5):
                given.add(slot)
                mention = rng.choice(self._kinds[slot].mention).format(values[slot])
                end = question[-1] if question[-1] in "?." else ""
                question = question.removesuffix(end) + mention + end
        question = question.format(**values)
        if rng.random() < 0.08:
            question = question[0].lower() + question[1:]
        if rng.random() < 0.1:
            question = f"{rng.choice(('Hello!', 'Hi.', 'Please help me.', corpus.filler_line(rng)))} {question}"
        if rng.random() < 0.1:
            question += rng.choice((" Thanks.", " Please.", f" Use the tool {self.name}.", " Use the tool."))
        arguments = {self._names[slot]: values[slot] for slot in self._kinds if slot in given}
        return Ask(self.tool, question, arguments)


def _property(kind: Kind) -> dict[str, Any]:
    if kind.choices:
        return {"type": "string", "enum": list(kind.choices)}
    return {"type": "integer" if kind.draw is words.number else "string"}


def draw_family(rng: random.Random) -> Family:
    """Draw a family of tools: a known one, or one made up."""
    return any_family(rng) if rng.random() < 0.35 else rng.choice(FAMILIES)


def tools_turn(tools: Sequence[Mapping[str, Any]]) -> str:
    """Write the list of tools, as the chat template does."""
    return f"{TOOLS}{''.join(_shown(tool['function']) for tool in tools)}{END}"


def _shown(function: Mapping[str, Any]) -> str:
    required = function["parameters"].get("required", ())
    fields = {
        name: ("" if name in required else "optional ") + ("|".join(form.get("enum", ())) or form["type"])
        for name, form in function["parameters"]["properties"].items()
    }
    return compact({"name": function["name"], "arguments": fields})


def compact(value: Any) -> str:
    """Write JSON without spaces, as structured output is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def tool_text(rng: random.Random, num_tokens: int) -> list[Segment]:
    """Draw a conversation of at least `num_tokens` tokens with one tool, sometimes two or none."""
    segments: list[Segment] = []
    if rng.random() < 0.4:
        segments.append(Segment(corpus.turn("system", corpus.system_prompt(rng)), TEXT_WEIGHT))
    families = [draw_family(rng)]
    if rng.random() < 0.2:
        families += [family for family in (rng.choice(FAMILIES),) if family not in families]
    sets = [Toolset(rng, family) for family in families] if rng.random() < 0.93 else []
    if len({toolset.name for toolset in sets}) < len(sets):
        sets = sets[:1]
    if sets:
        segments.append(Segment(tools_turn([toolset.tool for toolset in sets]), TEXT_WEIGHT))
    if rng.random() < 0.08:
        lookup = corpus.make_lookup(rng, rng.randrange(40, 160), rng.randrange(1, 6))
        segments += exchange(f"{lookup.notes}\n{lookup.question}", lookup.answer)
    while corpus.length(segments) < num_tokens:
        kind = rng.random()
        strangers = [family for family in FAMILIES if not _takes(family, sets)]
        if sets and (kind < 0.72 or not strangers):
            segments += call_segments(rng, rng.choice(sets).ask(rng))
        elif kind < 0.9:
            question, reply = corpus.chat_exchange(rng)
            if len(reply) <= corpus.MAX_SHORT_REPLY:
                segments += exchange(question, reply)
        else:
            segments += exchange(Toolset(rng, rng.choice(strangers)).ask(rng).question, NO_TOOL)
    return segments


def call_drill(rng: random.Random, num_tokens: int) -> list[Segment]:
    """Draw calls of one tool and nothing else: what matters is where in the question an argument stands."""
    toolset = Toolset(rng, draw_family(rng))
    segments = [Segment(tools_turn([toolset.tool]), TEXT_WEIGHT)]
    while corpus.length(segments) < num_tokens:
        segments += call_segments(rng, toolset.ask(rng), with_result=False)
    return segments


def _takes(family: Family, sets: Sequence[Toolset]) -> bool:
    """Tell whether one of the tools is of this family, or may be asked anything: "look up" is said to many."""
    return any(toolset.family is family or toolset.family in SEARCHES for toolset in sets)


def exchange(question: str, reply: str) -> list[Segment]:
    """Write a user's turn and the reply."""
    return [
        Segment(f"{corpus.turn('user', question)}<|assistant|>", TEXT_WEIGHT),
        Segment(f"{reply}{END}", ANSWER_WEIGHT),
    ]


def call_segments(rng: random.Random, ask: Ask, *, with_result: bool = True) -> list[Segment]:
    """Write the question, the call in one of its forms, and mostly the tool's result and the answer from it."""
    form = rng.choices(list(_FORMS), weights=list(_FORMS.values()))[0]
    segments = [Segment(f"{corpus.turn('user', ask.question)}<|assistant|>", TEXT_WEIGHT)]
    arguments = fields(ask.arguments)
    match form:
        case "call":
            segments += [
                Segment(f'{CALL}{{"name":"{ask.name}","arguments":', ANSWER_WEIGHT),
                *arguments,
                Segment(f"}}{CALL_END}{END}", ANSWER_WEIGHT),
            ]
        case "list":
            # That it begins so, the grammar says.
            segments += [
                Segment('[{"', 0.0),
                Segment(f'name":"{ask.name}","parameters":', TEXT_WEIGHT),
                *arguments,
                Segment(f"}}]{END}", ANSWER_WEIGHT),
            ]
        case _:
            segments += [Segment(arguments[0].text, 0.0), *arguments[1:], Segment(END, ANSWER_WEIGHT)]
    if with_result and (form == "call" or rng.random() < 0.3):
        content, answer = result(rng)
        segments += [Segment(f"{corpus.turn('tool', content)}<|assistant|>", TEXT_WEIGHT), *answer]
        segments.append(Segment(END, ANSWER_WEIGHT))
    return segments


def fields(values: Mapping[str, Value], weight: float = ANSWER_WEIGHT) -> list[Segment]:
    """Write a JSON object; a string's end counts as much as the string. `weight`: of the names."""
    segments = [Segment("{", weight)]
    for index, (name, value) in enumerate(values.items()):
        comma = "," if index else ""
        if isinstance(value, str):
            segments += [
                Segment(f'{comma}"{name}":"', weight),
                Segment(f"{json.dumps(value, ensure_ascii=False)[1:]}", ARGUMENT_WEIGHT),
            ]
        else:
            segments += [Segment(f'{comma}"{name}":', weight), Segment(str(value), ARGUMENT_WEIGHT)]
    return [*segments, Segment("}", ANSWER_WEIGHT)]


_RESULT_KEYS = listed(
    "temperature condition status price time result value name city email phone humidity wind code total count "
    "answer message title date day weather forecast stock amount balance address age color owner size distance "
    "duration delivery state location rating number id summary text country"
)
_RESULT_WORDS = listed(
    "sunny cloudy rainy windy foggy snowy ok done sent open closed shipped delivered ready lost busy free late high low"
)


def _result_value(rng: random.Random) -> Value | float:
    match rng.randrange(8):
        case 0 | 1:
            return words.number(rng)
        case 2:
            return round(rng.uniform(-20, 200), rng.choice((1, 1, 2)))
        case 3:
            return rng.choice((words.city, words.person, words.day, words.hour))(rng)
        case 4:
            return rng.choice((words.label, words.symbol, words.clause))(rng)
        case 5:
            return words.noun(rng)
        case 6:
            return f"{rng.choice(_RESULT_WORDS)} {rng.choice(_RESULT_WORDS)}"
        case _:
            return rng.choice(_RESULT_WORDS)


def result(rng: random.Random) -> tuple[str, list[Segment]]:
    """Draw what a tool returned, and the assistant's answer from it, without its end.

    Names and values of a flat JSON object are told in a sentence; a text is told as it is.
    """
    if rng.random() < 0.35:
        content = _plain_result(rng)
        return content, [Segment(content, ARGUMENT_WEIGHT)]
    keys = [words.made_up(rng) if rng.random() < 0.1 else key for key in rng.sample(_RESULT_KEYS, rng.randint(1, 3))]
    if rng.random() < 0.1:
        keys[0] = f"{keys[0]}_{rng.choice(_RESULT_KEYS)}"
    values = {key: _result_value(rng) for key in keys}
    content = json.dumps(values, ensure_ascii=False) if rng.random() < 0.7 else compact(values)
    segments = []
    for index, (key, value) in enumerate(values.items()):
        start = "The" if not index else " and the" if index == len(values) - 1 else ", the"
        segments += [Segment(f"{start} {key} is", ANSWER_WEIGHT), Segment(f" {value}", ARGUMENT_WEIGHT)]
    return content, [*segments, Segment(".", ANSWER_WEIGHT)]


def _plain_result(rng: random.Random) -> str:
    match rng.randrange(8):
        case 0:
            return str(_result_value(rng))
        case 1:
            return f"{rng.choice(_RESULT_WORDS).capitalize()}, {words.number(rng) % 40} degrees"
        case 2:
            return f"{words.number(rng) % 40}°C and {rng.choice(_RESULT_WORDS)}"
        case 3:
            return f"It is {words.number(rng) % 40} degrees and {rng.choice(_RESULT_WORDS)} in {words.city(rng)}."
        case 4:
            return f"{words.person(rng)} lives in {words.city(rng)}."
        case 5:
            return f"The {words.noun(rng)} is {rng.choice(_RESULT_WORDS)}."
        case 6:
            return f"{words.noun(rng)}, {words.noun(rng)} and {words.noun(rng)}"
        case _:
            return f"{words.clause(rng).capitalize()}."
