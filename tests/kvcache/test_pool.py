from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.pool import BlockPool, BlockState
from messages.errors import CapacityError, InvariantError


def name_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    """Four blocks of 16 tokens; its books are checked when the test is over."""
    pool = BlockPool(4, 16)
    yield pool
    pool.check_invariants()


def commit_chain(pool: BlockPool, first: int, length: int) -> list[int]:
    """Blocks named `first`, `first + 1`, ..., pinned."""
    block_ids = pool.allocate(length)
    for number, block_id in enumerate(block_ids, first):
        assert pool.commit(block_id, name_of(number))
    return block_ids


def test_a_new_pool_is_free(pool: BlockPool) -> None:
    assert (pool.num_free, pool.num_used, len(pool.snapshot())) == (4, 0, 0)
    assert pool.take_events() == ([], [])


def test_the_generation_changes_at_every_reuse_and_only_then(pool: BlockPool) -> None:
    [block_id] = pool.allocate(1)
    generation = pool.generation(block_id)
    pool.commit(block_id, name_of(1))
    pool.unpin([block_id])
    pool.pin([block_id])
    assert pool.generation(block_id) == generation
    pool.unpin([block_id])
    assert block_id in pool.allocate(4)
    assert pool.generation(block_id) == generation + 1


def test_generations_are_written_through_to_shared_memory() -> None:
    memory = bytearray(4096)
    view = memoryview(memory)[: 4 * 8].cast("Q")
    pool = BlockPool(4, 16, view)
    block_ids = pool.allocate(4)
    assert [pool.generation(block_id) for block_id in range(4)] == list(view)
    assert int.from_bytes(memory[8 * block_ids[0] :][:8], "little") == pool.generation(block_ids[0])
    view.release()


def test_two_lives_of_a_worker_share_no_generation() -> None:
    pools = [BlockPool(4, 16) for _ in range(2)]
    assert abs(pools[0].generation(0) - pools[1].generation(0)) > 1000


def test_generations_continue_from_where_the_caller_says() -> None:
    assert BlockPool(1, 16, first_generation=41).allocate(1) == [0]
    pool = BlockPool(1, 16, first_generation=41)
    pool.allocate(1)
    assert pool.generation(0) == 42


def test_too_many_blocks_wanted_changes_nothing(pool: BlockPool) -> None:
    pool.unpin(commit_chain(pool, 0, 3))
    with pytest.raises(CapacityError, match="5 blocks wanted, 4 of 4"):
        pool.allocate(5)
    assert pool.num_free == 4
    assert len(pool.snapshot()) == 3


def test_free_blocks_go_before_cached_ones(pool: BlockPool) -> None:
    pool.unpin(commit_chain(pool, 0, 2))
    pool.allocate(2)
    assert len(pool.snapshot()) == 2
    pool.allocate(1)
    assert len(pool.snapshot()) == 1


def test_tails_are_evicted_before_heads(pool: BlockPool) -> None:
    pool.unpin(commit_chain(pool, 0, 4))
    pool.allocate(2)
    assert sorted(pool.snapshot()) == [name_of(0), name_of(1)]


def test_the_least_recently_used_chain_is_evicted_first(pool: BlockPool) -> None:
    old = commit_chain(pool, 0, 2)
    new = commit_chain(pool, 10, 2)
    pool.unpin(old)
    pool.unpin(new)
    pool.pin(pool.match([name_of(0), name_of(1)]))
    pool.unpin(old)
    pool.allocate(2)
    assert pool.snapshot() == [name_of(0), name_of(1)]


def test_pinned_blocks_are_never_evicted(pool: BlockPool) -> None:
    block_ids = commit_chain(pool, 0, 2)
    pool.pin(block_ids)
    pool.unpin(block_ids)
    assert pool.num_free == 2
    with pytest.raises(CapacityError):
        pool.allocate(3)


def test_a_match_ends_at_the_first_block_that_is_missing(pool: BlockPool) -> None:
    block_ids = commit_chain(pool, 0, 3)
    names = [name_of(0), name_of(1), name_of(9), name_of(2)]
    assert pool.match(names) == block_ids[:2]
    assert pool.match([name_of(9)]) == []
    assert pool.holds(name_of(2))
    assert not pool.holds(name_of(9))


