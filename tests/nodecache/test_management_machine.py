"""The node cache's machine, with somebody who clears and verifies in the middle of everything."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import rule, run_state_machine_as_test

from kvcache.leases import TimePassed
from messages.cache import CheckBlocks, ClearBlocks, PieceDone
from messages.errors import InvariantError
from nodecache.management import Answer, Asked, BlocksVerified, Management, VerifyBlocks
from nodecache.pool import HostPool
from tests.nodecache.blocks import checksum, name_of
from tests.nodecache.test_cache_machine import MAX_LENGTH, CacheMachine, chains


class ManagedMachine(CacheMachine):
    """Nothing is kept of a question but by who asked: a Management for each will do."""

    verifying: tuple[VerifyBlocks, ...] = ()

    @rule(tier=st.sampled_from(["host", "disk", "remote"]), chain=st.none() | chains)
    def clear(self, tier: str, chain: str | None) -> None:
        names = None if chain is None else b"".join(name_of(index, chain) for index in range(MAX_LENGTH))
        question = ClearBlocks(query_id="q", tier=tier, names=names, is_dry_run=False)
        Management(self.cache).on_event(Asked(b"m", question), self.now_s)
        self.post(TimePassed())  # which tells what changed

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

TestManagedMachine = ManagedMachine.TestCase
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
