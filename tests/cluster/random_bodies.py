"""Requests drawn at random for every POST route: valid ones, mutated ones, and what only an attacker would send."""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from msgspec import inspect

from cluster.openai import cache_protocol as cache
from cluster.openai import protocol
from cluster.openai.responses.protocol import ResponsesRequest
from cluster.openai.route_protocol import RouteFields
from tests.text.random_schemas import SchemaDraw

CHAT, TEXT, RESPONSES, IMPORT = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/cache/import"
ROUTES: Final[dict[str, Any]] = {
    CHAT: protocol.ChatRequest,
    TEXT: protocol.CompletionRequest,
    RESPONSES: ResponsesRequest,
    "/tokenize": protocol.TokenizeRequest,
    "/detokenize": protocol.DetokenizeRequest,
    "/v1/cache/lookup": cache.LookupRequest,
    "/v1/cache/clear": cache.ClearRequest,
    "/v1/cache/pin": cache.PinRequest,
    "/v1/cache/unpin": cache.UnpinRequest,
    "/v1/cache/check": cache.CheckRequest,
    "/v1/cache/evict": cache.EvictRequest,
    "/v1/cache/move": cache.MoveRequest,
    "/v1/cache/warm": cache.WarmRequest,
    "/v1/cache/gc": cache.CollectRequest,
    "/v1/cache/export": cache.ExportRequest,
    IMPORT: cache.ImportRequest,
    "/v1/route": RouteFields,
}
_GENERATING: Final = (CHAT, TEXT, RESPONSES)
_MESSAGES: Final = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
_TOOL: Final = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
_CALLED: Final = [
    {"role": "user", "content": [{"type": "text", "text": "Look."}]},
    {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "look", "arguments": '{"at": "it"}'}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "It is red."},
]
_ITEMS: Final = [
    {"role": "user", "content": [{"type": "input_text", "text": "Look."}]},
    {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "It is red."},
]
#: what nobody would write there
_ODD: Final = [
    *(None, True, False, 0, -1, 1.5, -0.0, 5e-324, 1e308, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1),
    *(10**30, "", " ", "x", "\x00", "\u2028", "\u202e\ufeff", "é" * 300, "👩\u200d👧" * 40, "NaN", "1", "true", "null"),
    *("[", "{}", [], {}, [[]], [None], [{}], {"": ""}, {"type": "function"}, {"$ref": "#"}, [0] * 3000, ["a"] * 3000),
    "y" * 20_000,
]
#: numbers and texts as JSON has them, or must not have them
_ODD_RAW: Final = [
    *(b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1e-400", b"9" * 400, b"0x10", b"01", b"1.", b".5"),
    *(b"+1", b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\u0000"', b'"\\x41"', b'"\xff\xfe"', b'"\xed\xa0\x80"'),
    *(b'"\xc0\x80"', b"'a'", b"undefined", b"", b"[" * 300 + b"]" * 300, b"[" * 5000 + b"]" * 5000),
    b'{"a":' * 3000 + b"1" + b"}" * 3000,
]


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as it goes over the wire."""

    seed: int
    path: str
    body: bytes
    kind: str  #: valid, mutated or hostile
    headers: dict[str, str] = field(default_factory=dict)
    declared: int | None = None  #: Content-Length; None: that of the body
    chunks: int = 0  #: bytes in each; 0: the body is not chunked
    reads: int | None = None  #: bytes of the answer, before the client leaves; None: all of them


def drawn(seed: int, model: str, worker_ids: list[str]) -> Sent:
    """Draw a request, half of them for the endpoints that generate; the same seed gives the same one.

    `model` and `worker_ids`: names that are there.
    """
    return _Draw(random.Random(seed), model, worker_ids).sent(seed)


class _Draw:
    def __init__(self, rng: random.Random, model: str, worker_ids: list[str]) -> None:
        self._rng = rng
        self._model = model
        self._worker_ids = worker_ids

    def sent(self, seed: int) -> Sent:
        rng = self._rng
        path = rng.choice(_GENERATING if rng.random() < 0.5 else tuple(ROUTES))
        value = self._valid(path)
        kind = rng.choices(("valid", "mutated", "hostile"), (4, 4, 2))[0]
        if kind == "mutated":
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                value = self._mutated(value)
        if path == IMPORT:
            body = _packed(value)
            headers = {"Content-Type": "application/msgpack"}
        else:
            body = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
            headers = {"Content-Type": "application/json"}
        sent = Sent(seed, path, body, kind, headers)
        return rng.choice(_HOSTILE)(sent, rng) if kind == "hostile" else sent

    # ---------------------------------------------------------------- valid

    def _valid(self, path: str) -> Any:
        rng = self._rng
        value = self._base(path)
        fields = msgspec.structs.fields(ROUTES[path])
        for one in rng.sample(fields, min(len(fields), rng.choice((0, 0, 1, 1, 2, 3, 5)))):
            if one.encode_name not in value and one.encode_name != "ignore_eos":
                value[one.encode_name] = self._of(inspect.type_info(one.type), 0)
        return value

    def _base(self, path: str) -> dict[str, Any]:
        """What a client might mean, with one of the things that such requests ask for."""
        rng = self._rng
        few = rng.randrange(1, 17)
        text = rng.choice(("Hi", "It was a dark night, " * rng.randrange(1, 12), "Grüße 🌍", "a\nb"))
        match path:
            case "/v1/chat/completions":
                value = {
                    "model": self._model,
                    "messages": rng.choice((_MESSAGES, _CALLED, _user(text))),
                    "max_tokens": few,
                }
                return value | rng.choice((self._stream, self._structure, self._tools, self._sampling, dict))()
            case "/v1/completions":
                prompt = rng.choice((text, [text, "b"], [5, 6, 7], [[5, 6], [7] * 40]))
                value = {"model": self._model, "prompt": prompt, "max_tokens": few}
                return value | rng.choice((self._stream, self._structure, self._sampling, dict))()
            case "/v1/responses":
                given = rng.choice((text, _ITEMS, [{"role": "user", "content": text}]))
                value = {"model": self._model, "input": given, "max_output_tokens": few}
                schema = SchemaDraw(rng.randrange(2**32)).document()
                text_format = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
                tools = [{"type": "function", **_TOOL}]
                more = ({}, {"stream": True}, {"tools": tools}, {"text": text_format}, {"store": False})
                return value | rng.choice(more)
            case "/tokenize":
                return rng.choice(({"prompt": text}, {"messages": _MESSAGES, "return_token_strs": True}))
            case "/detokenize":
                return {"tokens": [rng.randrange(256) for _ in range(rng.randrange(30))]}
            case "/v1/cache/import":
                return {
                    name: self._of(inspect.type_info(one.type), 0)
                    for name, one in ((one.encode_name, one) for one in msgspec.structs.fields(cache.ImportRequest))
                }
            case "/v1/cache/gc":
                return {}
        value = rng.choice(({"prompt": text}, {"prompt": [5] * 40}, {"messages": _MESSAGES}))
        if path == "/v1/cache/move":
            value |= {"source": rng.choice(cache.NODE_TIERS), "target": rng.choice(cache.NODE_TIERS)}
        if path == "/v1/cache/warm" and rng.random() < 0.5:
            value |= {"worker_id": rng.choice(self._worker_ids)}
        return value

    def _stream(self) -> dict[str, Any]:
        return {"stream": True, "n": self._rng.randrange(1, 4), "stream_options": {"include_usage": True}}

    def _sampling(self) -> dict[str, Any]:
        rng = self._rng
        drawn = {
            "temperature": rng.choice((0, 0.7, 2, 100)),
            "top_p": rng.choice((1, 0.5, 1e-9)),
            "top_k": rng.choice((-1, 1, 40, 2**40)),
            "repetition_penalty": rng.choice((1, 0.1, 1e-38, 5e-324, 100)),
            "logit_bias": {str(rng.randrange(250)): rng.choice((-100, 100, 0.5))},
            "seed": rng.choice((0, -1, 2**63 - 1)),
            "stop": rng.choice(("a", ["\n", " "], "Grüße")),
            "logprobs": 2,
            "min_tokens": 1,
            "stop_token_ids": list(range(rng.choice((1, 300, 320)))),
        }
        return dict(rng.sample(sorted(drawn.items()), rng.randrange(1, 5)))

    def _structure(self) -> dict[str, Any]:
        rng = self._rng
        schema = SchemaDraw(rng.randrange(2**32)).document()
        json_schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        wanted = (
            {"response_format": json_schema},
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"json": schema}},
            {"structured_outputs": {"regex": rng.choice(("[a-c]{3}", "(a|b)*c", "[", "(?=a)b", "a{1,1000000}"))}},
            {"structured_outputs": {"choice": ["yes", "no"]}},
            {"guided_grammar": rng.choice(('start: "a" "b"', 'root ::= "a" | "b"', "start:", "a: b\nb: a\nstart: a"))},
        )
        return rng.choice(wanted)

    def _tools(self) -> dict[str, Any]:
        rng = self._rng
        drawn = {"name": "draw", "parameters": SchemaDraw(rng.randrange(2**32)).document(), "strict": True}
        tools = [{"type": "function", "function": function} for function in (_TOOL, drawn)[: rng.randrange(1, 3)]]
        named = {"type": "function", "function": {"name": "look"}}
        return {"tools": tools, "tool_choice": rng.choice(("auto", "none", "required", named))}

    def _of(self, kind: inspect.Type, depth: int) -> Any:
        """A value of a type, within its bounds; small ones mostly."""
        rng = self._rng
        if isinstance(kind, inspect.Metadata):
            return self._of(kind.type, depth)
        if isinstance(kind, inspect.UnionType):
            return self._of(rng.choice(kind.types), depth)
        if isinstance(kind, inspect.LiteralType):
            return rng.choice(kind.values)
        if isinstance(kind, inspect.BoolType):
            return rng.random() < 0.5
        if isinstance(kind, inspect.IntType | inspect.FloatType):
            return self._number(kind)
        if isinstance(kind, inspect.StrType):
            letters = string.ascii_letters + string.digits if kind.pattern else string.printable + "é世🌍"
            length = rng.choice((1, 3, 8, 40, 60)) if rng.random() < 0.95 else kind.max_length or 300
            return "".join(rng.choices(letters, k=max(kind.min_length or 0, min(length, kind.max_length or length))))
        if isinstance(kind, inspect.ListType):
            return [self._of(kind.item_type, depth + 1) for _ in range(rng.choice((1, 1, 2, 5)))]
        if isinstance(kind, inspect.TupleType):
            return [self._of(item, depth + 1) for item in kind.item_types]
        if isinstance(kind, inspect.DictType):
            pairs = range(rng.choice((0, 1, 2)))
            return {self._of(kind.key_type, depth): self._of(kind.value_type, depth + 1) for _ in pairs}
        if isinstance(kind, inspect.StructType):
            fields = [one for one in kind.fields if one.required or rng.random() < 0.4 / (depth + 1)]
            return {one.encode_name: self._of(one.type, depth + 1) for one in fields}
        if isinstance(kind, inspect.BytesType | inspect.MemoryViewType):
            return rng.randbytes(rng.choice((0, 16, 64)))
        return None if isinstance(kind, inspect.NoneType) else copy.deepcopy(rng.choice(_ODD))

    def _number(self, kind: inspect.IntType | inspect.FloatType) -> Any:
        rng = self._rng
        least = kind.ge if kind.ge is not None else kind.gt if kind.gt is not None else -(2**31)
        most = kind.le if kind.le is not None else kind.lt if kind.lt is not None else 2**31
        if rng.random() < 0.2:
            near_zero = () if isinstance(kind, inspect.IntType) else (max(least, 5e-324), max(least, 1e-38))
            return rng.choice((least, most, *near_zero))
        near = max(least, min(most, rng.choice((0, 1, 2, 3, 5, 16))))
        return near if isinstance(kind, inspect.IntType) else min(most, near + rng.random())

    # ---------------------------------------------------------------- mutated

    def _mutated(self, value: Any) -> Any:
        """Change one place, or the whole."""
        rng = self._rng
        places: list[tuple[Any, Any]] = []

        def look(inside: Any) -> None:
            if isinstance(inside, dict | list):
                for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
                    places.append((inside, key))
                    look(inside[key])

        value = json.loads(json.dumps(value, default=bytes.hex)) if not _has_bytes(value) else dict(value)
        look(value)
        if not places or rng.random() < 0.03:
            return copy.deepcopy(rng.choice(_ODD))
        inside, key = rng.choice(places)
        match rng.randrange(7):
            case 0:
                del inside[key]
            case 1:
                inside[key] = [inside[key]]
            case 2:
                inside[key] = {"value": inside[key]}
            case 3 if isinstance(inside, dict):
                inside[rng.choice(("", "x" * 500, f"{key} ", str(key).upper(), "é\u2028"))] = inside.pop(key)
            case 4 if isinstance(inside[key], str | list):
                inside[key] = inside[key] * rng.choice((2, 100, 2000))
            case 5 if isinstance(inside[key], str | int | float):
                inside[key] = str(inside[key]) if not isinstance(inside[key], str) else len(inside[key])
            case _:
                inside[key] = copy.deepcopy(rng.choice(_ODD))
        return value


def _packed(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:  # MessagePack has no such number
        return repr(value).encode()


def _has_bytes(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(inside, bytes) for inside in value.values())


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


# -------------------------------------------------------------------- hostile


def _changed(sent: Sent, body: bytes | None = None, **headers: str) -> Sent:
    return Sent(sent.seed, sent.path, sent.body if body is None else body, sent.kind, sent.headers | headers)


def _odd_raw(sent: Sent, rng: random.Random) -> Sent:
    """A value that JSON does not have in a value's place."""
    body, begin = sent.body, rng.randrange(max(1, len(sent.body)))
    at = body.find(b": ", begin) if body.find(b": ", begin) >= 0 else body.find(b": ")
    end = min((found for found in (body.find(mark, at) for mark in (b",", b"}", b"]")) if found > 0), default=len(body))
    return _changed(sent, body[: at + 2] + rng.choice(_ODD_RAW) + body[end:])


def _odd_whole(sent: Sent, rng: random.Random) -> Sent:
    return _changed(sent, rng.choice((*_ODD_RAW, b"\x00", b"\xef\xbb\xbf" + sent.body, sent.body * 2, b"[" * 60_000)))


def _cut(sent: Sent, rng: random.Random) -> Sent:
    return _changed(sent, sent.body[: rng.randrange(len(sent.body) + 1)])


def _flipped(sent: Sent, rng: random.Random) -> Sent:
    body = bytearray(sent.body or b"{}")
    for _ in range(rng.choice((1, 1, 3, 20))):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return _changed(sent, bytes(body))


def _twice(sent: Sent, rng: random.Random) -> Sent:
    """Every name of the outermost object a second time, with another value."""
    names = [one.encode_name for one in msgspec.structs.fields(ROUTES[sent.path])]
    more = b"".join(b'"%b":%b,' % (name.encode(), rng.choice((b"null", b"1", b'"a"', b"[]"))) for name in names)
    return _changed(sent, b"{" + more + sent.body[1:])


def _huge(sent: Sent, rng: random.Random) -> Sent:
    item = rng.choice((b"0", b'"a"', b"{}", b"[]", b"null", b'{"role":"user","content":"a"}'))
    name = rng.choice((b"messages", b"prompt", b"tokens", b"input", b"stop", b"tools", b"unknown", b"logit_bias"))
    return _changed(sent, b'{"%b":[' % name + b",".join([item] * 100_000) + b"]," + sent.body[1:])


def _recoded(sent: Sent, rng: random.Random) -> Sent:
    return _changed(
        sent, sent.body.decode(errors="replace").encode(rng.choice(("utf-16", "utf-32", "utf-7", "cp037")), "replace")
    )


def _other_type(sent: Sent, rng: random.Random) -> Sent:
    kinds = (
        "text/plain",
        "application/xml",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
        ";",
    )
    return _changed(sent, **{"Content-Type": rng.choice(kinds)})


def _odd_headers(sent: Sent, rng: random.Random) -> Sent:
    headers = (
        {"X-Request-Id": "a b" * 40},
        {"Content-Encoding": "gzip"},
        {"Accept": "x" * 4000},
        {"Expect": "100-continue"},
        {"Connection": "upgrade", "Upgrade": "websocket"},
        {"X-Kvray-Cache": "pin"},
    )
    return _changed(sent, **rng.choice(headers))


def _misdeclared(sent: Sent, rng: random.Random) -> Sent:
    """A Content-Length that is not the body's; one that waits for what is not declared would wait for long."""
    declared = max(0, len(sent.body) + rng.choice((-1, -len(sent.body), 1, 1000, 10**18)))
    return Sent(sent.seed, sent.path, sent.body, sent.kind, sent.headers, declared=declared, reads=0)


def _chunked(sent: Sent, rng: random.Random) -> Sent:
    return Sent(sent.seed, sent.path, sent.body, sent.kind, sent.headers, chunks=rng.choice((1, 7, 4096)))


def _left(sent: Sent, rng: random.Random) -> Sent:
    """A client that leaves before it has the whole answer."""
    return Sent(sent.seed, sent.path, sent.body, sent.kind, sent.headers, reads=rng.choice((0, 1, 200)))


_HOSTILE: Final[tuple[Callable[[Sent, random.Random], Sent], ...]] = (
    *(_odd_raw, _odd_raw, _odd_whole, _cut, _flipped, _flipped, _twice, _huge, _recoded, _other_type, _odd_headers),
    *(_misdeclared, _chunked, _left, _left),
)
