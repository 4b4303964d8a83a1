"""Thoughts told from content: every format, however the text is split."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cluster.openai.thought_formats import THOUGHT_FORMATS
from cluster.openai.thoughts import plan_thought
from cluster.openai.transcript import TextOptions, Transcript
from messages.stream import TokenChunk
from text.tokenizer import Tokenizer

PROMPT = "<|user|>Q<|assistant|>"
THOUGHT = "\nIs 2 < 3?\n\nYé"
ANSWER = "\n\nIt is <b>so</b>."
#: vLLM's parser whose thoughts are content
KEPT = "minimax_m2_append_think"
NAMES = [name for name in THOUGHT_FORMATS if name != KEPT]


def read(plan, pieces):
    """Thought, content and the number of the thought's tokens, of a text whose tokens are `pieces`."""
    reader = plan.reader()
    thought = content = ""
    for piece in pieces:
        more = reader.push(piece)
        thought, content = thought + more.thought, content + more.content
    more = reader.flush("")
    return thought + more.thought, content + more.content, reader.num_tokens


def read_alike(plan, text):
    """Thought and content of a text, the same in one piece and split anywhere."""
    whole = read(plan, [text])[:2]
    assert read(plan, list(text))[:2] == whole
    for at in range(1, len(text)):
        assert read(plan, [text[:at], text[at:]])[:2] == whole
    return whole


def written(kind, *, is_opened=False):
    return ("" if is_opened else kind.opens[0]) + THOUGHT + kind.closes[0] + kind.between + kind.lead + ANSWER


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", NAMES)
def test_a_thought_is_read_whether_the_output_or_the_prompt_opens_it(name):
    kind = THOUGHT_FORMATS[name]
    plan = plan_thought(kind, PROMPT, {})
    assert read_alike(plan, written(kind)) == (THOUGHT, ANSWER)
    opened = plan_thought(kind, f"{PROMPT}{kind.opens[0]}\n", {})
    assert read_alike(opened, written(kind, is_opened=True)) == (THOUGHT, ANSWER)
    assert read_alike(opened, written(kind)) == (THOUGHT, ANSWER), "a model may repeat the mark"


@pytest.mark.parametrize("name", NAMES)
def test_every_other_mark_does_as_well(name):
    kind = THOUGHT_FORMATS[name]
    plan = plan_thought(kind, PROMPT, {})
    for open_ in kind.opens:
        assert read_alike(plan, open_ + "T" + kind.closes[-1] + "A") == ("T", "A")
    for mark in kind.yields:
        thought, _ = read_alike(plan, kind.opens[0] + "T" + mark)
        assert thought == "T"


@pytest.mark.parametrize("name", NAMES)
def test_without_any_mark_the_output_is_a_thought_where_the_format_implies_one(name):
    kind = THOUGHT_FORMATS[name]
    plan = plan_thought(kind, PROMPT, {})
    assert read_alike(plan, "\nHello") == (("\nHello", "") if kind.is_implied else ("", "\nHello"))
    if kind.is_implied:
        assert read_alike(plan, f"{THOUGHT}{kind.closes[0]}{ANSWER}") == (THOUGHT, ANSWER)


@pytest.mark.parametrize("name", NAMES)
def test_a_thought_that_is_cut_is_nothing_but_one(name):
    kind = THOUGHT_FORMATS[name]
    plan = plan_thought(kind, PROMPT + kind.opens[0], {})
    for size in range(len(kind.closes[0])):
        assert read_alike(plan, f"{THOUGHT}{kind.closes[0][:size]}")[1] == ""


@pytest.mark.parametrize("name", [name for name in NAMES if not THOUGHT_FORMATS[name].is_repeated])
def test_where_the_client_wants_none_nothing_is_parsed_as_one(name):
    kind = THOUGHT_FORMATS[name]
    closed = f"{PROMPT}{kind.opens[0]}\n\n{kind.closes[0]}\n\n"
    text = f"A{kind.opens[0]}B{kind.closes[0]}C"
    for plan in (
        plan_thought(kind, closed, {}),
        plan_thought(kind, PROMPT, {"enable_thinking": False}),
        plan_thought(kind, PROMPT, {"thinking": False}),
    ):
        assert plan is None or read_alike(plan, text) == ("", text)


def test_marks_in_an_answer_are_text():
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    assert read_alike(plan, "<think>T</think>write <think>x</think>") == ("T", "write <think>x</think>")
    assert read_alike(plan, "<think>a <thin> b</think>A") == ("a <thin> b", "A")


def test_a_mark_that_a_thought_may_only_begin_with_is_text_later():
    opened = plan_thought(THOUGHT_FORMATS["qwen3"], f"{PROMPT}<think>", {})
    assert read_alike(opened, "a<think>b</think>c") == ("a<think>b", "c")


