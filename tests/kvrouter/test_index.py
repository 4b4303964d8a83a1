import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrouter.index import Holder, Run
from tests.kvrouter.indexes import both, compiled, plain, swept

WORKERS = ["a", "b", "c"]
TIERS = ["device", "host", "disk"]


def name(chain, position):
    return bytes([chain]) * 8 + position.to_bytes(8, "big")


def chain_names(chain, begin, end):
    return b"".join(name(chain, position) for position in range(begin, end))


def run(begin, end, *workers):
    return Run(begin, end, tuple(Holder(worker) for worker in workers))


def holders_by_walking(index, names):
    """Who holds each block of a prompt, block after block, up to the first that nobody does."""
    held = [index.holders(names[at : at + 16]) for at in range(0, len(names), 16)]
    return list(itertools.takewhile(bool, held))


@both
def test_a_prompt_is_divided_where_its_holders_change(make):
    index = make()
    index.fold("a", stored=chain_names(1, 0, 6))
    index.fold("b", stored=chain_names(1, 0, 2))
    index.fold("c", stored=chain_names(2, 0, 8))
    assert index.runs(chain_names(1, 0, 8)) == [run(0, 2, "a", "b"), run(2, 6, "a")]
    assert index.runs(chain_names(1, 0, 1)) == [run(0, 1, "a", "b")]
    assert index.runs(chain_names(3, 0, 8)) == []
    assert index.runs(b"") == []


@both
def test_who_holds_the_middle_or_the_tail_has_a_run_too(make):
    index = make()
    index.fold("a", stored=chain_names(1, 0, 4))
    index.fold("c", stored=chain_names(1, 4, 6))
    index.fold("b", stored=chain_names(1, 0, 2))
    assert index.runs(chain_names(1, 0, 8)) == [run(0, 2, "a", "b"), run(2, 4, "a"), run(4, 6, "c")]


@both
def test_what_follows_a_block_that_nobody_holds_does_not_count(make):
    index = make()
    index.fold("a", stored=chain_names(1, 0, 2) + chain_names(1, 3, 8))
    assert index.runs(chain_names(1, 0, 8))[-1].end in (2, 8)  # a hole between alike blocks may be missed
    index.fold("b", stored=chain_names(1, 3, 8))
    assert index.runs(chain_names(1, 0, 8)) == [run(0, 2, "a")]


@both
def test_each_tier_of_a_worker_is_a_holder_of_its_own(make):
    index = make()
    index.fold("cache", "host", stored=chain_names(1, 2, 4))
    index.fold("cache", "disk", stored=chain_names(1, 0, 6))
    index.fold("w", stored=chain_names(1, 0, 2))
    host, disk = Holder("cache", "host"), Holder("cache", "disk")
    assert index.runs(chain_names(1, 0, 8)) == [
        Run(0, 2, (disk, Holder("w"))),
        Run(2, 4, (host, disk)),
        Run(4, 6, (disk,)),
    ]
    index.fold("cache", "host", removed=chain_names(1, 2, 4))
    assert index.holders(name(1, 3)) == (disk,)
    assert index.num_held("cache") == 6
    assert index.num_held_by_tier("cache") == {"host": 0, "disk": 6}
    assert index.num_held_by_tier("w") == {"device": 2}
    index.drop("cache")
    assert index.num_held_by_tier("cache") == {}
    assert index.runs(chain_names(1, 0, 8)) == [run(0, 2, "w")]
    index.check_invariants()


@both
def test_dropped_worker_is_gone_from_the_next_run_on(make):
    index = make()
    index.fold("a", stored=chain_names(1, 0, 1000))
    index.fold("b", stored=chain_names(1, 0, 500))
    index.drop("a")
    assert index.runs(chain_names(1, 0, 1000)) == [run(0, 500, "b")]
    index.check_invariants()


@both
def test_column_is_not_given_to_another_before_it_is_swept(make):
    index = make()
    index.fold("a", stored=chain_names(1, 0, 5000))
    index.drop("a")
    index.fold("b", stored=chain_names(2, 0, 1))
    assert index.runs(chain_names(1, 0, 10)) == []
    index.check_invariants()
    swept(index)
    assert len(index) == 1
    index.fold("c", stored=chain_names(1, 0, 3))
    assert index.runs(chain_names(1, 0, 10)) == [run(0, 3, "c")]
    index.check_invariants()


@both
def test_snapshot_replaces_what_was_there(make):
    index = make()
    index.fold("a", stored=chain_names(1, 0, 10))
    index.drop("a")
    index.fold("a", stored=chain_names(2, 0, 3))
    assert index.runs(chain_names(1, 0, 10)) == []
    assert index.runs(chain_names(2, 0, 10)) == [run(0, 3, "a")]
    assert index.num_held("a") == 3


@both
def test_memory_stays_bounded_when_one_worker_sends_snapshot_after_snapshot(make):
    index = make()
    for turn in range(50):
        index.drop("a")
        index.fold("a", stored=chain_names(turn, 0, 1000))
        assert len(index) <= 2 * 1000
    index.check_invariants()


