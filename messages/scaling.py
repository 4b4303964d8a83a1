"""What replicas tell whoever scales the fleet, by way of Ray Serve: plain numbers by name, all of them finite.

Serve takes a worker that once told something else for one that tells nothing, for as long as it lives, and reads NaN
as an idle worker: what is not known is left out.
"""

from __future__ import annotations

import math

import msgspec


class WorkerScaling(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's load. What ends in `_total` only grows."""

    queued_s: float  #: of computing here before all sequences decode, by its own price and lateness
    busy_s_total: float  #: for which steps ran
    num_waiting: float
    num_running: float
    max_num_seqs: float
    used_share: float  #: of its blocks, those that sequences pin
    step_s: float = 0.0  #: median of recent steps with decode rows; 0: none yet
    step_fixed_s: float = 0.0  #: what of that a step costs with a single row; 0: not known yet


class RouterScaling(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of a router since its start, refused requests included. What ends in `_total` only grows."""

    prefill_asked_s_total: float  #: seconds of computing on prefill workers, by their prices, hits taken off
    decode_asked_s_total: float  #: the same, of prompts that decode workers compute
    num_asked_total: float
    num_refused_total: float  #: because their first token would have come too late
    ttft_s_total: float  #: of all predicted times to first token
    prompt_tokens_total: float
    matched_tokens_total: float  #: of those, the ones that some tier held


def finite(numbers: WorkerScaling | RouterScaling) -> dict[str, float]:
    """Return the numbers by name as floats; what is no finite number is left out."""
    told: dict[str, float] = {}
    for name, value in msgspec.structs.asdict(numbers).items():
        if isinstance(value, int | float) and math.isfinite(value):
            told[name] = float(value)
    return told