def test_a_second_block_of_the_same_name_stays_unnamed(pool: BlockPool) -> None:
    [first] = commit_chain(pool, 7, 1)
    [second] = pool.allocate(1)
    assert not pool.commit(second, name_of(7))
    assert pool.match([name_of(7)]) == [first]
    assert pool.state(second) is BlockState.WRITING
    pool.unpin([second])
    assert pool.state(second) is BlockState.FREE
    assert pool.stats.num_duplicate_blocks == 1


def test_committing_again_under_the_same_name_is_nothing_new(pool: BlockPool) -> None:
    [block_id] = commit_chain(pool, 7, 1)
    assert pool.commit(block_id, name_of(7))
    assert pool.stats.num_committed_blocks == 1


def test_a_block_never_changes_its_name(pool: BlockPool) -> None:
    [block_id] = commit_chain(pool, 7, 1)
    with pytest.raises(InvariantError, match="only a written block gets a name"):
        pool.commit(block_id, name_of(8))


def test_only_its_writer_names_a_block(pool: BlockPool) -> None:
    with pytest.raises(InvariantError, match="is free"):
        pool.commit(0, name_of(1))


def test_unnamed_blocks_cannot_be_shared(pool: BlockPool) -> None:
    with pytest.raises(InvariantError, match="is free"):
        pool.pin([0])


def test_giving_back_twice_is_a_bug_that_is_noticed(pool: BlockPool) -> None:
    block_ids = pool.allocate(1)
    pool.unpin(block_ids)
    with pytest.raises(InvariantError, match="is free, not pinned"):
        pool.unpin(block_ids)


def test_a_quarantined_block_is_nobodys_until_its_time_is_over(pool: BlockPool) -> None:
    block_ids = pool.allocate(2)
    pool.quarantine(block_ids[:1], until_s=10.0)
    assert pool.state(block_ids[0]) is BlockState.QUARANTINED
    assert (pool.num_free, pool.num_used, pool.num_quarantined) == (2, 1, 1)
    assert pool.release_quarantined(9.9) == 0
    with pytest.raises(CapacityError):
        pool.allocate(3)
    with pytest.raises(InvariantError, match="is quarantined"):
        pool.unpin(block_ids[:1])
    assert pool.release_quarantined(10.0) == 1
    assert block_ids[0] in pool.allocate(3)


def test_only_what_is_being_written_is_quarantined(pool: BlockPool) -> None:
    block_ids = commit_chain(pool, 0, 1)
    with pytest.raises(InvariantError, match="is pinned"):
        pool.quarantine(block_ids, until_s=1.0)


def test_clear_evicts_all_but_what_is_in_use(pool: BlockPool) -> None:
    kept = commit_chain(pool, 0, 1)
    pool.unpin(commit_chain(pool, 10, 2))
    assert pool.clear() == 2
    assert pool.snapshot() == [name_of(0)]
    assert pool.state(kept[0]) is BlockState.PINNED
    assert pool.num_free == 3


def test_blocks_are_dropped_by_id_but_those_that_are_used_or_hold_nothing(pool: BlockPool) -> None:
    kept = commit_chain(pool, 0, 1)
    idle = commit_chain(pool, 10, 2)
    pool.unpin(idle)
    pool.mark([name_of(11)], is_spare=True)
    pool.take_events()
    free = next(block_id for block_id in range(pool.num_blocks) if pool.state(block_id) is BlockState.FREE)
    assert pool.drop([*kept, *idle, free, idle[0]]) == idle
    assert (pool.snapshot(), pool.num_named) == ([name_of(0)], 1)
    assert pool.take_events() == ([], [name_of(10), name_of(11)])
    pool.check_invariants()
    assert pool.num_free == 3


def test_events_tell_the_difference_since_the_last_call(pool: BlockPool) -> None:
    pool.unpin(commit_chain(pool, 0, 2))
    assert pool.take_events() == ([name_of(0), name_of(1)], [])
    pool.allocate(3)
    assert pool.take_events() == ([], [name_of(1)])
    assert pool.take_events() == ([], [])


def test_stored_then_removed_is_not_worth_telling(pool: BlockPool) -> None:
    pool.unpin(commit_chain(pool, 0, 1))
    pool.clear()
    assert pool.take_events() == ([], [])


def test_removed_then_stored_again_is_not_worth_telling(pool: BlockPool) -> None:
    pool.unpin(commit_chain(pool, 0, 1))
    pool.take_events()
    pool.clear()
    commit_chain(pool, 0, 1)
    assert pool.take_events() == ([], [])
    assert pool.snapshot() == [name_of(0)]


# -------------------------------------------------------------------------------------------------------- spare copies


