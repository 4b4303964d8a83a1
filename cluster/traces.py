"""Traces of requests, read from files: Mooncake's JSONL, sessions of agents, requests as an OpenAI server takes them.

    mooncake   a request a line: timestamp (ms), input_length, output_length (tokens), hash_ids: one for each block of
               512 tokens of the prompt, equal where the whole prefix up to the block's end is
    agents     a session a line: requests, each with t (s from the session's begin), in, out (tokens), api_time (s that
               its answer took), and its prompt's ids as a difference: the first `keep` ids of the request before it,
               then `runs`, [first id, count] each. Ids are a session's own. Sub-agents are left out
    requests   a request a line: the body of a chat, a completion or a response; or {"url": ..., "body": ...}, as in
               files for OpenAI's batches; or {"prompt": ..., "output_tokens": n}. With or without a timestamp (ms).
               What tokens a text gives is an estimate: one for four bytes

A name that ends in .xz or .gz is decompressed. Blank lines are passed over; any other line that is no such request is
an error that names it.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal, TypeVar, cast

import msgspec
from msgspec import Meta

from cluster.config_refusals import refusal, shown
from messages.errors import ConfigError

TraceKind = Literal["mooncake", "agents", "requests"]
Runs = tuple[tuple[int, int], ...]  #: block ids: [first, first + count) of each

MOONCAKE_BLOCK_TOKENS: Final = 512
TEXT_BLOCK_TOKENS: Final = 64  #: of a request file's prompts
BYTES_PER_TOKEN: Final = 4  #: of a text whose tokenizer is not known; an estimate
#: of a request that does not say how many it wants at most
UNSAID_OUTPUT_TOKENS: Final = 256

#: What keeps ids of one session apart from another's.
_IDS_OF_A_SESSION: Final = 2**40
_WANTED: Final = (
    "hash_ids (Mooncake), or requests (sessions of agents), or messages, prompt, input or body (requests as an OpenAI"
    " server takes them)"
)

_Count = Annotated[int, Meta(ge=0, le=2**31)]
_Tokens = Annotated[int, Meta(ge=1, le=2**31)]
_Milliseconds = Annotated[float, Meta(ge=0, le=1e13)]
_Seconds = Annotated[float, Meta(ge=0, le=1e10)]

_Line = TypeVar("_Line", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A request of a trace."""

    at_s: float  #: from its session's begin
    pause_s: float  #: from the end of the answer before it, in its session
    num_prompt_tokens: int
    num_output_tokens: int
    #: of the prompt's blocks, head first; equal ids in a trace mean equal prefixes up to the block's end. A last block
    #: that is not full has one in Mooncake's traces only
    runs: Runs
    path: str | None = None  #: of a request file's: where it is posted
    body: dict[str, Any] | None = None  #: of a request file's: what is posted

    def block_ids(self) -> Iterator[int]:
        """Return the ids of the prompt's blocks, head first."""
        return itertools.chain.from_iterable(range(first, first + count) for first, count in self.runs)


