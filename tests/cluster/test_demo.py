"""The model that ships with the project answers what stands in its prompt, through our engine and our command line."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from cluster.config import DEMO_MODEL
from cluster.openai.call_recognition import recognised
from engine.core import Engine, EngineOptions
from engine.model.load import load_model
from engine.scheduling.plan import SequenceAdded, SequenceSpec
from messages.request import SamplingParams
from tests.served import free_port, kvray_command, own_environment
from text.tokenizer import Tokenizer
from tools.demo_model import corpus, words
from tools.demo_model.evaluate_tools import call_message, call_of
from tools.demo_model.tool_corpus import Toolset, draw_family, tools_turn

NUM_QUESTIONS = 40


def answers(prompts: list[list[int]]) -> list[list[int]]:
    """Greedy, all at once, so that the pool is shared and prefixes are reused."""
    loaded = load_model(DEMO_MODEL, num_threads=1)
    engine = Engine.build(loaded, EngineOptions(kv_cache_bytes=2**28), model_dir=DEMO_MODEL)
    params = SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=loaded.eos_token_ids)
    got: dict[str, list[int]] = {}
    try:
        for i, prompt in enumerate(prompts):
            spec = SequenceSpec(seq_id=str(i), token_ids=prompt, num_prompt_tokens=len(prompt), params=params)
            engine.post(SequenceAdded(spec))
        while engine.has_work():
            for emitted in engine.step():
                got.setdefault(emitted.seq_id, []).extend(emitted.token_ids)
    finally:
        engine.close()
    return [got[str(i)] for i in range(len(prompts))]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("num_tokens", "num_facts"), [(256, 6), (1024, 25), (2048, 40)])
@pytest.mark.slow
def test_unseen_notes_are_answered(num_tokens, num_facts):
    rng = random.Random(num_tokens)
    lookups = [corpus.make_lookup(rng, num_tokens=num_tokens, num_facts=num_facts) for _ in range(NUM_QUESTIONS)]
    tokenizer = Tokenizer.load(DEMO_MODEL)
    prompts = [
        tokenizer.encode(
            tokenizer.render_chat([{"role": "user", "content": f"{lookup.notes}\n{lookup.question}"}]),
            add_special_tokens=False,
        )
        for lookup in lookups
    ]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers(prompts)]
    right = sum(text == lookup.answer for text, lookup in zip(texts, lookups, strict=True))
    # 96 to 99 of 100 in the model card; four standard deviations below that
    assert right >= 0.85 * NUM_QUESTIONS, f"{right} of {NUM_QUESTIONS}"


def test_the_shipped_directory_is_small_and_whole():
    files = list(DEMO_MODEL.iterdir())
    assert sum(file.stat().st_size for file in files) < 12e6
    names = {file.name for file in files}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert json.loads((DEMO_MODEL / "generation_config.json").read_text())["eos_token_id"]


def test_its_template_shows_tools_calls_and_results():
    tokenizer = Tokenizer.load(DEMO_MODEL)
    assert recognised(tokenizer) == "hermes"
    properties = {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}
    messages = [
        {"role": "system", "content": "Use the tools."},
        {"role": "user", "content": "What is the weather in Bern?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "It rains."},
    ]
    assert tokenizer.render_chat(messages, tools=[tool]) == (
        "<|system|>Use the tools.<|end|>"
        '<|tools|>{"name":"get_weather","arguments":{"city":"string","unit":"optional celsius|fahrenheit"}}<|end|>'
        "<|user|>What is the weather in Bern?<|end|>"
        '<|assistant|><tool_call>{"name":"get_weather","arguments":{"city":"Bern"}}</tool_call><|end|>'
        "<|tool|>It rains.<|end|><|assistant|>"
    )


def test_its_template_writes_what_it_was_trained_on():
    """Else it would be asked in a way that it has never seen."""
    tokenizer = Tokenizer.load(DEMO_MODEL)
    assert recognised(tokenizer) == "hermes"
    rng = random.Random(3)
    for _ in range(50):
        ask = Toolset(rng, draw_family(rng)).ask(rng)
        messages = [
            {"role": "system", "content": "Use the tools."},
            {"role": "user", "content": ask.question},
            call_message(ask),
            {"role": "tool", "tool_call_id": "c", "content": "It rains."},
        ]
        written = [
            corpus.turn("system", "Use the tools."),
            tools_turn([ask.tool]),
            corpus.turn("user", ask.question),
            corpus.turn("assistant", call_of(ask)),
            corpus.turn("tool", "It rains."),
            "<|assistant|>",
        ]
        assert tokenizer.render_chat(messages, tools=[ask.tool]) == "".join(written)


def test_its_template_takes_what_clients_send():
    tokenizer = Tokenizer.load(DEMO_MODEL)
    parts = [{"type": "text", "text": "Good"}, {"type": "text", "text": "bye"}]
    text = "<|user|>Goodbye<|end|><|assistant|>"
    assert tokenizer.render_chat([{"role": "user", "content": parts}]) == text
    assert tokenizer.render_chat([{"role": "user", "content": "Goodbye"}], tools=[]) == text
    user = {"role": "user", "content": "Goodbye"}
    system = tokenizer.render_chat([{"role": "developer", "content": "Be kind."}, user])
    assert system == f"<|system|>Be kind.<|end|>{text}"
    for parameters in ({}, {"parameters": {}}, {"parameters": {"type": "object", "properties": {}}}):
        tool = {"type": "function", "function": {"name": "now", **parameters}}
        shown = tokenizer.render_chat([{"role": "user", "content": "Goodbye"}], tools=[tool])
        assert shown == f'<|tools|>{{"name":"now","arguments":{{}}}}<|end|>{text}'


def test_a_word_has_the_same_tokens_with_a_space_before_it_and_without():
    """Or the model could not copy one that it does not know from a text into JSON."""
    tokenizer = Tokenizer.load(DEMO_MODEL)
    rng = random.Random(4)
    for word in [*words.UNSEEN_CITIES, *corpus.THINGS, *(words.made_up(rng) for _ in range(50))]:
        plain, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}"))
        assert plain[1:] == spaced[1:]
        assert len(plain) == len(spaced)


@pytest.mark.alone
def test_the_demo_command_converses_and_ends():
    with own_environment() as variables:
        finished = subprocess.run(
            kvray_command("demo", "--port", str(free_port())),
            capture_output=True,
            text=True,
            env=variables | {"KVRAY_API_KEY": "key-one"},  # as a user may have it
            timeout=180,
            cwd=Path(__file__).parent.parent.parent,
            check=False,
        )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("(right)") == 3, finished.stdout
    assert finished.stdout.count("first token after") == 3
    assert " device" in finished.stdout  # the later turns find the earlier ones' blocks where they are decoded
