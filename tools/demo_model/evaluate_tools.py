"""Asks a demo model directory to call tools, to answer from what they return, and to fill records.

Towns and people are none of those that training draws, other words are made up anew; so are a third of the tools.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tools.demo_model import corpus, words
from tools.demo_model.corpus import CALL, CALL_END, END, Segment
from tools.demo_model.records import draw_record, record_segments
from tools.demo_model.scoring import CALL_ROOM, Message, Respondent, Score
from tools.demo_model.tool_corpus import Ask, Toolset, compact, fields, result, tools_turn
from tools.demo_model.tool_families import FAMILIES, Family, Kind, Value, any_family


def unseen(kind: Kind, rng: random.Random) -> Value:
    """Draw a value of a field that training does not draw: of towns, people and made-up words."""
    if kind.draw is words.city:
        return rng.choice(words.UNSEEN_CITIES)
    return rng.choice(words.UNSEEN_PEOPLE) if kind.draw is words.person else kind.value(rng)


def ask_unseen(rng: random.Random, family: Family) -> Ask:
    """Draw a tool of the family and a question for it."""
    return Toolset(rng, family).ask(rng, unseen)


def call_of(ask: Ask) -> str:
    """Write the call that answers a question, as the model should."""
    return f'{CALL}{{"name":"{ask.name}","arguments":{compact(ask.arguments)}}}{CALL_END}'


def call_message(ask: Ask) -> Message:
    """Write the call as a message of a past turn."""
    function = {"name": ask.name, "arguments": ask.arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def score(respondent: Respondent, num_questions: int) -> list[Score]:
    """Ask each kind of question so many times; the seed is apart from the training's."""
    examiner = _Examiner(respondent)
    kinds: dict[str, Callable[[random.Random], bool]] = {
        "call of a tool": lambda rng: examiner.calls(rng, rng.choice(FAMILIES)),
        "call of a tool made up": lambda rng: examiner.calls(rng, any_family(rng)),
        "second call, after a result and its answer": examiner.calls_again,
        "small talk and facts beside a tool": examiner.talks_beside_a_tool,
        "notes of 200 tokens beside a tool": examiner.reads_notes_beside_a_tool,
        "answer from a tool's result": examiner.tells_the_result,
        "arguments of a required call": lambda rng: examiner.fills_a_call(rng, rng.choice(FAMILIES)),
        "arguments of a required call of a tool made up": lambda rng: examiner.fills_a_call(rng, any_family(rng)),
        "record of a person and a town": examiner.fills_a_record_of_a_person,
        "record of any kind": lambda rng: respondent.gives(record_segments(rng, draw_record(rng))),
    }
    scores = []
    for kind, is_right in kinds.items():
        rng = random.Random(f"2026 {kind}")
        scores.append(Score(kind, 0, 0.0, sum(is_right(rng) for _ in range(num_questions)), num_questions))
    return scores


class _Examiner:
    """Asks one question of a kind and tells whether the answer was right."""

    def __init__(self, respondent: Respondent) -> None:
        self._respondent = respondent

    def _answers(self, messages: list[Message], tool: dict[str, Any], expected: str) -> bool:
        ids = self._respondent.prompt_ids(messages, [tool])
        return self._respondent.answer(ids, max_new_tokens=CALL_ROOM) == expected + END

    def calls(self, rng: random.Random, family: Family) -> bool:
        ask = ask_unseen(rng, family)
        messages = [{"role": "user", "content": ask.question}]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": corpus.system_prompt(rng)})
        return self._answers(messages, ask.tool, call_of(ask))

    def calls_again(self, rng: random.Random) -> bool:
        toolset = Toolset(rng, rng.choice(FAMILIES))
        first, second = toolset.ask(rng, unseen), toolset.ask(rng, unseen)
        content, answer = result(rng)
        messages = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": corpus.SMALL_TALK["Hello"]},
            {"role": "user", "content": first.question},
            call_message(first),
            {"role": "tool", "tool_call_id": "c", "content": content},
            {"role": "assistant", "content": corpus.joined(answer)},
            {"role": "user", "content": second.question},
        ]
        return self._answers(messages, toolset.tool, call_of(second))

    def talks_beside_a_tool(self, rng: random.Random) -> bool:
        question, reply = corpus.chat_exchange(rng)
        while len(reply) > corpus.MAX_SHORT_REPLY:
            question, reply = corpus.chat_exchange(rng)
        ask = ask_unseen(rng, rng.choice(FAMILIES))
        return self._answers([{"role": "user", "content": question}], ask.tool, reply)

    def reads_notes_beside_a_tool(self, rng: random.Random) -> bool:
        lookup = corpus.make_lookup(rng, 200, 6)
        ask = ask_unseen(rng, rng.choice(FAMILIES))
        messages = [{"role": "user", "content": f"{lookup.notes}\n{lookup.question}"}]
        return self._answers(messages, ask.tool, lookup.answer)

    def tells_the_result(self, rng: random.Random) -> bool:
        ask = ask_unseen(rng, rng.choice(FAMILIES))
        content, answer = result(rng)
        messages = [
            {"role": "user", "content": ask.question},
            call_message(ask),
            {"role": "tool", "tool_call_id": "c", "content": content},
        ]
        return self._answers(messages, ask.tool, corpus.joined(answer))

    def fills_a_call(self, rng: random.Random, family: Family) -> bool:
        ask = ask_unseen(rng, family)
        asked = f"{tools_turn([ask.tool])}{corpus.turn('user', ask.question)}<|assistant|>"
        call = [Segment(f'[{{"name":"{ask.name}","parameters":', 0.0), *fields(ask.arguments), Segment("}]", 0.0)]
        return self._respondent.gives([Segment(asked, 0.0), *call])

    def fills_a_record_of_a_person(self, rng: random.Random) -> bool:
        record = draw_record(rng, person=rng.choice(words.UNSEEN_PEOPLE), city=rng.choice(words.UNSEEN_CITIES))
        return self._respondent.gives(record_segments(rng, record))