@dataclass(frozen=True, slots=True)
class TraceSession:
    """Requests of which each is asked after the answer to the one before it; never empty."""

    name: str
    begin_s: float | None  #: from the trace's begin; None: the trace does not say
    requests: tuple[TraceRequest, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file holds; at least one session."""

    kind: TraceKind
    block_tokens: int  #: of the blocks that ids stand for
    sessions: tuple[TraceSession, ...]

    @property
    def is_timed(self) -> bool:
        """Whether it says when each session begins."""
        return all(session.begin_s is not None for session in self.sessions)

    @property
    def num_requests(self) -> int:
        """Requests of all sessions."""
        return sum(len(session.requests) for session in self.sessions)


def read_trace(path: Path, max_sessions: int | None = None) -> Trace:
    """Read the trace at `path`, of which kind its first line shows.

    Arrivals of a Mooncake trace lie on ticks; they are spread evenly up to the next one. Of more than `max_sessions`
    sessions the first are read, and no line after them is looked at.

    Raises:
        ConfigError: the file cannot be read or is empty, or a line is no such request; says which, and what is wanted.
    """
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise ConfigError(f"{path} is empty; a trace has at least one request")
    reader = _reader_of(path, first)
    sessions: list[TraceSession] = []
    for number, line in itertools.islice(itertools.chain([first], lines), max_sessions):
        try:
            sessions.append(reader.read(line))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error.message}") from None
    if reader.kind == "mooncake":
        sessions = _spread(sessions)
    return Trace(kind=reader.kind, block_tokens=reader.block_tokens, sessions=tuple(sessions))


@dataclass(frozen=True, slots=True)
class _Reader:
    kind: TraceKind
    block_tokens: int
    read: Callable[[bytes], TraceSession]


def _reader_of(path: Path, first: tuple[int, bytes]) -> _Reader:
    number, line = first
    try:
        document = _object(line)
    except ConfigError as error:
        raise ConfigError(f"{path}, line {number}: {error.message}") from None
    if "hash_ids" in document:
        return _Reader("mooncake", MOONCAKE_BLOCK_TOKENS, _MooncakeLines().read)
    if "requests" in document:
        block_tokens = document.get("block_size", 64)
        if type(block_tokens) is not int or not 1 <= block_tokens <= 2**20:
            raise ConfigError(f"{path}, line {number}: block_size: wanted 1 to {2**20}, saw {shown(block_tokens)}")
        return _Reader("agents", block_tokens, _AgentLines(block_tokens).read)
    if _is_request(document):
        return _Reader("requests", TEXT_BLOCK_TOKENS, _RequestLines().read)
    raise ConfigError(f"{path}, line {number}: no line of a trace; wanted {_WANTED}, saw {shown(sorted(document))}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Return lines that are not blank, with their numbers, from 1."""
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ConfigError(f"{path}: damaged or cut short after line {number}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return cast("BinaryIO", lzma.open(path))
    if path.suffix == ".gz":
        return cast("BinaryIO", gzip.open(path))
    return path.open("rb")


def _object(line: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"wanted a JSON object, saw what is no JSON: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError("wanted a JSON object in UTF-8, saw other bytes") from None
    if not isinstance(document, dict):
        raise ConfigError(f"wanted a JSON object, saw {shown(document)}")
    return document


def _converted(document: Any, kind: type[_Line]) -> _Line:
    if not isinstance(document, dict):
        raise ConfigError(f"wanted a JSON object, saw {shown(document)}")
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(refusal(kind, document, str(error)).removeprefix(".")) from None


# ------------------------------------------------------------------------------------------------------------- mooncake


class _MooncakeLine(msgspec.Struct):
    timestamp: _Milliseconds
    input_length: _Tokens
    output_length: _Count
    hash_ids: list[_Count]


class _MooncakeLines:
    """Reads line after line: their times go up."""

    def __init__(self) -> None:
        self._number = 0
        self._last_ms = 0.0

    def read(self, line: bytes) -> TraceSession:
        """Return the request of `line`.

        Raises:
            ConfigError: it is none.
        """
        row = _converted(_object(line), _MooncakeLine)
        num_blocks = -(-row.input_length // MOONCAKE_BLOCK_TOKENS)
        if len(row.hash_ids) != num_blocks:
            raise ConfigError(
                f"hash_ids: wanted {num_blocks}, one for each {MOONCAKE_BLOCK_TOKENS} of {row.input_length} tokens, "
                f"saw {len(row.hash_ids)}"
            )
        if row.timestamp < self._last_ms:
            raise ConfigError(
                f"timestamp: wanted {self._last_ms:g}, the line before it, or later, saw {row.timestamp:g}"
            )
        self._last_ms = row.timestamp
        self._number += 1
        request = TraceRequest(
            at_s=0.0,
            pause_s=0.0,
            num_prompt_tokens=row.input_length,
            num_output_tokens=max(1, row.output_length),
            runs=_merged((block_id, 1) for block_id in row.hash_ids),
        )
        return TraceSession(str(self._number), row.timestamp / 1000, (request,))


def _spread(sessions: list[TraceSession]) -> list[TraceSession]:
    """Spread those that begin at one time evenly up to the next time; after the last, over as long as before it."""
    ticks = [list(tick) for _, tick in itertools.groupby(sessions, key=lambda session: session.begin_s)]
    begins = [tick[0].begin_s or 0.0 for tick in ticks]
    gaps = [later - begin for begin, later in itertools.pairwise(begins)]
    gaps.append(gaps[-1] if gaps else 0.0)
    return [
        replace(session, begin_s=begin + gap * place / len(tick))
        for tick, begin, gap in zip(ticks, begins, gaps, strict=True)
        for place, session in enumerate(tick)
    ]


# --------------------------------------------------------------------------------------------------------------- agents


class _AgentLine(msgspec.Struct):
    requests: list[Any]
    id: str | None = None


class _AgentRequest(msgspec.Struct):
    t: _Seconds
    num_prompt_tokens: _Tokens = msgspec.field(name="in")
    num_output_tokens: _Count = msgspec.field(name="out")
    keep: _Count
    runs: list[Any]
    api_time: _Seconds = 0.0


class _AgentLines:
    """Reads line after line: ids of each are its own."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._number = 0

    def read(self, line: bytes) -> TraceSession:
        """Return the session of `line`.

        Raises:
            ConfigError: it is none.
        """
        row = _converted(_object(line), _AgentLine)
        first_id = self._number * _IDS_OF_A_SESSION
        self._number += 1
        requests: list[TraceRequest] = []
        end_s = 0.0
        for place, document in enumerate(row.requests):
            if isinstance(document, dict) and "requests" in document:
                continue  # a sub-agent
            try:
                asked = _converted(document, _AgentRequest)
                runs = self._runs(asked, requests[-1] if requests else None, first_id)
            except ConfigError as error:
                raise ConfigError(f"requests[{place}]: {error.message}") from None
            pause_s = max(0.0, asked.t - end_s) if requests else 0.0
            output = max(1, asked.num_output_tokens)
            requests.append(TraceRequest(asked.t, pause_s, asked.num_prompt_tokens, output, runs))
            end_s = asked.t + asked.api_time
        if not requests:
            raise ConfigError("requests: wanted at least one that is no sub-agent's, saw none")
        return TraceSession(row.id or str(self._number), None, tuple(requests))

    def _runs(self, asked: _AgentRequest, before: TraceRequest | None, first_id: int) -> Runs:
        """Return the prompt's runs: the head of what the one `before` had, and what is new."""
        if before and asked.t < before.at_s:
            raise ConfigError(f"t: wanted {before.at_s:g}, of the one before, or later, saw {asked.t:g}")
        kept = before.runs if before else ()
        num_before = sum(count for _, count in kept)
        if asked.keep > num_before:
            raise ConfigError(f"keep: wanted at most {num_before}, the ids of the request before, saw {asked.keep}")
        fresh = []
        for run in asked.runs:
            match run:
                case [int(first), int(count)] if first >= 0 and count >= 1 and first + count < _IDS_OF_A_SESSION:
                    fresh.append((first_id + first, count))
                case _:
                    raise ConfigError(f"runs: wanted [first id, count] each, saw {shown(run)}")
        num_blocks = asked.keep + sum(count for _, count in fresh)
        wanted = asked.num_prompt_tokens // self._block_tokens
        if num_blocks != wanted:
            raise ConfigError(
                f"runs: wanted ids of {wanted} blocks, of {self._block_tokens} of {asked.num_prompt_tokens} tokens, "
                f"saw {num_blocks} with those kept"
            )
        return _merged(itertools.chain(_head(kept, asked.keep), fresh))


def _head(runs: Runs, num_blocks: int) -> Iterator[tuple[int, int]]:
    for first, count in runs:
        if num_blocks <= 0:
            return
        yield first, min(count, num_blocks)
        num_blocks -= count


def _merged(runs: Iterable[tuple[int, int]]) -> Runs:
    """Join runs that go on where the one before them ends."""
    merged: list[tuple[int, int]] = []
    for first, count in runs:
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return tuple(merged)


# ------------------------------------------------------------------------------------------------------------- requests

_PATHS: Final = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/responses"}
_OUTPUT_KEYS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def _is_request(document: dict[str, Any]) -> bool:
    return "body" in document or any(key in document for key in _PATHS)


class _Envelope(msgspec.Struct):
    body: dict[str, Any] | None = None
    url: str | None = None
    timestamp: _Milliseconds | None = None
    output_tokens: _Tokens | None = None


class _Body(msgspec.Struct):
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    max_output_tokens: _Tokens | None = None


class _RequestLines:
    """Reads line after line: equal prefixes of their prompts get equal ids."""

    def __init__(self) -> None:
        self._number = 0
        self._ids: dict[tuple[int, bytes], int] = {}

    def read(self, line: bytes) -> TraceSession:
        """Return the request of `line`.

        Raises:
            ConfigError: it is none.
        """
        document = _object(line)
        envelope = _converted(document, _Envelope)
        body = envelope.body
        if body is None:
            aside = ("timestamp", "output_tokens", "custom_id", "method", "url", "body")
            body = {key: value for key, value in document.items() if key not in aside}
        prompt_key = next((key for key in _PATHS if key in body), None)
        if prompt_key is None:
            raise ConfigError(f"wanted messages, prompt or input, saw {shown(sorted(body))}")
        pieces = _prompt_pieces(prompt_key, body[prompt_key])
        limits = _converted(body, _Body)
        said = next((limit for key in _OUTPUT_KEYS if (limit := getattr(limits, key)) is not None), None)
        num_output = envelope.output_tokens or said or UNSAID_OUTPUT_TOKENS
        if said != num_output:  # what is wanted is what is judged, whatever else the line says
            body = {key: value for key, value in body.items() if key not in _OUTPUT_KEYS}
            body[_limit_key(prompt_key)] = num_output
        self._number += 1
        request = TraceRequest(
            at_s=0.0,
            pause_s=0.0,
            num_prompt_tokens=pieces.num_tokens,
            num_output_tokens=num_output,
            runs=self._named(pieces),
            path=envelope.url or _PATHS[prompt_key],
            body=body,
        )
        begin_s = None if envelope.timestamp is None else envelope.timestamp / 1000
        return TraceSession(str(self._number), begin_s, (request,))

    def _named(self, pieces: _Pieces) -> Runs:
        """Name whole blocks by themselves and the one before them."""
        before = -1
        ids = []
        for block in pieces.blocks:
            before = self._ids.setdefault((before, block), len(self._ids))
            ids.append((before, 1))
        return _merged(ids)


@dataclass(frozen=True, slots=True)
class _Pieces:
    num_tokens: int
    blocks: Sequence[bytes]  #: whole ones


def _limit_key(prompt_key: str) -> str:
    return "max_output_tokens" if prompt_key == "input" else "max_tokens"


def _prompt_pieces(key: str, prompt: Any) -> _Pieces:
    """Cut a prompt into blocks: token ids as they are, anything else by the bytes of its text."""
    if key == "prompt" and isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return _Pieces(len(prompt), [json.dumps(block).encode() for block in _cut(prompt, TEXT_BLOCK_TOKENS)])
    if not prompt or not isinstance(prompt, str | list):
        raise ConfigError(f"{key}: wanted a text or a list, saw {shown(prompt)}")
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    data = text.encode(errors="surrogatepass")
    return _Pieces(max(1, len(data) // BYTES_PER_TOKEN), list(_cut(data, TEXT_BLOCK_TOKENS * BYTES_PER_TOKEN)))


def _cut(whole: Any, size: int) -> Iterator[Any]:
    return (whole[begin : begin + size] for begin in range(0, len(whole) // size * size, size))
