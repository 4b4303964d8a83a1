"""What a route comes to, in sentences for people. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from cluster.openai.route_protocol import PlacementCandidate, RouteRun

_STEPS_PER_S: Final = 1000  #: costs that agree to a millisecond are equal to the router
_PARTS: Final = {
    "wait_s": "waiting for a slot and blocks",
    "load_s": "loading what others hold",
    "queue_s": "waiting for prompts before it",
    "compute_s": "computing",
    "handoff_s": "bringing the KV from the prefill worker",
    "crowding_s": "the harm to who runs there",
    "displaced_s": "computing again what is evicted for it",
}
_SOURCES: Final = {
    "device": "were in the pool of the decode worker",
    "peer": "came from the pool of another worker",
    "host": "came from the memory of a node cache",
    "disk": "came from a disk",
    "remote": "came from the remote store",
    "computed": "were computed",
}
_PLACES: Final = {
    "device": "lie in the pool of the decode worker",
    "peer": "lie in the pool of another worker",
    "host": "lie in the memory of a node cache",
    "disk": "lie on a disk",
    "remote": "lie in the remote store",
    "computed": "are to be computed",
}
_WHYS: Final = {
    "never_seen": "nobody was heard to hold them",
    "evicted": "who held them dropped them",
    "holder_lost": "who held them was lost, or did not give them",
    "damaged": "what came of them did not have its checksum",
    "slower_than_computing": "bringing them was no quicker than computing",
    "prompt_end": "the end of a prompt is computed in any case",
    "prompt_logprobs": "the log-probabilities of the prompt were wanted",
    "not_known": "nobody can tell why",
}


def why_won(candidates: Sequence[PlacementCandidate]) -> str:
    """Say why the chosen one of some placements, cheapest first, won; "" where none is known."""
    chosen = next((one for one in candidates if one.is_chosen), None)
    if chosen is None:
        return ""
    others = [one for one in candidates if not one.is_chosen]
    what = f"{_named(chosen)} was chosen: a cost of {_ms(chosen.cost_s)}"
    if not others:
        return f"{what}, and no other placement was possible."
    runner_up = min(others, key=lambda one: one.cost_s)
    saved_s = runner_up.cost_s - chosen.cost_s
    if _compared(runner_up) == _compared(chosen):
        return (
            f"{what}, to a millisecond the same as {_named(runner_up)}: less load decided, or the hash of the prompt's "
            "first blocks."
        )
    if saved_s < 0:
        return f"{what}; {_named(runner_up)} would cost {_ms(-saved_s)} less, by what its link costs now."
    mine, its = msgspec.structs.asdict(chosen.parts), msgspec.structs.asdict(runner_up.parts)
    part = max(_PARTS, key=lambda name: its[name] - mine[name])
    return (
        f"{what}, {_ms(saved_s)} less than {_named(runner_up)}, mostly for {_PARTS[part]}: {_ms(mine[part])} instead "
        f"of {_ms(its[part])}."
    )


def what_happened(runs: Sequence[RouteRun], *, is_expected: bool = False) -> str:
    """Say where the prompt's tokens came from, or lie, and why some are computed; "" where nothing is known."""
    tokens: Counter[tuple[str, str | None]] = Counter()
    for run in runs:
        tokens[run.source, run.why] += run.end - run.begin
    words = _PLACES if is_expected else _SOURCES
    clauses = [
        f"{count} {words.get(source, source)}" + (f" ({_WHYS[why]})" if why is not None else "")
        for (source, why), count in tokens.items()
    ]
    if not clauses:
        return ""
    return f"Of {sum(tokens.values())} prompt tokens {_listed(clauses)}."


def how_long(predicted_ttft_s: float | None, ttft_s: float | None) -> str:
    """Say when the first token came, and when it was predicted."""
    if ttft_s is None:
        return ""
    predicted = "" if predicted_ttft_s is None else f"; {predicted_ttft_s:.3f} s were predicted"
    return f"The first token came after {ttft_s:.3f} s{predicted}."


def _compared(candidate: PlacementCandidate) -> int:
    return round(candidate.cost_s * _STEPS_PER_S)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _named(candidate: PlacementCandidate) -> str:
    if candidate.prefill_worker is None:
        return f"{candidate.decode_worker} alone"
    return f"{candidate.decode_worker} with {candidate.prefill_worker}"


def _listed(clauses: Sequence[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])}, and {clauses[-1]}"
