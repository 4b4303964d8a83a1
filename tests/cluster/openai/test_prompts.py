"""Prompts as token ids: what is taken, where it is cut, how long it may be."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from cluster.openai.backend import ServedModel
from cluster.openai.prompts import check_length, check_token_ids, fitted, packed, prompts_of
from messages.errors import RequestError


@pytest.fixture
def model(served_model, tokenizer) -> Callable[..., ServedModel]:
    """By default a context of 20 tokens, all but one of which a pool holds."""
    return lambda **changes: served_model(tokenizer, **{"max_model_len": 20, "max_prompt_tokens": 19, **changes})


def test_token_ids_cross_processes_as_four_bytes_little_endian():
    assert packed([1, 256, 2**32 - 1]) == b"\x01\0\0\0\0\x01\0\0\xff\xff\xff\xff"
    assert packed([]) == b""
    with pytest.raises(struct.error):
        packed([2**32])


# ------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([0, 263], [[0, 263]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_one_text_several_texts_one_list_of_ids_or_several(model, prompt, prompts):
    assert prompts_of(prompt, model()) == prompts


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        (["a", ""], "prompt[1]"),
        (["a", [1]], "prompt[1]"),
        ([1, [1]], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([[1], []], "prompt[1]"),
        ([[1], [2, 264]], "prompt[1][1]"),
        ([None], "prompt[0]"),
        ([1, 2, -1, 264], "prompt[2]"),
    ],
)
def test_the_first_thing_that_is_no_prompt_is_named(model, prompt, param):
    with pytest.raises(RequestError) as caught:
        prompts_of(prompt, model())
    assert caught.value.param == param


@pytest.mark.parametrize("item", [264, -1, True, False, 1.5, "1", None, 10**30])
def test_a_token_id_is_an_integer_of_the_vocabulary_and_no_truth_value(item):
    assert check_token_ids("p", [0, 263], 264) == [0, 263]
    assert repr(check_token_ids("p", [0.0, 263], 264)) == "[0, 263]"
    with pytest.raises(RequestError, match=r"p\[1\]: got .*, want a token id from 0 to 263"):
        check_token_ids("p", [0, item, 0], 264)


# ------------------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(
    ("truncate", "max_tokens", "kept"),
    [
        (None, None, 19),
        (5, None, 5),
        (19, None, 19),
        (-1, None, 19),  # room for one token of output
        (-1, 0, 19),
        (-1, 1, 19),
        (-1, 8, 12),
        (-1, 19, 1),
        (-1, 1000, 1),  # one token of a prompt stays in any case: the output's length is judged elsewhere
    ],
)
def test_a_prompt_is_cut_from_the_left_to_what_was_asked_or_to_what_fits_beside_the_output(
    model, truncate, max_tokens, kept
):
    token_ids = list(range(19))
    assert fitted("prompt", token_ids, truncate, max_tokens, model()) == token_ids[19 - kept :]


def test_a_prompt_longer_than_the_model_holds_may_be_cut_to_it(model):
    token_ids = list(range(100))
    assert fitted("prompt", token_ids, -1, None, model()) == token_ids[81:]
    assert fitted("prompt", token_ids, -1, None, model(max_prompt_tokens=7)) == token_ids[93:]
    with pytest.raises(RequestError, match="prompt: got 100 tokens, want at most 19"):
        fitted("prompt", token_ids, None, None, model())


def test_a_short_prompt_is_not_cut(model):
    assert fitted("prompt", [1, 2], 5, None, model()) == [1, 2]


def test_to_cut_to_more_than_the_model_holds_makes_no_sense(model):
    with pytest.raises(RequestError, match="truncate_prompt_tokens: got 20, want -1 to 19"):
        fitted("prompt", [1], 20, None, model())


@pytest.mark.parametrize(("token_ids", "truncate"), [([], None), ([1, 2], 0), ([], -1)])
def test_a_prompt_without_tokens_is_refused_under_its_name(model, token_ids, truncate):
    with pytest.raises(RequestError, match="got no tokens") as caught:
        fitted("messages", token_ids, truncate, None, model())
    assert caught.value.param == "messages"


@pytest.mark.parametrize(("max_prompt_tokens", "why"), [(19, "20 tokens with"), (18, "19 tokens here, as the KV")])
def test_what_is_too_small_for_a_prompt_is_said(model, max_prompt_tokens, why):
    served = model(max_prompt_tokens=max_prompt_tokens)
    check_length("prompt", max_prompt_tokens, served)
    with pytest.raises(RequestError, match=f"this model's maximum context length is {why}") as caught:
        check_length("prompt", max_prompt_tokens + 1, served)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_a_token_that_the_tokenizer_has_and_the_model_has_not_is_refused(model):
    assert fitted("messages", [5, 263], None, None, model()) == [5, 263]
    with pytest.raises(RequestError, match="messages: got the token 264, want token ids from 0 to 263") as caught:
        fitted("messages", [5, 264, 7], None, None, model())
    assert (caught.value.param, caught.value.code) == ("messages", "invalid_value")
