import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrouter.index import BlockIndex

WORKERS = ["a", "b", "c"]


def name(chain, position):
    return bytes([chain]) * 8 + position.to_bytes(8, "big")


def chain_names(chain, begin, end):
    return b"".join(name(chain, position) for position in range(begin, end))


def test_match_gives_every_worker_its_own_length():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 6))
    index.fold("b", stored=chain_names(1, 0, 2))
    index.fold("c", stored=chain_names(2, 0, 8))
    assert index.match(chain_names(1, 0, 8)) == {"a": 6, "b": 2}
    assert index.match(chain_names(1, 0, 1)) == {"a": 1, "b": 1}
    assert index.match(chain_names(3, 0, 8)) == {}
    assert index.match(b"") == {}


def test_dropped_worker_is_gone_from_the_next_match_on():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 1000))
    index.fold("b", stored=chain_names(1, 0, 500))
    index.drop("a")
    assert index.match(chain_names(1, 0, 1000)) == {"b": 500}
    index.check_invariants()


def test_column_is_not_given_to_another_before_it_is_swept():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 5000))
    index.drop("a")
    index.fold("b", stored=chain_names(2, 0, 1))
    assert index.match(chain_names(1, 0, 10)) == {}
    index.check_invariants()
    index.sweep(10_000)
    assert len(index) == 1
    index.fold("c", stored=chain_names(1, 0, 3))
    assert index.match(chain_names(1, 0, 10)) == {"c": 3}
    index.check_invariants()


def test_snapshot_replaces_what_was_there():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 10))
    index.fold("a", cleared=True, stored=chain_names(2, 0, 3))
    assert index.match(chain_names(1, 0, 10)) == {}
    assert index.match(chain_names(2, 0, 10)) == {"a": 3}
    assert index.num_held("a") == 3


def test_memory_stays_bounded_when_one_worker_sends_snapshot_after_snapshot():
    index = BlockIndex()
    for turn in range(50):
        index.fold("a", cleared=True, stored=chain_names(turn, 0, 1000))
        assert len(index) <= 2 * 1000
    index.check_invariants()


@pytest.mark.parametrize("field", ["stored", "removed"])
def test_torn_names_are_refused_whole(field):
    index = BlockIndex()
    with pytest.raises(ValueError, match="17"):
        index.fold("a", **{field: bytes(17)})
    assert len(index) == 0


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=70),
    num_names=st.integers(0, 300),
)
@settings(max_examples=200, deadline=None)
def test_galloping_agrees_with_walking(lengths, num_names):
    index = BlockIndex()
    for i, length in enumerate(lengths):
        index.fold(f"w{i}", stored=chain_names(1, 0, length))
    expected = {f"w{i}": min(length, num_names) for i, length in enumerate(lengths) if min(length, num_names)}
    assert index.match(chain_names(1, 0, num_names)) == expected


@given(held=st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=5))
def test_match_of_gappy_holdings_ends_where_a_run_ends(held):
    index = BlockIndex()
    for i, positions in enumerate(held):
        index.fold(f"w{i}", stored=b"".join(name(1, position) for position in positions))
    matches = index.match(chain_names(1, 0, 40))
    for i, positions in enumerate(held):
        end = matches.get(f"w{i}", 0)
        assert end == 0 or end - 1 in positions
        assert end == 40 or end not in positions
        assert (end > 0) == (0 in positions)


def test_few_probes_suffice_for_a_long_prompt():
    class Counting(dict):
        num_gets = 0

        def get(self, key, default=None):
            Counting.num_gets += 1
            return super().get(key, default)

    index = BlockIndex()
    index._holders = Counting()
    rng = random.Random(5)
    for worker in range(64):
        index.fold(f"w{worker}", stored=chain_names(1, 0, rng.choice([0, 100, 4000, 8192])))
    Counting.num_gets = 0
    index.match(chain_names(1, 0, 8192))
    assert Counting.num_gets < 150


class IndexAgainstSets(RuleBasedStateMachine):
    """Whatever happens, the index knows what a set of names per worker knows."""

    def __init__(self):
        super().__init__()
        self.index = BlockIndex()
        self.model = {}

    @rule(
        worker=st.sampled_from(WORKERS),
        cleared=st.booleans(),
        stored=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5))),
        removed=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5))),
    )
    def fold(self, worker, cleared, stored, removed):
        held = self.model.setdefault(worker, set())
        if cleared:
            held.clear()
        held |= {name(*at) for at in stored}
        held -= {name(*at) for at in removed}
        self.index.fold(
            worker,
            cleared=cleared,
            stored=b"".join(name(*at) for at in stored),
            removed=b"".join(name(*at) for at in removed),
        )

    @rule(worker=st.sampled_from(WORKERS))
    def drop(self, worker):
        self.model.pop(worker, None)
        self.index.drop(worker)

    @rule(max_names=st.integers(0, 4))
    def sweep(self, max_names):
        self.index.sweep(max_names)

    @rule()
    def sweep_all_and_count(self):
        self.index.sweep(10**6)
        assert len(self.index) == len(set().union(*self.model.values()))

    @invariant()
    def agrees(self):
        self.index.check_invariants()
        for worker in WORKERS:
            assert self.index.num_held(worker) == len(self.model.get(worker, ()))
        for chain in range(3):
            first = name(chain, 0)
            assert self.index.match(first) == {worker: 1 for worker, held in self.model.items() if first in held}


TestIndexAgainstSets = IndexAgainstSets.TestCase
TestIndexAgainstSets.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
