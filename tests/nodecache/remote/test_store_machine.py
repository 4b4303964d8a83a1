"""Two stores of one directory, any order of calls, restarts and damage: never wrong bytes, in the end both agree.

They write plain or encoded, by chance, and read what either wrote.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nodecache.codec import PLAIN, lossless_codec
from nodecache.remote import manifests
from tests.nodecache.remote.blocks import (
    DEADLINE_S,
    block_of,
    held,
    manifest_files,
    name_of,
    object_files,
    open_store,
    read,
    write,
)

NUMBERS = range(30)
BFLOAT16 = lossless_codec(2)
STORES = st.integers(0, 1)


class RemoteStoreMachine(RuleBasedStateMachine):
    """`expected`: numbers of blocks, while nothing was damaged and every change is told at once; then None."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.patched = pytest.MonkeyPatch()
        for name, value in (("MIN_MERGED", 3), ("MAX_MERGED", 4)):
            self.patched.setattr(manifests, name, value)
        self.stores = [open_store(self.root, codec=codec) for codec in (PLAIN, BFLOAT16)]
        self.are_manifests_whole = True

    @initialize(is_calm=st.booleans())
    def begin(self, is_calm):
        self.is_calm = is_calm
        self.expected = set()

    def settle(self):
        for store in (*self.stores, self.stores[0]):
            store.sync(DEADLINE_S)

    def after_change(self):
        if self.is_calm:
            self.settle()

    @rule(store=STORES, first=st.sampled_from(NUMBERS), length=st.integers(1, 8))
    def write(self, store, first, length):
        chain = [number for number in range(first, first + length) if number in NUMBERS]
        write(self.stores[store], chain)
        self.expected |= set(chain)
        self.after_change()

    @rule(store=STORES, numbers=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=8))
    def remove(self, store, numbers):
        self.stores[store].remove([name_of(number) for number in numbers])
        self.expected -= set(numbers)
        assert held(self.stores[store], numbers) == []
        self.after_change()

    @rule(store=STORES, numbers=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=12))
    def read(self, store, numbers):
        before = held(self.stores[store], numbers)
        came = read(self.stores[store], numbers)
        for number, is_whole in zip(numbers, came, strict=True):
            assert not is_whole or number in before
            assert is_whole or held(self.stores[store], [number]) == []
        self.after_change()

    @rule(store=STORES)
    def sync(self, store):
        self.stores[store].sync(DEADLINE_S)

    @rule(store=STORES, codec=st.sampled_from([PLAIN, BFLOAT16]))
    def restart(self, store, codec):
        self.stores[store].close()
        self.stores[store] = open_store(self.root, codec=codec)

    @rule(store=STORES)
    def both_agree_in_the_end(self, store):
        self.settle()
        if self.are_manifests_whole:
            assert held(self.stores[0], NUMBERS) == held(self.stores[1], NUMBERS)
            self.restart(store, PLAIN)
            assert held(self.stores[0], NUMBERS) == held(self.stores[1], NUMBERS)

    @rule(
        seed=st.integers(0, 1 << 32),
        what=st.sampled_from(["flip", "cut", "lose", "replace"]),
        is_manifest=st.booleans(),
    )
    def damage(self, seed, what, is_manifest):
        paths = manifest_files(self.root) if is_manifest else object_files(self.root)
        if not paths:
            return
        draw = random.Random(seed)
        path, other = draw.choice(paths), draw.choice(paths)
        data = bytearray(path.read_bytes())
        match what:
            case "flip" if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
            case "cut":
                path.write_bytes(data[: draw.randrange(len(data) + 1)])
            case "lose":
                path.unlink()
            case "replace" if other != path:
                shutil.copy(other, path)
        self.expected = set()
        self.is_calm = False
        self.are_manifests_whole &= not is_manifest

    @invariant()
    def books_agree(self):
        for store in self.stores:
            store.check_invariants()
            for number in held(store, NUMBERS):
                assert store.find(name_of(number)) == block_of(number)
        if hasattr(self, "expected") and self.is_calm:
            assert all(set(held(store, NUMBERS)) == self.expected for store in self.stores)

    def teardown(self):
        for store in self.stores:
            store.close()
        self.patched.undo()
        self.directory.cleanup()


@pytest.mark.slow
class TestRemoteStore(RemoteStoreMachine.TestCase):
    settings = settings(max_examples=10, stateful_step_count=20, deadline=None)


@pytest.mark.long
class TestRemoteStoreMore(RemoteStoreMachine.TestCase):
    settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