def test_a_blank_thought_is_none():
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    assert read_alike(plan, "<think>\n\n</think>\n\nA") == ("", "\n\nA")


def test_thoughts_between_contents_are_read_where_a_format_has_them():
    plan = plan_thought(THOUGHT_FORMATS["openai_gptoss"], "<|start|>assistant", {})
    text = (
        "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>two<|end|>"
        "<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}<|return|>"
    )
    assert read_alike(plan, text) == ("onetwo", "Wait.{}")


def test_vllms_parser_that_keeps_thoughts_puts_their_mark_before_them():
    plan = plan_thought(THOUGHT_FORMATS[KEPT], PROMPT, {})
    assert read_alike(plan, "T</think>A") == ("", "<think>T</think>A")
    assert read(plan, ["T</think>", "A"])[2] == 0


def test_tokens_are_counted_without_marks_however_many_those_are_made_of():
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    assert read(plan, ["<think>", "a", "b ", "</think>", "A", "B"])[2] == 2
    assert read(plan, [*"<think>", "a", "b ", *"</think>", "A"])[2] == 2
    assert read(plan, ["a", "<", "/", "b", "</think>"])[2] == 4
    assert read(plan, ["<think>a</think>A"])[2] == 1
    assert read(plan, ["a", "", "b", "<", "/"])[2] == 5, "without its end all of it is a thought"


def test_a_continued_message_says_itself_whether_it_is_within_a_thought():
    kind = THOUGHT_FORMATS["qwen3"]
    assert read(plan_thought(kind, "...", {}, continued="<think>Let me"), ["x</think>A"])[:2] == ("x", "A")
    assert plan_thought(kind, "...", {}, continued="<think>x</think>An") is None
    assert plan_thought(kind, "...", {}, continued="An") is None


# --------------------------------------------------------------------------------------------------------- transcripts


MARKS = sorted(
    {
        *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<|open|>", "<|close|>", "<|sep|>"),
        *("[THINK]", "[/THINK]", "<|channel>", "<channel|>", "<|eom|>", "<think>", "</think>"),
        *("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|START_TEXT|>"),
        *("<|content_thinking|>", "<|content_text|>", "<|end_message|>", "<|message_model|>"),
    }
)
EOS, VOCAB = 256, 320


def byte_tokenizer(*, is_special: bool) -> Tokenizer:
    """One token a byte, and marks of thoughts that are tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    (backend.add_special_tokens if is_special else backend.add_tokens)(MARKS)
    return Tokenizer(backend)


def deltas(tokenizer, text, size, **options):
    transcript = Transcript(tokenizer, TextOptions(**options))
    ids = tokenizer.encode(text, add_special_tokens=False)
    taken = []
    for at in range(0, len(ids), size):
        last = at + size >= len(ids)
        chunk = TokenChunk(request_id="r", token_ids=ids[at : at + size], finish_reason="length" if last else None)
        taken.append(transcript.take(chunk))
        if transcript.is_finished:
            break
    return taken, transcript


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_strings_are_looked_for_after_the_thought(size):
    tokenizer = byte_tokenizer(is_special=False)
    plan = plan_thought(THOUGHT_FORMATS["qwen3"], PROMPT, {})
    text = "<think>stop, no: stop</think>go on, stop here"
    taken, transcript = deltas(tokenizer, text, size, stop=("stop",), thought=plan)
    assert "".join(delta.reasoning for delta in taken) == "stop, no: stop"
    assert "".join(delta.text for delta in taken) == "go on, "
    assert (taken[-1].finish_reason, taken[-1].stop_reason) == ("stop", "stop")
    assert transcript.num_reasoning_tokens == len("stop, no: stop")
    assert transcript.num_tokens == len("stop, no: stopgo on, stop") + 2


@pytest.mark.parametrize("size", [1, 3, 100])
def test_special_tokens_that_mark_thoughts_are_read_and_not_shown(size):
    tokenizer = byte_tokenizer(is_special=True)
    plan = plan_thought(THOUGHT_FORMATS["mistral"], PROMPT, {})
    shown = {tokenizer.backend.token_to_id(mark) for mark in ("[THINK]", "[/THINK]")}
    options = {"skips_special_tokens": False, "hidden_ids": tokenizer.special_ids - shown, "thought": plan}
    taken, transcript = deltas(tokenizer, "[THINK]T<|end|>[/THINK]A<eos>", size, **options)
    assert "".join(delta.reasoning for delta in taken) == "T"
    assert "".join(delta.text for delta in taken) == "A"
    assert transcript.num_reasoning_tokens == 2
