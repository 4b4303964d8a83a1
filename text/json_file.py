"""The JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from messages.errors import ConfigError


def read_json(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    """Read the object in `path`; {} where there is no file and none is needed.

    Raises:
        ConfigError: the file cannot be read, is no JSON, or holds no object.
    """
    if is_optional and not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not valid JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, wanted an object")
    return value
