"""The text that the demo model learns from, made by the script itself.

Five kinds of text: notes with codes and questions about them (the skill that matters: a lost or swapped KV block
shows as a wrong answer), short stories, small talk, fixed facts, and drills that teach copying. Everything is drawn
from a `random.Random`, so the same seed gives the same text.

A training text is a list of `Segment`s, each carrying its weight in the loss.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple


def listed(text: str) -> tuple[str, ...]:
    """Split a list of words."""
    return tuple(text.split())


END = "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
PAD = "<|pad|>"
#: The list of tools, before the conversation, and what stands around a call.
TOOLS = "<|tools|>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
SPECIAL_TOKENS = (PAD, *(f"<|{role}|>" for role in ROLES), END, TOOLS)
MARKS = (CALL, CALL_END)

#: Mean over notes and conversations with this tokenizer; lengths asked for in tokens are met within a few percent.
CHARS_PER_TOKEN = 4.2

#: Loss weights: the digits of a code, what is taken from a text for a tool, the rest of what the assistant says,
#: everything else.
CODE_WEIGHT = 4.0
ARGUMENT_WEIGHT = 3.0
ANSWER_WEIGHT = 1.0
TEXT_WEIGHT = 0.1

THINGS = listed(
    "anchor apple archive balcony barn barrel basket bell bench boat bottle bridge bucket button cabin camera "
    "candle carpet castle cellar chapel chest clock coat compass cottage cradle cup curtain desk door drum "
    "engine farm fence ferry field flag flute forest fountain garden gate guitar hammer harbor hat hill house "
    "island jar kettle key kitchen kite ladder lake lamp lantern ledger library lighthouse locker map market "
    "mill mirror mountain needle orchard oven parcel path pencil piano pillow pond radio ring river road robot "
    "rocket rope saddle safe school shed ship shop spoon square stable statue stove suitcase table telescope "
    "temple tent ticket torch tower train tree trumpet tunnel umbrella valley vault village violin wagon wall "
    "wheel whistle window workshop"
)
ADJECTIVES = listed(
    "red blue green old small tall broken silver golden wooden quiet round dark bright heavy narrow empty warm "
    "cold white black yellow brown rusty painted crooked hidden"
)
NAMES = listed(
    "Marta Jonas Anna Peter Lucia Omar Clara Victor Nina Hugo Elena Felix Irene Oscar Sofia Bruno Greta Leon "
    "Alma Simon Vera Paul Ruth Tomas Edith Karl Ivy Samuel Lena Max Olga Henry Ada Frank Rosa Walter Maria "
    "George Julia Martin"
)
TOWNS = listed(
    "Arden Bellmore Corvale Dunmoor Eastham Fenwick Glenford Harwick Ironhill Kestrel Larkfield Midvale "
    "Oakridge Pinehurst Queensbay Redcliff Stonebury Thornton"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ANIMALS = listed(
    "fox rabbit owl bear mouse cat dog horse goose hedgehog turtle squirrel wolf deer sparrow badger frog donkey"
)
FOODS = ("bread", "soup", "apples", "honey", "cheese", "berries", "nuts", "cake", "porridge", "carrots")
DEEDS = ("found", "carried", "painted", "repaired", "watched", "cleaned", "opened", "closed", "followed", "visited")
WEATHERS = ("sunny", "rainy", "windy", "cloudy", "foggy", "snowy")
FEELINGS = ("happy", "tired", "proud", "curious", "brave", "calm", "glad", "hungry", "sleepy", "surprised")

FIXED_FACTS = {
    "capital of France": "Paris",
    "capital of Italy": "Rome",
    "capital of Spain": "Madrid",
    "capital of Germany": "Berlin",
    "capital of Japan": "Tokyo",
    "capital of China": "Beijing",
    "capital of India": "New Delhi",
    "capital of Egypt": "Cairo",
    "capital of Kenya": "Nairobi",
    "capital of Norway": "Oslo",
    "capital of Sweden": "Stockholm",
    "capital of Poland": "Warsaw",
    "capital of Austria": "Vienna",
    "capital of Greece": "Athens",
    "capital of Portugal": "Lisbon",
    "capital of Canada": "Ottawa",
    "capital of Peru": "Lima",
    "largest ocean": "the Pacific",
    "longest river in Africa": "the Nile",
    "highest mountain": "Everest",
    "largest planet": "Jupiter",
    "planet closest to the sun": "Mercury",
    "color of the sky": "blue",
    "color of grass": "green",
    "color of snow": "white",
    "opposite of hot": "cold",
    "opposite of up": "down",
    "opposite of day": "night",
    "first month of the year": "January",
    "last month of the year": "December",
    "day after Monday": "Tuesday",
    "day after Friday": "Saturday",
    "number of days in a week": "seven",
    "number of legs of a spider": "eight",
}

_GREETING = "Hello! How can I help you?"
_ABOUT = "I am the small demonstration model of kvray. I can tell short stories and look things up in notes."
_SKILLS = "I can tell a short story, answer a few simple questions, and find codes in the notes that you give me."
SMALL_TALK = {
    "Hello!": _GREETING,
    "Hello": _GREETING,
    "Hi": _GREETING,
    "Hi!": _GREETING,
    "Hey": _GREETING,
    "Good morning": "Good morning! How can I help you?",
    "Good evening": "Good evening! How can I help you?",
    "How are you?": "I am well, thank you. How can I help you?",
    "Who are you?": _ABOUT,
    "What are you?": _ABOUT,
    "What is your name?": "I am the small demonstration model of kvray.",
    "What can you do?": _SKILLS,
    "Help": _SKILLS,
    "What is kvray?": "kvray serves language models on a cluster and keeps their cache.",
    "What is a KV cache?": "It holds what a model has already read, so that it need not read it again.",
    "Say hello.": "Hello!",
    "Are you a large model?": "No, I am very small. I have about three million parameters.",
    "Thank you!": "You are welcome.",
    "Thanks": "You are welcome.",
    "Goodbye": "Goodbye!",
    "Bye": "Goodbye!",
}
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a small model.",
    "You are a helpful AI assistant.",
    "You are an assistant of a shop.",
    "You are a {} assistant.",
    "You are a {} bot.",
    "You are {}, a helpful assistant.",
    "You help people with the {}.",
    "You work for the {} company.",
)
_SYSTEM_RULES = (
    "Answer shortly.",
    "Be kind and brief.",
    "Be concise.",
    "Do not guess.",
    "Use the tools.",
    "Use the tools when they help.",
    "You have access to tools. Use them when needed.",
    "Answer from the notes.",
    "Answer in one sentence.",
    "Always answer in English.",
    "Today is {}.",
    "The user is called {}.",
)

NOTES_READ = "I have read the notes."
PLAIN_QUESTION = "What is the code of {thing}?"
OTHER_QUESTIONS = (
    "What is the code of the {thing}?",
    "What is the code for the {thing}?",
    "What is the code for {thing}?",
    "What's the code of the {thing}?",
    "code of {thing}?",
    "Code of the {thing}?",
    "Tell me the code of {thing}.",
    "Tell me the code of the {thing}.",
    "Please give me the code of the {thing}.",
    "I need the code for the {thing}.",
    "Which code does the {thing} have?",
)

#: Replies up to this length, in characters, may stand between other questions: all but stories.
MAX_SHORT_REPLY = 120

#: Share of the questions that ask for a thing in focus, in the conversations that have one.
FOCUS_SHARE = 0.3


class Segment(NamedTuple):
    """A piece of a training text and the weight of its tokens in the loss."""

    text: str
    weight: float


class Lookup(NamedTuple):
    """Notes, a question about one of them, and the exact answer the model should give."""

    notes: str
    question: str
    answer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Variety:
    """Shares, 0 to 1, of the forms that differ from the plain one: a first user turn with notes and plain question."""

    #: Questions in other words than `PLAIN_QUESTION`.
    wording: float = 0.0
    #: Notes written as "- the red lantern: 4821." instead of "- lantern 4821.".
    sentence: float = 0.0
    #: Conversations that begin with a system prompt.
    system: float = 0.0
    #: Notes given alone in their turn (or in the system prompt), questions only in later turns.
    apart: float = 0.0
    #: Turns of small talk or fixed facts between the questions.
    chatter: float = 0.0


PLAIN = Variety()


def turn(role: str, content: str) -> str:
    """Write one finished turn, as the chat template writes it."""
    return f"<|{role}|>{content}{END}"


def draw_code(rng: random.Random) -> str:
    """Draw a code of four digits; the tokenizer makes two tokens of them."""
    return f"{rng.randrange(10_000):04d}"


def filler_line(rng: random.Random) -> str:
    """Draw a sentence that holds no code, to fill notes up to their length."""
    name, thing, animal = rng.choice(NAMES), rng.choice(THINGS), rng.choice(ANIMALS)
    match rng.randrange(8):
        case 0:
            return f"On {rng.choice(DAYS)} it was {rng.choice(WEATHERS)} and {name} {rng.choice(DEEDS)} a {thing}."
        case 1:
            return f"{name} and {rng.choice(NAMES)} ate {rng.choice(FOODS)} near the {thing}."
        case 2:
            return f"A {rng.choice(FEELINGS)} {animal} slept behind the {rng.choice(ADJECTIVES)} {thing}."
        case 3:
            return f"{name} was {rng.choice(FEELINGS)} because the {animal} had {rng.choice(DEEDS)} a {thing}."
        case 4:
            return f"Nobody in {rng.choice(TOWNS)} had seen the {animal} before."
        case 5:
            return f"The {animal} looked at the {thing} and felt {rng.choice(FEELINGS)}."
        case 6:
            return f"In the evening {name} walked home past the {thing}."
        case _:
            return f"There was {rng.choice(FOODS)} for everyone, even for the {animal}."


def story(rng: random.Random, animal: str) -> str:
    """Write seven sentences about `animal` and a friend."""
    friend = rng.choice([other for other in ANIMALS if other != animal])
    food, thing = rng.choice(FOODS), rng.choice(THINGS)
    sentences = (
        f"Once upon a time there was a {rng.choice(FEELINGS)} {animal} who lived near an old {thing}.",
        f"Every morning the {animal} looked for {food}.",
        rng.choice(
            (f"One day a {friend} came to the {thing}.", f"One {rng.choice(WEATHERS)} day the {animal} met a {friend}.")
        ),
        rng.choice((f'"Do you have some {food}?" asked the {friend}.', f'"I am hungry," said the {friend}.')),
        rng.choice(
            (f"The {animal} shared the {food} with the {friend}.", f"The {animal} gave the {friend} all the {food}.")
        ),
        f"They {rng.choice(('sat', 'walked', 'sang'))} together until the evening.",
        f"After that day the {animal} and the {friend} were friends.",
    )
    return " ".join(sentences)


def chat_exchange(rng: random.Random) -> tuple[str, str]:
    """Draw a user's line and the reply: a story, a fixed fact or small talk."""
    match rng.choices(("story", "fact", "small talk"), weights=(0.3, 0.4, 0.3))[0]:
        case "story":
            animal = rng.choice(ANIMALS)
            requests = (
                f"Tell me a story about a {animal}.",
                f"Write a short story about a {animal}.",
                f"A story about a {animal}, please.",
                "Tell me a story.",
            )
            return rng.choice(requests), story(rng, animal)
        case "fact":
            subject, value = rng.choice(list(FIXED_FACTS.items()))
            return f"What is the {subject}?", f"The {subject} is {value}."
        case _:
            return rng.choice(list(SMALL_TALK.items()))