def use(pool: BlockPool, first: int, length: int, now_s: float) -> None:
    """A chain that was last used then."""
    block_ids = commit_chain(pool, first, length)
    pool.now_s = now_s
    pool.unpin(block_ids)


def oldest(pool: BlockPool, num_blocks: int) -> list[tuple[bytes | None, float]]:
    """What is evicted next of what only this pool keeps, and when it was last used."""
    return [(pool.name(block_id), used_s) for block_id, used_s in pool._evictable[0].items()][:num_blocks]


def numbers(pool: BlockPool) -> set[int]:
    return {int.from_bytes(name, "little") for name in pool.snapshot()}


def test_a_copy_that_another_keeps_goes_before_what_was_used_earlier(pool: BlockPool) -> None:
    use(pool, 0, 2, now_s=10.0)
    use(pool, 10, 2, now_s=11.0)
    pool.mark([name_of(10), name_of(11)], is_spare=True)
    pool.now_s = 12.0
    pool.allocate(2)
    assert numbers(pool) == {0, 1}
    assert (pool.stats.num_evicted_blocks, pool.stats.num_evicted_spare_blocks) == (2, 2)


def use_again(pool: BlockPool, first: int, length: int, now_s: float) -> None:
    """A chain that is held."""
    pool.now_s = now_s
    block_ids = pool.match(name_of(number) for number in range(first, first + length))
    assert len(block_ids) == length
    pool.pin(block_ids)
    pool.unpin(block_ids)


def test_what_lay_much_longer_than_blocks_do_that_are_used_again_counts_as_idle() -> None:
    pool = BlockPool(8, 16)
    use(pool, 0, 2, now_s=0.0)
    use(pool, 10, 3, now_s=0.0)
    pool.now_s = 99.0
    assert pool.num_idle(9) == 3  # nobody knows yet
    use_again(pool, 0, 2, now_s=100.0)
    pool.now_s = 799.0
    assert pool.num_idle(9) == 3
    pool.now_s = 801.0
    assert pool.num_idle(9) == 6
    assert pool.num_idle(4) == 4


def test_what_is_kept_is_worth_as_much_as_is_used_again_of_it() -> None:
    pool = BlockPool(8, 16)
    use(pool, 0, 4, now_s=1.0)
    assert pool.reused_share == 0.0
    for _ in range(5):
        use_again(pool, 0, 4, now_s=2.0)
    reused_share = pool.reused_share
    assert reused_share == 1 - 0.5**5
    pool.mark([name_of(0), name_of(1)], is_spare=True)
    pool.unpin(pool.allocate(6))
    assert pool.reused_share == reused_share  # copies are no loss
    pool.unpin(pool.allocate(8))
    assert pool.reused_share == pytest.approx(reused_share * (7 / 8) ** 2)


def test_of_blocks_whose_use_is_expected_nothing_is_learned_once() -> None:
    pool = BlockPool(8, 16)
    use(pool, 0, 4, now_s=1.0)
    pool.expect(pool.match(map(name_of, range(4))))
    use_again(pool, 0, 2, now_s=1.001)
    assert (pool.reused_share, pool.num_idle(9)) == (0.0, 4)  # nobody knows yet
    use_again(pool, 0, 2, now_s=100.0)
    reused_share = pool.reused_share
    assert reused_share > 0.0
    pool.allocate(6)  # the other two are evicted unused
    assert pool.reused_share == reused_share


def test_only_what_nobody_uses_is_expected_to_be_used(pool: BlockPool) -> None:
    use(pool, 0, 1, now_s=1.0)
    (block_id,) = pool.match([name_of(0)])
    pool.pin([block_id])
    pool.expect([block_id, *pool.allocate(1)])
    pool.unpin([block_id])
    use_again(pool, 0, 1, now_s=2.0)
    assert pool.reused_share > 0.0


def test_of_spare_copies_tails_go_before_heads(pool: BlockPool) -> None:
    use(pool, 0, 4, now_s=10.0)
    pool.mark([name_of(number) for number in range(4)], is_spare=True)
    pool.allocate(2)
    assert numbers(pool) == {0, 1}


def test_what_is_spare_no_more_goes_as_if_it_had_never_been(pool: BlockPool) -> None:
    use(pool, 0, 1, now_s=1.0)
    use(pool, 1, 1, now_s=2.0)
    pool.mark([name_of(0), name_of(1)], is_spare=True)
    use(pool, 2, 2, now_s=3.0)
    pool.mark([name_of(0)], is_spare=False)
    assert oldest(pool, 9) == [(name_of(0), 1.0), (name_of(3), 3.0), (name_of(2), 3.0)]
    pool.mark([name_of(1)], is_spare=False)
    assert {name for name, _ in oldest(pool, 2)} == {name_of(0), name_of(1)}


