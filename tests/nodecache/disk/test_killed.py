"""SIGKILL under load: what is served is right, nothing written is lost, nothing whose removal was synced is back."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nodecache.disk.blocks import capacity_of, held, read, used_bytes
from tests.nodecache.disk.loaded_process import NUM_BLOCKS, NUM_SEGMENTS, NUM_WORTHY, open_loaded

ROOT = Path(__file__).parents[3]


class Witness:
    """What must be there and what must not, by what the process said before it was killed."""

    def __init__(self) -> None:
        self.written: set[int] = set()
        self.gone: set[int] = set()
        self.removed: set[int] = set()
        self.syncing: set[int] = set()

    def hear(self, line: str) -> None:
        what, *words = line.split()
        numbers = {int(word) for word in words}
        match what:
            case "writing":
                self.removed -= numbers
                self.syncing -= numbers
                self.gone -= numbers
            case "written":
                self.written |= numbers
            case "removing":
                self.written -= numbers
            case "removed":
                self.removed |= numbers
            case "syncing":
                self.syncing = set(self.removed)
            case "synced":
                self.gone |= self.syncing


def kill_and_look(root: Path, num_rounds: int) -> None:
    witness = Witness()
    rng = random.Random(num_rounds)
    for number in range(num_rounds):
        command = [sys.executable, "-m", "tests.nodecache.disk.loaded_process", str(root), str(number)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            for _ in range(rng.choice([2, 10, 100, 400])):
                witness.hear(child.stdout.readline())
            child.kill()
            for line in child.stdout:
                if line.endswith("\n"):
                    witness.hear(line)
        witness.removed.clear()  # what was not synced may have come back
        store = open_loaded(root)
        store.check_invariants()
        assert witness.written <= set(held(store, range(NUM_WORTHY)))
        assert not witness.gone & set(held(store, range(NUM_WORTHY)))
        assert all(read(store, sorted(witness.written)))
        read(store, held(store, range(NUM_BLOCKS + 6)))  # some may be collected meanwhile
        assert store.stats()["kvray_disk_damaged_blocks_total"] == 0
        assert used_bytes(root) <= capacity_of(NUM_SEGMENTS)
        store.close()


@pytest.mark.slow
def test_killed_five_times(tmp_path):
    kill_and_look(tmp_path, 5)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_killed_three_hundred_times(tmp_path):
    kill_and_look(tmp_path, 300)
