"""Which sequences cannot run here: what would raise in the middle of a step, and harm all that compute beside it."""

from __future__ import annotations

import math
from typing import NamedTuple

from engine.scheduling.plan import SequenceSpec
from messages.errors import CapacityError, KvrayError, RequestError, WorkerError
from messages.request import MIN_REPETITION_PENALTY, SamplingParams

_U64 = 2**64
_I64 = 2**63


class Bounds(NamedTuple):
    """What a sequence must fit in, in tokens."""

    model_len: int  #: prompt and output
    pool_len: int  #: the same, as far as the KV pool holds them
    vocab_size: int  #: token ids are below it


def refusal(spec: SequenceSpec, bounds: Bounds, *, knows_tokens: bool = False) -> KvrayError | None:
    """Return why a sequence can never run within `bounds`; None where it can. `knows_tokens`: one with these runs."""
    num_prompt, num_tokens = spec.num_prompt_tokens, len(spec.token_ids)
    if not 1 <= num_prompt <= num_tokens:
        return RequestError(
            f"num_prompt_tokens is {num_prompt}; from 1 to the {num_tokens} tokens given is wanted", param="prompt"
        )
    if num_prompt + 1 > bounds.model_len:
        return RequestError(
            f"the prompt has {num_prompt} tokens; at most {bounds.model_len - 1} fit beside one output token: this "
            f"model's maximum context length is {bounds.model_len} (context_length_exceeded)",
            param="prompt",
            code="context_length_exceeded",
        )
    if num_prompt + 1 > bounds.pool_len:
        return CapacityError(
            f"the prompt has {num_prompt} tokens; at most {bounds.pool_len - 1} fit beside one output token: this "
            f"model's maximum context length is {bounds.pool_len} here, as the KV pool holds no more "
            "(context_length_exceeded)",
            code="context_length_exceeded",
            status=400,
        )
    largest = 0 if knows_tokens else max(spec.token_ids)
    if largest >= bounds.vocab_size:
        return RequestError(
            f"the prompt has token {largest}; the model's vocabulary ends at {bounds.vocab_size - 1}",
            param="prompt",
            code="invalid_value",
        )
    return _bad_param(spec.params, bounds.vocab_size)


def deadline_error(seq_id: str, phase: str) -> WorkerError:
    """Return what a sequence ends with that was in `phase` when its deadline passed."""
    return WorkerError(
        f"sequence {seq_id!r} was {phase} when its deadline passed", code="deadline_exceeded", status=504
    )


def _bad_param(params: SamplingParams, vocab_size: int) -> RequestError | None:
    """Return which parameter the sampler cannot compute with; None where it can with all.

    Stop tokens may be any: they are compared only.
    """
    bias = params.logit_bias
    checks: tuple[tuple[str, object, bool, str], ...] = (
        ("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1"),
        ("temperature", params.temperature, 0 <= params.temperature < math.inf, "a finite number from 0 on"),
        ("top_k", params.top_k, -_I64 <= params.top_k < _I64, "a signed integer of 64 bits"),
        ("top_p", params.top_p, 0 < params.top_p <= 1, "a number above 0, at most 1"),
        ("min_p", params.min_p, 0 <= params.min_p <= 1, "a number from 0 to 1"),
        (
            "repetition_penalty",
            params.repetition_penalty,
            MIN_REPETITION_PENALTY <= params.repetition_penalty < math.inf,
            f"a finite number from {MIN_REPETITION_PENALTY:g} on",
        ),
        ("presence_penalty", params.presence_penalty, math.isfinite(params.presence_penalty), "a finite number"),
        ("frequency_penalty", params.frequency_penalty, math.isfinite(params.frequency_penalty), "a finite number"),
        ("seed", params.seed, 0 <= params.seed < _U64, "an unsigned integer of 64 bits"),
        ("n", params.choice, 0 <= params.choice < _U64, "choices counted from 0"),
        ("logprobs", params.logprobs, (params.logprobs or 0) >= 0, "at least 0"),
        ("prompt_logprobs", params.prompt_logprobs, (params.prompt_logprobs or 0) >= 0, "at least 0"),
        (
            "logit_bias",
            max(bias, default=0),
            all(0 <= token_id < vocab_size for token_id in bias),
            f"token ids from 0 to {vocab_size - 1}",
        ),
        ("logit_bias", "a value", not any(math.isnan(value) for value in bias.values()), "numbers"),
    )
    for param, seen, is_good, wanted in checks:
        if not is_good:
            return RequestError(f"{param} is {seen}; {wanted} is wanted", param=param, code="invalid_value")
    return None
