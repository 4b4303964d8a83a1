"""The page cache outlives a SIGKILL, not a loss of power: here unsynced writes are dropped, torn and reordered."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.nodecache.disk.blocks import DEADLINE_S, folder, held, name_of, open_store, read, write
from tests.nodecache.disk.recording_files import RecordingFiles, lose_power

NUM_BLOCKS = 60


class Mark(NamedTuple):
    """Between two operations: what the store held; what was written or removed since the mark before."""

    held: frozenset[int]
    touched: frozenset[int] = frozenset()
    removed: frozenset[int] = frozenset()  #: by now, and not written again
    is_synced: bool = False


def record(root: Path, rng: random.Random, num_operations: int) -> list[tuple]:
    files = RecordingFiles()
    store = open_store(root, 6, files=files)
    removed: set[int] = set()

    def mark(*touched: int) -> None:
        files.note(Mark(frozenset(held(store, range(NUM_BLOCKS))), frozenset(touched), frozenset(removed)))

    for _ in range(num_operations):
        match rng.randrange(12):
            case 0 | 1:
                before = frozenset(held(store, range(NUM_BLOCKS)))
                store.sync(DEADLINE_S)
                after = frozenset(held(store, range(NUM_BLOCKS)))
                files.note(Mark(before & after, removed=frozenset(removed), is_synced=True))
            case 2 | 3:
                numbers = rng.sample(range(NUM_BLOCKS), 4)
                store.remove([name_of(number) for number in numbers])
                removed |= set(numbers)
                mark(*numbers)
            case 4 | 5:
                read(store, rng.sample(range(NUM_BLOCKS), 8))
            case 6 if rng.random() < 0.3:
                store.close()
                store = open_store(root, 6, files=files)
                mark()
            case _:
                first = rng.randrange(NUM_BLOCKS - 6)
                numbers = range(first, first + rng.randrange(1, 6))
                removed -= set(numbers)
                write(store, numbers)
                mark(*numbers)
    store.close()
    return files.log


def expected(log: list[tuple], end: int) -> tuple[set[int], set[int]]:
    """What must be there when power is lost after `end` entries, and what must not."""
    marks = [(position, entry) for position, entry in enumerate(log) if isinstance(entry, Mark)]
    synced = [number for number, (position, mark) in enumerate(marks) if position < end and mark.is_synced]
    if not synced:
        return set(), set()
    first = synced[-1]
    there, gone = set(marks[first][1].held), set(marks[first][1].removed)
    for position, mark in marks[first + 1 :]:
        there &= mark.held
        there -= mark.touched
        gone -= mark.touched
        if position >= end:
            break
    return there, gone


def replay(tmp_path: Path, seed: int, num_operations: int, num_losses: int) -> None:
    rng = random.Random(seed)
    log = record(tmp_path / "recorded", rng, num_operations)
    num_there = num_gone = 0
    for number in range(num_losses):
        end = rng.randrange(len(log) + 1)
        there, gone = expected(log, end)
        root = tmp_path / str(number)
        lose_power([entry for entry in log[:end] if not isinstance(entry, Mark)], rng, folder(root))
        store = open_store(root, 6)
        came = read(store, range(NUM_BLOCKS))
        served = {block for block, is_whole in enumerate(came) if is_whole}
        assert there <= served
        assert not gone & served
        num_there += len(there)
        num_gone += len(gone)
        dropped = write(store, range(NUM_BLOCKS, NUM_BLOCKS + 5))
        assert all(read(store, [new for new in range(NUM_BLOCKS, NUM_BLOCKS + 5) if name_of(new) not in dropped]))
        store.check_invariants()
        store.close()
        shutil.rmtree(root)
    assert num_there > num_losses
    assert num_gone > num_losses // 4


@pytest.mark.parametrize("seed", [1, 2])
def test_what_was_synced_survives_and_what_was_torn_is_not_served(tmp_path, seed):
    replay(tmp_path, seed, 150, 25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 15))
def test_more_losses_of_power(tmp_path, seed):
    replay(tmp_path, seed, 400, 150)
