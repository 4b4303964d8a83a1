"""The spans of requests: which stage of one took how long, where its prompt's blocks came from. Pure: no clock, no IO.

    HTTP      ------------------------------------------------------------------------
    route     --                       the router is asked, or hashing chooses
    queue       ----                   sent to the decode worker, until it is admitted there
    load            -------            what others hold is pulled
    prefill            ------          the rest is computed, here or by a prefill worker, until the first token
    decode                   ---------------------------------------------------

Whoever decides (cluster.request_table) is watched, never asked: `see` gets each event with the instructions that came
of it. A worker tells with its first token how long a sequence waited and pulled, by its own clock; all else is by this
one's. Only requests that somebody began a span for are followed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from cluster.request_events import (
    Deliver,
    End,
    Event,
    FleetChanged,
    Instruction,
    SendToRouter,
    SendToWorker,
)
from messages.request import GenerateRequest
from messages.route import Placement, RouteRequest
from messages.stream import TokenChunk

Attribute: TypeAlias = str | int | float | bool | Sequence[str]

_MAX_FOLLOWED: Final = 16  #: sequences of one request; of further ones only the number is told
_MAX_RUNS: Final = 32  #: of a prompt that are told with where they came from
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_MAX_STATE: Final = 512  #: characters of a tracestate that have to be passed on (W3C Trace Context, 3.3.1.5)
_SAMPLED: Final = 1
_LEFT: Final = "left"  #: how a sequence ended of which nobody wanted more: at a stop string, or as its client went
_LOADED: Final = ("peer", "host", "disk", "remote")


class TraceContext(NamedTuple):
    """What a client said of the trace that its request belongs to (W3C Trace Context)."""

    trace_id: int
    parent_id: int  #: of the client's span
    is_sampled: bool
    state: str = ""


def trace_context(parent: str, state: str = "") -> TraceContext | None:
    """Read the headers traceparent and tracestate; None: there is no trace to go on with."""
    found = _TRACEPARENT.fullmatch(parent.strip())
    if found is None or int(found[1], 16) == 0 or int(found[2], 16) == 0:
        return None
    flags = int(found[3], 16)
    return TraceContext(
        int(found[1], 16), int(found[2], 16), bool(flags & _SAMPLED), state if len(state) <= _MAX_STATE else ""
    )


class Span(NamedTuple):
    """One stage, from when to when by the clock that `see` is told."""

    name: str
    begin_s: float
    end_s: float
    attributes: Mapping[str, Attribute] = {}
    error: str = ""  #: what it ended with


class RequestSpans(NamedTuple):
    """All that is told of one HTTP request: its own span, and the stages below it."""

    context: TraceContext | None  #: None: the trace begins here
    whole: Span
    stages: tuple[Span, ...]


@dataclass(slots=True, eq=False)
class _Open:
    """A stage that has not ended."""

    name: str
    begin_s: float
    attributes: dict[str, Attribute] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence on its worker."""

    sent_s: float
    attributes: dict[str, Attribute]  #: of each of its stages
    decode: _Open | None = None
    num_tokens: int = 0


@dataclass(slots=True, eq=False)
class FollowedRequest:
    """An HTTP request, from its begin to its end."""

    context: TraceContext | None
    began_s: float
    ids: tuple[str, ...] = ()  #: of its sequences, once it has any
    attributes: dict[str, Attribute] = field(default_factory=dict)
    stages: list[Span] = field(default_factory=list)
    route: _Open | None = None
    sequences: dict[str, _Sequence] = field(default_factory=dict)  #: on a worker, by the client's id
    error: str = ""

    def end(self, status: int, now_s: float) -> RequestSpans:
        """Return what is to be told of it; what has not ended ends now."""
        _end_all(self, now_s, reason=_LEFT)
        error = self.error or (f"HTTP {status}" if status >= 500 else "")  # another's mistake is no error of ours
        attributes = {**self.attributes, "http.response.status_code": status}
        name = f"{attributes.get('http.request.method', '')} {attributes.get('url.path', '')}".strip()
        return RequestSpans(self.context, Span(name, self.began_s, now_s, attributes, error), tuple(self.stages))


