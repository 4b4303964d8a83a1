"""Files that were altered in any way: what is served is right, the rest is dropped, the store works on."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.nodecache.disk.blocks import folder, name_of, open_store, read, segment_files, write

NUM_BLOCKS = 30


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("original")
    store = open_store(root)
    for first in range(0, NUM_BLOCKS, 3):
        write(store, range(first, first + 3))
    store.close()
    return root


def flip(rng: random.Random, root: Path) -> None:
    path = rng.choice([*segment_files(root), folder(root) / "checkpoint"])
    content = bytearray(path.read_bytes())
    # As likely in headers and tables as in the blocks.
    end = rng.choice([4096, 8192, len(content)])
    for _ in range(rng.choice([1, 1, 8])):
        content[rng.randrange(min(end, len(content)))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(rng: random.Random, root: Path) -> None:
    path = rng.choice([*segment_files(root), folder(root) / "checkpoint"])
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def reorder(rng: random.Random, root: Path) -> None:
    """Swap two equally long pieces of files."""
    paths = rng.choices(segment_files(root), k=2)
    size = rng.choice([16, 128, 512, 4096, 8192])
    contents = {path: bytearray(path.read_bytes()) for path in paths}
    places = [rng.randrange(len(contents[path]) // size) * size for path in paths]
    pieces = [bytes(contents[path][place : place + size]) for path, place in zip(paths, places, strict=True)]
    for path, place, piece in zip(paths, places, reversed(pieces), strict=True):
        contents[path][place : place + size] = piece
    for path, content in contents.items():
        path.write_bytes(content)


def rename(rng: random.Random, root: Path) -> None:
    """Swap two files' names, or have one twice."""
    one, other = rng.sample(segment_files(root), 2)
    if rng.random() < 0.5:
        shutil.copy(one, folder(root) / "00000099.segment")
    else:
        spare = one.with_suffix(".spare")
        one.rename(spare)
        other.rename(one)
        spare.rename(other)


def erase(rng: random.Random, root: Path) -> None:
    path = rng.choice(segment_files(root))
    content = bytearray(path.read_bytes())
    begin = rng.randrange(len(content))
    end = min(len(content), begin + rng.choice([100, 4096, 20000]))
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)


def damage_and_look(original: Path, tmp_path: Path, seeds: range) -> None:
    num_lost = 0
    for seed in seeds:
        rng = random.Random(seed)
        root = tmp_path / str(seed)
        shutil.copytree(original, root)
        for _ in range(rng.choice([1, 1, 3])):
            rng.choice([flip, truncate, reorder, rename, erase])(rng, root)
        store = open_store(root)
        came = read(store, range(NUM_BLOCKS))
        num_lost += came.count(False)
        assert [store.find(name_of(number)) is not None for number in range(NUM_BLOCKS)] == came
        write(store, range(NUM_BLOCKS + 2))
        assert all(read(store, range(NUM_BLOCKS + 2)))
        store.check_invariants()
        store.close()
        store = open_store(root)
        assert all(read(store, range(NUM_BLOCKS + 2)))
        store.close()
        shutil.rmtree(root)
    assert num_lost > len(seeds) // 2  # most of it did hit something


@pytest.mark.slow
def test_what_thirty_damages_leave_is_right(original, tmp_path):
    damage_and_look(original, tmp_path, range(30))


@pytest.mark.slow
def test_what_three_hundred_damages_leave_is_right(original, tmp_path):
    damage_and_look(original, tmp_path, range(1000, 1300))
