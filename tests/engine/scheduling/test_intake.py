"""Blocks taken in because somebody says that they are worth having: asked for, pulled, named, or given back."""

from __future__ import annotations

import pytest

from engine.scheduling.intake import Intakes
from engine.scheduling.plan import AskBlocks, BlocksOffered, Instruction, PullBlocks, PullEnded, TakeIn
from kvcache.locations import BlockLocation, pack_locations
from kvcache.pool import BlockPool, BlockState
from tests.locations import pairs_of

NAMES = tuple(bytes([number]) * 16 for number in range(9))


class Bench:
    """Eight blocks of four tokens, and what is to be done."""

    def __init__(self) -> None:
        self.pool = BlockPool(8, 4)
        self.intakes = Intakes(self.pool, {})
        self.used: list[int] = []

    def use(self, num_blocks: int) -> None:
        """Somebody else writes there."""
        self.used += self.pool.allocate(num_blocks)

    def hold(self, names: tuple[bytes, ...], used_s: float, *, is_spare: bool = False) -> None:
        """Blocks that were last used then."""
        block_ids = self.pool.allocate(len(names))
        for block_id, name in zip(block_ids, names, strict=True):
            self.pool.commit(block_id, name)
        self.pool.now_s = used_s
        self.pool.unpin(block_ids)
        self.pool.mark(names, is_spare=is_spare)

    def begin(self, names: tuple[bytes, ...], used_s: float | None = 5.0, intake_id: str = "i") -> list[Instruction]:
        out: list[Instruction] = []
        self.intakes.begin(TakeIn(intake_id, "source", names, used_s), out)
        self.check()
        return out

    def offer(self, *locations: BlockLocation, is_last: bool = True, intake_id: str = "i") -> list[Instruction]:
        out: list[Instruction] = []
        self.intakes.take_blocks(BlocksOffered(intake_id, "source", pack_locations(locations), is_last), out)
        self.check()
        return out

    def finish(self, *bad: int, quarantine_until_s: float | None = None, intake_id: str = "i") -> list[Instruction]:
        out: list[Instruction] = []
        self.intakes.finish_pull(PullEnded(intake_id, frozenset(bad), quarantine_until_s), out)
        self.check()
        return out

    def check(self) -> None:
        self.pool.check_invariants()
        assert sorted([*self.intakes.targets(), *self.used]) == [b for b in range(8) if self.pool.num_pins(b)]


@pytest.fixture
def bench():
    return Bench()


def at(index: int, name: bytes | None = None, num_tokens: int = 4) -> BlockLocation:
    return BlockLocation(index, 90 + index, 5, NAMES[index] if name is None else name, num_tokens)


def test_what_is_taken_in_stays_whose_it_was(bench):
    bench.begin(NAMES[:2])
    bench.offer(at(0), BlockLocation(1, 91, 5, NAMES[1], 4, tenant=7))
    bench.finish()
    assert [bench.pool.tenant(bench.pool.find(name)) for name in NAMES[:2]] == [0, 7]


def pulled(out: list[Instruction]) -> list[int]:
    (pull,) = out
    assert isinstance(pull, PullBlocks)
    return [location.index for location, _ in pairs_of(pull)]


def test_what_is_wanted_is_asked_for_pulled_and_named(bench):
    assert bench.begin(NAMES[:3]) == [AskBlocks("i", "source", 0, NAMES[:3], is_tail_first=False)]
    assert (bench.intakes.ids(), bench.intakes.num_coming("i"), bench.pool.num_used) == (("i",), 3, 3)
    (pull,) = bench.offer(at(0), at(1), at(2))
    assert pull == PullBlocks("i", "source", pack_locations([at(0), at(1), at(2)]), tuple(bench.intakes.targets()))
    assert bench.finish() == []
    assert set(bench.pool.snapshot()) == set(NAMES[:3])
    assert (bench.intakes.ids(), bench.intakes.num_blocks, bench.pool.num_used) == ((), 3, 0)


def test_what_came_is_evicted_as_it_was_named_tails_before_heads(bench):
    bench.begin(NAMES[:3])
    bench.offer(at(0), at(1), at(2))
    bench.finish()
    bench.pool.unpin(bench.pool.allocate(7))
    assert bench.pool.snapshot() == [NAMES[2]]


def test_what_is_here_or_on_its_way_is_not_asked_for(bench):
    bench.hold(NAMES[:1], used_s=1.0)
    bench.begin(NAMES[1:3])
    assert bench.begin(NAMES[:4], intake_id="j") == [AskBlocks("j", "source", 0, NAMES[3:4], is_tail_first=False)]
    assert bench.begin(NAMES[:4], intake_id="k") == []
    assert bench.begin(NAMES[4:5], intake_id="i") == []


