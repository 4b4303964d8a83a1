"""What /tokenizer_info answers, as vLLM's: the tokenizer's configuration, and the chat template that is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_FILES: Final = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path")  #: names of files of this machine
_DEFAULT_CLASS: Final = "PreTrainedTokenizerFast"


def tokenizer_info(config: Mapping[str, Any], chat_template: str) -> dict[str, Any]:
    """Return a model's tokenizer_config.json as it is told: tokens as their texts, without names of files.

    `chat_template`: the one that is used, "" for none.
    """
    info = {key: _plain(value) for key, value in config.items() if key not in _FILES}
    info["tokenizer_class"] = config.get("tokenizer_class") or _DEFAULT_CLASS
    if chat_template:
        info["chat_template"] = chat_template
    return info


def _plain(value: Any) -> Any:
    """Return the text of a token that is described as an object, also of one inside `value`."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
