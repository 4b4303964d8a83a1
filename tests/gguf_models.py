"""GGUF files of tiny random models, written from transformers model directories as llama.cpp's converter does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from tests.models import CHAT_TEMPLATE, make_tiny_model

#: families that GGUF files spell otherwise than transformers
ARCHITECTURES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "minimax_m2": "minimax-m2",
    "gpt_oss": "gpt-oss",
}
_CONTROL, _NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


def write_gguf(
    path: Path,
    family: str = "llama",
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random decoder of `family` as a GGUF file, and the directory it was made from beside it.

    Args:
        path: of the file; the directory is `path` without its suffix, with -original behind it.
        family: transformers' model_type.
        kind: of matrices; vectors are float32 in any case.
        architecture: as the file names it; default: as llama.cpp does.
        metadata: further entries; None leaves one out.
        tensors: further ones.
        overrides: of the configuration, as for `make_tiny_model`.

    Returns:
        `path`.
    """
    directory = make_tiny_model(original_of(path), family, **overrides)
    config = AutoConfig.from_pretrained(directory)
    name = architecture or ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, name)
    entries = {**_settings(config, family, name), **_vocabulary(directory, config.vocab_size), **(metadata or {})}
    for key, value in entries.items():
        _add(writer, key, value)
    for tensor, values in [*_tensors(directory, family), *(tensors or {}).items()]:
        is_plain = values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32
        if is_plain:
            writer.add_tensor(tensor, values)
        else:
            writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def original_of(path: Path) -> Path:
    """The directory that `write_gguf` made the file at `path` from."""
    return path.with_name(f"{path.stem}-original")


def _settings(config: Any, family: str, name: str) -> dict[str, Any]:
    mapping = GGUF_CONFIG_MAPPING[family.removesuffix("_text")]
    rope = getattr(config, "rope_parameters", None) or {}
    found = {
        f"{name}.{key}": rope.get(entry) if entry == "rope_theta" else getattr(config, entry, None)
        for key, entry in mapping.items()
        if entry is not None
    }
    return {key: value for key, value in found.items() if value is not None} | {"general.name": f"tiny {family}"}


def _vocabulary(directory: Path, size: int) -> dict[str, Any]:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    unused = [f"[PAD{number}]" for number in range(len(tokens), size)]
    types = [int(_CONTROL if token in special else _NORMAL) for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": types + [int(gguf.TokenType.UNUSED)] * len(unused),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": vocab["<|end|>"],
        "tokenizer.ggml.bos_token_id": vocab["<|end|>"],
        "tokenizer.ggml.padding_token_id": vocab["<|end|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def sentencepiece_vocabulary(size: int) -> dict[str, Any]:
    """Metadata of a vocabulary of sentencepiece's, with byte tokens and a bos before each text."""
    words = ["▁the", "▁quick", "▁brown", "▁fox", "▁lazy", "▁dog", "▁code", "lantern"]
    pieces = dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    letters = dict.fromkeys("▁" + "".join(sorted({letter for word in words for letter in word if letter != "▁"})))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    tokens += [f"[PAD{number}]" for number in range(len(tokens), size)]
    kind = gguf.TokenType
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256]
    types += [kind.UNUSED if token.startswith("[PAD") else kind.NORMAL for token in tokens[len(types) :]]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(number) for number in range(len(tokens))],
        "tokenizer.ggml.token_type": [int(each) for each in types],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _tensors(directory: Path, family: str) -> Iterator[tuple[str, np.ndarray]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    processor = TENSOR_PROCESSORS.get(ARCHITECTURES.get(family, family), TensorProcessor)
    names = get_gguf_hf_weights_map(model, processor(config=model.config.to_dict()))
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    for tensor, name in names.items():
        if name not in state or (tensor == "output.weight" and model.config.tie_word_embeddings):
            continue
        tensor = f"{tensor}.weight" if tensor.endswith("_exps") else tensor  # transformers has them as parameters
        yield tensor, np.ascontiguousarray(_as_written(tensor, state[name], model.config, family))


def _as_written(tensor: str, values: np.ndarray, config: Any, family: str) -> np.ndarray:
    """What llama.cpp's converter makes of a tensor: the reverse of what transformers makes of the file's."""
    if family == "llama" and (found := re.search(r"attn_([qk])\.weight", tensor)):
        heads = config.num_attention_heads if found[1] == "q" else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if family in ("gemma2", "gemma3_text", "nemotron") and "norm.weight" in tensor:
        return values + 1
    if family == "gpt2" and values.ndim == 2 and tensor.startswith("blk."):
        return values.T
    if tensor.endswith("ssm_a"):
        return -np.exp(values)
    if "ssm_conv1d.weight" in tensor:
        return values[:, 0]
    if "ffn_gate_inp_shexp" in tensor:
        return values[0]
    if re.search(r"ffn_(gate|up)_exps", tensor):  # which transformers has in one
        half = values.shape[1] // 2
        return values[:, :half] if "gate" in tensor else values[:, half:]
    return values
