"""Which of the request's, the model's and the API's values counts, and where each ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.openai.backend import GenerationDefaults, HttpLimits, ServedModel
from cluster.openai.protocol import SharedFields, StreamOptions
from cluster.openai.sampling import (
    check_stream_options,
    max_output_tokens,
    num_choices,
    sampling_params,
    stop_strings,
)
from messages.errors import RequestError
from messages.request import Grammar, SamplingParams

LIMITS = HttpLimits(max_choices=4, max_sequences=6, max_stop_strings=2, max_stop_chars=3, max_logprobs=5)
CONFIGURED = GenerationDefaults(temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.2)


@pytest.fixture
def model(served_model, tokenizer) -> Callable[..., ServedModel]:
    return lambda **changes: served_model(tokenizer, **{"eos_token_ids": (256, 259), **changes})


def params(model: ServedModel, *, max_tokens: int = 10, **fields: object) -> SamplingParams:
    chosen = {name: fields.pop(name, None) for name in ("logprobs", "prompt_logprobs", "grammar")}
    return sampling_params(SharedFields(**fields), model, LIMITS, max_tokens=max_tokens, **chosen)  # type: ignore[arg-type]


def five(found: SamplingParams) -> tuple[float, float, int, float, float]:
    return (found.temperature, found.top_p, found.top_k, found.min_p, found.repetition_penalty)


def test_the_models_own_values_count_where_the_request_is_silent_and_the_apis_where_both_are(model):
    assert five(params(model())) == (1.0, 1.0, 0, 0.0, 1.0)
    assert five(params(model(defaults=CONFIGURED))) == (0.7, 0.9, 20, 0.1, 1.2)


def test_a_zero_that_was_asked_for_is_a_value_and_not_silence(model):
    found = params(model(defaults=CONFIGURED), temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert five(found) == (0.0, 1.0, 0, 0.0, 1.0)


@pytest.mark.parametrize(("asked", "meant"), [(0.0, 0.0), (9e-6, 0.0), (1e-5, 1e-5), (2.0, 2.0)])
def test_a_temperature_too_small_to_divide_by_is_greedy(model, asked, meant):
    assert params(model(), temperature=asked).temperature == meant
    assert params(model(defaults=GenerationDefaults(temperature=asked))).temperature == meant


@pytest.mark.parametrize(("asked", "meant"), [(-1, 0), (0, 0), (263, 263), (10**9, 264)])
def test_top_k_is_at_most_the_vocabulary_and_minus_one_means_all(model, asked, meant):
    assert params(model(), top_k=asked).top_k == meant


@pytest.mark.parametrize(
    ("asked", "meant"), [(0, 0), (7, 7), (-1, 2**64 - 1), (2**63 - 1, 2**63 - 1), (-(2**63), 2**63)]
)
def test_every_seed_is_64_bits_without_a_sign(model, asked, meant):
    assert params(model(), seed=asked).seed == meant


def test_the_models_end_tokens_stop_first_then_the_clients_each_once(model):
    assert params(model(), stop_token_ids=[5, 259, 5]).stop_token_ids == (256, 259, 5)
    assert params(model(), stop_token_ids=[5, 259, 5], ignore_eos=True).stop_token_ids == (5, 259)
    assert params(model(), ignore_eos=True).stop_token_ids == ()


def test_the_last_token_of_the_vocabulary_can_stop_and_be_biased_and_the_next_one_not(model):
    found = params(model(), stop_token_ids=[263], logit_bias={"263": 1.0, "0": -100.0})
    assert (found.stop_token_ids[-1], found.logit_bias) == (263, {263: 1.0, 0: -100.0})
    for fields in ({"stop_token_ids": [0, 264]}, {"logit_bias": {"264": 1.0}}):
        with pytest.raises(RequestError, match="from 0 to 263"):
            params(model(), **fields)


def test_min_tokens_may_be_all_tokens_and_no_more(model):
    assert params(model(), max_tokens=10, min_tokens=10).min_tokens == 10
    with pytest.raises(RequestError, match="min_tokens: got 11, want at most max_tokens, which is 10"):
        params(model(), max_tokens=10, min_tokens=11)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_logprobs_are_none_or_from_zero_up_to_the_limit(model, name):
    assert [getattr(params(model(), **{name: asked}), name) for asked in (None, 0, 5)] == [None, 0, 5]
    with pytest.raises(RequestError, match=f"{name}: got 6, want 0 to 5"):
        params(model(), **{name: 6})


def test_what_is_not_decided_here_is_passed_on(model):
    grammar = Grammar(kind="json_object")
    found = params(model(), max_tokens=3, presence_penalty=-2.0, frequency_penalty=2.0, grammar=grammar)
    assert (found.max_tokens, found.presence_penalty, found.frequency_penalty) == (3, -2.0, 2.0)
    assert found.grammar is grammar
    assert found.choice == 0


# ------------------------------------------------------------------------------------------------------- output tokens


@pytest.mark.parametrize(
    ("asked", "most", "tokens"),
    [(None, None, 12), (None, 5, 5), (None, 100, 12), (1, 5, 1), (12, 5, 12)],
)
def test_what_is_asked_for_counts_else_the_models_default_else_what_remains(model, asked, most, tokens):
    served = model(max_model_len=512, defaults=GenerationDefaults(max_new_tokens=most))
    assert max_output_tokens("max_tokens", asked, 500, served) == tokens


def test_more_than_remains_is_refused_under_the_name_that_asked(model):
    with pytest.raises(RequestError, match="max_completion_tokens: got 13, want at most 12") as caught:
        max_output_tokens("max_completion_tokens", 13, 500, model(max_model_len=512))
    assert (caught.value.param, caught.value.code) == ("max_completion_tokens", "context_length_exceeded")


# ---------------------------------------------------------------------------------------------- stops, choices, streams


@pytest.mark.parametrize(
    ("stop", "stops"), [(None, ()), ("abc", ("abc",)), ([], ()), (["b", "a"], ("b", "a")), (["a", "a"], ("a", "a"))]
)
def test_stop_strings_keep_the_clients_order(stop, stops):
    assert stop_strings(SharedFields(stop=stop), LIMITS) == stops


@pytest.mark.parametrize(
    ("stop", "param"), [("abcd", "stop"), ("", "stop"), (["a", "abcd"], "stop[1]"), (["a", "b", "c"], "stop")]
)
def test_a_stop_string_that_will_not_do_is_named_by_its_place(stop, param):
    with pytest.raises(RequestError) as caught:
        stop_strings(SharedFields(stop=stop), LIMITS)
    assert caught.value.param == param


@pytest.mark.parametrize(("n", "prompts", "choices"), [(None, 1, 1), (None, 6, 1), (4, 1, 4), (3, 2, 3)])
def test_choices_up_to_both_limits(n, prompts, choices):
    assert num_choices(SharedFields(n=n), prompts, LIMITS) == choices


@pytest.mark.parametrize(
    ("n", "prompts", "words"), [(5, 1, "want 1 to 4"), (2, 4, "at most 6"), (None, 7, "at most 6")]
)
def test_choices_beyond_a_limit_are_refused(n, prompts, words):
    with pytest.raises(RequestError, match=words) as caught:
        num_choices(SharedFields(n=n), prompts, LIMITS)
    assert caught.value.param == "n"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, None),
        ({"stream": True, "stream_options": StreamOptions()}, None),
        ({"stream": False, "prompt_logprobs": 0}, None),
        ({"stream": False, "stream_options": StreamOptions()}, None),
        ({"stream": False, "stream_options": StreamOptions(include_usage=False)}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_what_contradicts_stream_is_refused(fields, param):
    if param is None:
        check_stream_options(SharedFields(**fields))
        return
    with pytest.raises(RequestError) as caught:
        check_stream_options(SharedFields(**fields))
    assert caught.value.param == param
