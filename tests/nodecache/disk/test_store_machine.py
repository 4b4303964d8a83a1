"""Any order of calls and restarts: never wrong bytes, never more than the capacity, every loss is told."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.nodecache.disk.blocks import (
    DEADLINE_S,
    block_of,
    capacity_of,
    folder,
    name_of,
    open_store,
    read,
    used_bytes,
    write,
)

NUMBERS = range(60)


class DiskStoreMachine(RuleBasedStateMachine):
    """`held`: numbers of blocks that the store may hold, as far as it has told."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.held: set[int] = set()
        self.removed: set[int] = set()  # and never written again
        self.number_of = {name_of(number): number for number in NUMBERS}

    @initialize(num_segments=st.integers(4, 8), has_values=st.booleans())
    def open(self, num_segments, has_values):
        self.num_segments = num_segments
        self.keep_value = (lambda name: float(self.number_of[name] % 5)) if has_values else None
        self.store = open_store(self.root, num_segments, keep_value=self.keep_value)

    def present(self) -> set[int]:
        return {self.number_of[name] for name in self.store.names()}

    @rule(first=st.sampled_from(NUMBERS), length=st.integers(1, 12))
    def write(self, first, length):
        chain = [number for number in range(first, first + length) if number in NUMBERS]
        missing = self.held - self.present()
        dropped = {self.number_of[name] for name in write(self.store, chain)}
        assert missing <= dropped | set(chain)
        self.held = (self.held | set(chain)) - dropped
        self.removed -= set(chain)

    @rule(numbers=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=12, unique=True))
    def read(self, numbers):
        before = self.present()
        for number, is_whole in zip(numbers, read(self.store, numbers), strict=True):
            assert not is_whole or number in self.held
            assert is_whole or number not in before or number not in self.present()

    @rule(numbers=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=6))
    def remove(self, numbers):
        self.store.remove([name_of(number) for number in numbers])
        self.held -= set(numbers)
        self.removed |= set(numbers)
        assert not self.present() & set(numbers)

    @rule()
    def sync(self):
        self.store.sync(DEADLINE_S)

    @rule()
    def collect(self):
        before = self.present()
        assert self.store.collect(DEADLINE_S).num_bytes >= 0
        assert self.present() <= before

    @rule(is_checkpoint_kept=st.booleans(), num_segments=st.integers(4, 8))
    def restart(self, is_checkpoint_kept, num_segments):
        before = self.present()
        self.store.close()
        if not is_checkpoint_kept:
            (folder(self.root) / "checkpoint").unlink(missing_ok=True)
        self.num_segments = max(num_segments, self.num_segments)
        self.store = open_store(self.root, self.num_segments, keep_value=self.keep_value)
        after = self.present()
        assert before <= after
        assert not after & self.removed
        assert self.store.unusable == []
        self.held = after

    @invariant()
    def books_agree(self):
        if not hasattr(self, "store"):
            return
        self.store.check_invariants()
        present = self.present()
        assert present <= self.held
        for number in present:
            assert self.store.find(name_of(number)) in (block_of(number), None)
        assert used_bytes(self.root) <= capacity_of(self.num_segments)
        assert self.store.stats()["kvray_disk_damaged_blocks_total"] == 0

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
        self.directory.cleanup()


class TestDiskStore(DiskStoreMachine.TestCase):
    settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


@pytest.mark.slow
class TestDiskStoreMore(DiskStoreMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