def chat_text(rng: random.Random, num_tokens: int, variety: Variety = PLAIN) -> list[Segment]:
    """Draw a conversation of stories, facts and small talk, at least `num_tokens` long."""
    segments = _system_prompt(rng, variety)
    while length(segments) < num_tokens:
        segments += _exchange(*chat_exchange(rng))
    return segments


def make_lookup(
    rng: random.Random,
    num_tokens: int,
    num_facts: int,
    *,
    variety: Variety = PLAIN,
    position: float | None = None,
    thing: str | None = None,
) -> Lookup:
    """Draw notes of about `num_tokens` tokens holding `num_facts` codes, one question, and its answer.

    Args:
        rng: The source of all choices.
        num_tokens: Length of notes and question together; exceeded when the facts alone need more.
        num_facts: At most `len(THINGS)`.
        variety: `wording` and `sentence` are shares here of single questions and of whole notes.
        position: Where in the notes the asked fact stands, 0 (first) to 1 (last); None asks any of them.
        thing: Asks for this one of `THINGS`, wherever it stands.
    """
    notes, codes = _make_notes(rng, num_tokens - 12, num_facts, variety, thing)
    things = list(codes)
    if thing is None:
        thing = rng.choice(things) if position is None else things[round(position * (len(things) - 1))]
    return Lookup(notes, _ask(rng, thing, variety), f"{thing} {codes[thing]}.")


