"""Keepers: of a block that several hold one keeps it, and the others are told, in whatever order things happen."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrouter.index import BlockIndex
from kvrouter.keepers import Appointed, Keepers
from messages.errors import InvariantError

NUM_BLOCKS = {"small": 4, "middle": 8, "large": 16, "cache": 64}


def name(number):
    return number.to_bytes(16, "big")


def names(*numbers):
    return b"".join(map(name, numbers))


class World:
    """An index, and the keepers of what is in it."""

    def __init__(self):
        self.index = BlockIndex()
        self.keepers = Keepers(
            self.index.holders,
            lambda worker_id: self.index.num_held(worker_id) / NUM_BLOCKS[worker_id],
            NUM_BLOCKS.__getitem__,
        )

    def store(self, worker_id, *numbers, tier="device"):
        return self.keepers.on_change(self.index.fold(worker_id, tier, stored=names(*numbers)), worker_id)

    def remove(self, worker_id, *numbers, tier="device"):
        return self.keepers.on_change(self.index.fold(worker_id, tier, removed=names(*numbers)), worker_id)

    def drop(self, worker_id):
        return self.keepers.on_dropped(self.index.drop(worker_id), worker_id)


@pytest.fixture
def world():
    made = World()
    yield made
    made.keepers.check_invariants()


def test_a_block_that_one_holds_is_nobodys_concern(world):
    assert world.store("small", 1, 2) == []
    assert len(world.keepers) == 0


def test_who_stored_it_last_keeps_it(world):
    world.store("small", 1, 2)
    assert world.store("large", 1, 2) == [Appointed("small", names(1, 2), b"")]
    assert world.keepers.kept_share("small") == 0
    assert world.keepers.kept_share("large") == 2 / 16


def test_one_copy_is_told_to_be_kept_again_when_the_keepers_is_gone(world):
    world.store("small", 1, 2)
    world.store("large", 1, 2)
    assert world.remove("large", 1) == [Appointed("small", b"", names(1))]
    assert world.remove("small", 2) == []  # a spare copy was there to go
    assert len(world.keepers) == 0


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
    assert len(world.keepers) == 0


def test_who_is_lost_keeps_nothing_and_has_nothing_spare(world):
    world.store("small", 1, 2)
    world.store("large", 1, 3)
    world.store("small", 3)
    assert world.drop("large") == [Appointed("small", b"", names(1))]
    assert len(world.keepers) == 0
    assert world.keepers.kept_share("small") == 3 / 4
    assert world.drop("large") == []
    assert world.store("large", 1) == [Appointed("small", names(1), b"")]


def test_books_that_do_not_agree_are_noticed():
    damages = [
        lambda world: world.index.drop("large"),
        lambda world: world.index.fold("cache", "host", stored=names(1)),
        lambda world: world.index.fold("middle", stored=names(1)),
        lambda world: world.keepers._num_spare.update(["small"]),
    ]
    for damage in damages:
        world = World()
        world.store("small", 1)
        world.store("large", 1)
        damage(world)
        with pytest.raises(InvariantError, match="keepers: "):
            world.keepers.check_invariants()


class KeepersMachine(RuleBasedStateMachine):
    """Whatever happens, each shared block has one keeper, and each worker was told so.

    Workers remember what they were told of the blocks that they hold, as pools do.
    """

    workers = st.sampled_from(["small", "middle", "large"])
    numbers = st.lists(st.integers(0, 4), max_size=5, unique=True)

    def __init__(self):
        super().__init__()
        self.world = World()
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
        self.tell(self.world.drop(worker))
        if is_back:  # with a snapshot
            tier = "host" if worker == "cache" else "device"
            shared = self.world.index.fold(worker, tier, stored=names(*numbers))
            self.tell(self.world.keepers.on_change(shared, None))

    @invariant()
    def each_block_has_one_keeper(self):
        self.world.keepers.check_invariants()
        for number in range(5):
            block = name(number)
            holders = [worker for worker in NUM_BLOCKS if block in self.held(worker)]
            keepers = [worker for worker in holders if block not in self.spare[worker]]
            assert len(keepers) == min(1, len(holders))
            assert "cache" not in holders or keepers == ["cache"]
        assert len(self.world.keepers) == sum(
            sum(name(number) in self.held(worker) for worker in NUM_BLOCKS) > 1 for number in range(5)
        )
        for worker, num_blocks in NUM_BLOCKS.items():
            num_kept = self.world.index.num_held(worker) - len(self.spare[worker])
            assert self.world.keepers.kept_share(worker) == pytest.approx(num_kept / num_blocks)


TestKeepersMachine = KeepersMachine.TestCase
TestKeepersMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
