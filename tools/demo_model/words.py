"""Words and short phrases that tools' arguments and records are made of, and words that nobody has seen before."""

from __future__ import annotations

import random

from tools.demo_model import corpus
from tools.demo_model.corpus import listed

CITIES = listed(
    "Paris London Rome Berlin Madrid Tokyo Boston Chicago Lisbon Vienna Prague Dublin Athens Oslo Warsaw Budapest "
    "Hamburg Munich Cologne Milan Naples Turin Venice Florence Seville Valencia Porto Lyon Nice Bordeaux Geneva Basel "
    "Bern Brussels Antwerp Amsterdam Utrecht Copenhagen Stockholm Gothenburg Helsinki Riga Vilnius Kiev Sofia Belgrade "
    "Zagreb Istanbul Ankara Cairo Nairobi Lagos Accra Tunis Dubai Mumbai Delhi Bangalore Beijing Shanghai Seoul Osaka "
    "Kyoto Bangkok Hanoi Manila Jakarta Sydney Melbourne Perth Auckland Toronto Montreal Vancouver Ottawa Seattle "
    "Portland Denver Dallas Houston Austin Miami Atlanta Phoenix Detroit Philadelphia Washington Lima Bogota Santiago "
    "Havana Leeds Bristol Glasgow Edinburgh"
)
LONG_CITIES = (
    "San Francisco",
    "New York",
    "Los Angeles",
    "Buenos Aires",
    "Mexico City",
    "Hong Kong",
    "Cape Town",
    "San Diego",
    "Las Vegas",
    "New Delhi",
    "Tel Aviv",
    "Abu Dhabi",
)
STATES = ("MA", "CA", "NY", "TX", "WA", "France", "Italy", "Germany", "Japan")
#: Never drawn in training: the evaluation asks about them.
UNSEEN_CITIES = listed(
    "Zurich Salzburg Krakow Tallinn Marseille Bologna Granada Rotterdam Bergen Aarhus Leipzig Dresden Nagoya Sapporo "
    "Calgary Quebec Orlando Memphis Tampa Nashville Brisbane Adelaide Casablanca Dakar Kampala Karachi Lahore Quito"
)
PEOPLE = listed(
    "Alice Bob Carol David Emma John Mary James Sarah Laura Tom Kate Daniel Michael Lucas Mia Noah Eva Erik Ben Jane "
    "Sam Lisa Mark Steve Linda Amir Priya Chen Yuki Diego Fatima"
)
SURNAMES = listed("Smith Miller Jones Brown Garcia Novak Weber Rossi Silva Tanaka Kim Larsen Moreau Walker")
UNSEEN_PEOPLE = listed("Beatrice Tobias Wilma Ruben Cecilia Gideon Philippa Rowan Agatha Milo Xenia Jasper")
PLURALS = listed("cars dogs books maps songs games news trains hotels recipes movies flowers shoes jobs stars")
LANGUAGES = listed("French German Spanish Italian English Japanese Chinese Polish Dutch Greek Danish Swedish")
ROOMS = listed("kitchen bedroom bathroom hall office garage cellar attic garden")
JOBS = listed("baker teacher doctor farmer painter sailor driver nurse cook tailor pilot engineer lawyer writer")
TASKS = ("call", "visit", "water", "clean", "buy", "sell", "feed", "paint", "repair", "meet")
PRODUCTS = listed("laptop phone printer keyboard tablet monitor headset charger router speaker jacket bicycle")
LABELS = listed("alpha beta gamma delta north south east west first second main spare open closed new done")
COLORS = listed("red blue green black white yellow brown orange purple pink gray golden silver")

_STARTS = listed("b d f g k l m n p r s t v z h j br tr st kr ch sh")
_VOWELS = listed("a e i o u ar en ol in ur er an ai ou")
_ENDS = ("", "", "", "n", "r", "s", "l", "ck", "ng", "th", "x", "ville", "burg", "ton", "ia", "o", "son")


