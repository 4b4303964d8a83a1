"""How many workers a trace wants for its targets, and how much cache pays. Pure.

    trace --hits by capacity--> the capacity that pays --model of the fleet--> fewest prefill, then decode workers

A fleet is enough where nine of ten requests get their first token in time, and nine of ten their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.fleet_model import FleetModel, ModelSession, Outcome, WorkerShape
from cluster.hit_curve import Hits, Turn, hits, in_order
from cluster.model_sessions import model_sessions
from cluster.traces import Trace
from kvcache.price import ASSUMED_MOVES, Computation, compute_s
from messages.errors import ConfigError
from messages.tier import Tier

SHARE_IN_TIME: Final = 0.9
_MAX_WORKERS: Final = 1024
#: Of the computing that an endless cache saves: what host memory and what disk are to save together with it.
_HOST_SAVES, _DISK_SAVES = 0.9, 0.99
_LEAST_CAPACITY_TOKENS: Final = 64 * 1024
_MAX_PAUSE_S: Final = 600.0  #: of a client between an answer and its next request


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A point of the curve: what a cache that holds so much has of the trace."""

    tokens: int
    bytes: int
    hit_share: float  #: of prompt tokens
    computing_s: float  #: of the prompts' rest, in all
    saved_share: float  #: of what an endless cache saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a trace wants."""

    num_requests: int
    num_prompt_tokens: int
    endless_hit_share: float
    curve: tuple[Capacity, ...]
    host_bytes: int  #: of all nodes together
    disk_bytes: int  #: the same, beside host memory; 0: none pays
    disk_why: str
    num_prefill: int
    num_decode: int
    ttft_p50_s: float
    ttft_p90_s: float
    itl_p90_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a plan is for."""

    ttft_s: float
    itl_s: float
    num_at_once: int  #: clients, of a trace that does not say when its sessions begin
    kv_bytes_per_token: int


def plan(trace: Trace, shape: WorkerShape, wishes: Wishes, on_progress: Callable[[str], None]) -> Plan:
    """Return the least that serves `trace` in time, by workers of `shape`.

    Raises:
        ConfigError: no number of workers does; says which target, and what one worker with nothing else to do takes.
    """
    turns = list(in_order(trace, wishes.num_at_once))
    on_progress("looking for hits")
    curve, endless = _curve(trace, turns, shape, wishes.kv_bytes_per_token)
    host = next(point for point in curve if point.saved_share >= _HOST_SAVES)
    disk = next(point for point in curve if point.saved_share >= _DISK_SAVES)
    disk_why = _disk_refusal(shape, wishes.kv_bytes_per_token) or ("" if disk.tokens > host.tokens else "no more hits")
    held = host if disk_why else disk
    found = hits(trace, turns, held.tokens)
    _refuse_impossible(turns, found, shape, wishes)
    sessions = model_sessions(trace, found, wishes.num_at_once, _MAX_PAUSE_S)
    num_prefill, num_decode, outcome = _fewest(sessions, shape, wishes, on_progress)
    return Plan(
        num_requests=len(turns),
        num_prompt_tokens=sum(turn.request.num_prompt_tokens for turn in turns),
        endless_hit_share=endless.share,
        curve=curve,
        host_bytes=host.bytes,
        disk_bytes=0 if disk_why else disk.bytes - host.bytes,
        disk_why=disk_why,
        num_prefill=num_prefill,
        num_decode=num_decode,
        ttft_p50_s=_quantile(outcome.ttft_s, 0.5),
        ttft_p90_s=_quantile(outcome.ttft_s, 0.9),
        itl_p90_s=_quantile(outcome.itl_s, 0.9),
    )


def _curve(
    trace: Trace, turns: Sequence[Turn], shape: WorkerShape, kv_bytes_per_token: int
) -> tuple[tuple[Capacity, ...], Hits]:
    """Return what ever larger caches have, up to one that has all that an endless one has."""
    endless = hits(trace, turns, None)
    without_s = _computing_s(turns, None, shape)
    most_s = without_s - _computing_s(turns, endless, shape)
    points: list[Capacity] = []
    tokens = _LEAST_CAPACITY_TOKENS
    while not points or points[-1].saved_share < _DISK_SAVES:
        found = hits(trace, turns, tokens)
        computing_s = _computing_s(turns, found, shape)
        saved = (without_s - computing_s) / most_s if most_s > 0 else 1.0
        points.append(
            Capacity(
                tokens=tokens,
                bytes=tokens * kv_bytes_per_token,
                hit_share=found.share,
                computing_s=computing_s,
                saved_share=saved,
            )
        )
        tokens *= 2
    return tuple(points), endless


def _computing_s(turns: Sequence[Turn], found: Hits | None, shape: WorkerShape) -> float:
    return sum(_alone_s(turn, found, shape) for turn in turns)


def _alone_s(turn: Turn, found: Hits | None, shape: WorkerShape) -> float:
    held = 0 if found is None else found.by_request[turn.session, turn.place]
    return compute_s(shape.compute, Computation.of(held, turn.request.num_prompt_tokens))


def _disk_refusal(shape: WorkerShape, kv_bytes_per_token: int) -> str:
    """Return why reading a token's KV from disk is no cheaper than computing it; "" where it is."""
    tier: Tier = "disk"
    read_s = kv_bytes_per_token * ASSUMED_MOVES[tier].byte_s
    if read_s < shape.compute.token_s:
        return ""
    return f"reading a token takes {1e6 * read_s:.0f} us, computing it {1e6 * shape.compute.token_s:.0f}"