def lookup_text(
    rng: random.Random,
    num_tokens: int,
    num_facts: int,
    *,
    notes_share: float,
    variety: Variety = PLAIN,
    focus: Sequence[str] = (),
) -> list[Segment]:
    """Draw a conversation about one set of notes: `notes_share` of `num_tokens` are notes, questions fill the rest.

    One of the things in `focus`, where given, is in the notes and asked for by `FOCUS_SHARE` of the questions.
    """
    focused = rng.choice(focus) if focus else None
    notes, codes = _make_notes(rng, round(num_tokens * notes_share), num_facts, variety, focused)
    things = list(codes)
    opening = f"{notes}\n"
    segments: list[Segment] = []
    if rng.random() < variety.apart:
        opening = ""
        if rng.random() < 0.5:
            segments.append(Segment(turn("system", notes), TEXT_WEIGHT))
        else:
            segments += [*_system_prompt(rng, variety), *_exchange(notes, NOTES_READ)]
    else:
        segments += _system_prompt(rng, variety)
    while length(segments) < num_tokens:
        if not opening and rng.random() < variety.chatter:
            question, reply = chat_exchange(rng)
            if len(reply) <= MAX_SHORT_REPLY:
                segments += _exchange(question, reply)
                continue
        thing = focused if focused and rng.random() < FOCUS_SHARE else rng.choice(things)
        segments += [
            Segment(f"<|user|>{opening}{_ask(rng, thing, variety)}{END}<|assistant|>", TEXT_WEIGHT),
            Segment(thing, ANSWER_WEIGHT),
            Segment(f" {codes[thing]}", CODE_WEIGHT),
            Segment(f".{END}", ANSWER_WEIGHT),
        ]
        opening = ""
    return segments


