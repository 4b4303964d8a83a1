"""SmolLM2 as `kvray serve smollm2` serves it: its template, and, where there is a package index, the model."""

from __future__ import annotations

import threading
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.model_argument import model_directory
from cluster.openai.call_recognition import recognised
from cluster.packaged_models import PACKAGED_MODELS, fetched
from messages.errors import ConfigError
from tests.models import write_tokenizer
from tests.served import serving
from text.chat_template import ChatTemplate
from text.tokenizer import Tokenizer

MODEL = PACKAGED_MODELS["smollm2"]
#: as its GGUF file has it
OWN_TEMPLATE = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def template() -> ChatTemplate:
    return ChatTemplate(MODEL.chat_template.read_text(), {})


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [QUESTION],
        [{"role": "system", "content": "Be brief."}, QUESTION],
        [QUESTION, {"role": "assistant", "content": " Rain.\n"}, {"role": "user", "content": ""}],
    ],
)
def test_without_tools_its_template_renders_as_the_files_own(template, messages, adds):
    own = ChatTemplate(OWN_TEMPLATE, {})
    wanted = own.render(messages, add_generation_prompt=adds)
    assert template.render(messages, add_generation_prompt=adds) == wanted


def test_its_template_shows_tools_calls_and_results(template):
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    text = template.render(messages, tools=[TOOL])
    assert '<tools>\n{"name": "get_weather", "description": "The weather in a city."' in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    ) in text


def test_its_calls_are_read_back_as_hermes(tmp_path):
    write_tokenizer(tmp_path)
    assert recognised(Tokenizer.load(tmp_path, chat_template=MODEL.chat_template)) == "hermes"


@pytest.fixture(scope="module")
def directory() -> Path:
    try:
        return model_directory("smollm2", threading.Event(), print)
    except ConfigError as error:
        pytest.skip(f"SmolLM2 cannot be fetched here: {error.message}")


@pytest.fixture(scope="module")
def source(directory, tmp_path_factory) -> Path:
    """The GGUF file itself."""
    return fetched("smollm2", MODEL, tmp_path_factory.mktemp("source"), [], threading.Event(), print)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_served_smollm2_is_transformers_own_token_for_token_and_calls_a_tool(directory, source, tmp_path):
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=str(source))
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=str(source), dtype=torch.float32)
    model.generation_config.eos_token_id = None  # which it would not choose before its time
    prompts = ["The capital of France is", "def fibonacci(n):\n", "Ein Satz über 4821 Äpfel:"]
    with serving("smollm2", "--dtype", "float32", log_dir=tmp_path) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)
        for prompt in prompts:
            ids = theirs(prompt, return_tensors="pt").input_ids
            wanted = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            extra = {"ignore_eos": True, "return_token_ids": True}
            reply = client.completions.create(
                model="smollm2", prompt=prompt, max_tokens=48, temperature=0, extra_body=extra
            )
            assert reply.choices[0].model_extra["token_ids"] == wanted.tolist()
        reply = client.chat.completions.create(
            model="smollm2", messages=[QUESTION], tools=[TOOL], tool_choice="required", temperature=0
        )
        call = reply.choices[0].message.tool_calls[0].function
        assert (call.name, call.arguments) == ("get_weather", '{"city":"Paris"}')
        reply = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0
        )
        assert "Paris" in reply.choices[0].message.content
        assert reply.choices[0].finish_reason == "stop"