class SpanBook:
    """The requests of one ingress that are followed. One thread."""

    def __init__(self) -> None:
        self._requests: dict[str, FollowedRequest] = {}  #: by the client's ids of all their sequences
        self._block_size = 1  #: tokens, once there was a worker

    def __len__(self) -> int:
        """Return how many sequences are followed."""
        return len(self._requests)

    def follow(self, request: FollowedRequest, asked: Sequence[GenerateRequest]) -> None:
        """Follow `request`, which is about to be added as these sequences."""
        request.attributes |= {
            "kvray.sequence_id": asked[0].request_id,
            "kvray.sequences": len(asked),
            "gen_ai.usage.input_tokens": sum(
                one.num_prompt_tokens
                for number, one in enumerate(asked)
                if number == 0 or one.token_ids is not asked[number - 1].token_ids
            ),
        }
        request.ids = tuple(one.request_id for one in asked)
        self._requests |= dict.fromkeys(request.ids, request)

    def end(self, request: FollowedRequest, status: int, now_s: float) -> RequestSpans:
        """Follow a request no longer, whose answer ended with this HTTP status; return what is to be told of it."""
        self._forget(request)
        return request.end(status, now_s)

    def see(self, event: Event, instructions: Sequence[Instruction], now_s: float) -> None:
        """Take in what happened, and what came of it."""
        if isinstance(event, FleetChanged):
            self._block_size = next((info.block_size for info in event.workers.values()), self._block_size)
        if not self._requests:
            return
        placement = event if isinstance(event, Placement) else None
        for instruction in instructions:
            if type(instruction) is Deliver:  # one for every token
                if (request := self._requests.get(instruction.request_id)) is not None:
                    self._take_chunk(request, instruction.chunk, now_s)
                continue
            match instruction:
                case SendToRouter(RouteRequest() as route):
                    if (request := self._request_of(route.request_id)) is not None:
                        _end_all(request, now_s, error="placed anew")
                        request.route = _Open("route", now_s, {"kvray.prompt_blocks": len(route.names) // 16})
                case SendToWorker(worker_id, _, GenerateRequest() as message):
                    if (request := self._request_of(message.request_id)) is not None:
                        _take_placement(request, message, worker_id, placement, now_s)
                case End(request_id):
                    if (request := self._requests.get(request_id)) is not None:
                        self._forget(request)
                        _end_all(request, now_s, reason=_LEFT)
                case _:
                    pass

    def _request_of(self, placed_id: str) -> FollowedRequest | None:
        """Return the followed request that a sequence is of, by its id at the router or a worker."""
        return self._requests.get(_asked_id(placed_id))

    def _forget(self, request: FollowedRequest) -> None:
        for request_id in request.ids:
            self._requests.pop(request_id, None)

    def _take_chunk(self, request: FollowedRequest, chunk: TokenChunk, now_s: float) -> None:
        sequence = request.sequences.get(chunk.request_id)
        if sequence is None or chunk.is_accepted:
            return
        if chunk.error is not None:
            request.error = chunk.error.message
        sequence.num_tokens += len(chunk.token_ids)
        if sequence.decode is None and chunk.token_ids:
            request.stages += _stages_to_first_token(sequence, chunk, self._block_size, now_s)
            if "kvray.ttft_s" not in request.attributes:
                request.attributes["kvray.ttft_s"] = now_s - request.began_s
            sequence.decode = _Open("decode", now_s, dict(sequence.attributes))
        if chunk.finish_reason is not None:
            _end_sequence(request, chunk.request_id, now_s, request.error, chunk.finish_reason)


def _take_placement(
    request: FollowedRequest, message: GenerateRequest, worker_id: str, placement: Placement | None, now_s: float
) -> None:
    """Begin the stages of a prompt's sequences at their worker; the route ends, if it was one."""
    route, request.route = request.route, None
    asked_ids = [_asked_id(placed) for placed in (message.request_id, *(other.request_id for other in message.others))]
    if route is None and (not request.sequences or asked_ids[0] in request.sequences):
        _end_all(request, now_s, error="placed anew")
        route = _Open("route", now_s)  # there is no router, and choosing takes no time
    if route is not None:
        attributes: dict[str, Attribute] = {
            **route.attributes,
            "kvray.placed_by": "hashing" if placement is None else "router",
            "kvray.decode_worker": worker_id,
            "kvray.prefill_worker": message.prefill_worker or "",
            "kvray.predicted_ttft_s": message.predicted_ttft_s,
        }
        if placement is not None:
            attributes |= {
                "kvray.reason": placement.reason,
                "kvray.decode_match_tokens": placement.decode_match_tokens,
                "kvray.prefill_match_tokens": placement.prefill_match_tokens,
                "kvray.computed_tokens": placement.num_computed_tokens,
            }
        request.stages.append(Span("route", route.begin_s, now_s, attributes))
    for asked_id in asked_ids:
        if len(request.sequences) < _MAX_FOLLOWED:
            attributes = {"kvray.sequence_id": asked_id, "kvray.worker": worker_id}
            request.sequences[asked_id] = _Sequence(now_s, attributes)


def _stages_to_first_token(sequence: _Sequence, chunk: TokenChunk, block_size: int, now_s: float) -> list[Span]:
    """Lay the stages that a worker told of between the sending of a sequence and its first token there."""
    sources, plan = chunk.sources, chunk.plan
    if sources is None or plan is None:  # it went on here after what another worker had given
        return [Span("replay", sequence.sent_s, now_s, sequence.attributes)]
    admitted_s = min(sequence.sent_s + plan.queued_s, now_s)
    pulled_s = min(admitted_s + plan.pulled_s, now_s)
    common = sequence.attributes
    held = {**common, "kvray.device_blocks": _blocks(sources.device, block_size)}
    stages = [Span("queue", sequence.sent_s, admitted_s, held)]
    if plan.pulled_s > 0:
        loaded: dict[str, Attribute] = {
            f"kvray.{tier}_blocks": _blocks(getattr(sources, tier), block_size) for tier in _LOADED
        }
        runs = [f"{run.begin}-{run.end} {run.tier} {run.owner}" for run in plan.runs[:_MAX_RUNS]]
        if plan.handed_over_by:
            runs.append(f"rest device {plan.handed_over_by}")
        loaded |= {"kvray.moved_bytes": plan.num_moved_bytes, "kvray.runs": runs, "kvray.predicted_s": plan.load_s}
        stages.append(Span("load", admitted_s, pulled_s, {**common, **loaded}))
    if sources.computed:
        begin_s = admitted_s if plan.is_mixed or plan.handed_over_by else pulled_s
        computed: dict[str, Attribute] = {
            "kvray.computed_blocks": _blocks(sources.computed, block_size),
            "kvray.computed_by": plan.handed_over_by or str(common["kvray.worker"]),
            "kvray.predicted_s": plan.compute_s,
        }
        stages.append(Span("prefill", begin_s, now_s, {**common, **computed}))
    return stages


def _end_sequence(request: FollowedRequest, asked_id: str, now_s: float, error: str, reason: str = "") -> None:
    """End what is open of a sequence: its answer, or, before the first token, its way there."""
    sequence = request.sequences.pop(asked_id)
    total = request.attributes.get("gen_ai.usage.output_tokens", 0)
    assert isinstance(total, int)
    request.attributes["gen_ai.usage.output_tokens"] = total + sequence.num_tokens
    last = sequence.decode or _Open("queue", sequence.sent_s, dict(sequence.attributes))
    attributes = {**last.attributes, "kvray.output_tokens": sequence.num_tokens}
    if reason:
        attributes["kvray.finish_reason"] = reason
    request.stages.append(Span(last.name, last.begin_s, now_s, attributes, error))


def _end_all(request: FollowedRequest, now_s: float, error: str = "", reason: str = "") -> None:
    for asked_id in list(request.sequences):
        _end_sequence(request, asked_id, now_s, error, reason)
    if request.route is not None:
        request.stages.append(Span("route", request.route.begin_s, now_s, request.route.attributes, error))
        request.route = None


def _asked_id(placed_id: str) -> str:
    """Return the client's id of a sequence that a router or a worker knows by another, after a move: `ID#2`."""
    return re.sub(r"#\d+$", "", placed_id)


def _blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
