"""Keepers: of a block that several hold one keeps it, and the others are told, in whatever order things happen."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrouter.index import Appointed, Holder
from messages.errors import InvariantError
from tests.kvrouter.indexes import compiled, plain, swept

NUM_BLOCKS = {"small": 4, "middle": 8, "large": 16, "cache": 64}


def name(number):
    return number.to_bytes(16, "big")


def names(*numbers):
    return b"".join(map(name, numbers))


class World:
    """An index, which knows who keeps what is in it."""

    def __init__(self, make):
        self.index = make(NUM_BLOCKS.__getitem__)

    def store(self, worker_id, *numbers, tier="device"):
        return self.index.fold(worker_id, tier, stored=names(*numbers))

    def remove(self, worker_id, *numbers, tier="device"):
        return self.index.fold(worker_id, tier, removed=names(*numbers))

    def drop(self, worker_id):
        return self.index.drop(worker_id) + swept(self.index)

    def kept_share(self, worker_id):
        return (self.index.num_held(worker_id) - self.index.num_spare(worker_id)) / NUM_BLOCKS[worker_id]


@pytest.fixture(params=[plain, compiled])
def world(request):
    made = World(request.param)
    yield made
    made.index.check_invariants()


def test_a_block_that_one_holds_is_nobodys_concern(world):
    assert world.store("small", 1, 2) == []
    assert world.index.num_shared == 0


def test_who_stored_it_last_keeps_it(world):
    world.store("small", 1, 2)
    assert world.store("large", 1, 2) == [Appointed("small", names(1, 2), b"")]
    assert world.kept_share("small") == 0
    assert world.kept_share("large") == 2 / 16


def test_one_copy_is_told_to_be_kept_again_when_the_keepers_is_gone(world):
    world.store("small", 1, 2)
    world.store("large", 1, 2)
    assert world.remove("large", 1) == [Appointed("small", b"", names(1))]
    assert world.remove("small", 2) == []  # a spare copy was there to go
    assert world.index.num_shared == 0


def test_of_several_that_are_left_who_keeps_least_for_its_size_is_told(world):
    world.store("small", 1, 2, 3)
    world.store("middle", 1)
    world.store("large", 1)
    assert world.remove("large", 1) == [Appointed("middle", b"", names(1))]


def test_a_node_cache_keeps_whoever_uses_it_meanwhile(world):
    world.store("small", 1)
    assert world.store("cache", 1, tier="host") == [Appointed("small", names(1), b"")]
    assert world.store("large", 1) == [Appointed("large", names(1), b"")]
    assert world.remove("cache", 1, tier="host") == [Appointed("small", b"", names(1))]


@pytest.mark.parametrize("tier", ["disk", "remote"])
def test_a_copy_that_is_not_at_hand_does_not_count(world, tier):
    world.store("small", 1)
    assert world.store("cache", 1, tier=tier) == []
    assert world.index.num_shared == 0


def test_who_is_lost_keeps_nothing_and_has_nothing_spare(world):
    world.store("small", 1, 2)
    world.store("large", 1, 3)
    world.store("small", 3)
    assert world.drop("large") == [Appointed("small", b"", names(1))]
    assert world.index.num_shared == 0
    assert world.kept_share("small") == 3 / 4
    assert world.drop("large") == []
    assert world.store("large", 1) == [Appointed("small", names(1), b"")]


def test_what_is_stored_and_removed_at_once_is_told_to_nobody(world):
    world.store("small", 1, 2)
    assert world.index.fold("large", stored=names(1, 2), removed=names(2)) == [Appointed("small", names(1), b"")]


def test_a_snapshot_is_no_sign_of_use(world):
    world.store("small", 1, 2)
    world.store("middle", 1)
    told = world.index.fold("large", stored=names(1, 2), is_use=False)  # who keeps least for its size keeps the other
    assert set(told) == {Appointed("large", names(1), b""), Appointed("small", names(2), b"")}


def test_of_a_worker_that_comes_back_before_it_is_swept_everything_counts_anew(world):
    world.store("small", 1, 2)
    world.store("large", 1, 2)
    told = world.index.drop("large")
    spare = {1, 2}  # as small was told
    for worker_id, now_spare, now_kept in told + world.index.fold("large", stored=names(1)) + swept(world.index):
        assert worker_id == "small"
        spare -= {number for number in (1, 2) if name(number) in now_kept}
        spare |= {number for number in (1, 2) if name(number) in now_spare}
    assert spare == {1}
    assert world.index.num_spare("small") == 1


def test_plain_books_that_do_not_agree_are_noticed():
    damages = [
        lambda index: index._remove(Holder("large"), names(1)),
        lambda index: index._store(Holder("middle"), names(1)),
        lambda index: index._keepers._num_spare.update(["small"]),
    ]
    for damage in damages:
        index = plain(NUM_BLOCKS.__getitem__)
        for worker_id, stored in (("middle", names(2)), ("small", names(1)), ("large", names(1))):
            index.fold(worker_id, stored=stored)
        damage(index)
        with pytest.raises(InvariantError, match="keepers: "):
            index.check_invariants()


class KeepersMachine(RuleBasedStateMachine):
    """Whatever happens, each shared block has one keeper, and each worker was told so.

    Workers remember what they were told of the blocks that they hold, as pools do.
    """

    workers = st.sampled_from(["small", "middle", "large"])
    numbers = st.lists(st.integers(0, 4), max_size=5, unique=True)

    make = staticmethod(plain)

    def __init__(self):
        super().__init__()
        self.world = World(self.make)
        self.spare = {worker: set() for worker in NUM_BLOCKS}

    def held(self, worker):
        at_hand = [(worker, "host" if worker == "cache" else "device")]
        return {name(n) for n in range(5) if set(at_hand) & set(self.world.index.holders(name(n)))}

    def tell(self, appointed):
        for worker, spare, kept in appointed:
            assert worker != "cache"
            assert spare or kept
            assert self.held(worker), "who is gone is told nothing"
            told_spare = {spare[at : at + 16] for at in range(0, len(spare), 16)}
            told_kept = {kept[at : at + 16] for at in range(0, len(kept), 16)}
            assert not told_spare & self.spare[worker], "told before"
            assert told_kept <= self.spare[worker], "told before"
            assert told_spare | told_kept <= self.held(worker)
            self.spare[worker] = (self.spare[worker] | told_spare) - told_kept

    @rule(worker=workers, numbers=numbers)
    def store(self, worker, numbers):
        before = self.held(worker)
        self.spare[worker] &= before  # a block that is committed counts as kept
        self.tell(self.world.store(worker, *numbers))
        for number in numbers:
            is_in_cache = name(number) in self.held("cache")
            assert (name(number) in self.spare[worker]) is is_in_cache or name(number) in before

    @rule(numbers=numbers, tier=st.sampled_from(["host", "host", "disk"]))
    def store_below(self, numbers, tier):
        self.tell(self.world.store("cache", *numbers, tier=tier))

    @rule(worker=workers, numbers=numbers)
    def remove(self, worker, numbers):
        self.spare[worker] -= {name(number) for number in numbers}
        self.tell(self.world.remove(worker, *numbers))

    @rule(numbers=numbers, tier=st.sampled_from(["host", "disk"]))
    def remove_below(self, numbers, tier):
        self.tell(self.world.remove("cache", *numbers, tier=tier))

    @rule(worker=st.sampled_from(sorted(NUM_BLOCKS)), numbers=numbers, is_back=st.booleans())
    def lose(self, worker, numbers, is_back):
        self.spare[worker].clear()
        told = self.world.index.drop(worker)
        if is_back:  # with a snapshot, before it is swept
            tier = "host" if worker == "cache" else "device"
            told += self.world.index.fold(worker, tier, stored=names(*numbers), is_use=False)
        self.tell(told + swept(self.world.index))

    @invariant()
    def each_block_has_one_keeper(self):
        self.world.index.check_invariants()
        for number in range(5):
            block = name(number)
            holders = [worker for worker in NUM_BLOCKS if block in self.held(worker)]
            keepers = [worker for worker in holders if block not in self.spare[worker]]
            assert len(keepers) == min(1, len(holders))
            assert "cache" not in holders or keepers == ["cache"]
        assert self.world.index.num_shared == sum(
            sum(name(number) in self.held(worker) for worker in NUM_BLOCKS) > 1 for number in range(5)
        )
        for worker, num_blocks in NUM_BLOCKS.items():
            num_kept = self.world.index.num_held(worker) - len(self.spare[worker])
            assert self.world.kept_share(worker) == pytest.approx(num_kept / num_blocks)


class CompiledKeepersMachine(KeepersMachine):
    """The same of the compiled index."""

    make = staticmethod(compiled)


TestPlainKeepers = pytest.mark.slow(KeepersMachine.TestCase)
TestCompiledKeepers = pytest.mark.slow(CompiledKeepersMachine.TestCase)
TestPlainKeepers.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestCompiledKeepers.settings = TestPlainKeepers.settings
