"""Short texts about people and things, and the records that structured output makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tools.demo_model import corpus, words
from tools.demo_model.corpus import ANSWER_WEIGHT, END, TEXT_WEIGHT, Segment
from tools.demo_model.tool_corpus import fields
from tools.demo_model.tool_families import Value

_GOOD = corpus.listed("love like enjoy adore recommend")
_BAD = corpus.listed("hate dislike regret despise avoid")
_GOOD_WORDS = corpus.listed("wonderful great excellent fantastic good amazing perfect lovely brilliant nice")
_BAD_WORDS = corpus.listed("terrible awful bad horrible poor disappointing broken useless boring ugly")
_FLAT_WORDS = corpus.listed("okay average ordinary usual normal acceptable fine")


@dataclass(frozen=True, slots=True)
class Facet:
    """Something that a text tells of somebody: names of its field, and how it is said."""

    names: tuple[str, ...]
    sayings: tuple[str, ...]
    draw: Callable[[random.Random], Value]


_FACETS = (
    Facet(("city", "town", "location", "home", "place"), ("lives in {}", "comes from {}", "is from {}"), words.city),
    Facet(("age", "years"), ("is {} years old", "is {}", "turned {}"), lambda rng: rng.randrange(2, 100)),
    Facet(
        ("job", "profession", "occupation", "role"),
        ("works as a {}", "is a {}", "is a young {}"),
        lambda rng: rng.choice(words.JOBS),
    ),
    Facet(
        ("food", "favorite_food", "likes", "dish"),
        ("likes {}", "eats {}", "wants {}"),
        lambda rng: rng.choice(corpus.FOODS),
    ),
    Facet(("pet", "animal"), ("has a {}", "owns a {}", "lives with a {}"), lambda rng: rng.choice(corpus.ANIMALS)),
    Facet(
        ("color", "favorite_color", "colour"),
        ("wears a {} coat", "drives a {} car", "likes the color {}"),
        lambda rng: rng.choice(words.COLORS),
    ),
    Facet(("day", "date", "when"), ("arrives on {}", "leaves on {}", "comes on {}"), words.day),
    Facet(("product", "item", "thing"), ("bought a {}", "ordered a {}", "sells a {}"), words.noun),
    Facet(("friend", "partner", "boss"), ("knows {}", "works with {}", "is a friend of {}"), words.person),
    Facet(("language", "lang"), ("speaks {}", "learns {}"), lambda rng: rng.choice(words.LANGUAGES)),
    Facet(("company", "employer"), ("works at {}", "works for {}"), lambda rng: words.made_up(rng).capitalize()),
)
_NAMES = ("name", "person", "customer", "who", "user")
_PLAIN_FIELDS = corpus.listed(
    "status priority size category owner title brand model team project country version level genre author region label"
)
_PLAIN_CHOICES = corpus.listed("low medium high open closed small large urgent new old done red green blue yes no")
_REQUESTS = (
    "{text}",
    "{text}",
    "{text}",
    "Extract the data: {text}",
    "Extract the fields: {text}",
    "Extract the information. {text}",
    "{text} Answer in JSON.",
    "{text} Answer as JSON with {names}.",
    "Return JSON with {names}: {text}",
    "Give me {names} as JSON. {text}",
    "Extract {names} from: {text}",
    "Extract {names}: {text}",
    "Classify: {text}",
)
_SYSTEM_RULES = ("", " Answer in JSON.", " You extract data.", " Extract the fields as JSON.")


class Record(NamedTuple):
    """A text, and the fields that are read from it."""

    text: str
    values: dict[str, Value]


def record_text(rng: random.Random, num_tokens: int) -> list[Segment]:
    """Draw a conversation of at least `num_tokens` tokens in which texts are turned into JSON."""
    segments: list[Segment] = []
    if rng.random() < 0.3:
        segments.append(
            Segment(corpus.turn("system", corpus.system_prompt(rng) + rng.choice(_SYSTEM_RULES)), TEXT_WEIGHT)
        )
    while corpus.length(segments) < num_tokens:
        segments += record_segments(rng, draw_record(rng))
    return segments


def record_segments(rng: random.Random, record: Record) -> list[Segment]:
    """Write the user's turn and the record; where the turn speaks of no JSON, only a grammar makes it begin."""
    request = rng.choice(_REQUESTS)
    names = list(record.values)
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    question = request.format(text=record.text, names=listed)
    written = fields(record.values, weight=0.5)
    if "JSON" not in question:
        written[0] = Segment("{", 0.0)
        written[1] = written[1]._replace(text=written[1].text[1:])
        written.insert(1, Segment('"', 0.0))
    return [
        Segment(f"{corpus.turn('user', question)}<|assistant|>", TEXT_WEIGHT),
        *written,
        Segment(END, ANSWER_WEIGHT),
    ]