def test_what_is_marked_while_it_is_used_waits_among_its_like_afterwards(pool: BlockPool) -> None:
    block_ids = commit_chain(pool, 0, 2)
    pool.mark([name_of(0), name_of(1), name_of(77)], is_spare=True)
    pool.mark([name_of(1)], is_spare=False)
    pool.unpin(block_ids)
    assert oldest(pool, 9) == [(name_of(1), 0.0)]
    assert pool.num_dispensable == 3
    pool.pin(block_ids)
    assert (pool.num_dispensable, pool.num_evictable) == (2, 0)


def test_a_block_that_is_written_anew_is_kept(pool: BlockPool) -> None:
    use(pool, 0, 1, now_s=1.0)
    pool.mark([name_of(0)], is_spare=True)
    pool.clear()
    use(pool, 0, 1, now_s=2.0)
    assert oldest(pool, 9) == [(name_of(0), 2.0)]


def test_the_oldest_are_named_as_they_would_go_without_spare_copies(pool: BlockPool) -> None:
    use(pool, 0, 2, now_s=1.0)
    use(pool, 10, 2, now_s=2.0)
    pool.mark([name_of(1)], is_spare=True)
    assert oldest(pool, 2) == [(name_of(0), 1.0), (name_of(11), 2.0)]
    assert oldest(pool, 0) == []


def test_free_blocks_spare_copies_and_what_was_used_longer_ago_are_worth_less(pool: BlockPool) -> None:
    assert pool.num_worth_less(5.0, 3) == 3
    use(pool, 0, 2, now_s=1.0)
    use(pool, 10, 1, now_s=5.0)
    assert [pool.num_worth_less(used_s, 9) for used_s in (0.5, 1.0, 1.5, 5.0, 5.5)] == [1, 1, 3, 3, 4]
    pool.mark([name_of(10)], is_spare=True)
    assert [pool.num_worth_less(used_s, 9) for used_s in (0.5, 1.5)] == [2, 4]
    assert pool.num_worth_less(9.0, 2) == 2
    assert pool.num_worth_less(9.0, 0) == 0


def test_the_hit_rate_is_the_share_of_blocks_that_were_not_written(pool: BlockPool) -> None:
    assert pool.stats.hit_rate == 0
    block_ids = commit_chain(pool, 0, 3)
    pool.pin(block_ids[:1])
    assert pool.stats.hit_rate == 0.25


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(InvariantError, match="at least 1"):
        BlockPool(num_blocks, block_size)


def test_too_few_generations_are_refused() -> None:
    with pytest.raises(InvariantError, match="2 generations for 4 blocks"):
        BlockPool(4, 16, memoryview(bytearray(16)).cast("Q"))


def _break_pins(pool: BlockPool, held: list[int]) -> None:
    pool._num_pins[held[0]] = 0


def _break_names(pool: BlockPool, held: list[int]) -> None:
    pool._by_name[name_of(99)] = held[0]


def _break_twice_named(pool: BlockPool, held: list[int]) -> None:
    pool._names[held[1]] = pool._names[held[0]]


def _break_free(pool: BlockPool, held: list[int]) -> None:
    pool._free.append(held[0])


def _break_spares(pool: BlockPool, held: list[int]) -> None:
    pool.unpin(held)
    pool._is_spare[held[0]] = True


def _break_nameless_spares(pool: BlockPool, held: list[int]) -> None:
    pool._is_spare[3 - held[0]] = pool._is_spare[3 - held[1]] = True


def _break_tenants(pool: BlockPool, held: list[int]) -> None:
    pool._tenants[3 - held[0]] = 7


def _break_events(pool: BlockPool, held: list[int]) -> None:
    pool._removed[name_of(0)] = None


@pytest.mark.parametrize(
    "damage",
    [
        *(_break_pins, _break_names, _break_twice_named, _break_free),
        *(_break_spares, _break_nameless_spares, _break_tenants, _break_events),
    ],
)
def test_damage_to_the_books_is_noticed(damage) -> None:
    pool = BlockPool(4, 16)
    held = commit_chain(pool, 0, 2)
    pool.check_invariants()
    damage(pool, held)
    with pytest.raises(InvariantError, match="not true that"):
        pool.check_invariants()