def made_up(rng: random.Random) -> str:
    """Make a word of two or three syllables, in small letters."""
    syllables = [rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
    return "".join(syllables) + rng.choice(_STARTS) + rng.choice(_VOWELS) + rng.choice(_ENDS)


def city(rng: random.Random) -> str:
    """Draw a town: a known one, one of two words, or one that does not exist."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(CITIES)
    if kind < 0.6:
        return rng.choice(LONG_CITIES)
    name = rng.choice(corpus.TOWNS) if kind < 0.65 else made_up(rng).capitalize()
    return f"{name}, {rng.choice(STATES)}" if kind > 0.95 else name


def person(rng: random.Random) -> str:
    """Draw a first name, sometimes with a surname; a third were never heard."""
    kind = rng.random()
    name = made_up(rng).capitalize() if kind < 0.35 else rng.choice((*PEOPLE, *corpus.NAMES))
    if kind % 0.1 > 0.08:
        return f"{name} {rng.choice(SURNAMES) if rng.random() < 0.6 else made_up(rng).capitalize()}"
    return name


def noun(rng: random.Random) -> str:
    """Draw a word for a thing."""
    return made_up(rng) if rng.random() < 0.25 else rng.choice((*corpus.THINGS, *PRODUCTS, *corpus.ANIMALS))


def topic(rng: random.Random) -> str:
    """Draw what one may search for: one to four words."""
    match rng.randrange(5):
        case 0:
            return rng.choice(PLURALS)
        case 1:
            return f"{rng.choice((*corpus.ADJECTIVES, *COLORS))} {rng.choice(PLURALS)}"
        case 2:
            return f"{noun(rng)} {noun(rng)}"
        case 3:
            return f"{rng.choice(PLURALS)} {rng.choice(('in', 'near', 'from', 'for'))} {city(rng)}"
        case _:
            return noun(rng)


def clause(rng: random.Random) -> str:
    """Draw what one may tell somebody."""
    match rng.randrange(6):
        case 0:
            return f"the {noun(rng)} is {rng.choice(corpus.ADJECTIVES)}"
        case 1:
            state, when = rng.choice(("late", "there", "home", "back")), rng.choice(("today", "soon", "at seven"))
            return f"I will be {state} {when}"
        case 2:
            return f"{person(rng)} {rng.choice(corpus.DEEDS)} the {noun(rng)}"
        case 3:
            return rng.choice(("hello", "good morning", "good night", "see you soon", "happy birthday", "thank you"))
        case 4:
            return f"the {noun(rng)} {noun(rng)} is ready"
        case _:
            return f"{rng.choice(corpus.FOODS)} and {rng.choice(corpus.FOODS)}"


def task(rng: random.Random) -> str:
    """Draw something to do."""
    return f"{rng.choice(TASKS)} {rng.choice((person(rng), f'the {noun(rng)}', f'some {rng.choice(corpus.FOODS)}'))}"


def day(rng: random.Random) -> str:
    """Draw a day: of the week, near today, or a date."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(corpus.DAYS)
    if kind < 0.75:
        return rng.choice(("today", "tomorrow"))
    return f"20{rng.randrange(20, 40)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"


def hour(rng: random.Random) -> str:
    """Draw a time of the day."""
    number = rng.randrange(1, 13)
    return rng.choice((f"{number} pm", f"{number} am", f"{number}:{rng.randrange(60):02d}"))


def label(rng: random.Random) -> str:
    """Draw a number of an order or the like: digits, or letters and digits."""
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randrange(2, 7)))
    letter, letters = rng.choice("ABCDEFKLMXZ"), f"{rng.choice('ABCXZ')}{rng.choice('KLMN')}"
    return rng.choice((digits, f"{letter}{digits}", f"{letters}-{digits}"))


def symbol(rng: random.Random) -> str:
    """Draw a few capitals."""
    return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randrange(2, 5)))


def number(rng: random.Random) -> int:
    """Draw a number, small ones more often."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 4)))
