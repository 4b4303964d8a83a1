"""Which files a model's weights are in, that they are whole, and what names them. Without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from engine.model.checkpoint import stored_dtype, weight_files, weights_digest
from messages.errors import ConfigError

INDEX = "model.safetensors.index.json"


def header_of(**tensors: tuple[str, int, int]) -> dict[str, Any]:
    """Tensors by name: dtype, and where their bytes begin and end."""
    return {
        name: {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (dtype, begin, end) in tensors.items()
    }


def write(path: Path, header: object, num_bytes: int) -> Path:
    """A safetensors file with `num_bytes` behind its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    return path


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        weight_files(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


# --------------------------------------------------------------------------------------------------------- which files


def test_one_whole_file_comes_before_an_index_and_pickled_weights_beside_it_are_no_matter(tmp_path):
    whole = write(tmp_path / "model.safetensors", header_of(a=("F32", 0, 8)), 8)
    (tmp_path / INDEX).write_text("no JSON at all")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert weight_files(tmp_path) == [whole]


def test_shards_of_an_index_are_read_once_each_in_order_of_their_names(tmp_path):
    shards = [write(tmp_path / name, header_of(a=("F32", 0, 8)), 8) for name in ("a.safetensors", "b.safetensors")]
    write(tmp_path / "c.safetensors", {}, 0)  # nobody's
    weight_map = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert weight_files(tmp_path) == shards


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a.safetensors"]}'])
def test_an_index_that_maps_nothing_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    assert refusal(tmp_path) == f"{tmp_path / INDEX} has no weight_map"


def test_a_shard_that_is_missing_is_named(tmp_path):
    write(tmp_path / "a.safetensors", {}, 0)
    (tmp_path / INDEX).write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert refusal(tmp_path) == f"{tmp_path} lacks the weight file b.safetensors"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_alone_are_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert "pickled weights only, which can run code" in refusal(tmp_path)


def test_a_directory_without_weights_says_what_was_wanted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == f"{tmp_path} has no weights: wanted model.safetensors or {INDEX}"


# --------------------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize(("num_bytes", "is_whole"), [(7, False), (8, True), (9, False)])
def test_a_file_is_as_long_as_its_last_tensor_says(tmp_path, num_bytes, is_whole):
    header = {"__metadata__": {"format": "pt"}, **header_of(b=("F32", 4, 8), a=("F32", 0, 4))}
    path = write(tmp_path / "model.safetensors", header, num_bytes)
    if is_whole:
        assert weight_files(tmp_path) == [path]
        return
    size = path.stat().st_size
    assert refusal(tmp_path).endswith(f"it has {size} bytes, its header describes {size - num_bytes + 8}")


def test_a_file_of_no_tensors_is_whole(tmp_path):
    path = write(tmp_path / "model.safetensors", {"__metadata__": {}}, 0)
    assert weight_files(tmp_path) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "its header claims 0 bytes"),
        (b"\x01" + bytes(7) + b"{", "its header claims 1 bytes"),
        (struct.pack("<Q", 100_000_001), "its header claims 100000001 bytes"),
        (struct.pack("<Q", 2**64 - 1), "its header claims 18446744073709551615 bytes"),
        (struct.pack("<Q", 50) + b'{"a": ', "header is not valid JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "header is not valid JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "header is not valid JSON"),
        (struct.pack("<Q", 2) + b"[]", "header is not a JSON object"),
    ],
    ids=["empty", "short", "long", "endless", "cut", "bytes", "deep", "list"],
)
def test_a_file_whose_header_cannot_be_read_is_corrupt(tmp_path, content, words):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert words in refusal(tmp_path)
    assert str(tmp_path / "model.safetensors") in refusal(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {},
        {"dtype": "F32", "data_offsets": None},
        {"dtype": "F32", "data_offsets": []},
        {"dtype": "F32", "data_offsets": [0]},
        {"dtype": "F32", "data_offsets": [0, "8"]},
        {"dtype": "F32", "data_offsets": ["0", 8]},
        {"dtype": "F32", "data_offsets": [0, 4, 8]},
        {"data_offsets": [0, 8]},
        {"dtype": 5, "data_offsets": [0, 8]},
    ],
)
def test_a_tensor_that_is_not_described_makes_its_file_corrupt(tmp_path, entry):
    write(tmp_path / "model.safetensors", {"a": entry}, 8)
    assert f"{tmp_path / 'model.safetensors'} is corrupt" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------------ what names them


def test_the_dtype_of_most_bytes_is_the_stored_one_over_all_files(tmp_path):
    few = write(tmp_path / "a", header_of(norm=("F32", 0, 6), gate=("F32", 6, 12), ids=("I64", 12, 20)), 20)
    many = write(
        tmp_path / "b", {"__metadata__": {"format": "pt"}, **header_of(x=("BF16", 0, 8), y=("BF16", 8, 14))}, 14
    )
    assert stored_dtype([few]) == "F32"
    assert stored_dtype([few, many]) == stored_dtype([many, few]) == "BF16"


def test_files_without_tensors_are_stored_as_nothing_in_particular(tmp_path):
    assert stored_dtype([write(tmp_path / "a", {}, 0)]) == stored_dtype([]) == "F32"


def test_a_digest_is_of_the_bytes_in_order_and_of_nothing_else(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"12")
    second.write_bytes(b"3")
    digest = weights_digest([first, second])
    assert len(digest) == 32
    assert weights_digest([second, first]) != digest
    renamed = first.rename(tmp_path / "c")
    assert weights_digest([renamed, second]) == digest
    second.write_bytes(b"4")
    assert weights_digest([renamed, second]) != digest
