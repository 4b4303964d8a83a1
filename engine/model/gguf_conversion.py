"""Turns a GGUF file into a model directory, by transformers' own reader: `python -m engine.model.gguf_conversion`.

A command of its own, because it takes the whole model's memory, in float32, which ends with it. It prints what it does,
a line each; a model that cannot be served is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, Keys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from engine.model.families import probe_layers, read_model_config
from engine.model.gguf_rope import FACTOR_TENSORS, rope_scaling
from messages.errors import ConfigError, RequestError, first_line
from messages.request import MIN_REPETITION_PENALTY
from text.json_file import read_json
from text.tokenizer import Tokenizer

#: Keys of a GGUF file that name tokens at which an answer ends.
_END_KEYS = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
#: What a GGUF file recommends for sampling: its name in a generation_config.json, the least and the most that is taken.
_SAMPLING_KEYS = {
    Keys.General.SAMPLING_TEMP: ("temperature", 0.0, 100.0),
    Keys.General.SAMPLING_TOP_K: ("top_k", -1, 2**31 - 1),
    Keys.General.SAMPLING_TOP_P: ("top_p", 1e-6, 1.0),
    Keys.General.SAMPLING_MIN_P: ("min_p", 0.0, 1.0),
    Keys.General.SAMPLING_PENALTY_REPEAT: ("repetition_penalty", MIN_REPETITION_PENALTY, 100.0),
}
_ORIGINAL_LENGTH = "original_max_position_embeddings"
#: Before the names of chat templates beside the ordinary one, such as tool_use.
_OTHER_TEMPLATE = "tokenizer.chat_template."
_TEMPLATE_NAME = re.compile(r"\w{1,64}")
#: Narrower dtypes that a tensor is written in where they hold each of its numbers.
_NARROW = (torch.bfloat16, torch.float16)
_PROBE = "kvray-probe"


def convert(source: Path, into: Path) -> None:
    """Write what the GGUF file `source` holds as a model directory into the existing, empty directory `into`.

    Weights are those that transformers computes from the file in float32, each written in a narrower dtype where that
    loses nothing. The tokenizer and its chat template are transformers' own for the file too.

    Raises:
        ConfigError: the file is truncated or no GGUF, or its model cannot be served; names its architecture.
        OSError: the file cannot be read, or there is no room for the directory.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    metadata, factors = _read_header(source)
    architecture = str(metadata.get(Keys.General.ARCHITECTURE, ""))
    try:
        _check_whole_model(metadata)
        with tempfile.TemporaryDirectory() as alone:
            # The file decides, and nothing that lies beside it: transformers looks at that too.
            link = Path(alone) / "model.gguf"
            link.symlink_to(source.resolve())
            _write_config(link, into, metadata, factors)
            _write_tokenizer(link, into, metadata)
            _write_weights(link, into)
        (into / "generation_config.json").write_text(json.dumps(_generation_config(metadata, into), indent=2) + "\n")
    except ConfigError as error:
        raise ConfigError(f"{source}, architecture {architecture or 'unknown'}: {error.message}") from error


def _check_whole_model(metadata: dict[str, Any]) -> None:
    if not metadata.get(Keys.General.ARCHITECTURE):
        raise ConfigError(f"it names no {Keys.General.ARCHITECTURE}")
    num_parts = metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
    if num_parts not in (0, 1):
        raise ConfigError(f"it is one of {num_parts} parts; join them with llama-gguf-split --merge")