def draw_record(rng: random.Random, *, person: str | None = None, city: str | None = None) -> Record:
    """Draw a text about somebody, about a thing's fields, or a judgement; `person` and `city` are put in if given."""
    kind = 0.0 if person else rng.random()
    if kind < 0.55:
        return _about_somebody(rng, person, city)
    return _plain(rng) if kind < 0.85 else _judgement(rng)


def _about_somebody(rng: random.Random, person: str | None, city: str | None) -> Record:
    person = person or words.person(rng)
    told = rng.sample(_FACETS, rng.randint(1, 4))
    if city and _FACETS[0] not in told:
        told[0] = _FACETS[0]
    values: dict[str, Value] = {rng.choice(_NAMES): person}
    said = []
    for facet in told:
        value = city if city and facet is _FACETS[0] else facet.draw(rng)
        said.append(rng.choice(facet.sayings).format(value))
        values[rng.choice(facet.names)] = value
    if len(said) > 1 and rng.random() < 0.6:
        text = f"{person} {', '.join(said[:-1])} and {said[-1]}."
    else:
        text = " ".join(
            f"{person if not index else rng.choice(('He', 'She'))} {part}." for index, part in enumerate(said)
        )
    if rng.random() < 0.15:
        text = f"My name is {person}. I am here. {text}" if rng.random() < 0.3 else f"{corpus.filler_line(rng)} {text}"
    asked = list(values.items())
    if rng.random() < 0.5:
        rng.shuffle(asked)
    return Record(text, dict(asked[: rng.randint(max(1, len(asked) - 2), len(asked))] if not city else asked))


def _plain(rng: random.Random) -> Record:
    names = rng.sample(_PLAIN_FIELDS, rng.randint(1, 4))
    draws = (words.noun, words.person, words.city, words.label, words.made_up)
    values: dict[str, Value] = {
        name: rng.choice(_PLAIN_CHOICES) if rng.random() < 0.5 else rng.choice(draws)(rng) for name in names
    }
    form = rng.choice(("The {} is {}.", "{}: {}.", "Its {} is {}.", "{} {};", "The {} of the ticket is {}."))
    said = [form.format(name, value) for name, value in values.items()]
    asked = list(values.items())
    rng.shuffle(asked)
    return Record(" ".join(said), dict(asked[: rng.randint(1, len(asked))]))


def _judgement(rng: random.Random) -> Record:
    thing = words.noun(rng)
    name, answer, verbs, adjectives = rng.choice(
        (
            ("sentiment", "positive", _GOOD, _GOOD_WORDS),
            ("sentiment", "negative", _BAD, _BAD_WORDS),
            ("sentiment", "neutral", ("have", "own", "use"), _FLAT_WORDS),
        )
    )
    text = rng.choice(
        (
            f"I {rng.choice(verbs)} this {thing}.",
            f"The {thing} is {rng.choice(adjectives)}.",
            f"I {rng.choice(verbs)} the {thing}. It is {rng.choice(adjectives)}.",
            f"This is a {rng.choice(adjectives)} {thing}.",
            f"{rng.choice(adjectives).capitalize()} {thing}!",
            f"What a {rng.choice(adjectives)} {thing}!",
        )
    )
    values: dict[str, Value] = {name: answer}
    if rng.random() < 0.4 and thing in text:
        key = rng.choice(("product", "item", "topic", "subject", "thing"))
        values = {key: thing, **values} if rng.random() < 0.5 else {**values, key: thing}
    return Record(text, values)
