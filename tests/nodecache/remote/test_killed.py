"""A process that writes is killed at any moment: what is found afterwards is whole."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nodecache.remote.blocks import DEADLINE_S, held, open_store, read

ROOT = Path(__file__).parents[3]
NUMBERS = range(2000)
CODE = """
import sys, tests.nodecache.remote.blocks as blocks
store = blocks.open_store(sys.argv[1])
for first in range(int(sys.argv[2]), 2000, 5):
    blocks.write(store, range(first, first + 5))
    if first % 20 == 0:
        store.sync(blocks.DEADLINE_S)
        print(first + 5, flush=True)
"""


def kill_while_it_writes(root, draw):
    """Let a process write a while; how many blocks it said are listed."""
    listed = draw.randrange(0, 1500, 20)
    until = listed + draw.randrange(1, 200)
    with subprocess.Popen(
        [sys.executable, "-c", CODE, root, str(listed)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        first, last = listed, listed
        for line in child.stdout:
            last = int(line)
            if last >= until:
                break
        child.kill()
    return range(first, last)


@pytest.mark.slow
def test_what_a_killed_process_listed_is_read_and_nothing_else_is_wrong(tmp_path):
    draw = random.Random(1)
    for _ in range(10):
        numbers = kill_while_it_writes(tmp_path, draw)
        store = open_store(tmp_path)
        assert held(store, numbers) == list(numbers)
        there = held(store, NUMBERS)
        assert read(store, there) == [True] * len(there)
        store.sync(DEADLINE_S)
        store.check_invariants()
        store.close()
        assert store.stats()["kvray_remote_damaged_manifests_total"] == 0
