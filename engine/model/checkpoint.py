"""A model directory's weight files: which they are, whether they are whole, what they hash to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import msgspec
from blake3 import blake3

from messages.errors import ConfigError
from text.json_file import read_json

_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_METADATA = "__metadata__"  # the one entry of a header that is no tensor


class _Tensor(msgspec.Struct, frozen=True):
    """What a header says of a tensor, as far as it matters here."""

    dtype: str
    data_offsets: tuple[int, int]  #: its bytes, from the header's end


class _Header(NamedTuple):
    """Of a safetensors file."""

    num_bytes: int  #: with the length before it
    tensors: list[_Tensor]


def weight_files(directory: Path) -> list[Path]:
    """Find the safetensors files of `directory`, each checked to be whole, sorted by name.

    Raises:
        ConfigError: there are none (says so where only pickled ones are there), one is missing, truncated or corrupt.
    """
    index = directory / _INDEX
    if (directory / "model.safetensors").is_file():
        files = [directory / "model.safetensors"]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index} has no weight_map")
        files = sorted({directory / str(name) for name in weight_map.values()})
    elif any(path for pattern in _PICKLED for path in directory.glob(pattern)):
        raise ConfigError(
            f"{directory} has pickled weights only, which can run code when read; wanted model.safetensors"
        )
    else:
        raise ConfigError(f"{directory} has no weights: wanted model.safetensors or {_INDEX}")
    for path in files:
        _check_whole(path)
    return files


def stored_dtype(files: list[Path]) -> str:
    """Return the dtype that most numbers of `files` are stored in, as safetensors spells it ("BF16")."""
    sizes: dict[str, int] = {}
    for path in files:
        for tensor in _read_header(path).tensors:
            begin, end = tensor.data_offsets
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + end - begin
    return max(sizes, key=lambda name: sizes[name]) if sizes else "F32"


def weights_digest(files: list[Path]) -> bytes:
    """Hash the content of `files`, in order, to 32 bytes of BLAKE3; reads them once, on all cores."""
    digest = blake3(max_threads=blake3.AUTO)
    for path in files:
        digest.update_mmap(path)
    return digest.digest()


def _read_header(path: Path) -> _Header:
    """Read a safetensors header: 8 bytes of length, little endian, then JSON.

    Raises:
        ConfigError: the file has none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ConfigError(f"{path} is corrupt: its header claims {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is corrupt or truncated: its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path} is corrupt: its header is not a JSON object")
    entries = [entry for name, entry in header.items() if name != _METADATA]
    try:
        return _Header(_HEADER_LENGTH_BYTES + length, msgspec.convert(entries, list[_Tensor]))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} is corrupt: a tensor in its header has no dtype or no offsets") from error


def _check_whole(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path.parent} lacks the weight file {path.name}")
    header = _read_header(path)
    wanted = header.num_bytes + max((tensor.data_offsets[1] for tensor in header.tensors), default=0)
    seen = path.stat().st_size
    if seen != wanted:
        raise ConfigError(f"{path} is truncated or corrupt: it has {seen} bytes, its header describes {wanted}")
