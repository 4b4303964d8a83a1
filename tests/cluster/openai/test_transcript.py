"""A choice's text from its chunks: what is shown, what is hidden, what ends it."""

from __future__ import annotations

import pytest

from cluster.openai.transcript import Delta, TextOptions, Transcript
from messages.errors import CapacityError, ErrorInfo, KvrayError, WorkerError
from messages.stream import PromptSources, TokenChunk, TokenLogprob
from text.tokenizer import Tokenizer


class Choice:
    """A transcript that is fed with text."""

    def __init__(self, tokenizer: Tokenizer, **options: object) -> None:
        self.tokenizer = tokenizer
        self.transcript = Transcript(tokenizer, TextOptions(**options))  # type: ignore[arg-type]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def take(self, text: str = "", **fields: object) -> Delta:
        ids = self.ids(text)
        logprobs = [TokenLogprob(token_id, -1.0, 1) for token_id in ids]
        return self.transcript.take(TokenChunk(request_id="r", token_ids=ids, logprobs=logprobs, **fields))


@pytest.fixture
def choose(tokenizer: Tokenizer):
    return lambda **options: Choice(tokenizer, **options)


def test_text_comes_with_its_tokens_and_characters_come_whole(choose):
    choice = choose()
    first, last = choice.ids("é")
    assert choice.take("a").text == "a"
    assert choice.transcript.take(TokenChunk(request_id="r", token_ids=[first])).text == ""
    delta = choice.transcript.take(TokenChunk(request_id="r", token_ids=[last], finish_reason="length"))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("é", "length", None)
    assert choice.transcript.num_tokens == 3
    assert choice.transcript.is_finished


def test_half_a_character_at_the_end_is_shown_as_one_that_is_missing(choose):
    choice = choose()
    delta = choice.transcript.take(TokenChunk(request_id="r", token_ids=choice.ids("é")[:1], finish_reason="length"))
    assert delta.text == "\ufffd"


def test_what_is_told_of_the_prompt_is_kept_from_the_chunk_that_has_it(choose):
    choice = choose()
    choice.take("a", sources=PromptSources(device=3), prompt_logprobs=[None])
    choice.take("b", finish_reason="length")
    assert choice.transcript.sources == PromptSources(device=3)
    assert choice.transcript.prompt_logprobs == [None]


# --------------------------------------------------------------------------------------------------------- stop tokens


def test_a_stop_token_counts_and_has_no_text(choose):
    choice = choose()
    delta = choice.take("ab<|end|>", stop_token_id=choice.ids("<|end|>")[0], finish_reason="stop")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", None)
    assert choice.transcript.num_tokens == len(delta.token_ids) == len(delta.logprobs) == 3


@pytest.mark.parametrize(("includes_stop", "text"), [(False, "a"), (True, "ab")])
def test_the_clients_own_stop_token_is_the_reason_and_shown_only_where_stops_are(
    choose, tokenizer, includes_stop, text
):
    [b] = tokenizer.encode("b", add_special_tokens=False)
    choice = choose(stop_token_ids=frozenset({b}), includes_stop=includes_stop)
    delta = choice.take("ab", stop_token_id=b, finish_reason="stop")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == (text, "stop", b)


def test_the_models_own_end_token_is_not_shown_where_stops_are(choose, tokenizer):
    end = tokenizer.eos_token_id
    choice = choose(includes_stop=True, skips_special_tokens=False)
    assert choice.take("a<|end|>", stop_token_id=end, finish_reason="stop").text == "a"


def test_a_stop_token_that_came_before_the_end_was_told_takes_no_text_back(choose, tokenizer):
    """As of a sequence that moved with all its tokens: the worker it came to has none to add."""
    choice = choose(stop_token_ids=frozenset({tokenizer.eos_token_id}))
    choice.take("a")
    delta = choice.take("", stop_token_id=tokenizer.eos_token_id, finish_reason="stop")
    assert delta == Delta(finish_reason="stop", stop_reason=tokenizer.eos_token_id)
    assert choice.transcript.is_finished


