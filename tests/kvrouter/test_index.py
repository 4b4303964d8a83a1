import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrouter.index import BlockIndex, Holder, Run

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


def test_a_prompt_is_divided_where_its_holders_change():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 6))
    index.fold("b", stored=chain_names(1, 0, 2))
    index.fold("c", stored=chain_names(2, 0, 8))
    assert index.runs(chain_names(1, 0, 8)) == [run(0, 2, "a", "b"), run(2, 6, "a")]
    assert index.runs(chain_names(1, 0, 1)) == [run(0, 1, "a", "b")]
    assert index.runs(chain_names(3, 0, 8)) == []
    assert index.runs(b"") == []


def test_who_holds_the_middle_or_the_tail_has_a_run_too():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 4))
    index.fold("c", stored=chain_names(1, 4, 6))
    index.fold("b", stored=chain_names(1, 0, 2))
    assert index.runs(chain_names(1, 0, 8)) == [run(0, 2, "a", "b"), run(2, 4, "a"), run(4, 6, "c")]


def test_what_follows_a_block_that_nobody_holds_does_not_count():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 2) + chain_names(1, 3, 8))
    assert index.runs(chain_names(1, 0, 8))[-1].end in (2, 8)  # a hole between alike blocks may be missed
    index.fold("b", stored=chain_names(1, 3, 8))
    assert index.runs(chain_names(1, 0, 8)) == [run(0, 2, "a")]


def test_each_tier_of_a_worker_is_a_holder_of_its_own():
    index = BlockIndex()
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
    index.drop("cache")
    assert index.runs(chain_names(1, 0, 8)) == [run(0, 2, "w")]
    index.check_invariants()


def test_a_change_names_what_others_hold_too():
    index = BlockIndex()
    assert index.fold("a", stored=chain_names(1, 0, 6)) == []
    assert index.fold("b", stored=chain_names(1, 4, 8)) == [name(1, 4), name(1, 5)]
    assert index.fold("a", "disk", stored=name(1, 0)) == [name(1, 0)]
    assert index.fold("b", removed=chain_names(1, 5, 8)) == [name(1, 5)]
    assert index.fold("b", removed=chain_names(1, 5, 8)) == []
    assert index.drop("b") == [name(1, 4)]
    assert index.drop("b") == index.drop("a") == []
    assert index.fold("c", stored=chain_names(1, 0, 8)) == []  # a's blocks, not swept yet, are nobody's


def test_dropped_worker_is_gone_from_the_next_run_on():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 1000))
    index.fold("b", stored=chain_names(1, 0, 500))
    index.drop("a")
    assert index.runs(chain_names(1, 0, 1000)) == [run(0, 500, "b")]
    index.check_invariants()


def test_column_is_not_given_to_another_before_it_is_swept():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 5000))
    index.drop("a")
    index.fold("b", stored=chain_names(2, 0, 1))
    assert index.runs(chain_names(1, 0, 10)) == []
    index.check_invariants()
    index.sweep(10_000)
    assert len(index) == 1
    index.fold("c", stored=chain_names(1, 0, 3))
    assert index.runs(chain_names(1, 0, 10)) == [run(0, 3, "c")]
    index.check_invariants()


def test_snapshot_replaces_what_was_there():
    index = BlockIndex()
    index.fold("a", stored=chain_names(1, 0, 10))
    index.drop("a")
    index.fold("a", stored=chain_names(2, 0, 3))
    assert index.runs(chain_names(1, 0, 10)) == []
    assert index.runs(chain_names(2, 0, 10)) == [run(0, 3, "a")]
    assert index.num_held("a") == 3


def test_memory_stays_bounded_when_one_worker_sends_snapshot_after_snapshot():
    index = BlockIndex()
    for turn in range(50):
        index.drop("a")
        index.fold("a", stored=chain_names(turn, 0, 1000))
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
    prompt = chain_names(1, 0, num_names)
    runs = index.runs(prompt)
    assert [holders for run in runs for holders in [run.holders] * (run.end - run.begin)] == holders_by_walking(
        index, prompt
    )
    ends = sorted({min(length, num_names) for length in lengths} - {0})
    assert [run.end for run in runs] == ends


@given(held=st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=5))
def test_runs_of_gappy_holdings_follow_each_other_and_are_right_at_both_their_ends(held):
    index = BlockIndex()
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
    assert len(index.runs(chain_names(1, 0, 8192))) == 3
    assert Counting.num_gets < 150


class IndexAgainstSets(RuleBasedStateMachine):
    """Whatever happens, the index knows what a set of names per worker and tier knows."""

    def __init__(self):
        super().__init__()
        self.index = BlockIndex()
        self.model = {}

    def others(self, holder, names):
        """Those of `names` that others than `holder` hold."""
        return [name for name in names if any(name in held for other, held in self.model.items() if other != holder)]

    @rule(
        worker=st.sampled_from(WORKERS),
        tier=st.sampled_from(TIERS),
        stored=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5))),
        removed=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5))),
    )
    def fold(self, worker, tier, stored, removed):
        holder = Holder(worker, tier)
        held = self.model.setdefault(holder, set())
        stored, removed = {name(*at) for at in stored}, {name(*at) for at in removed}
        is_changed = (held | stored) & removed | (stored - held)
        held |= stored
        held -= removed
        shared = self.index.fold(worker, tier, stored=b"".join(stored), removed=b"".join(removed))
        assert set(self.others(holder, is_changed)) <= set(shared)

    @rule(worker=st.sampled_from(WORKERS))
    def drop(self, worker):
        gone = [self.model.pop(Holder(worker, tier), set()) for tier in TIERS]
        assert set(self.index.drop(worker)) == set(self.others(None, set().union(*gone)))

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
            held = [len(self.model.get(Holder(worker, tier), ())) for tier in TIERS]
            assert self.index.num_held(worker) == sum(held)
        for chain in range(3):
            first = name(chain, 0)
            expected = {holder for holder, held in self.model.items() if first in held}
            assert set(self.index.holders(first)) == expected
            assert [set(found.holders) for found in self.index.runs(first)] == ([expected] if expected else [])


TestIndexAgainstSets = IndexAgainstSets.TestCase
TestIndexAgainstSets.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_no_more_runs_are_looked_for_than_wanted():
    index = BlockIndex()
    for position in range(40):
        index.fold("a" if position % 2 else "b", stored=chain_names(1, position, position + 1))
    assert index.match(chain_names(1, 0, 40), 3).ends.tolist() == [1, 2, 3]


def test_runs_as_arrays_say_what_runs_do():
    index = BlockIndex()
    for number in range(20):
        index.fold(f"w{number}", "disk" if number % 3 else "device", stored=chain_names(1, 0, 2 * number))
    index.drop("w3")
    matches, runs = index.match(chain_names(1, 0, 50), 100), index.runs(chain_names(1, 0, 50))
    assert matches.ends.tolist() == [run.end for run in runs]
    for is_held, run in zip(matches.is_held, runs, strict=True):
        assert tuple(matches.holders[column] for column in is_held.nonzero()[0]) == run.holders
    assert index.match(chain_names(2, 0, 5), 100).ends.size == 0
    assert BlockIndex().match(chain_names(1, 0, 5), 100).ends.size == 0
