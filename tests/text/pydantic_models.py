"""Models as applications have them: of all field types that pydantic writes a JSON schema for."""

from __future__ import annotations

import uuid
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, TypeVar

from pydantic import (
    UUID4,
    AnyUrl,
    AwareDatetime,
    Base64Bytes,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    FutureDate,
    HttpUrl,
    Json,
    NegativeInt,
    NonNegativeFloat,
    PositiveInt,
    RootModel,
    SecretStr,
    StrictBool,
    StringConstraints,
    conint,
    conlist,
    constr,
)
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict


class Color(StrEnum):
    RED = "red"
    GREEN = "green"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Plain(BaseModel):
    name: str
    age: int
    score: float
    is_ok: bool


class Defaults(BaseModel):
    name: str = "x"
    age: int | None = None
    tags: list[str] = []


class Nested(BaseModel):
    one: Plain
    many: list[Plain]


class Enums(BaseModel):
    color: Color
    level: Level
    either: Color | Level


class Literals(BaseModel):
    kind: Literal["a", "b", 3, True, None]
    fixed: Literal["only"]


class Bounds(BaseModel):
    small: conint(ge=0, le=10)
    odd: Annotated[int, Field(gt=-5, lt=100, multiple_of=5)]
    part: Annotated[float, Field(ge=0, le=1)]
    positive: PositiveInt
    negative: NegativeInt
    rest: NonNegativeFloat


class WideBounds(BaseModel):
    int64: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    uint64: Annotated[int, Field(ge=0, le=2**64 - 1)]
    exact: Annotated[int, Field(ge=-(2**53), le=2**53)]


class Texts(BaseModel):
    code: constr(pattern=r"^[A-Z]{3}-\d{4}$")
    short: constr(min_length=1, max_length=8)
    stripped: Annotated[str, StringConstraints(strip_whitespace=True, to_lower=True, max_length=5)]


class Dates(BaseModel):
    day: date
    moment: datetime
    clock: time
    lasting: timedelta


class Aware(BaseModel):
    moment: AwareDatetime
    later: FutureDate | None


class Identifiers(BaseModel):
    any_id: uuid.UUID
    random_id: UUID4


class Addresses(BaseModel):
    four: IPv4Address
    six: IPv6Address


class Annotations(BaseModel):
    path: Path
    raw: bytes
    secret: SecretStr


class Networks(BaseModel):
    network: str | IPv4Network


class Links(BaseModel):
    link: AnyUrl | str
    site: str | HttpUrl


class Numbers(BaseModel):
    amount: Decimal
    price: Annotated[Decimal, Field(ge=0, le=100)]
    size: ByteSize | int


class Maps(BaseModel):
    words: dict[str, int]
    nested: dict[str, dict[str, Plain]]
    anything: dict[str, Any]


class MapsByEnum(BaseModel):
    by_color: dict[Color, int]
    by_literal: dict[Literal["x", "y"], str]
    by_pattern: dict[Annotated[str, StringConstraints(pattern="^[a-z]+$")], int]
    by_length: dict[Annotated[str, StringConstraints(min_length=1, max_length=3)], int]
    by_number: dict[int, str] = {}


class Tuples(BaseModel):
    pair: tuple[int, str]
    same: tuple[float, ...]
    triple: tuple[Color, Plain, bool | None]


class Lists(BaseModel):
    few: conlist(int, min_length=1, max_length=3)
    deep: list[list[list[bool]]]
    mixed: list[int | str | None]


class Sets(BaseModel):
    words: set[str]


class EnumSets(BaseModel):
    colors: set[Color]
    frozen: frozenset[Literal["a", "b", "c"]]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Discriminated(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    pets: list[Annotated[Cat | Dog, Field(discriminator="kind")]]


class Union(BaseModel):
    pet: Cat | Dog | str


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class LinkedList(BaseModel):
    value: int
    next: LinkedList | None = None


class Even(BaseModel):
    odd: Odd | None


class Odd(BaseModel):
    even: Even | None


class Expression(BaseModel):
    term: Annotated[Sum | Number, Field(discriminator="op")]


class Sum(BaseModel):
    op: Literal["sum"]
    terms: list[Expression]


class Number(BaseModel):
    op: Literal["number"]
    value: float


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int
    b: str | None = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Extras(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int] = Field(init=False)
    a: str


class Aliases(BaseModel):
    first: Annotated[int, Field(alias="@first")]
    class_: Annotated[str, Field(alias="class", description="a word", examples=["x"])]


class Described(BaseModel):
    """A docstring with "quotes" and a newline
    here."""

    step: Annotated[str, Field(title="A title", description="what is done", json_schema_extra={"x-order": 1})]
    old: Annotated[int, Field(deprecated=True)] = 0


class Root(RootModel[list[int]]):
    pass


class RootMap(RootModel[dict[str, Plain]]):
    pass


class RootUnion(RootModel[Annotated[Cat | Dog, Field(discriminator="kind")]]):
    pass


class Base(BaseModel):
    a: int


class Derived(Base):
    a: PositiveInt
    b: str


T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T]
    total: int


class Pages(BaseModel):
    cats: Page[Cat]
    numbers: Page[int]


class Point(NamedTuple):
    x: float
    y: float


class Named(BaseModel):
    point: Point


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


class Typed(BaseModel):
    movie: Movie
    movies: list[Movie]


@dataclass
class Part:
    name: str
    count: int = 1


class Dataclasses(BaseModel):
    parts: list[Part]


class Encoded(BaseModel):
    parsed: Json[list[int]] | None
    blob: Base64Bytes | None


class Optionals(BaseModel):
    a: int | None
    b: Color | None
    c: list[Plain] | None
    d: dict[str, int] | None = None


class Strict(BaseModel):
    flag: StrictBool
    anything: Any
    thing: object


class Reasoning(BaseModel):
    thoughts: list[str]
    answer: Literal["yes", "no", "unknown"]
    confidence: Annotated[float, Field(ge=0, le=1, multiple_of=0.25)]


class Invoice(BaseModel):
    number: constr(pattern=r"^INV-\d+$")
    day: date
    lines: conlist(Part, min_length=1)
    total: Decimal
    paid: bool = False


class Empty(BaseModel):
    pass


class Wide(BaseModel):
    a0: int | None = None
    a1: str | None = None
    a2: float | None = None
    a3: bool | None = None
    a4: Color | None = None
    a5: list[int] | None = None
    a6: Plain | None = None
    a7: Literal["z"] | None = None


class Event(BaseModel):
    at: datetime
    who: Annotated[str, Field(min_length=1)]
    data: dict[str, str | int | float | bool | None]


class Graph(BaseModel):
    nodes: list[Node]
    edges: list[tuple[int, int]]


class Node(BaseModel):
    id: int
    payload: Cat | Dog | Plain
    graph: Graph | None = None


MODELS: list[type[BaseModel]] = [
    *(Plain, Defaults, Nested, Enums, Literals, Bounds, WideBounds, Texts, Dates, Aware, Identifiers, Addresses),
    *(Annotations, Networks, Links, Numbers, Maps, MapsByEnum, Tuples, Lists, Sets, EnumSets, Discriminated, Union),
    *(Tree, LinkedList, Even, Expression, Closed, Open, Extras, Aliases, Described, Root, RootMap, RootUnion, Derived),
    *(Pages, Named, Typed, Dataclasses, Encoded, Optionals, Strict, Reasoning, Invoice, Empty, Wide, Event, Graph, Cat),
]
#: models whose schemas say less than they check: what follows the schema need not be read
NOT_PARSED = {"Aware", "Numbers", "Encoded", "Invoice", "MapsByEnum"}
