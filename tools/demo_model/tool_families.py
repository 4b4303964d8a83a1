"""The tools that the demo model learns to call: names, fields, and the ways people ask for what they do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.demo_model import words
from tools.demo_model.corpus import listed

Value = str | int


@dataclass(frozen=True, slots=True)
class Kind:
    """A field of tools: the names it may have, and how its values come to be."""

    names: tuple[str, ...]
    draw: Callable[[random.Random], Value] | None = None
    choices: tuple[str, ...] = ()
    #: How a value that the question need not hold is said, before the question's last sign.
    mention: tuple[str, ...] = ()

    def value(self, rng: random.Random) -> Value:
        """Draw a value."""
        return rng.choice(self.choices) if self.draw is None else self.draw(rng)


@dataclass(frozen=True, slots=True)
class Family:
    """Tools that do the same, by whatever name; braces in questions stand for values of `fields`."""

    names: tuple[str, ...]
    questions: tuple[str, ...]
    fields: dict[str, Kind]
    #: Fields that a tool may have besides.
    more: dict[str, Kind]


_CITY = Kind(("city", "location", "place", "town", "city_name"), words.city)
_DAY = Kind(("day", "date", "when"), words.day, mention=(" on {}", " for {}", " {}"))
_PERSON = Kind(("name", "person", "user", "username", "customer"), words.person)
_RECIPIENT = Kind(("to", "recipient", "name", "person", "contact"), words.person)
_TOPIC = Kind(("query", "q", "topic", "term", "text", "search_query", "keywords"), words.topic)
_TEXT = Kind(("message", "text", "body", "content"), words.clause)
_UNIT = Kind(("unit", "units", "scale"), choices=("celsius", "fahrenheit"), mention=(" in {}", " in degrees {}"))

FAMILIES = (
    Family(
        ("get_weather", "weather", "get_current_weather", "weather_forecast", "get_forecast", "lookup_weather"),
        (
            "What is the weather in {city}?",
            "What's the weather in {city}?",
            "What is the weather like in {city}?",
            "What's the weather like in {city} today?",
            "How is the weather in {city}?",
            "How's the weather in {city} right now?",
            "What will the weather be in {city}?",
            "Weather in {city}?",
            "weather {city}",
            "Tell me the weather in {city}.",
            "Get the weather for {city}.",
            "I am in {city}. What is the weather?",
            "Is it raining in {city}?",
            "Will it rain in {city}?",
            "How warm is it in {city}?",
            "What is the temperature in {city}?",
            "What's the current temperature in {city}?",
            "Do I need an umbrella in {city}?",
            "Should I take a coat to {city}?",
        ),
        {"city": _CITY},
        {"unit": _UNIT, "day": _DAY},
    ),
    Family(
        ("get_time", "get_current_time", "current_time", "local_time", "clock"),
        (
            "What time is it in {city}?",
            "What's the time in {city}?",
            "What is the current time in {city}?",
            "Tell me the time in {city}.",
            "How late is it in {city} now?",
            "time in {city}",
        ),
        {"city": Kind((*_CITY.names, "timezone"), words.city)},
        {},
    ),
    Family(
        ("search", "web_search", "search_web", "google", "find", "search_documents", "search_products"),
        (
            "Search for {topic}.",
            "Search the web for {topic}.",
            "Please search for {topic}.",
            "Look up {topic}.",
            "Find {topic}.",
            "Find me {topic}, please.",
            "Google {topic}.",
            "What can you find about {topic}?",
            "I want to know more about {topic}.",
            "Can you search for {topic}?",
        ),
        {"topic": _TOPIC},
        {},
    ),
    Family(
        ("send_message", "send_email", "send_sms", "message", "notify", "email"),
        (
            "Send a message to {to} saying {text}.",
            "Send {to} a message saying {text}.",
            "Send an email to {to} saying {text}.",
            "Tell {to} that {text}.",
            "Write to {to} that {text}.",
            "Email {to}: {text}.",
            'Send "{text}" to {to}.',
            "Let {to} know that {text}.",
            "Message {to} with the text {text}.",
        ),
        {"to": _RECIPIENT, "text": _TEXT},
        {"subject": Kind(("subject", "title"), words.noun, mention=(" with the subject {}", ", subject {}"))},
    ),
    Family(
        ("book_flight", "find_flights", "search_flights", "get_route", "buy_ticket", "find_train"),
        (
            "Book a flight from {start} to {end}.",
            "I need a ticket from {start} to {end}.",
            "Find flights from {start} to {end}.",
            "How do I get from {start} to {end}?",
            "I want to travel from {start} to {end}.",
            "Is there a train from {start} to {end}?",
            "Fly me to {end} from {start}.",
        ),
        {
            "start": Kind(("origin", "from", "from_city", "departure", "start", "source"), words.city),
            "end": Kind(("destination", "to", "to_city", "arrival", "end", "target"), words.city),
        },
        {"day": _DAY},
    ),
    Family(
        ("get_stock_price", "stock_price", "get_quote", "stock"),
        (
            "What is the stock price of {symbol}?",
            "What's the price of {symbol}?",
            "How much is {symbol} worth?",
            "Get the stock price for {symbol}.",
            "Quote for {symbol}, please.",
            "How is {symbol} doing?",
        ),
        {
            "symbol": Kind(
                ("symbol", "ticker", "company", "stock"),
                lambda rng: words.symbol(rng) if rng.random() < 0.6 else words.made_up(rng).capitalize(),
            )
        },
        {},
    ),
    Family(
        ("translate", "translate_text", "translation"),
        (
            'Translate "{text}" to {language}.',
            'Translate "{text}" into {language}.',
            "Translate {text} to {language}.",
            'How do you say "{text}" in {language}?',
            "How do I say {text} in {language}?",
            'What is "{text}" in {language}?',
        ),
        {
            "text": Kind(("text", "sentence", "phrase", "word"), lambda r: r.choice((words.clause, words.noun))(r)),
            "language": Kind(
                ("language", "target_language", "to", "lang", "target"), lambda rng: rng.choice(words.LANGUAGES)
            ),
        },
        {},
    ),
    Family(
        ("create_reminder", "add_reminder", "add_task", "create_event", "add_todo", "set_reminder"),
        (
            "Remind me to {task}.",
            "Please remind me to {task}.",
            "Add a task: {task}.",
            "I have to {task}.",
            "Put {task} on my list.",
            "Create a reminder to {task}.",
        ),
        {"task": Kind(("task", "title", "text", "what", "name", "reminder"), words.task)},
        {
            "day": _DAY,
            "hour": Kind(("time", "hour", "at"), words.hour, mention=(" at {}",)),
        },
    ),
    Family(
        ("get_order", "get_order_status", "lookup_order", "track_order", "track_package", "find_ticket"),
        (
            "Where is my order {label}?",
            "What is the status of order {label}?",
            "What's the status of my order {label}?",
            "Track order {label}.",
            "Check package {label}.",
            "My order number is {label}. Where is it?",
            "When does {label} arrive?",
            "Has order {label} been sent?",
        ),
        {"label": Kind(("order_id", "id", "order", "order_number", "number", "tracking_id"), words.label)},
        {},
    ),
    Family(
        ("get_user", "find_person", "lookup_user", "get_customer", "get_phone_number", "find_contact"),
        (
            "Who is {name}?",
            "Find the user {name}.",
            "Look up {name}.",
            "What is the phone number of {name}?",
            "Get the record of {name}.",
            "What do you know about {name}?",
            "How can I reach {name}?",
        ),
        {"name": _PERSON},
        {},
    ),
    Family(
        ("set_light", "switch_light", "control_light", "set_lights", "light"),
        (
            "Turn {state} the light in the {room}.",
            "Turn the light in the {room} {state}.",
            "Switch {state} the {room} light.",
            "Please turn the {room} light {state}.",
            "The light in the {room} should be {state}.",
        ),
        {
            "room": Kind(("room", "place", "location", "where"), lambda rng: rng.choice(words.ROOMS)),
            "state": Kind(("state", "mode", "value", "action"), choices=("on", "off")),
        },
        {"color": Kind(("color",), choices=words.COLORS[:6], mention=(" in {}", ", color {}"))},
    ),
    Family(
        ("get_code", "lookup_code", "find_code", "get_price", "get_item", "check_stock"),
        (
            "What is the code of {noun}?",
            "What is the code of the {noun}?",
            "Tell me the code of the {noun}.",
            "What is the price of the {noun}?",
            "How much does the {noun} cost?",
            "Do we have the {noun}?",
            "Look up the {noun}.",
        ),
        {"noun": Kind(("thing", "item", "name", "product", "object"), words.noun)},
        {},
    ),
    Family(
        ("add", "calculate_sum", "sum", "multiply", "add_numbers"),
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "What is the sum of {a} and {b}?",
            "Multiply {a} by {b}.",
            "What is {a} times {b}?",
            "Calculate {a} + {b}.",
        ),
        {"a": Kind(("a", "x", "first"), words.number), "b": Kind(("b", "y", "second"), words.number)},
        {},
    ),
    Family(
        ("set_timer", "start_timer", "timer"),
        (
            "Set a timer for {n} minutes.",
            "Wake me in {n} minutes.",
            "Start a timer of {n} minutes.",
            "Timer {n} minutes",
        ),
        {"n": Kind(("minutes", "duration", "n"), words.number)},
        {},
    ),
)
#: Families whose questions others have too.
SEARCHES = tuple(family for family in FAMILIES if {"search", "get_user", "get_code"} & set(family.names))

_VERBS = ("create", "update", "add", "find", "set", "open", "make", "get", "register", "check", "order", "start")
_OBJECTS = ("ticket", "note", "item", "user", "room", "report", "job", "list", "account", "project", "table", "file")
_FIELD_NAMES = listed(
    "title name color size status owner category priority label topic item product brand model team project country "
    "street version level mode format genre author artist song movie book dish department role group type tag region "
    "material shape flavor owner_name project_name file_name first_name last_name job_title room_name start_date city"
)
_CHOICES = (
    ("low", "medium", "high"),
    ("open", "closed"),
    ("small", "medium", "large"),
    ("red", "green", "blue"),
    ("yes", "no"),
    ("new", "used"),
    ("draft", "final"),
)
_DRAWS = (words.noun, words.person, words.city, words.made_up, words.label, words.topic)
_LISTS = (
    "{verb} a {object} with {facts}.",
    "{verb} the {object} with {facts}.",
    "Please {verb} a {object} with {facts}.",
    "{verb} a {object}: {facts}.",
    "{verb} {object}, {facts}",
    "I want to {verb} a {object} with {facts}.",
    "Can you {verb} a {object} with {facts}?",
)
_FACTS = ("{field} {value}", "{field} {value}", "the {field} {value}", "{field}: {value}", "{field} = {value}")


def any_family(rng: random.Random) -> Family:
    """Make a tool that nobody has seen before, whose questions name its fields."""
    verb, thing = rng.choice(_VERBS), rng.choice((*_OBJECTS, words.made_up(rng)))
    fields: dict[str, Kind] = {}
    for name in rng.sample(_FIELD_NAMES, rng.choice((1, 2, 2, 3))):
        name = words.made_up(rng) if rng.random() < 0.1 else name
        is_enum = rng.random() < 0.3
        fields[name] = Kind((name,), choices=rng.choice(_CHOICES)) if is_enum else Kind((name,), rng.choice(_DRAWS))
    questions = []
    for _ in range(3):
        fact = rng.choice(_FACTS)
        facts = [fact.format(field=name.replace("_", " "), value=f"{{{name}}}") for name in fields]
        rng.shuffle(facts)
        joined = ", ".join(facts[:-1]) + rng.choice((" and ", ", ")) + facts[-1] if len(facts) > 1 else facts[0]
        question = rng.choice(_LISTS).format(verb=verb, object=thing, facts=joined)
        questions.append(question[0].upper() + question[1:])
    return Family((f"{verb}_{thing}", f"{verb}_{thing}", thing), tuple(questions), fields, {})