def restated_text(rng: random.Random, num_tokens: int, num_facts: int) -> list[Segment]:
    """Draw a drill: the same few notes over and over in random order; every code after its first time counts."""
    codes = {thing: draw_code(rng) for thing in rng.sample(THINGS, num_facts)}
    segments: list[Segment] = []
    seen: set[str] = set()
    while length(segments) < num_tokens:
        thing = rng.choice(list(codes))
        weight = CODE_WEIGHT if thing in seen else TEXT_WEIGHT
        seen.add(thing)
        segments += [
            Segment(f"- {thing}", TEXT_WEIGHT),
            Segment(f" {codes[thing]}", weight),
            Segment(".\n", TEXT_WEIGHT),
        ]
    return segments


def _make_notes(
    rng: random.Random, num_tokens: int, num_facts: int, variety: Variety, thing: str | None = None
) -> tuple[str, dict[str, str]]:
    """Draw notes of about `num_tokens` tokens, on `thing` among others, and the codes in the order of the notes."""
    things = rng.sample(THINGS, num_facts)
    if thing and thing not in things:
        things[rng.randrange(num_facts)] = thing
    codes = {name: draw_code(rng) for name in things}
    if rng.random() < variety.sentence:
        facts = [f"- the {rng.choice(ADJECTIVES)} {thing}: {code}." for thing, code in codes.items()]
    else:
        facts = [f"- {thing} {code}." for thing, code in codes.items()]
    room = num_tokens * CHARS_PER_TOKEN - sum(len(line) + 1 for line in facts)
    fillers: list[str] = []
    while room > 0:
        fillers.append(filler_line(rng))
        room -= len(fillers[-1]) + 1
    return "Notes:\n" + "\n".join(_interleave(rng, facts, fillers)), codes


def _interleave(rng: random.Random, facts: Sequence[str], fillers: Sequence[str]) -> list[str]:
    """Merge both sequences at random, each keeping its order."""
    is_fact = [True] * len(facts) + [False] * len(fillers)
    rng.shuffle(is_fact)
    next_fact, next_filler = iter(facts), iter(fillers)
    return [next(next_fact if fact else next_filler) for fact in is_fact]


def _ask(rng: random.Random, thing: str, variety: Variety) -> str:
    wording = rng.choice(OTHER_QUESTIONS) if rng.random() < variety.wording else PLAIN_QUESTION
    return wording.format(thing=thing)


def system_prompt(rng: random.Random) -> str:
    """Draw what an operator might write: one to three sentences."""
    fillings = (*THINGS, *NAMES, *DAYS, *ADJECTIVES)
    sentences = [rng.choice(_SYSTEM_PROMPTS), *rng.sample(_SYSTEM_RULES, rng.choice((0, 0, 1, 2)))]
    if rng.random() < 0.1:
        sentences.append(filler_line(rng))
    return " ".join(sentence.format(rng.choice(fillings)) for sentence in sentences)


def _system_prompt(rng: random.Random, variety: Variety) -> list[Segment]:
    return [Segment(turn("system", system_prompt(rng)), TEXT_WEIGHT)] if rng.random() < variety.system else []


def _exchange(question: str, reply: str) -> list[Segment]:
    return [
        Segment(f"{turn('user', question)}<|assistant|>", TEXT_WEIGHT),
        Segment(f"{reply}{END}", ANSWER_WEIGHT),
    ]


def length(segments: Sequence[Segment]) -> float:
    """Estimate the number of tokens."""
    return sum(len(segment.text) for segment in segments) / CHARS_PER_TOKEN


def joined(segments: Sequence[Segment]) -> str:
    """Join the segments' texts."""
    return "".join(segment.text for segment in segments)
