"""A node cache, its arena and its stores real, workers and threads made of lists: anything may happen in any order.

Writers write the bytes that follow from a block's name, whole, in part or never; readers look at the bytes as long as
they hold a lease; stores answer late, not at all, or with an error. No name may ever be offered with another checksum,
no byte offered change under a lease, and in the end, when all askers are gone and all stores have answered, nothing is
pinned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcache.leases import AskerLost, LeaseBook, TimePassed
from kvcache.locations import BlockLocation, each_location, pack_locations
from kvcache.names import split_names
from messages.errors import InvariantError
from messages.handoff import (
    BlockHint,
    BlocksFound,
    BlocksRequest,
    BlocksWritten,
    KvHandoff,
    PrefetchBlocks,
    ReleaseLease,
    RenewLease,
    RoomGranted,
    RoomRequest,
)
from nodecache.arena import Arena, as_ids
from nodecache.cache import BlocksKept, BlocksRead, CacheEvent, CacheLimits, Hinted, NodeCache, Said, Tell
from nodecache.loopback import LoopbackStore
from nodecache.pool import HostPool
from nodecache.quotas import Accounts
from nodecache.reading import ReadBlocks, Reading
from nodecache.store import StoredBlock, StoreError
from nodecache.worth import Worth
from nodecache.writing_down import WriteBlocks, WritingDown
from tests.nodecache.blocks import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    QUARANTINE_S,
    checksum,
    checksum_of,
    content_of,
    layout_of,
    name_of,
)

ASKERS = (b"one", b"two", b"three")
CHAINS = "abcd"
OWNERS = {"a": 1, "b": 2, "c": 3, "d": 0}  #: whose a chain's blocks are; 3 has no quota, 0 is nobody
MAX_LENGTH = 8
LEASE_S = 10.0

askers = st.sampled_from(ASKERS)
request_ids = st.sampled_from(["p", "q"])
chains = st.sampled_from(CHAINS)
lengths = st.integers(1, MAX_LENGTH)
hints = st.builds(
    BlockHint,
    st.integers(0, MAX_LENGTH),
    st.none() | st.integers(0, MAX_LENGTH),
    st.none() | st.integers(-2, 2),
    st.sampled_from([0.0, 5.0, 100.0]),
)
quotas = st.none() | st.integers(0, 6)  #: blocks


@dataclasses.dataclass
class Offered:
    """What an asker was offered under one question, and whether all was."""

    locations: list[BlockLocation] = dataclasses.field(default_factory=list)
    is_whole: bool = False


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 12),
        sizes=st.lists(st.integers(1, 40), max_size=2),
        kept=st.lists(st.sets(chains), min_size=2, max_size=2),
        quotas=st.lists(st.tuples(quotas, quotas), min_size=3, max_size=3),
    )
    def open(
        self, num_blocks: int, sizes: list[int], kept: list[set[str]], quotas: list[tuple[int | None, int | None]]
    ) -> None:
        self.now_s = 100.0
        layout = layout_of(num_blocks)
        self.memory = layout.allocate()
        accounts, *below = [Accounts({1: one, 2: other, 3: None}) for one, other in quotas]
        self.pool = HostPool(Arena(self.memory, layout), Worth(BLOCK_SIZE), self.now_s, QUARANTINE_S, accounts)
        self.stores = {
            tier: LoopbackStore(size, checksum, own)
            for tier, size, own in zip(("disk", "remote"), sizes, below, strict=False)
        }
        for store, there in zip(self.stores.values(), kept, strict=False):
            names = [name_of(index, chain) for chain in sorted(there) for index in range(MAX_LENGTH)]
            blocks = [
                StoredBlock(name_of(index, chain), BLOCK_SIZE, checksum_of(name_of(index, chain)), OWNERS[chain])
                for chain in sorted(there)
                for index in range(MAX_LENGTH)
            ]
            store.write(blocks, [memoryview(content_of(name)) for name in names], 0.0)
        limits = CacheLimits(
            lease_s=LEASE_S, quarantine_s=QUARANTINE_S, batch_bytes=2 * BLOCK_BYTES, max_reads=2, read_deadline_s=3.0
        )
        self.cache = NodeCache(self.pool, self.stores, limits)
        self.pending: list[ReadBlocks | WriteBlocks] = []
        self.grants: dict[tuple[bytes, str], RoomGranted] = {}
        self.slow: list[BlockLocation] = []  # granted long ago, to writers that still look before they write
        self.late: list[tuple[int, float]] = []  # blocks that lost writers were writing into, and until when
        self.offered: dict[tuple[bytes, str], Offered] = {}
        self.ahead: dict[tuple[bytes, str], int] = {}  # times that it was told where the blocks lie
        self.told: dict[str, set[bytes]] = {tier: set(split_names(names)) for tier, names in self.cache.snapshot()}

    def stores_are_ahead(self) -> bool:
        """Whether a store did what the cache does not know of yet."""
        return bool(self.pending)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for _ in self.stores:  # no store answers any more: whoever waits is told, at last by the furthest one
            self.now_s += 5.0
            self.post(TimePassed())
        if not all(offered.is_whole for offered in self.offered.values()) or self.cache.prefetching.num_waiting:
            raise InvariantError("somebody waits for ever")
        for asker in ASKERS:
            self.post(AskerLost(asker))
        self.grants.clear()
        self.offered.clear()
        while self.pending:
            self.answer(0, is_error=False)
        self.pass_time(QUARANTINE_S + 1)
        while self.pending:
            self.answer(0, is_error=False)
        self.cache.check_invariants()
        if self.pool.num_used or self.pool.num_quarantined:
            raise InvariantError("something is held for nobody")
        if self.cache.leases.num_open or self.cache.reading.num_waiting or len(self.cache.prefetching):
            raise InvariantError("something is remembered of nobody")
        self.memory.close()

    # ------------------------------------------------------------------------------------------------------- the world

    def post(self, event: CacheEvent) -> None:
        for instruction in self.cache.on_event(event, self.now_s):
            match instruction:
                case Tell(asker, RoomGranted() as granted):
                    self.grants[asker, granted.request_id] = granted
                case Tell(asker, KvHandoff() as handoff):
                    self.take_offer(asker, handoff)
                case Tell(asker, BlocksFound(request_id=request_id)):
                    self.ahead[asker, request_id] += 1
                    assert self.ahead[asker, request_id] <= 2
                case _:
                    self.pending.append(instruction)
        for tier, stored, removed in self.cache.take_events():
            new, gone = set(split_names(stored)), set(split_names(removed))
            assert not new & gone
            # A store may drop a block for others while it is read: its loss is told for both.
            assert gone <= self.told[tier] or tier != "host"
            self.told[tier] = (self.told[tier] | new) - gone
        self.let_late_bytes_land()

    def let_late_bytes_land(self) -> None:
        """Whoever still may write does it, at every moment."""
        for block_id, until_s in self.late:
            if self.now_s < until_s:
                self.pool.arena.block(block_id)[:] = b"?" * BLOCK_BYTES
        for location in self.slow:
            if int(self.pool.arena.generations[location.block_id]) == location.generation:
                self.pool.arena.block(location.block_id)[:] = b"?" * BLOCK_BYTES

    def take_offer(self, asker: bytes, handoff: KvHandoff) -> None:
        offered = self.offered[asker, handoff.request_id]
        assert not offered.is_whole
        offered.is_whole = handoff.is_last
        for location in each_location(handoff.blocks):
            assert location.checksum == checksum_of(location.name)
            assert location.num_tokens == BLOCK_SIZE
            assert location.name in [name_of(location.index, chain) for chain in CHAINS]
        assert not {b.name for b in offered.locations} & {b.name for b in each_location(handoff.blocks)}
        offered.locations += each_location(handoff.blocks)

    def answer(self, which: int, *, is_error: bool) -> None:
        """Let a store do what is pending."""
        instruction = self.pending.pop(which % len(self.pending))
        store = self.stores[instruction.tier]
        store.error = StoreError("no") if is_error else None
        views = [self.pool.arena.block(block_id) for block_id in instruction.block_ids]
        match instruction:
            case ReadBlocks():
                try:
                    arrived = tuple(store.read(instruction.names, views, 0.0))
                except StoreError:
                    arrived = None
                self.post(BlocksRead(instruction.read_id, arrived))
            case WriteBlocks():
                for block, view in zip(instruction.blocks, views, strict=True):
                    assert bytes(view) == content_of(block.name)
                try:
                    dropped = tuple(store.write(instruction.blocks, views, 0.0))
                except StoreError:
                    dropped = None
                self.post(BlocksKept(instruction.write_id, dropped))

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        # The askers' own clocks: what they know to be over they do not touch any more.
        if seconds > LEASE_S / 2:
            self.slow += [location for granted in self.grants.values() for location in each_location(granted.blocks)]
            self.grants.clear()
            self.offered = {key: offered for key, offered in self.offered.items() if not offered.is_whole}
        self.post(TimePassed())

    # ----------------------------------------------------------------------------------------------------------- rules

    @rule(
        asker=askers,
        request_id=request_ids,
        chain=chains,
        begin=st.integers(0, MAX_LENGTH - 1),
        length=lengths,
        hints=st.lists(hints, max_size=2),
        is_again=st.booleans(),
    )
    def ask_for_room(
        self,
        asker: bytes,
        request_id: str,
        chain: str,
        begin: int,
        length: int,
        hints: list[BlockHint],
        is_again: bool,
    ) -> None:
        indexes = list(range(begin, min(MAX_LENGTH, begin + length)))
        names = b"".join(name_of(index, chain) for index in indexes)
        tenant = OWNERS[chain]
        message = RoomRequest(
            request_id=request_id,
            names=names,
            indexes=indexes,
            tenant=tenant,
            hints=tuple(hints),
            is_again=is_again,
        )
        self.post(Said(asker, message))

    @precondition(lambda self: self.grants)
    @rule(which=st.integers(0, 5), written=st.just(255) | st.integers(0, 255), is_told_wrongly=st.booleans())
    def write(self, which: int, written: int, is_told_wrongly: bool) -> None:
        asker, request_id = sorted(self.grants)[which % len(self.grants)]
        granted = self.grants.pop((asker, request_id))
        told = []
        for position, location in enumerate(each_location(granted.blocks)):
            if not written >> position & 1:
                continue
            if int(self.pool.arena.generations[location.block_id]) == location.generation:
                self.pool.arena.block(location.block_id)[:] = content_of(location.name)
                generation = location.generation - (is_told_wrongly and position == 0)
                told.append(
                    BlockLocation(
                        *(location.index, location.block_id, generation, location.name),
                        *(BLOCK_SIZE, checksum_of(location.name)),
                    )
                )
        self.post(Said(asker, BlocksWritten(request_id=request_id, blocks=pack_locations(told))))

    @rule(
        asker=askers, request_id=request_ids, chain=chains, begin=st.integers(0, 3), length=lengths, tail=st.booleans()
    )
    def ask_for_blocks(self, asker: bytes, request_id: str, chain: str, begin: int, length: int, tail: bool) -> None:
        names = b"".join(name_of(index, chain) for index in range(begin, min(MAX_LENGTH, begin + length)))
        self.offered[asker, request_id] = Offered()
        message = BlocksRequest(request_id=request_id, first_index=begin, names=names, is_tail_first=tail)
        self.post(Said(asker, message))

    @rule(asker=askers, request_id=request_ids, chain=chains, begin=st.integers(0, 3), length=lengths)
    def will_ask_for_blocks(self, asker: bytes, request_id: str, chain: str, begin: int, length: int) -> None:
        names = b"".join(name_of(index, chain) for index in range(begin, min(MAX_LENGTH, begin + length)))
        self.ahead[asker, request_id] = 0
        self.post(Said(asker, PrefetchBlocks(request_id=request_id, first_index=begin, names=names)))
        assert self.ahead[asker, request_id]

    @rule(asker=askers, request_id=request_ids)
    def renew(self, asker: bytes, request_id: str) -> None:
        self.post(Said(asker, RenewLease(request_id=request_id)))

    @rule(asker=askers, request_id=request_ids)
    def release(self, asker: bytes, request_id: str) -> None:
        self.offered.pop((asker, request_id), None)
        self.grants.pop((asker, request_id), None)
        self.post(Said(asker, ReleaseLease(request_id=request_id)))

    @rule(asker=askers)
    def lose(self, asker: bytes) -> None:
        """The asker dies in the middle of writing: its last bytes land after it was noticed."""
        late = [granted for (who, _), granted in self.grants.items() if who == asker]
        self.grants = {key: granted for key, granted in self.grants.items() if key[0] != asker}
        self.offered = {key: offered for key, offered in self.offered.items() if key[0] != asker}
        self.post(AskerLost(asker))
        for granted in late:
            self.late += [(location.block_id, self.now_s + QUARANTINE_S) for location in each_location(granted.blocks)]

    @precondition(lambda self: self.pending)
    @rule(which=st.integers(0, 9), is_error=st.booleans())
    def let_a_store_answer(self, which: int, is_error: bool) -> None:
        self.answer(which, is_error=is_error and which > 6)

    @rule(chain=chains, index=st.integers(0, MAX_LENGTH - 1), tier=st.sampled_from(["disk", "remote"]))
    def damage_a_store(self, chain: str, index: int, tier: str) -> None:
        store = self.stores.get(tier)
        if store is not None and store.find(name_of(index, chain)) is not None:
            store.damage(name_of(index, chain))

    @rule(chain=chains, priority=st.integers(-2, 2), seconds=st.sampled_from([-1.0, 5.0, float("inf")]))
    def hint(self, chain: str, priority: int, seconds: float) -> None:
        names = b"".join(name_of(index, chain) for index in range(MAX_LENGTH))
        self.post(Hinted(names, priority, self.now_s + seconds))

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    # ------------------------------------------------------------------------------------------------------ invariants

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        for tier, names in self.cache.snapshot():
            if tier == "host" or not self.stores_are_ahead():
                assert set(split_names(names)) == self.told[tier]

    @invariant()
    def hints_keep_no_more_than_half(self) -> None:
        if hasattr(self, "pool"):
            assert self.pool.num_hinted(self.now_s) <= self.pool.num_blocks // 2

    @invariant()
    def no_store_has_more_of_a_tenant_than_it_may(self) -> None:
        for store in getattr(self, "stores", {}).values():
            tenants = [block.tenant for block in store.page(0, 1000).blocks]
            for tenant, limit in store.accounts.max_blocks.items():
                assert store.accounts[tenant] == tenants.count(tenant)
                assert limit is None or tenants.count(tenant) <= limit

    @invariant()
    def blocks_are_whose_they_are(self) -> None:
        if hasattr(self, "pool"):
            block_ids = as_ids(np.flatnonzero(self.pool.arena.committed()))
            owners = {name_of(index, chain): OWNERS[chain] for chain in CHAINS for index in range(MAX_LENGTH)}
            wanted = [owners[name] for name in self.pool.names(block_ids)]
            assert self.pool.records(block_ids)["tenant"].tolist() == wanted

    @invariant()
    def what_is_leased_does_not_change(self) -> None:
        for offered in getattr(self, "offered", {}).values():
            for location in offered.locations:
                assert int(self.pool.arena.generations[location.block_id]) == location.generation
                assert bytes(self.pool.arena.block(location.block_id)) == content_of(location.name)


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}

TestCacheMachine = pytest.mark.slow(CacheMachine.TestCase)
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, **_SETTINGS)


@pytest.mark.long
def test_many_more_of_them() -> None:
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=1500, stateful_step_count=60, **_SETTINGS))


def pin_nothing(pool: HostPool, block_ids: Sequence[int]) -> None:
    """Wrong: what is offered may be evicted."""


def renew_without_a_new_generation(arena: Arena, block_ids: Sequence[int]) -> None:
    """Wrong: a reader cannot see that a block was reused."""
    arena.records["state"][block_ids] = 1


def free_at_once(pool: HostPool, block_ids: Sequence[int], until_s: float) -> None:
    """Wrong: what a lost writer may still write into goes to the next one."""
    pool.give_back(block_ids)


def tell_nothing_of_losses(book: LeaseBook, request_ids: list[str], *, is_expired: bool = False) -> list[object]:
    """Wrong: what was held for somebody is held for ever."""
    for request_id in request_ids:
        del book._leases[request_id]
    return []


_end = WritingDown.end


def disown_nothing(pool: HostPool, block_ids: Sequence[int]) -> None:
    """Wrong: what a tenant lost counts as its own for ever."""


def have_room_for_all(accounts: Accounts, tenant: int) -> None:
    """Wrong: nobody is told that a quota is full."""


def give_up_nobody(reading: Reading, now_s: float) -> list[object]:
    """Wrong: a store that does not answer is waited for."""
    return []


def keep_pinned_what_was_written_down(
    writing: WritingDown, write_id: int, dropped: list[bytes] | None, now_s: float
) -> None:
    """Wrong: a failed write leaves its blocks pinned."""
    if dropped is None:
        writing._writes.pop(write_id)
    else:
        _end(writing, write_id, dropped, now_s)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (HostPool, "pin", pin_nothing),
        (Arena, "renew", renew_without_a_new_generation),
        (HostPool, "quarantine", free_at_once),
        (LeaseBook, "_free", tell_nothing_of_losses),
        (Reading, "give_up", give_up_nobody),
        (WritingDown, "end", keep_pinned_what_was_written_down),
        (HostPool, "_disown", disown_nothing),
        (Accounts, "room", have_room_for_all),
    ],
)
def test_the_machine_finds_what_is_wrong(monkeypatch, owner, name, wrong) -> None:
    monkeypatch.setattr(owner, name, wrong)
    enough = settings(max_examples=3000, derandomize=True, phases=[Phase.generate], database=None, **_SETTINGS)
    with pytest.raises((AssertionError, InvariantError, KeyError)):
        run_state_machine_as_test(CacheMachine, settings=enough)
