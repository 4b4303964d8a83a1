"""A converted GGUF file is the model that transformers reads from it, and the one that it was made from."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.model.gguf_conversion import convert, main
from engine.model.load import load_model
from messages.errors import ConfigError
from tests.gguf_models import original_of, sentencepiece_vocabulary, write_gguf
from tests.models import VOCAB_SIZE
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = gguf.GGMLQuantizationType
#: by family, what makes a tiny model of it that its GGUF file describes whole
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    # what the reader takes of its own knowledge: the width of experts, and that their weights add up to one
    "qwen3_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        **{"moe_intermediate_size": 768, "norm_topk_prob": True},
    },
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_hidden_layers": 2},
        **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {},
    "stablelm": {},
    "starcoder2": {},
    "nemotron": {},
    "gpt2": {"num_key_value_heads": None, "head_dim": None, "n_positions": 1024, "n_ctx": 1024},
}


def converted(tmp_path, *arguments, **options):
    source = write_gguf(tmp_path / "tiny.gguf", *arguments, **options)
    directory = tmp_path / "made"
    directory.mkdir()
    convert(source, directory)
    return source, directory


def logits(directory, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **options
    )
    tokens = torch.randint(4, VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_has_the_logits_of_the_file_and_of_what_the_file_was_made_from(family, tmp_path):
    source, directory = converted(tmp_path, family, **FAMILIES[family])
    made = logits(directory)
    assert torch.equal(made, logits(tmp_path, gguf_file=str(source)))
    assert torch.allclose(made, logits(original_of(source)), rtol=1e-4, atol=1e-4)
    assert load_model(directory).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [
        (KINDS.F32, "float32", {"F32"}),
        (KINDS.F16, "float16", {"F16"}),
        (KINDS.BF16, "bfloat16", {"BF16"}),
        (KINDS.Q8_0, "float32", {"F32"}),
        (KINDS.Q4_1, "float32", {"F32"}),
    ],
)
def test_weights_are_written_in_the_narrowest_dtype_that_loses_nothing(kind, dtype, stored, tmp_path):
    source, directory = converted(tmp_path, kind=kind)
    with safe_open(directory / "model.safetensors", "pt") as file:
        matrices = [file.get_slice(name) for name in file.keys() if "norm" not in name]  # noqa: SIM118 - no mapping
        assert {matrix.get_dtype() for matrix in matrices} == stored
    assert json.loads((directory / "config.json").read_text())["dtype"] == dtype
    assert torch.equal(logits(directory), logits(tmp_path, gguf_file=str(source)))


@pytest.mark.slow
def test_the_tokenizer_and_its_chat_template_are_the_files(tmp_path):
    source, directory = converted(tmp_path)
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(tmp_path, gguf_file=str(source))
    for text in ("the lazy dog", "Was kostet 4821?", "<|user|>über <|end|>", "  two  spaces\n\n"):
        assert ours.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == rendered == "<|user|>Hi<|end|><|assistant|>"
    assert ours.special_tokens["eos_token"] == "<|end|>"


@pytest.mark.slow
def test_a_vocabulary_of_sentencepiece_is_the_files_too(tmp_path):
    source, directory = converted(tmp_path, vocab_size=384, metadata=sentencepiece_vocabulary(384))
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(tmp_path, gguf_file=str(source))
    for text in ("the quick brown fox", "lantern  4821 ü", "</s>the"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text)[0] == 1
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.eos_token_id == 2


@pytest.mark.slow
def test_a_file_has_chat_templates_by_name_too(tmp_path):
    _, directory = converted(tmp_path, metadata={"tokenizer.chat_template.tool_use": "{{ tools | length }} tools"})
    ours, messages = Tokenizer.load(directory), [{"role": "user", "content": "Hi"}]
    assert ours.render_chat(messages, tools=[{}, {}]) == "2 tools"
    assert ours.render_chat(messages) == "<|user|>Hi<|end|><|assistant|>"


@pytest.mark.slow
def test_what_lies_beside_the_file_changes_nothing(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]"}')
    _, directory = converted(tmp_path)
    assert Tokenizer.load(directory).special_tokens["eos_token"] == "<|end|>"


def generation_config(tmp_path, **metadata) -> dict:
    _, directory = converted(tmp_path, metadata={f"tokenizer.{name}": value for name, value in metadata.items()})
    return json.loads((directory / "generation_config.json").read_text())


@pytest.mark.slow
def test_answers_end_where_the_file_says_and_where_the_template_ends_them(tmp_path):
    ended = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|system|>{% endfor %}"
    found = generation_config(tmp_path, **{"ggml.eot_token_id": 2, "chat_template": ended})
    assert found["eos_token_id"] == [0, 2, 3]


@pytest.mark.slow
def test_what_the_file_recommends_for_sampling_is_the_default(tmp_path):
    _, directory = converted(tmp_path, metadata={"general.sampling.temp": 0.5, "general.sampling.top_k": 7})
    found = json.loads((directory / "generation_config.json").read_text())
    assert found == {"eos_token_id": [0], "temperature": 0.5, "top_k": 7}


@pytest.mark.slow
def test_what_no_request_could_ask_for_and_ends_that_are_no_tokens_are_not_taken(tmp_path, capsys):
    odd = {"temp": float("nan"), "top_k": "many", "top_p": 0.0, "min_p": 0.25, "penalty_repeat": 0.0}
    metadata = {f"general.sampling.{key}": value for key, value in odd.items()}
    ends = {"tokenizer.ggml.eot_token_id": 2**32 - 1, "tokenizer.ggml.eom_token_id": "x"}
    _, directory = converted(tmp_path, metadata=metadata | ends)
    assert json.loads((directory / "generation_config.json").read_text()) == {"eos_token_id": [0], "min_p": 0.25}
    assert "general.sampling.temp is nan, wanted 0.0 to 100.0: not taken" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "clip"}, "architecture clip: .*clip"),
        ({"metadata": {"split.count": 3}}, "architecture llama: it is one of 3 parts"),
        ({"metadata": {"split.count": "two"}}, "architecture llama: it is one of two parts"),
        ({"metadata": {"llama.feed_forward_length": 97}}, r"architecture llama: .*\[64, 96\], and \[64, 97\]"),
        ({"metadata": {"tokenizer.ggml.model": "rwkv"}}, "architecture llama: .*tokenizer.*rwkv"),
        ({"metadata": {"llama.block_count": 5}}, "architecture llama: .* tensors too few, first model.layers.4"),
    ],
    ids=["unknown architecture", "a part", "an odd part", "another width", "another tokenizer", "a layer less"],
)
def test_a_file_that_cannot_be_served_is_refused_with_its_architecture(options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        converted(tmp_path, **options)


@pytest.mark.slow
def test_an_architecture_that_the_reader_knows_and_the_engine_does_not_is_named(tmp_path):
    entries = {"num_key_value_heads": None, "head_dim": None, "state_size": 8}
    with pytest.raises(ConfigError, match="architecture mamba: mamba cannot be served"):
        converted(tmp_path, "mamba", **entries)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [3, 200, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused(kept, tmp_path):
    source = write_gguf(tmp_path / "tiny.gguf")
    whole = source.read_bytes()
    source.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ConfigError, match=r"tiny\.gguf is truncated or no GGUF file"):
        convert(source, tmp_path)


def test_the_command_says_in_one_line_why_it_cannot(tmp_path, capfd):
    path = tmp_path / "no.gguf"
    path.write_bytes(b"GGUF and no more")
    assert main([str(path), str(tmp_path)]) == 2
    assert capfd.readouterr().err.startswith(f"{path} is truncated or no GGUF file")
    assert main([str(tmp_path / "missing.gguf"), str(tmp_path)]) == 2
    assert capfd.readouterr().err == f"{tmp_path / 'missing.gguf'}: No such file or directory\n"