def _refuse_impossible(turns: Sequence[Turn], found: Hits, shape: WorkerShape, wishes: Wishes) -> None:
    alone_s = _quantile([_alone_s(turn, found, shape) for turn in turns], SHARE_IN_TIME)
    if alone_s > wishes.ttft_s:
        raise ConfigError(
            f"--ttft: with any number of workers one request in ten takes {alone_s:.3g} s or more by itself, hits "
            f"taken off; wanted were {wishes.ttft_s:g} s"
        )
    step_s = shape.compute.step_s + shape.compute.row_s
    if step_s > wishes.itl_s:
        raise ConfigError(
            f"--itl: a step with a single sequence takes {1e3 * step_s:.3g} ms; wanted were {1e3 * wishes.itl_s:g} ms"
        )


def _fewest(
    sessions: Sequence[ModelSession], shape: WorkerShape, wishes: Wishes, on_progress: Callable[[str], None]
) -> tuple[int, int, Outcome]:
    """Return the fewest prefill workers, the fewest decode workers beside them, and what comes of both."""
    outcomes: dict[tuple[int, int], Outcome] = {}

    def outcome(num_prefill: int, num_decode: int) -> Outcome:
        key = (num_prefill, num_decode)
        if key not in outcomes:
            on_progress(f"trying {num_prefill} prefill and {num_decode} decode workers")
            outcomes[key] = FleetModel(shape, sessions, num_prefill, num_decode).run()
        return outcomes[key]

    def is_early(came: Outcome) -> bool:
        return _quantile(came.ttft_s, SHARE_IN_TIME) <= wishes.ttft_s

    def is_enough(came: Outcome) -> bool:
        return is_early(came) and (not came.itl_s or _quantile(came.itl_s, SHARE_IN_TIME) <= wishes.itl_s)

    # Decode workers without end: what is late then is late for want of prefill workers.
    num_prefill = _least(lambda number: is_early(outcome(number, _MAX_WORKERS)), "--ttft", wishes.ttft_s)
    num_decode = _least(lambda number: is_enough(outcome(num_prefill, number)), "--itl", 1e3 * wishes.itl_s)
    return num_prefill, num_decode, outcome(num_prefill, num_decode)


def _least(is_enough: Callable[[int], bool], target: str, value: float) -> int:
    """Return the least number that is enough: doubled until one is, then halved in between."""
    most = 1
    while not is_enough(most):
        most *= 2
        if most > _MAX_WORKERS:
            raise ConfigError(f"{target}: {value:g} is not met by {_MAX_WORKERS} workers of a kind either")
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if is_enough(middle) else (middle, most)
    return most


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
