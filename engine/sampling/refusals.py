"""Why a row of logits gives no token."""

from __future__ import annotations

import math

from messages.errors import KvrayError, RequestError, WorkerError


def choice_refusal(own_top: float, top: float) -> KvrayError:
    """Return why there is nothing to choose from in a row whose largest logit became `top`, which is not finite.

    Another worker may do better where the model's own largest logit is not finite either: its memory or its KV may be
    at fault. Where it is, what the request asks for is.
    """
    if not math.isfinite(own_top):
        return WorkerError(f"the largest logit is {own_top}, wanted a finite number", code="non_finite_logits")
    what = "allow no token" if top == -math.inf else f"make the largest logit {top}, wanted a finite number"
    return RequestError(f"the request's penalties, biases and grammar together {what}", code="invalid_value")


def bias_refusal(bias: dict[int, float], vocab_size: int) -> RequestError | None:
    """Return why these biases cannot be added to a row of `vocab_size` logits; None if they can."""
    unknown = next((token_id for token_id in bias if not 0 <= token_id < vocab_size), None)
    if unknown is None:
        return None
    return RequestError(
        f"logit_bias names token {unknown}, wanted token ids from 0 to {vocab_size - 1}", param="logit_bias"
    )