@both
@pytest.mark.parametrize("field", ["stored", "removed"])
def test_torn_names_are_refused_whole(make, field):
    index = make()
    with pytest.raises(ValueError, match="17"):
        index.fold("a", **{field: bytes(17)})
    assert len(index) == 0


@pytest.mark.slow
@both
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=70),
    num_names=st.integers(0, 300),
)
@settings(max_examples=200, deadline=None)
def test_galloping_agrees_with_walking(make, lengths, num_names):
    index = make()
    for i, length in enumerate(lengths):
        index.fold(f"w{i}", stored=chain_names(1, 0, length))
    prompt = chain_names(1, 0, num_names)
    runs = index.runs(prompt)
    assert [holders for run in runs for holders in [run.holders] * (run.end - run.begin)] == holders_by_walking(
        index, prompt
    )
    ends = sorted({min(length, num_names) for length in lengths} - {0})
    assert [run.end for run in runs] == ends


@pytest.mark.slow
@both
@given(held=st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=5))
def test_runs_of_gappy_holdings_follow_each_other_and_are_right_at_both_their_ends(make, held):
    index = make()
    for i, positions in enumerate(held):
        index.fold(f"w{i}", stored=b"".join(name(1, position) for position in positions))
    prompt = chain_names(1, 0, 40)
    runs = index.runs(prompt)
    assert [run.begin for run in runs] == [0, *(run.end for run in runs)][: len(runs)]
    for found in runs:
        for position in (found.begin, found.end - 1):
            assert found.holders == index.holders(name(1, position))
    end = runs[-1].end if runs else 0
    assert end == 40 or not index.holders(name(1, end))
    for before, after in itertools.pairwise(runs):
        assert before.holders != after.holders


@pytest.mark.slow
@both
def test_a_table_grows_and_shrinks_with_what_is_held(make):
    index = make()
    rng = random.Random(5)
    chains = {worker: rng.randbytes(16 * 30_000) for worker in WORKERS}
    for worker, held in chains.items():
        for at in range(0, len(held), 16 * 64):
            index.fold(worker, stored=held[at : at + 16 * 64])
    assert len(index) == 90_000
    index.check_invariants()
    for worker, held in chains.items():
        assert index.runs(held) == [run(0, 30_000, worker)]
        index.fold(worker, removed=held[16 * 100 :])
    index.check_invariants()
    assert len(index) == 300
    index.drop("b")
    swept(index)
    index.check_invariants()
    assert len(index) == 200


class IndexMachine(RuleBasedStateMachine):
    """Whatever happens, both forms of the index know what a set of names per worker and tier knows."""

    def __init__(self):
        super().__init__()
        self.indexes = [plain(), compiled()]
        self.model = {}

    @rule(
        worker=st.sampled_from(WORKERS),
        tier=st.sampled_from(TIERS),
        stored=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5))),
        removed=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5))),
    )
    def fold(self, worker, tier, stored, removed):
        held = self.model.setdefault(Holder(worker, tier), set())
        stored, removed = {name(*at) for at in stored}, {name(*at) for at in removed}
        held |= stored
        held -= removed
        for index in self.indexes:
            index.fold(worker, tier, stored=b"".join(stored), removed=b"".join(removed))

    @rule(worker=st.sampled_from(WORKERS))
    def drop(self, worker):
        for tier in TIERS:
            self.model.pop(Holder(worker, tier), None)
        for index in self.indexes:
            index.drop(worker)

    @rule()
    def sweep_and_count(self):
        for index in self.indexes:
            swept(index)
            assert len(index) == len(set().union(*self.model.values()))

    @invariant()
    def agrees(self):
        for index in self.indexes:
            index.check_invariants()
            for worker in WORKERS:
                held = [len(self.model.get(Holder(worker, tier), ())) for tier in TIERS]
                assert index.num_held(worker) == sum(held)
            for chain in range(3):
                first = name(chain, 0)
                expected = {holder for holder, held in self.model.items() if first in held}
                assert set(index.holders(first)) == expected
                assert [set(found.holders) for found in index.runs(first)] == ([expected] if expected else [])


TestIndexMachine = pytest.mark.slow(IndexMachine.TestCase)
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@both
def test_no_more_runs_are_looked_for_than_wanted(make):
    index = make()
    for position in range(40):
        index.fold("a" if position % 2 else "b", stored=chain_names(1, position, position + 1))
    assert index.match(chain_names(1, 0, 40), 3).ends.tolist() == [1, 2, 3]


@both
def test_runs_as_arrays_say_what_runs_do(make):
    index = make()
    for number in range(20):
        index.fold(f"w{number}", "disk" if number % 3 else "device", stored=chain_names(1, 0, 2 * number))
    index.drop("w3")
    matches, runs = index.match(chain_names(1, 0, 50), 100), index.runs(chain_names(1, 0, 50))
    assert matches.ends.tolist() == [run.end for run in runs]
    for is_held, run in zip(matches.is_held, runs, strict=True):
        assert tuple(matches.holders[column] for column in is_held.nonzero()[0]) == run.holders
    assert index.match(chain_names(2, 0, 5), 100).ends.size == 0
    assert make().match(chain_names(1, 0, 5), 100).ends.size == 0
