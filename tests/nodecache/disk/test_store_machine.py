"""Any order of calls and restarts: never wrong bytes, never more than the capacity, every loss is told."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nodecache.quotas import Accounts
from nodecache.store import StoredBlock
from tests.nodecache.disk.blocks import (
    DEADLINE_S,
    block_of,
    capacity_of,
    content_of,
    folder,
    name_of,
    open_store,
    read,
    used_bytes,
)

NUMBERS = range(60)
MINE = 1  #: a tenant that may have a quota; blocks are by turns those of nobody, of it and of another
quotas = st.none() | st.integers(0, 20)


def owned(number: int) -> StoredBlock:
    return block_of(number)._replace(tenant=number % 3)


class DiskStoreMachine(RuleBasedStateMachine):
    """`held`: numbers of blocks that the store may hold, as far as it has told."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.held: set[int] = set()
        self.removed: set[int] = set()  # and never written again
        self.number_of = {name_of(number): number for number in NUMBERS}

    @initialize(num_segments=st.integers(4, 8), has_values=st.booleans(), quota=quotas)
    def open(self, num_segments, has_values, quota):
        self.num_segments = num_segments
        self.keep_value = (lambda name: float(self.number_of[name] % 5)) if has_values else None
        self.open_with(quota)

    def open_with(self, quota):
        self.quota = quota
        accounts = Accounts({MINE: quota, 2: None})
        self.store = open_store(self.root, self.num_segments, keep_value=self.keep_value, accounts=accounts)

    def present(self) -> set[int]:
        return {self.number_of[name] for name in self.store.names()}

    @rule(first=st.sampled_from(NUMBERS), length=st.integers(1, 12))
    def write(self, first, length):
        chain = [number for number in range(first, first + length) if number in NUMBERS]
        missing = self.held - self.present()
        blocks, sources = [owned(number) for number in chain], [content_of(number) for number in chain]
        dropped = {self.number_of[name] for name in self.store.write(blocks, sources, DEADLINE_S)}
        assert missing <= dropped | set(chain)
        left_out = set(chain) - self.present() - dropped
        assert all(number % 3 == MINE for number in left_out - self.held)
        self.held = (self.held | set(chain)) - dropped - left_out
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

    @rule(is_checkpoint_kept=st.booleans(), num_segments=st.integers(4, 8), quota=quotas)
    def restart(self, is_checkpoint_kept, num_segments, quota):
        before = self.present()
        self.store.close()
        if not is_checkpoint_kept:
            (folder(self.root) / "checkpoint").unlink(missing_ok=True)
        self.num_segments = max(num_segments, self.num_segments)
        self.open_with(quota)
        after = self.present()
        assert {number for number in before if number % 3 != MINE} <= after
        assert quota is not None or before <= after
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
            assert self.store.find(name_of(number)) in (owned(number), None)
        if self.quota is not None:
            assert sum(number % 3 == MINE for number in present) <= self.quota
        assert used_bytes(self.root) <= capacity_of(self.num_segments)
        assert self.store.stats()["kvray_disk_damaged_blocks_total"] == 0

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
        self.directory.cleanup()


@pytest.mark.slow
class TestDiskStore(DiskStoreMachine.TestCase):
    settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


@pytest.mark.long
class TestDiskStoreMore(DiskStoreMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