CHAIN_OF = {name_of(100 * chain + index): chain for chain in range(3) for index in range(20)}


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model made of plain sets: who holds what, what it contains, who was told what."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(1, 9))
    def make(self, num_blocks: int) -> None:
        self.generations = memoryview(bytearray(8 * num_blocks)).cast("Q")
        self.pool = BlockPool(num_blocks, 16, self.generations, first_generation=0)
        self.tables_held: dict[int, list[int]] = {}
        self.content: dict[int, bytes] = {}  # of committed blocks
        self.told: set[bytes] = set()
        self.num_tables = 0
        self.now_s = 0.0
        self.quarantined: dict[int, float] = {}
        self.spare: set[int] = set()
        self.used_s: dict[int, float] = {}  # of blocks that were given back

    def _hold(self, block_ids: list[int]) -> int:
        self.num_tables += 1
        self.tables_held[self.num_tables] = list(block_ids)
        return self.num_tables

    @rule(target=tables, num_blocks=st.integers(0, 6))
    def allocate(self, num_blocks: int) -> int:
        before = list(self.generations)
        cached, free = set(self.pool.snapshot()), self.pool.num_free
        if num_blocks > free:
            with pytest.raises(CapacityError):
                self.pool.allocate(num_blocks)
            return self._hold([])
        block_ids = self.pool.allocate(num_blocks)
        assert len(set(block_ids)) == num_blocks
        held = {block_id for table in self.tables_held.values() for block_id in table}
        assert held.isdisjoint(block_ids)
        assert self.quarantined.keys().isdisjoint(block_ids)
        for block_id in range(self.pool.num_blocks):
            assert self.generations[block_id] == before[block_id] + (block_id in block_ids)
        for block_id in block_ids:
            self.content.pop(block_id, None)
            self.spare.discard(block_id)
        if cached != set(self.pool.snapshot()):
            assert all(self.pool.state(block_id) is not BlockState.FREE for block_id in range(self.pool.num_blocks))
        return self._hold(block_ids)

    @rule(table=tables, chain=st.integers(0, 2))
    def commit(self, table: int, chain: int) -> None:
        for index, block_id in enumerate(self.tables_held.get(table, [])):
            name = name_of(100 * chain + index)
            if self.pool.name(block_id) not in (None, name):
                with pytest.raises(InvariantError):
                    self.pool.commit(block_id, name)
                continue
            is_new = name not in self.content.values() or self.content.get(block_id) == name
            assert self.pool.commit(block_id, name, chain) == is_new
            if is_new:
                self.content[block_id] = name

    @rule(target=tables, chain=st.integers(0, 2), length=st.integers(0, 6))
    def match_and_pin(self, chain: int, length: int) -> int:
        names = [name_of(100 * chain + index) for index in range(length)]
        block_ids = self.pool.match(names)
        assert [self.content[block_id] for block_id in block_ids] == names[: len(block_ids)]
        if len(block_ids) < length:
            assert names[len(block_ids)] not in self.content.values()
        self.pool.pin(block_ids)
        return self._hold(block_ids)

    @rule(table=tables)
    def unpin(self, table: int) -> None:
        block_ids = self.tables_held.pop(table, [])
        self.pool.unpin(block_ids)
        self.used_s |= dict.fromkeys(block_ids, self.pool.now_s)

    @rule(chain=st.integers(0, 2), begin=st.integers(0, 3), length=st.integers(0, 6), is_spare=st.booleans())
    def mark(self, chain: int, begin: int, length: int, is_spare: bool) -> None:
        names = [name_of(100 * chain + index) for index in range(begin, begin + length)]
        self.pool.mark(names, is_spare=is_spare)
        marked = {block_id for block_id, name in self.content.items() if name in names}
        self.spare = self.spare | marked if is_spare else self.spare - marked

    @rule(data=st.data())
    def expect(self, data: st.DataObject) -> None:
        self.pool.expect(data.draw(st.sets(st.integers(0, self.pool.num_blocks - 1))))

    @rule(used_s=st.integers(0, 30), most=st.integers(0, 9))
    def see_what_is_worth_less(self, used_s: int, most: int) -> None:
        kept = [self.used_s[block_id] for block_id in self._idle() if block_id not in self.spare]
        num_others = self.pool.num_free - len(kept)
        number = self.pool.num_worth_less(used_s, most)
        assert number <= min(most, num_others + sum(before < used_s for before in kept))
        assert number >= min(most, num_others)
        used = {self.content[block_id]: self.used_s[block_id] for block_id in self._idle()}
        next_to_go = oldest(self.pool, most)
        assert len(next_to_go) == min(most, len(kept))
        assert all(used[name] == before for name, before in next_to_go)

    def _idle(self) -> list[int]:
        held = {block_id for table in self.tables_held.values() for block_id in table}
        return [block_id for block_id in self.content if block_id not in held]

    @rule(seconds=st.integers(1, 9))
    def clock_goes_on(self, seconds: int) -> None:
        self.pool.now_s += seconds

    @rule(table=tables, seconds=st.integers(1, 3))
    def quarantine(self, table: int, seconds: int) -> None:
        block_ids = self.tables_held.get(table, [])
        if any(self.pool.state(block_id) is not BlockState.WRITING for block_id in block_ids):
            return
        self.tables_held.pop(table, None)
        self.pool.quarantine(block_ids, self.now_s + seconds)
        self.quarantined |= dict.fromkeys(block_ids, self.now_s + seconds)

    @precondition(lambda self: self.quarantined)
    @rule()
    def time_passes(self) -> None:
        self.now_s += 1
        ended = [block_id for block_id, until_s in self.quarantined.items() if until_s <= self.now_s]
        assert self.pool.release_quarantined(self.now_s) == len(ended)
        for block_id in ended:
            del self.quarantined[block_id]

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        held = {block_id for table in self.tables_held.values() for block_id in table}
        self.content = {block_id: name for block_id, name in self.content.items() if block_id in held}
        self.spare &= held
        assert set(self.pool.snapshot()) == set(self.content.values())

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        wanted = data.draw(st.sets(st.integers(0, self.pool.num_blocks - 1)))
        held = {block_id for table in self.tables_held.values() for block_id in table}
        gone = {block_id for block_id in wanted if block_id in self.content and block_id not in held}
        assert set(self.pool.drop(sorted(wanted))) == gone
        self.content = {block_id: name for block_id, name in self.content.items() if block_id not in gone}
        self.spare -= gone
        assert set(self.pool.snapshot()) == set(self.content.values())

    @rule()
    def tell(self) -> None:
        stored, removed = self.pool.take_events()
        assert self.told.isdisjoint(stored)
        assert self.told.issuperset(removed)
        assert set(stored).isdisjoint(removed)
        self.told = (self.told | set(stored)) - set(removed)
        assert self.told == set(self.pool.snapshot())

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check_invariants()
        for block_id in range(pool.num_blocks):
            assert pool.num_pins(block_id) == sum(table.count(block_id) for table in self.tables_held.values())
            if pool.name(block_id) is not None:
                assert pool.name(block_id) == self.content[block_id]
        tenants = {block_id: CHAIN_OF[name] for block_id, name in self.content.items()}
        assert [pool.tenant(block_id) for block_id in range(pool.num_blocks)] == [
            tenants.get(block_id, 0) for block_id in range(pool.num_blocks)
        ]
        assert pool.num_blocks_by_tenant() == Counter(filter(None, tenants.values()))
        assert pool.num_free + pool.num_used + pool.num_quarantined == pool.num_blocks
        num_kept = sum(block_id not in self.spare for block_id in self._idle())
        assert pool.num_dispensable == pool.num_free - num_kept
        assert {name for name, _ in oldest(pool, 99)} == {
            self.content[block_id] for block_id in self._idle() if block_id not in self.spare
        }
        assert pool.num_quarantined == len(self.quarantined)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for table in self.tables_held.values():
            self.pool.unpin(table)
        self.pool.release_quarantined(self.now_s + 10)
        assert self.pool.num_free == self.pool.num_blocks


@pytest.mark.slow
class TestPoolMachine(PoolMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


@pytest.mark.long
class TestPoolMachineAtLength(PoolMachine.TestCase):
    settings = settings(max_examples=700, stateful_step_count=60, deadline=None)


def test_what_was_last_used_elsewhere_keeps_its_age_and_goes_next_in_the_order_given():
    pool = BlockPool(4, 16)
    pool.now_s = 50.0
    old, first, second = pool.allocate(3)
    for block_id, name in ((old, b"o" * 16), (first, b"1" * 16), (second, b"2" * 16)):
        pool.commit(block_id, name)
    pool.unpin([old])
    pool.unpin([first, second], used_s=20.0)
    assert oldest(pool, 4) == [(b"1" * 16, 20.0), (b"2" * 16, 20.0), (b"o" * 16, 50.0)]
    pool.check_invariants()
