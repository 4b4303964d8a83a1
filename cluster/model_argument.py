"""How a model is named on the command line, in a variable or in YAML, and the directory that it then is.

The one place for further ways to name one: `model_directory` is called before anything else is done with a model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from messages.errors import ConfigError

#: as on the Hugging Face hub: owner/name, or the name alone of models that came before owners
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_directory(named: str) -> Path:
    """Return the absolute path of the transformers model directory that is meant by `named`.

    Raises:
        ConfigError: there is none; one line that says what to do.
    """
    path = Path(named).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ConfigError(f"{path.resolve()} is a file, wanted a transformers model directory")
    if _HUB_ID.fullmatch(named):
        raise ConfigError(
            f"no directory {named} here, and nothing is downloaded: get the model first (hf download {named} "
            f"--local-dir {named.rpartition('/')[2]}), then serve that directory"
        )
    raise ConfigError(f"no model directory at {path.resolve()}")