def test_only_what_is_worth_less_makes_room(bench):
    bench.hold(NAMES[:3], used_s=6.0)
    bench.hold(NAMES[3:4], used_s=6.5, is_spare=True)
    bench.pool.now_s = 9.0
    bench.use(3)
    (asked,) = bench.begin(NAMES[4:], used_s=6.0)  # one block is free, one spare
    assert asked.names == NAMES[7:]  # the head
    assert set(bench.pool.snapshot()) == set(NAMES[:3])


def test_what_was_used_longer_ago_makes_room(bench):
    bench.hold(NAMES[:2], used_s=1.0)
    bench.hold(NAMES[2:3], used_s=9.0)
    bench.use(5)
    (asked,) = bench.begin(NAMES[4:8], used_s=5.0)
    assert asked.names == NAMES[6:8]
    assert bench.pool.snapshot() == [NAMES[2]]


def test_what_is_wanted_now_is_the_last_to_go_and_makes_no_room_for_what_follows_it(bench):
    bench.hold(NAMES[6:], used_s=1.0)
    for names, now_s in ((NAMES[2:4], 8.0), (NAMES[:2], 8.5)):  # the head, then its tail
        bench.pool.now_s = now_s
        bench.begin(names, used_s=None)
        bench.offer(*(at(index, name) for index, name in enumerate(names)))
        bench.finish()
    bench.hold(NAMES[5:6], used_s=9.0)
    gone = []
    while held := set(bench.pool.snapshot()):
        bench.use(1)
        gone += held.difference(bench.pool.snapshot())
    assert gone[-5:] == [NAMES[2], NAMES[3], NAMES[0], NAMES[1], NAMES[5]]


def test_where_there_is_no_room_nothing_is_asked(bench):
    bench.use(8)
    assert bench.begin(NAMES[:2]) == []
    assert bench.intakes.ids() == ()


def test_so_much_is_taken_in_at_a_time(bench, monkeypatch):
    monkeypatch.setattr("engine.scheduling.intake._MAX_BLOCKS", 3)
    (first,) = bench.begin(NAMES[:2])
    (second,) = bench.begin(NAMES[2:5], intake_id="j")
    assert (first.names, second.names) == (NAMES[:2], NAMES[4:5])
    assert bench.begin(NAMES[5:], intake_id="k") == []


def test_what_the_source_has_no_more_is_not_taken_in(bench):
    bench.begin(NAMES[:3])
    assert pulled(bench.offer(at(1))) == [1]
    assert bench.finish() == []
    assert bench.pool.snapshot() == [NAMES[1]]
    bench.begin(NAMES[3:5])
    assert bench.offer() == []  # it has nothing, or was lost
    assert (bench.intakes.ids(), bench.pool.num_used, bench.pool.num_free) == ((), 0, 8)


@pytest.mark.parametrize("wrong", [at(0, name=NAMES[7]), at(0, num_tokens=3), at(8)])
def test_what_is_not_what_was_asked_for_is_left(bench, wrong):
    bench.begin(NAMES[:2])
    assert pulled(bench.offer(wrong, at(1))) == [1]


def test_what_is_offered_while_a_pull_runs_waits_for_its_turn(bench):
    bench.begin(NAMES[:3])
    assert pulled(bench.offer(at(2), is_last=False)) == [2]
    assert bench.offer(at(0), at(2), is_last=False) == []
    assert pulled(bench.finish()) == [0]
    assert bench.finish() == []
    assert bench.intakes.ids() == ("i",)  # more may come
    assert bench.offer() == []
    assert set(bench.pool.snapshot()) == {NAMES[0], NAMES[2]}
    assert bench.intakes.find("i") is None


def test_a_source_that_is_lost_under_a_pull_leaves_what_comes_of_it(bench):
    bench.begin(NAMES[:3])
    bench.offer(at(0), at(1), is_last=False)
    assert bench.offer() == []
    assert bench.finish(1) == []
    assert bench.pool.snapshot() == [NAMES[0]]
    assert bench.intakes.ids() == ()


def test_what_came_badly_is_given_back_and_may_not_be_used_while_late_bytes_land(bench):
    bench.begin(NAMES[:3])
    first, *_ = bench.intakes.targets()
    bench.offer(at(0), at(1), is_last=False)
    bench.offer(at(0), is_last=True)  # again: too late
    assert bench.finish(0, quarantine_until_s=20.0) == []
    assert bench.pool.state(first) is BlockState.QUARANTINED
    assert bench.pool.snapshot() == [NAMES[1]]
    assert (bench.pool.num_used, bench.intakes.num_blocks) == (0, 1)


def test_what_another_named_meanwhile_is_there_once(bench):
    bench.begin(NAMES[:1])
    bench.offer(at(0))
    bench.hold(NAMES[:1], used_s=6.0)
    assert bench.finish() == []
    assert (bench.intakes.num_blocks, bench.pool.num_used, bench.pool.num_evictable) == (0, 0, 1)
