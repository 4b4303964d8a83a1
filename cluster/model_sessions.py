"""A trace as the fleet model takes it. Pure."""

from __future__ import annotations

from cluster.fleet_model import ModelRequest, ModelSession
from cluster.hit_curve import Hits
from cluster.traces import Trace


def model_sessions(trace: Trace, found: Hits, num_at_once: int, max_pause_s: float) -> list[ModelSession]:
    """Return the trace's sessions with what they hit, at their own times.

    Where a trace does not say when sessions begin, it is as if `num_at_once` clients had one after the other, and began
    within a minute; a pause is at most `max_pause_s`.
    """
    made = []
    for number, session in enumerate(trace.sessions):
        requests = tuple(
            ModelRequest(
                request.num_prompt_tokens,
                found.by_request[number, place],
                request.num_output_tokens,
                min(max_pause_s, request.pause_s),
            )
            for place, request in enumerate(session.requests)
        )
        made.append(ModelSession(session.begin_s or 0.0, requests))
    if trace.is_timed:
        return made
    clients: list[list[ModelRequest]] = [[] for _ in range(min(num_at_once, len(made)))]
    for one in made:
        min(clients, key=len).extend(one.requests)
    return [ModelSession(60.0 * place / len(clients), tuple(client)) for place, client in enumerate(clients)]
