"""Blocks of a pool lent by name: a real scheduler and pool; what is sent is a list, the clock a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest

from engine.lending import Lender
from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import BlocksReleased, Event, LendBlocks
from engine.scheduling.scheduler import Scheduler
from kvcache.locations import each_location
from kvcache.pool import BlockPool
from messages.handoff import BlocksRequest, KvHandoff, ReleaseLease, RenewLease
from messages.wire import Message

A, B = b"asker a", b"asker b"
LEASE_S = 5.0
NAMES = [bytes([index]) * 16 for index in range(1, 5)]


class Bench:
    """A lender beside its scheduler, whose pool holds the blocks of NAMES."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.pool = BlockPool(8, 4)
        self.scheduler = Scheduler(SchedulerConfig(max_model_len=32), self.pool, b"model")
        self.sent: list[tuple[bytes, Message]] = []
        self.lender = Lender(LEASE_S, self.post, lambda asker, message: self.sent.append((asker, message)), checksums)
        self.held = self.pool.allocate(len(NAMES))
        for block_id, name in zip(self.held, NAMES, strict=True):
            self.pool.commit(block_id, name, tenant=7)
        self.pool.unpin(self.held)

    def post(self, event: Event) -> None:
        for instruction in self.scheduler.on_event(event, self.now_s):
            assert isinstance(instruction, LendBlocks)
            self.lender.lend(instruction)
        self.scheduler.check_invariants()

    def ask(
        self, asker: bytes, names: Sequence[bytes] = NAMES, request_id: str = "q", first_index: int = 0
    ) -> KvHandoff:
        """Ask for these; what is offered."""
        message = BlocksRequest(request_id=request_id, first_index=first_index, names=b"".join(names))
        assert self.lender.take(asker, message)
        [(told, handoff)] = self.sent
        self.sent.clear()
        assert (told, handoff.request_id, handoff.is_last) == (asker, request_id, True)
        return handoff

    def pinned(self) -> list[int]:
        """How often each block of NAMES is pinned."""
        return [self.pool.num_pins(block_id) for block_id in self.held]


def checksums(block_ids: Sequence[int]) -> list[int]:
    return [1000 + block_id for block_id in block_ids]


@pytest.fixture
def bench(monkeypatch) -> Iterator[Bench]:
    bench = Bench()
    monkeypatch.setattr("engine.lending.time", SimpleNamespace(monotonic=lambda: bench.now_s))
    yield bench
    for asker in (A, B):
        bench.lender.lose(asker)
    assert (bench.pool.num_used, bench.lender.leases.num_open) == (0, 0)


def test_what_is_there_is_offered_pinned_with_its_place_and_checksum(bench):
    handoff = bench.ask(A, NAMES[1:3], first_index=5)
    assert (handoff.lease_s, handoff.first_token, handoff.tier) == (LEASE_S, None, "device")
    assert [(block.index, block.name, block.num_tokens) for block in each_location(handoff.blocks)] == [
        (5, NAMES[1], 4),
        (6, NAMES[2], 4),
    ]
    assert [block.block_id for block in each_location(handoff.blocks)] == bench.held[1:3]
    assert [block.generation for block in each_location(handoff.blocks)] == [
        bench.pool.generation(b) for b in bench.held[1:3]
    ]
    assert [block.checksum for block in each_location(handoff.blocks)] == checksums(bench.held[1:3])
    assert [block.tenant for block in each_location(handoff.blocks)] == [7, 7]
    assert bench.pinned() == [0, 1, 1, 0]
    assert bench.lender.num_lent_blocks == 2


def test_what_is_lent_is_not_evicted(bench):
    bench.ask(A, NAMES[:2])
    bench.pool.unpin(bench.pool.allocate(bench.pool.num_free))
    assert [bench.pool.holds(name) for name in NAMES] == [True, True, False, False]


def test_holes_are_left_out(bench):
    handoff = bench.ask(A, [NAMES[0], b"x" * 16, NAMES[2], b"y" * 16])
    assert [(block.index, block.name) for block in each_location(handoff.blocks)] == [(0, NAMES[0]), (2, NAMES[2])]
    assert bench.pinned() == [1, 0, 1, 0]


@pytest.mark.parametrize("first_index", [-1, 2**32 - 1, 2**62])
def test_a_position_that_no_block_can_have_becomes_one_that_it_can(bench, first_index):
    handoff = bench.ask(A, NAMES[:2], first_index=first_index)
    first, second = (block.index for block in each_location(handoff.blocks))
    assert second == first + 1 < 2**32


def test_nothing_is_held_for_an_empty_answer(bench):
    assert bench.ask(A, [b"x" * 16]).blocks == b""
    assert (bench.pool.num_used, bench.lender.leases.num_open) == (0, 0)
    assert not bench.lender.take(A, ReleaseLease(request_id="q"))  # somebody else's, or of what ended


def test_nothing_is_held_after_a_release(bench):
    bench.ask(A)
    assert bench.lender.take(A, ReleaseLease(request_id="q"))
    assert bench.pinned() == [0] * 4
    assert not bench.lender.take(A, ReleaseLease(request_id="q"))


def test_nothing_is_held_after_the_lease_which_each_renewal_begins_anew(bench):
    bench.ask(A)
    bench.now_s += LEASE_S
    bench.lender.pass_time()
    assert bench.lender.take(A, RenewLease(request_id="q"))
    bench.now_s += LEASE_S
    bench.lender.pass_time()
    assert bench.pinned() == [1] * 4
    bench.now_s += 0.1
    bench.lender.pass_time()
    assert bench.pinned() == [0] * 4
    assert not bench.lender.take(A, RenewLease(request_id="q"))
    assert bench.lender.leases.num_expired == 1


def test_nothing_is_held_for_an_asker_that_is_gone(bench):
    bench.ask(A, NAMES[:2], "one")
    bench.ask(A, NAMES[1:3], "two")
    bench.ask(B, NAMES[2:])
    bench.lender.lose(A)
    assert bench.pinned() == [0, 0, 1, 1]


def test_two_askers_may_use_one_id(bench):
    bench.ask(A, NAMES[:3])
    bench.ask(B, NAMES[2:])
    assert bench.pinned() == [1, 1, 2, 1]
    bench.lender.take(A, ReleaseLease(request_id="q"))
    assert bench.pinned() == [0, 0, 1, 1]
    bench.lender.take(B, ReleaseLease(request_id="q"))
    assert bench.pinned() == [0] * 4


def test_a_second_question_under_an_id_takes_the_place_of_the_first(bench):
    bench.ask(A, NAMES[:2])
    assert [block.name for block in each_location(bench.ask(A, NAMES[1:]).blocks)] == NAMES[1:]
    assert bench.pinned() == [0, 1, 1, 1]
    assert bench.ask(A, [b"x" * 16]).blocks == b""
    assert bench.pinned() == [0] * 4


def test_a_lease_of_another_is_not_ours(bench):
    bench.ask(A)
    for message in (RenewLease(request_id="p"), ReleaseLease(request_id="p")):
        assert not bench.lender.take(A, message)
    assert not bench.lender.take(B, ReleaseLease(request_id="q"))
    bench.post(BlocksReleased("q"))  # a sequence's, under an id like the question's
    assert bench.pinned() == [1] * 4
