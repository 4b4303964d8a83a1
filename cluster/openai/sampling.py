"""From request fields to `SamplingParams`: the request's value, else the model's generation_config, else OpenAI's."""

from __future__ import annotations

import secrets
from typing import TypeVar

from cluster.openai.backend import HttpLimits, ServedModel
from cluster.openai.errors import bad_field, context_overflow, shown
from cluster.openai.protocol import SharedFields, StreamOptions
from messages.errors import RequestError
from messages.request import Grammar, SamplingParams

# Below this a temperature is greedy: logits divided by it would leave float32's range (vLLM draws the line here too).
_GREEDY_BELOW = 1e-5
_MAX_STOP_TOKEN_IDS = 1024
_U64 = 2**64 - 1

N = TypeVar("N", int, float)


def sampling_params(
    request: SharedFields,
    model: ServedModel,
    limits: HttpLimits,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: Grammar | None,
) -> SamplingParams:
    """Make the parameters of choice 0; the other choices differ in `choice` only.

    Raises:
        RequestError: the model or the limits forbid a value.
    """
    defaults = model.defaults
    temperature = _first(request.temperature, defaults.temperature, 1.0)
    top_p = _first(request.top_p, defaults.top_p, 1.0)
    if top_p <= 0.0:
        raise bad_field("top_p", top_p, "a number above 0, at most 1")
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_field("min_tokens", min_tokens, f"at most max_tokens, which is {max_tokens}")
    seed = secrets.randbits(64) if request.seed is None else request.seed & _U64
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_k=min(max(_first(request.top_k, defaults.top_k, 0), 0), model.vocab_size),
        top_p=top_p,
        min_p=_first(request.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias, model.vocab_size),
        seed=seed,
        min_tokens=min_tokens,
        stop_token_ids=_stop_token_ids(request, model),
        logprobs=_bounded_logprobs("logprobs", logprobs, limits),
        prompt_logprobs=_bounded_logprobs("prompt_logprobs", prompt_logprobs, limits),
        grammar=grammar,
    )


def max_output_tokens(param: str, asked: int | None, num_prompt_tokens: int, model: ServedModel) -> int:
    """Return how many tokens may be generated: `asked` (the value of `param`), else what remains of the context.

    Raises:
        RequestError: prompt and output together do not fit (context_length_exceeded).
    """
    remaining = model.max_model_len - num_prompt_tokens
    if asked is None:
        most = model.defaults.max_new_tokens
        return remaining if most is None else min(remaining, most)
    if asked > remaining:
        raise context_overflow(
            param,
            f"got {shown(asked)}, want at most {remaining}: this model's maximum context length is"
            f" {model.max_model_len} tokens and the prompt takes {num_prompt_tokens}",
        )
    return asked


def stop_strings(request: SharedFields, limits: HttpLimits) -> tuple[str, ...]:
    """Return the `stop` field's strings, in the client's order.

    Raises:
        RequestError: there are too many, or one is too long or empty.
    """
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stops) > limits.max_stop_strings:
        raise RequestError(
            f"stop: got {len(stops)} strings, want at most {limits.max_stop_strings}",
            param="stop",
            code="invalid_value",
        )
    for index, stop in enumerate(stops):
        if not 1 <= len(stop) <= limits.max_stop_chars:
            param = "stop" if isinstance(request.stop, str) else f"stop[{index}]"
            raise bad_field(param, stop, f"1 to {limits.max_stop_chars} characters")
    return stops


def num_choices(request: SharedFields, num_prompts: int, limits: HttpLimits) -> int:
    """Return how many choices each prompt gets, which is `n`.

    Raises:
        RequestError: `n` is more than the limits allow, alone or times the number of prompts.
    """
    n = request.n or 1
    if n > limits.max_choices:
        raise bad_field("n", n, f"1 to {limits.max_choices}")
    if n * num_prompts > limits.max_sequences:
        raise RequestError(
            f"n: got {n} choices of {num_prompts} prompts, want at most {limits.max_sequences} sequences in all",
            param="n",
            code="invalid_value",
        )
    return n


def check_stream_options(request: SharedFields) -> None:
    """Check that stream options come with a stream, and prompt log-probabilities without one.

    Raises:
        RequestError: a field contradicts `stream`.
    """
    if request.stream_options not in (None, StreamOptions()) and not request.stream:
        raise RequestError(
            "stream_options: want stream to be true with it", param="stream_options", code="invalid_value"
        )
    if request.stream and request.prompt_logprobs is not None:
        raise bad_field("prompt_logprobs", request.prompt_logprobs, "no value together with stream")


def _first(*values: N | None) -> N:
    return next(value for value in values if value is not None)


def _logit_bias(biases: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, bias in (biases or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise RequestError(
                f"logit_bias: got the key {shown(key)}, want token ids from 0 to {vocab_size - 1}",
                param="logit_bias",
                code="invalid_value",
            )
        result[int(key)] = bias
    return result


def _stop_token_ids(request: SharedFields, model: ServedModel) -> tuple[int, ...]:
    asked = request.stop_token_ids or []
    if len(asked) > _MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids: got {len(asked)} ids, want at most {_MAX_STOP_TOKEN_IDS}",
            param="stop_token_ids",
            code="invalid_value",
        )
    for index, token_id in enumerate(asked):
        if token_id >= model.vocab_size:
            raise bad_field(f"stop_token_ids[{index}]", token_id, f"a token id from 0 to {model.vocab_size - 1}")
    own = () if request.ignore_eos else model.eos_token_ids
    return tuple(dict.fromkeys((*own, *asked)))


def _bounded_logprobs(param: str, asked: int | None, limits: HttpLimits) -> int | None:
    if asked is not None and asked > limits.max_logprobs:
        raise bad_field(param, asked, f"0 to {limits.max_logprobs}")
    return asked
