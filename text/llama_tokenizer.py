"""Directories that name LlamaTokenizer: transformers builds that class's own tokenizer from the vocabulary of the file.

tokenizer.json   " a</s>b"   [▁▁a][</s>][▁b]    its normalizer puts a space in front of every piece of a text
transformers     " a</s>b"   [▁▁a][</s>][b]     the class puts one in front of the first
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from text.json_file import read_json

#: Whose rules a directory's tokenizer follows, where its tokenizer.json and transformers differ.
TokenizerRules = Literal["transformers", "file"]

#: Model types whose tokenizer.json transformers 5.23 takes as it is, whatever class is named beside it; of those that
#: generate text.
# fmt: off
AS_THE_FILE_SAYS: Final = frozenset(
    {
        "beam", "bigbird_pegasus", "ernie4_5", "ernie4_5_moe", "flex_olmo", "fuyu", "glm", "glm4", "glm4_moe",
        "glm4_moe_lite", "got_ocr2", "gpt_bigcode", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared",
        "hyperclovax", "internlm3", "iquestcoder", "jamba", "kimi_linear", "mimo_v2_flash", "minicpm3", "minimax_m2",
        "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "nemotron", "olmo2", "olmo3",
        "olmo_hybrid", "persimmon", "phi3", "phimoe", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
        "qwen4_exp", "stablelm", "xlm-roberta-xl",
    }
)
# fmt: on
#: Its own special tokens, where the configuration names none.
_DEFAULTS: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def rebuilt(folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the tokenizer.json and the configuration that transformers makes of a directory's, which is known to load.

    None where it takes the file as it is: of another class, of a model type that it knows to name a wrong one, or with
    tokens that are bytes.

    Raises:
        ConfigError: config.json is no JSON object.
    """
    model = read_json(folder / "config.json", is_optional=True)
    named = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    if named.removesuffix("Fast") != "LlamaTokenizer" or model.get("model_type") in AS_THE_FILE_SAYS:
        return None
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    spec = json.loads(text)
    if '"ByteLevel"' in text or spec["model"].get("type", "BPE") != "BPE":
        return None
    puts_space = config.get("add_prefix_space") is not False
    scheme = "never" if not puts_space else "always" if config.get("legacy") else "first"
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if puts_space else []
    spec |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            **{name: spec["model"][name] for name in ("type", "vocab", "merges") if name in spec["model"]},
            **{"fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
            **dict.fromkeys(("unk_token", "dropout", "continuing_subword_prefix", "end_of_word_suffix")),
        },
    }
    if "added_tokens_decoder" in config:
        spec["added_tokens"] = []  # it lists them all
    return json.dumps(spec), {**_DEFAULTS, **config}