def _read_header(source: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return the numbers and short texts among the file's metadata, and by what rotary frequencies are divided.

    Raises:
        ConfigError: it is no GGUF file, or not a whole one.
    """
    try:
        reader = GGUFReader(source)
        fields = {name: field for name, field in reader.fields.items() if len(field.data) == 1}
        metadata = {name: field.contents() for name, field in fields.items()}
        factors = [tensor for tensor in reader.tensors if tensor.name in FACTOR_TENSORS]
        return metadata, {tensor.name: tensor.data.tolist() for tensor in factors}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ConfigError(f"{source} is truncated or no GGUF file: {first_line(error)}") from error


def _write_config(source: Path, into: Path, metadata: dict[str, Any], factors: dict[str, list[float]]) -> None:
    _say("reading the configuration")
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=str(source), local_files_only=True)
    except Exception as error:  # the reader fails with errors of many kinds
        raise ConfigError(f"transformers' GGUF reader refuses it: {first_line(error)}") from error
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "default":
        scaling = rope_scaling(metadata, factors, config.max_position_embeddings)
        config.rope_parameters |= scaling
        if hasattr(config, _ORIGINAL_LENGTH):  # which goes before that of the parameters
            setattr(config, _ORIGINAL_LENGTH, scaling.get(_ORIGINAL_LENGTH, config.max_position_embeddings))
    config.save_pretrained(into)
    read_model_config(into)


def _write_tokenizer(source: Path, into: Path, metadata: dict[str, Any]) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=str(source), local_files_only=True)
    except Exception as error:  # as above
        raise ConfigError(f"transformers' GGUF reader refuses its tokenizer: {first_line(error)}") from error
    tokenizer.save_pretrained(into)
    others = {
        key.removeprefix(_OTHER_TEMPLATE): text for key, text in metadata.items() if key.startswith(_OTHER_TEMPLATE)
    }
    for name, text in others.items():
        if _TEMPLATE_NAME.fullmatch(name):
            (into / "additional_chat_templates").mkdir(exist_ok=True)
            (into / "additional_chat_templates" / f"{name}.jinja").write_text(str(text), encoding="utf-8")


def _generation_config(metadata: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return a generation_config.json: where answers end, and what the file recommends for sampling."""
    tokenizer = Tokenizer.load(directory)
    named = {metadata[key] for key in _END_KEYS if key in metadata}
    ends = {end for end in named if isinstance(end, int) and 0 <= end < tokenizer.vocab_size}  # 2^32 - 1 is none
    if not ends and tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    ends |= set(_turn_ends(tokenizer))
    found: dict[str, Any] = {}
    for key, (name, least, most) in _SAMPLING_KEYS.items():
        value = metadata.get(key)
        if isinstance(value, int | float) and least <= value <= most:
            found[name] = value
        elif value is not None:
            _say(f"{key} is {value}, wanted {least} to {most}: not taken")
    return ({"eos_token_id": sorted(ends)} if ends else {}) | found


def _turn_ends(tokenizer: Tokenizer) -> Iterator[int]:
    """Find the control token that the chat template puts behind an answer: few files name it when it is not eos."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.render_chat(messages, add_generation_prompt=False)
    except RequestError:
        return
    behind = tokenizer.encode(text.rpartition(_PROBE)[2].strip(), add_special_tokens=False)
    if behind and behind[0] in tokenizer.special_ids:
        yield behind[0]


def _write_weights(source: Path, into: Path) -> None:
    _say(f"unpacking {source.stat().st_size / 1e6:,.0f} MB of weights to float32")
    config = read_model_config(into)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=str(source),
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are looked at here
        )
    except Exception as error:  # as above, and errors of the tensors' shapes
        raise ConfigError(f"transformers' GGUF reader refuses its weights: {first_line(error)}") from error
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, seen, wanted = mismatched[0]
        raise ConfigError(
            f"transformers' GGUF reader takes too little of its metadata: {name} is {list(seen)}, "
            f"and {list(wanted)} by the configuration that it makes"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(f"transformers' GGUF reader finds {len(missing)} tensors too few, first {missing[0]}")
    probe_layers(model, str(config.model_type))
    model.hf_quantizer = None  # which keeps a model from being saved that is quantised no longer
    vars(model.config).pop("quantization_config", None)
    sizes = dict.fromkeys((torch.float32, *_NARROW), 0)
    for parameter in model.parameters():
        parameter.data = _narrowed(parameter.data)
        sizes[parameter.dtype] += parameter.nbytes
    _say(f"writing {sum(sizes.values()) / 1e6:,.0f} MB")
    model.save_pretrained(into)
    # save_pretrained names the dtype of whichever tensor comes first
    most = max(sizes, key=lambda dtype: sizes[dtype])
    described = read_json(into / "config.json") | {"dtype": str(most).removeprefix("torch.")}
    (into / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def _narrowed(values: torch.Tensor) -> torch.Tensor:
    """Return `values` in the narrowest dtype that holds each of them."""
    for dtype in _NARROW:
        narrow = values.to(dtype)
        if torch.equal(narrow.to(values.dtype), values):
            return narrow
    return values


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - read by whoever started this


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 2 where the model cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m engine.model.gguf_conversion", description=__doc__)
    parser.add_argument("source", type=Path, help="a GGUF file")
    parser.add_argument("directory", type=Path, help="an empty directory")
    chosen = parser.parse_args(arguments)
    try:
        convert(chosen.source, chosen.directory)
    except ConfigError as error:
        sys.stderr.write(f"{' '.join(error.message.split())}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{error.filename or chosen.source}: {error.strerror or error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
