"""The node cache's machine, with somebody who clears, verifies, moves and puts in in the middle of everything."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from kvcache.leases import TimePassed
from messages.cache import CheckBlocks, ClearBlocks, MoveBlocks, PieceDone, PutBlocks
from messages.errors import InvariantError
from nodecache.long_work import LongWorker
from nodecache.management import (
    Answer,
    Asked,
    BlocksVerified,
    LongWork,
    Management,
    ManagementEvent,
    VerifyBlocks,
    WorkDone,
)
from nodecache.pool import HostPool
from tests.nodecache.blocks import BLOCK_SIZE, FINGERPRINT, checksum, checksum_of, content_of, name_of
from tests.nodecache.test_cache_machine import MAX_LENGTH, OWNERS, CacheMachine, chains

tiers = st.sampled_from(["host", "disk", "remote"])


class ManagedMachine(CacheMachine):
    """Nothing is kept of a question but by who asked: a Management for each will do."""

    verifying: tuple[VerifyBlocks, ...] = ()
    carrying: tuple[tuple[LongWork, WorkDone | None], ...] = ()  #: work, and what became of it once it is done

    @rule(tier=st.sampled_from(["host", "disk", "remote"]), chain=st.none() | chains)
    def clear(self, tier: str, chain: str | None) -> None:
        names = None if chain is None else b"".join(name_of(index, chain) for index in range(MAX_LENGTH))
        question = ClearBlocks(query_id="q", tier=tier, names=names, is_dry_run=False)
        Management(self.cache).on_event(Asked(b"m", question), self.now_s)
        self.post(TimePassed())  # which tells what changed

    @rule(source=tiers, to=tiers, chain=chains, keeps_source=st.booleans())
    def begin_to_move(self, source: str, to: str, chain: str, keeps_source: bool) -> None:
        names = b"".join(name_of(index, chain) for index in range(MAX_LENGTH))
        question = MoveBlocks(query_id="q", tier=source, target=to, names=names, keeps_source=keeps_source)
        self.manage(Asked(b"m", question))

    @rule(chain=chains, begin=st.integers(0, MAX_LENGTH - 1), is_altered=st.booleans())
    def begin_to_put(self, chain: str, begin: int, is_altered: bool) -> None:
        names = [name_of(index, chain) for index in range(begin, MAX_LENGTH)]
        data = bytearray(b"".join(map(content_of, names)))
        data[-1] ^= is_altered
        question = PutBlocks(
            **{"query_id": "q", "fingerprint": FINGERPRINT, "layout_version": 1, "kernel_path": ""},
            **{"first_index": begin, "block_size": BLOCK_SIZE, "names": b"".join(names), "data": memoryview(data)},
            checksums=np.array([checksum_of(name) for name in names], "<u8").tobytes(),
            tenant=OWNERS[chain],
        )
        self.manage(Asked(b"m", question))

    @precondition(lambda self: self.carrying)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A thread does what is to be done, or its outcome becomes known: anything may happen in between."""
        number = data.draw(st.integers(0, len(self.carrying) - 1))
        work, done = self.carrying[number]
        self.carrying = self.carrying[:number] + self.carrying[number + 1 :]
        if done is None:
            self.carrying += ((work, LongWorker(self.pool.arena, self.stores).do(work)),)
        else:
            self.manage(done)

    def stores_are_ahead(self) -> bool:
        return super().stores_are_ahead() or any(done is not None for _, done in self.carrying)

    def manage(self, event: ManagementEvent) -> None:
        for instruction in Management(self.cache).on_event(event, self.now_s):
            if not isinstance(instruction, Answer):
                self.carrying += ((instruction, None),)
        self.post(TimePassed())  # which tells what changed

    def teardown(self) -> None:
        while self.carrying:
            (work, done), *rest = self.carrying
            self.carrying = tuple(rest)
            self.manage(done or LongWorker(self.pool.arena, self.stores).do(work))
        super().teardown()

    @rule()
    def begin_to_verify(self) -> None:
        question = CheckBlocks(query_id="q", tier="host")
        self.verifying += tuple(Management(self.cache).on_event(Asked(b"m", question), self.now_s))

    @rule()
    def verify(self) -> None:
        """Whatever happened meanwhile, no block is taken for damaged that is not."""
        for work in self.verifying:
            views = map(self.pool.arena.block, work.block_ids.tolist())
            whole = [checksum(view) == wanted for view, wanted in zip(views, work.checksums.tolist(), strict=True)]
            [answer] = Management(self.cache).on_event(BlocksVerified(work, whole), self.now_s)
            assert isinstance(answer, Answer)
            assert isinstance(answer.message, PieceDone)
            assert answer.message.num_damaged == 0
        self.verifying = ()


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}

TestManagedMachine = pytest.mark.slow(ManagedMachine.TestCase)
TestManagedMachine.settings = settings(max_examples=60, stateful_step_count=40, **_SETTINGS)


@pytest.mark.long
def test_many_more_of_them() -> None:
    run_state_machine_as_test(ManagedMachine, settings=settings(max_examples=1500, stateful_step_count=60, **_SETTINGS))


def tell_nobody(pool: HostPool) -> tuple[bytes, bytes]:
    """Wrong: the router hears of nothing."""
    return b"", b""


@pytest.mark.slow
def test_the_machine_finds_that_nobody_is_told(monkeypatch) -> None:
    monkeypatch.setattr(HostPool, "take_events", tell_nobody)
    enough = settings(max_examples=1000, derandomize=True, phases=[Phase.generate], database=None, **_SETTINGS)
    with pytest.raises((AssertionError, InvariantError)):
        run_state_machine_as_test(ManagedMachine, settings=enough)
