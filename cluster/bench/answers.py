"""Reads the server-sent events of an answer, and folds them into an Outcome. Pure: bytes and times in.

Whatever a server sends, it ends in an outcome or a Fault; a fault's kind is the same for all of that kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from cluster.bench.figures import Outcome

MAX_EVENT_BYTES: Final = 2 * 2**20
_MAX_SHOWN: Final = 200
#: Events with tokens beyond what was asked for: a server that goes on and on.
_SLACK_EVENTS: Final = 16

NO_USAGE: Final = "no usage: tokens are counted by events"
FEWER_EVENTS: Final = "several tokens in an event: gaps are between events"
OTHER_PROMPT: Final = "usage counts fewer prompt tokens than were sent"


class Fault(Exception):  # noqa: N818 - not raised to anybody: counted
    """An answer that is none."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = " ".join(detail.split())[:_MAX_SHOWN]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def has_tokens(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.refusal or self.tool_calls)


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None  #: as responses call it
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Kvray(msgspec.Struct):
    prompt_sources: dict[str, int] = {}


class _Response(msgspec.Struct):
    usage: _Usage | None = None
    error: Any = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    kvray: _Kvray | None = None
    type: str | None = None  #: of a response's events
    response: _Response | None = None
    message: str | None = None


@dataclass(slots=True)
class AnswerReader:
    """One answer; `feed` what comes, `close` at its end."""

    began_s: float
    num_sent_tokens: int  #: of the prompt; 0: not known
    max_tokens: int
    wants_all: bool  #: an answer that is shorter is none: the server was told to ignore ends
    token_ids: list[int] = field(default_factory=list)  #: of the answer, as far as they came
    _rest: bytes = b""
    _last_s: float = 0.0
    _ended: bool = False  #: the server said that this is all
    _finish: str | None = None
    _usage: _Usage | None = None
    _outcome: Outcome = field(default_factory=Outcome)

    def feed(self, data: bytes, now_s: float) -> None:
        """Take in what came.

        Raises:
            Fault: it is no answer.
        """
        whole = self._rest + data
        *events, self._rest = (whole.replace(b"\r\n", b"\n") if b"\r" in whole else whole).split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise Fault("endless event", f"{len(self._rest)} bytes and no end of it")
        for event in events:
            for payload in _payloads(event):
                self._take(payload, now_s)

    def close(self, now_s: float) -> Outcome:
        """Return what came, now that the connection says that this was all.

        Raises:
            Fault: it is less than the server should have given.
        """
        outcome = self._outcome
        outcome.e2e_s = now_s - self.began_s
        if not self._ended and self._finish is None:
            raise Fault("cut off", f"after {outcome.num_events} events with tokens, no end of the answer")
        self._count()
        if outcome.num_output_tokens == 0 or outcome.num_events == 0:
            raise Fault("no tokens", f"usage says {outcome.num_output_tokens}, {outcome.num_events} events have any")
        if outcome.num_output_tokens > self.max_tokens:
            raise Fault("more tokens than asked for", f"{outcome.num_output_tokens} of {self.max_tokens}")
        is_short = self._usage is not None and outcome.num_output_tokens < self.max_tokens
        if is_short and (self.wants_all or self._finish == "length"):
            raise Fault("tokens missing", f"{outcome.num_output_tokens} of {self.max_tokens} came")
        if self.token_ids and len(self.token_ids) < outcome.num_output_tokens:
            raise Fault("tokens missing", f"usage says {outcome.num_output_tokens}, {len(self.token_ids)} ids came")
        return outcome

    def _count(self) -> None:
        """Count tokens: usage says how many there are; without it token ids, else events."""
        outcome, usage = self._outcome, self._usage
        outcome.num_prompt_tokens = self.num_sent_tokens
        outcome.num_output_tokens = len(self.token_ids) or outcome.num_events
        if usage is None:
            outcome.remarks.add(NO_USAGE)
            return
        prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
        output = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
        if prompt is None or output is None or prompt < 0 or output < 0:
            raise Fault("usage without numbers", f"{prompt} prompt and {output} output tokens")
        if prompt < self.num_sent_tokens:
            outcome.remarks.add(OTHER_PROMPT)
        outcome.num_prompt_tokens, outcome.num_output_tokens = prompt, output
        if outcome.num_events < output:
            outcome.remarks.add(FEWER_EVENTS)
        details = usage.prompt_tokens_details or usage.input_tokens_details
        if details is not None and details.cached_tokens is not None:
            if not 0 <= details.cached_tokens <= prompt:
                raise Fault("usage that cannot be", f"{details.cached_tokens} of {prompt} prompt tokens cached")
            outcome.num_cached_tokens = details.cached_tokens

    def _take(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self._ended = True
            return
        try:
            event = msgspec.json.decode(payload, type=_Event)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Fault("events that are no chunks", f"{error}: {payload[:_MAX_SHOWN]!r}") from None
        _refuse(event)
        has_tokens = event.type is not None and event.type.endswith(".delta")
        for choice in event.choices:
            has_tokens |= bool(
                choice.text or choice.token_ids or (choice.delta is not None and choice.delta.has_tokens)
            )
            self.token_ids += choice.token_ids or ()
            self._finish = choice.finish_reason or self._finish
        usage = event.usage if event.response is None else event.response.usage
        self._usage = usage or self._usage
        if event.type in ("response.completed", "response.incomplete"):
            self._ended = True
        if event.kvray is not None:
            self._outcome.sources.update(event.kvray.prompt_sources)
        if has_tokens:
            self._note(now_s)

    def _note(self, now_s: float) -> None:
        """Note when an event with tokens came."""
        outcome = self._outcome
        if outcome.num_events == 0:
            outcome.ttft_s = now_s - self.began_s
        else:
            outcome.gaps_s.append(now_s - self._last_s)
        outcome.num_events += 1
        self._last_s = now_s
        if outcome.num_events > self.max_tokens + _SLACK_EVENTS:
            raise Fault("more tokens than asked for", f"{outcome.num_events} events for {self.max_tokens} tokens")


def _refuse(event: _Event) -> None:
    """Raise the Fault that an event tells of."""
    error = event.error if event.response is None else event.error or event.response.error
    if error:
        raise Fault("error in the stream", _message(error))
    if event.type in ("error", "response.failed"):
        raise Fault("error in the stream", event.message or event.type)


def _message(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _payloads(event: bytes) -> Iterator[bytes]:
    """Return the data of an event; none of a comment."""
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


def refusal(body: bytes) -> str:
    """Return what a server says in a body that goes with an error's status."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="replace")
    if isinstance(document, dict):
        return _message(document.get("error") or document.get("message") or document)
    return str(document)
