from __future__ import annotations

import numpy as np
import pytest

from nodecache.disk.directory import ModelDirectory, in_order_of_use
from nodecache.disk.files import Files
from tests.nodecache.disk.blocks import MODEL, folder

PLACES = np.array([[3, 1], [0, 2], [3, 0]], np.uint64)


@pytest.fixture
def directory(tmp_path):
    directory = ModelDirectory(tmp_path, MODEL, Files())
    yield directory
    directory.unlock()


def order(places, sequences, checkpoint):
    places = np.array(places, np.uint64).reshape(-1, 2)
    return in_order_of_use(places[:, 0], places[:, 1], np.array(sequences, np.uint64), checkpoint).tolist()


def test_a_checkpoint_comes_back_as_it_was_written_last(directory):
    assert directory.read_checkpoint().tolist() == []
    directory.write_checkpoint(PLACES[:1])
    directory.write_checkpoint(PLACES)
    assert directory.read_checkpoint().tolist() == PLACES.tolist()
    directory.write_checkpoint(PLACES[:0])
    assert directory.read_checkpoint().tolist() == []


@pytest.mark.parametrize("position", [0, 9, 17, 25, 4096, 4096 + 47])
def test_an_altered_checkpoint_is_ignored(directory, tmp_path, position):
    directory.write_checkpoint(PLACES)
    path = folder(tmp_path) / "checkpoint"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert directory.read_checkpoint().tolist() == []


@pytest.mark.parametrize("num_bytes", [0, 10, 4096, 4120])
def test_a_cut_checkpoint_is_ignored(directory, tmp_path, num_bytes):
    directory.write_checkpoint(PLACES)
    path = folder(tmp_path) / "checkpoint"
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert directory.read_checkpoint().tolist() == []


def test_blocks_are_in_the_checkpoints_order_then_as_written():
    places = [[0, 1], [0, 2], [3, 0], [3, 1], [4, 0]]
    assert order(places, [1, 2, 5, 9, 3], PLACES) == [3, 1, 2, 0, 4]
    assert order(places, [1, 2, 5, 9, 3], PLACES[:0]) == [0, 1, 4, 2, 3]
    assert order([], [], PLACES) == []


def test_the_folder_is_free_once_it_is_unlocked(directory, tmp_path):
    directory.unlock()
    other = ModelDirectory(tmp_path, MODEL, Files())
    other.unlock()