# -------------------------------------------------------------------------------------------------------- stop strings


def test_tokens_after_the_one_that_completes_a_stop_string_are_not_there(choose):
    choice = choose(stop=("cd",))
    delta = choice.take("abcdef")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", "cd")
    assert delta.token_ids == choice.ids("abcd")
    assert [token.entry.token_id for token in delta.logprobs] == delta.token_ids
    assert choice.transcript.num_tokens == 4
    assert choice.transcript.is_finished


def test_a_stop_string_met_in_the_last_chunk_outdoes_the_workers_reason(choose):
    delta = choose(stop=("cd",)).take("abcd", finish_reason="length")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("ab", "stop", "cd")


def test_the_beginning_of_a_stop_string_is_held_back_until_the_end(choose):
    choice = choose(stop=("cde",))
    assert choice.take("abcd").text == "ab"
    assert choice.take("", finish_reason="length").text == "cd"


@pytest.mark.parametrize(("min_tokens", "ending"), [(1, ("", "stop", "a\ufffd")), (2, ("a\ufffd", "length", None))])
def test_a_stop_string_may_be_completed_by_what_the_end_brings_which_is_no_token_more(choose, min_tokens, ending):
    """Half a character, which is known to be one only when nothing follows."""
    choice = choose(stop=("a\ufffd",), min_tokens=min_tokens)
    ids = choice.ids("aé")[:2]
    delta = choice.transcript.take(TokenChunk(request_id="r", token_ids=ids, finish_reason="length"))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ending


def test_a_stop_string_counts_only_after_min_tokens_and_tokens_without_text_are_counted(choose, tokenizer):
    [hidden] = tokenizer.encode("<|bos|>", add_special_tokens=False)
    choice = choose(stop=("b",), min_tokens=3, skips_special_tokens=False, hidden_ids=frozenset({hidden}))
    assert choice.take("ab").text == "ab"
    assert choice.take("<|bos|>").finish_reason is None
    assert choice.take("ab").stop_reason == "b"


def test_the_stop_string_stays_where_stops_are_shown(choose):
    assert choose(stop=("cd",), includes_stop=True).take("abcdef").text == "abcd"


# ------------------------------------------------------------------------------------------------------ special tokens


@pytest.mark.parametrize(
    ("skips", "hides", "text"),
    [(True, False, "ab"), (False, False, "a[TOOL_CALLS]<|bos|>b"), (False, True, "a[TOOL_CALLS]b")],
)
@pytest.mark.parametrize("stop", [(), ("never",)])
def test_special_tokens_are_skipped_all_or_hidden_one_by_one(choose, tokenizer, stop, skips, hides, text):
    hidden = frozenset(tokenizer.encode("<|bos|>", add_special_tokens=False) if hides else [])
    choice = choose(stop=stop, skips_special_tokens=skips, hidden_ids=hidden)
    delta = choice.take("a[TOOL_CALLS]<|bos|>b")
    assert (delta.text, len(delta.token_ids)) == (text, 4)


# --------------------------------------------------------------------------------------------------------------- ends


def test_a_sequence_that_failed_raises_the_error_it_was_told(choose):
    info = CapacityError("full", retry_after_s=2).info()
    with pytest.raises(CapacityError, match="full") as caught:
        choose().take(finish_reason="error", error=info)
    assert caught.value.retry_after_s == 2


def test_a_failure_without_words_and_one_of_an_unknown_kind_are_still_errors(choose):
    with pytest.raises(KvrayError, match="the sequence failed"):
        choose().take(finish_reason="error")
    with pytest.raises(KvrayError, match="odd"):
        choose().take(finish_reason="error", error=ErrorInfo(kind="Newer", message="odd"))


def test_a_sequence_that_somebody_else_cancelled_is_the_servers_fault(choose):
    with pytest.raises(WorkerError) as caught:
        choose().take("a", finish_reason="cancelled")
    assert (caught.value.status, caught.value.code) == (503, "cancelled")
