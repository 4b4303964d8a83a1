"""A process that writes, reads, removes and collects until it is killed, and says what it does: `... ROOT SEED`.

Blocks below NUM_WORTHY are worth keeping, and are so few that all of them fit: they may not get lost.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from nodecache.disk.store import DiskStore
from tests.nodecache.disk.blocks import DEADLINE_S, name_of, open_store, read, write

NUM_WORTHY = 12
NUM_BLOCKS = 300
NUM_SEGMENTS = 12

_WORTHY = {name_of(number) for number in range(NUM_WORTHY)}


def open_loaded(root: Path) -> DiskStore:
    return open_store(root, NUM_SEGMENTS, keep_value=lambda name: float(name in _WORTHY))


def say(what: str, numbers: list[int]) -> None:
    print(what, *numbers, flush=True)


def main() -> None:
    rng = random.Random(int(sys.argv[2]))
    store = open_loaded(Path(sys.argv[1]))
    say("open", [])
    while True:
        match rng.randrange(10):
            case 0:
                numbers = rng.sample(range(NUM_WORTHY), 3)
                say("writing", numbers)
                write(store, numbers)
                say("written", numbers)
            case 1:
                numbers = rng.sample(range(NUM_WORTHY), 1)
                say("removing", numbers)
                store.remove([name_of(number) for number in numbers])
                say("removed", numbers)
            case 2:
                say("syncing", [])
                store.sync(DEADLINE_S)
                say("synced", [])
            case 3 | 4:
                read(store, rng.sample(range(NUM_BLOCKS), 8))
            case _:
                first = rng.randrange(NUM_WORTHY, NUM_BLOCKS)
                write(store, range(first, first + rng.randrange(1, 6)))
                say("wrote", [])


if __name__ == "__main__":
    main()
