"""Prefill and decode, their books, schedulers and pools real, with messages in between that are made of lists.

As in test_scheduler_model.py the fake KV of a token is a number that stands for its whole prefix, and the
next token follows from the last number in the cache. Here those numbers also travel: a pull copies whatever a block
holds at that moment, and only the published checksum tells whether it is what was promised. Workers die, leases end
early, blocks are reused under a pull, bytes land late; no wrong number may ever bear a name or be attended to, and at
the end neither side holds a block.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import hypothesis.strategies as st
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

from decode.streams import CancelSequence, StreamBook, StreamInstruction
from engine.lending import Lender
from engine.loans import LoanBook, LoanInstruction, PullStopped
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import EmitTokens, OfferBlocks
from kvcache import leases, load_plan
from kvcache.leases import AskerLost, FreeBlocks, LeaseBook, LeaseEvent
from kvcache.pool import BlockPool
from messages.errors import InvariantError
from messages.request import SamplingParams
from prefill.publications import PublicationBook, PublicationInstruction, TellFailed
from tests.fake_kv import BASES, STOP, VOCABULARY
from tests.prefill.fake_engine import (
    LEASE_S,
    REMOTE_TIMEOUT_S,
    SIZE,
    Holders,
    Pull,
)
from tests.prefill.world import World, config_of


class LeaseMachine(RuleBasedStateMachine):
    """Everything that can happen between a prefill and a decode worker, in any order, with too few blocks."""

    world: World
    verifies = True

    @initialize(
        num_prefill_blocks=st.integers(3, 9),
        num_decode_blocks=st.one_of(st.integers(6, 16), st.just(60)),
        prefill=st.builds(
            config_of, st.sampled_from([4, 6, 8]), st.sampled_from([8, 12, 24]), max_num_seqs=st.integers(1, 4)
        ),
        decode=st.builds(config_of, st.sampled_from([4, 8]), st.sampled_from([8, 24]), st.integers(1, 5)),
        prefill_s=st.sampled_from([0.0, 0.0, 0.01]),
    )
    def make(self, num_prefill_blocks, num_decode_blocks, prefill, decode, prefill_s) -> None:
        self.world = World(
            prefill, decode, num_prefill_blocks, num_decode_blocks, verifies=self.verifies, prefill_s=prefill_s
        )

    def _pulls(self, *, has_begun: bool) -> list[Pull]:
        return [pull for pull in self.world.decode.pulls if (pull.source is not None) == has_begun]

    @rule(
        data=st.data(),
        max_tokens=st.integers(1, 10),
        is_remote=st.sampled_from([True, True, True, True, False]),
        manners=st.sampled_from(["polite", "polite", "hasty", "mute"]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([b"", b"", b"", b"s"]),
        has_stop=st.booleans(),
        patience_s=st.sampled_from([None, None, None, None, 4.0]),
        holders=st.sampled_from(["nobody", "nobody", "near", "slow", "gone"]),
    )
    def add(self, data, max_tokens, is_remote, manners, priority, salt, has_stop, patience_s, holders) -> None:
        fits_prefill = SIZE * self.world.prefill.engine.pool.num_blocks - 1
        at_most = data.draw(st.sampled_from([fits_prefill, fits_prefill, fits_prefill, 40]))
        length = data.draw(st.integers(1, min(self.world.max_len - 1, at_most)))
        prompt = BASES[data.draw(st.integers(0, 1))][:length]
        if data.draw(st.booleans()):
            prompt = [*prompt[:-1], data.draw(st.integers(0, VOCABULARY - 1))]
        self.world.add(
            prompt,
            SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,) if has_stop else ()),
            salt=salt,
            priority=priority,
            is_remote=is_remote,
            manners=manners,
            patience_s=patience_s,
            holders=holders,
        )

    @precondition(lambda self: self.world.alive())
    @rule(num_rounds=st.integers(1, 6))
    def go_on(self, num_rounds) -> None:
        """Steps and messages as they come; pulls only begin."""
        for _ in range(num_rounds):
            self.world.step_prefill()
            for connection, to_prefill in self.world.deliverable():
                self.world.deliver(connection, to_prefill)
            for pull in self._pulls(has_begun=False):
                self.world.decode.begin_pull(pull)
            self.world.step_decode()

    @rule(data=st.data())
    def step_prefill(self, data) -> None:
        failed = set()
        step = self.world.prefill.engine.step
        if step is not None and data.draw(st.sampled_from([False] * 4 + [True])):
            failed = {data.draw(st.sampled_from([part.seq_id for part in step.parts]))}
        self.world.step_prefill(failed)

    @rule()
    def step_decode(self) -> None:
        self.world.step_decode()

    @precondition(lambda self: self.world.deliverable())
    @rule(data=st.data())
    def deliver(self, data) -> None:
        self.world.deliver(*data.draw(st.sampled_from(self.world.deliverable())))

    @precondition(lambda self: self._pulls(has_begun=False))
    @rule(data=st.data())
    def begin_pull(self, data) -> None:
        self.world.decode.begin_pull(data.draw(st.sampled_from(self._pulls(has_begun=False))))

    @precondition(lambda self: self._pulls(has_begun=True))
    @rule(data=st.data(), is_renewed=st.booleans())
    def copy(self, data, is_renewed) -> None:
        pull = data.draw(st.sampled_from(self._pulls(has_begun=True)))
        lacking = [position for position in range(len(pull.pairs)) if position not in pull.copied]
        if lacking:
            self.world.decode.copy(pull, data.draw(st.sampled_from(lacking)))
        if is_renewed:
            self.world.decode.look_at(pull)

    @precondition(lambda self: self._pulls(has_begun=True))
    @rule(data=st.data(), ending=st.sampled_from(["well", "well", "well", "some", "none", "late", "late"]))
    def end_pull(self, data, ending) -> None:
        pull = data.draw(st.sampled_from(self._pulls(has_begun=True)))
        lost = data.draw(st.sets(st.integers(0, len(pull.pairs) - 1))) if ending == "some" else set()
        self.world.decode.end_pull(pull, ending, lost)

    @precondition(lambda self: self.world.late)
    @rule(data=st.data())
    def land(self, data) -> None:
        self.world.land(data.draw(st.sampled_from(self.world.late)))

    @rule(seconds=st.sampled_from([0.5, 1.0, LEASE_S + 0.5, LEASE_S + 0.5, REMOTE_TIMEOUT_S + 0.5]))
    def pass_time(self, seconds) -> None:
        self.world.pass_time(seconds)

    @precondition(lambda self: self.world.alive())
    @rule(data=st.data(), what=st.sampled_from(["cancel", "clear", "decode dies", "prefill dies"]), is_so=st.booleans())
    def disturb(self, data, what, is_so) -> None:
        match what:
            case "cancel":
                self.world.cancel(data.draw(st.sampled_from(self.world.alive())))
            case "clear":
                (self.world.prefill if is_so else self.world.decode).engine.pool.clear()
            case "decode dies":
                self.world.kill_decode(loses_messages=is_so, is_retried=lambda: data.draw(st.sampled_from([1, 1, 0])))
            case "prefill dies":
                self.world.kill_prefill(loses_messages=is_so)

    @precondition(lambda self: self.world.prefill.lender._questions)
    @rule(loses_messages=st.booleans())
    def lose_who_borrows(self, loses_messages) -> None:
        self.world.kill_decode(loses_messages=loses_messages, is_retried=lambda: 1)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.slow
class TestLeaseMachine(LeaseMachine.TestCase):
    settings = settings(max_examples=40, stateful_step_count=50, derandomize=True, **_SETTINGS)


@pytest.mark.long
class TestLeaseMachineAtLength(LeaseMachine.TestCase):
    settings = settings(max_examples=200, stateful_step_count=80, **_SETTINGS)


# ----------------------------------------------------------------------------------------------------- long random runs


def drive_at_random(seed: int, num_events: int) -> World:
    """Progress most of the time, so that every stage is reached, with everything else in between."""
    rng = random.Random(seed)
    prefill = config_of(rng.choice([4, 6, 8]), rng.choice([8, 12, 24]), rng.randint(1, 4))
    has_few_slots = seed % 3 == 0  # then sequences wait though there is room
    decode = config_of(4, rng.choice([8, 24]), 1 if has_few_slots else rng.randint(2, 6))
    sizes = (40, 60) if has_few_slots else (rng.randint(6, 10), rng.randint(10, 20))
    world = World(prefill, decode, *sizes, prefill_s=rng.choice([0.0, 0.01]))
    for _ in range(num_events):
        action = rng.random()
        pulls = world.decode.pulls
        if action < 0.1 and len(world.alive()) < 8:
            add_at_random(world, rng, has_few_slots=has_few_slots)
        elif action < 0.35 and world.deliverable():
            world.deliver(*rng.choice(world.deliverable()))
        elif action < 0.5 and pulls:
            pull = rng.choice(pulls)
            lacking = [position for position in range(len(pull.pairs)) if position not in pull.copied]
            if pull.source is None:
                world.decode.begin_pull(pull)
            elif lacking and rng.random() < 0.5:
                world.decode.copy(pull, rng.choice(lacking))
                world.decode.look_at(pull)
            else:
                lost = set(rng.sample(lacking, rng.randint(0, len(lacking))))
                world.decode.end_pull(pull, rng.choice(["well", "well", "well", "some", "none", "late"]), lost)
        elif action < 0.51 and world.late:
            world.land(rng.choice(world.late))
        elif action < 0.54:
            world.pass_time(rng.choice([0.3, 0.3, 1.0, LEASE_S + 0.1]))
        elif action < 0.545 and world.alive():
            world.cancel(rng.choice(world.alive()))
        elif action < 0.552:
            world.kill_decode(loses_messages=rng.random() < 0.5, is_retried=lambda: rng.random() < 0.8)
        elif action < 0.557:
            world.kill_prefill(loses_messages=rng.random() < 0.5)
        elif action < 0.62 and has_few_slots:
            world.decode.engine.pool.clear()
        elif action < 0.8:
            step = world.prefill.engine.step
            world.step_prefill({part.seq_id for part in step.parts if rng.random() < 0.03} if step else set())
        else:
            world.step_decode()
        world.check()
    return world


def add_at_random(world: World, rng: random.Random, *, has_few_slots: bool) -> None:
    holders: list[Holders] = ["near"] if has_few_slots else ["nobody", "nobody", "near", "slow", "gone"]
    salts = [b"a", b"b", b"c"] if has_few_slots else [b"", b"", b"s"]
    prompt = [*BASES[rng.randrange(2)][: rng.randint(1, 30)], rng.randrange(VOCABULARY)]
    world.add(
        prompt[: world.max_len - 1],
        SamplingParams(max_tokens=rng.randint(1, 8)),
        salt=rng.choice(salts),
        priority=rng.choice([0, 0, 1]),
        is_remote=rng.random() < 0.9,
        manners=rng.choice(["polite", "polite", "hasty", "mute"]),
        patience_s=rng.choice([None] * 5 + [4.0]),
        holders=rng.choice(holders),
    )


@pytest.fixture(autouse=True)
def heads_are_often_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mix computing and loading where that does not pay, too: prompts are short here."""
    monkeypatch.setattr(load_plan, "_HALF_BATCH_S", 0.0)
    monkeypatch.setattr(load_plan, "_CLEARLY", 2.0)


@pytest.mark.slow
def test_long_random_runs_meet_every_accident_and_end_clean() -> None:
    seen: Counter[str] = Counter()
    for seed in range(75):
        world = drive_at_random(seed, 400)
        world.drain()
        seen += world.seen
    accidents = (
        "finished",
        "copied",
        "damaged",
        "published early",
        "expired",
        "late writes",
    )
    accidents += ("asker lost", "refused", "prefill failed", "retried", "asked again", "too late", "learned")
    accidents += ("lent by name", "not there any more", "lease on lent blocks expired", "head computed meanwhile")
    accidents += ("pulled for who waits",)
    assert seen.keys() - {"admitted under its pull"} == set(accidents)
    assert min(seen.values()) >= 5, f"the runs must meet everything that is counted: {seen}"


@pytest.mark.long
def test_many_long_random_runs_end_clean() -> None:
    for seed in range(100, 200):
        drive_at_random(seed, 600).drain()


# ------------------------------------------------------------------------------------------------- ahead of admission


@pytest.mark.parametrize("accident", ["none", "some lost", "late bytes", "source dies", "cancelled", "lease ends"])
def test_who_is_admitted_under_the_pull_that_began_while_it_waited_goes_on_with_it(accident) -> None:
    world = World(config_of(8, 24, 4), config_of(8, 24, 1), num_prefill_blocks=20, num_decode_blocks=60)
    world.add(BASES[0][:30], SamplingParams(max_tokens=2))
    run_until(world, lambda: not world.alive())
    world.pass_time(LEASE_S + 0.1)
    world.decode.engine.pool.clear()
    world.add(BASES[1][:9], SamplingParams(max_tokens=20), is_remote=False)
    world.step_decode()
    asked = world.add(BASES[0][:30], SamplingParams(max_tokens=3), is_remote=accident != "none", holders="near")
    run_until(world, lambda: world.decode.pulls)
    assert world.seen["pulled for who waits"] == 1
    (pull,) = world.decode.pulls
    world.decode.begin_pull(pull)
    world.decode.copy(pull, 0)
    match accident:
        case "source dies":
            world.kill_prefill(loses_messages=True)
        case "lease ends":
            world.pass_time(LEASE_S + 0.1)
            world.prefill.engine.pool.clear()
    while asked not in world.decode.engine.scheduler._ledger.pulling:
        world.step_decode()
    if accident == "cancelled":
        world.cancel(asked)
    endings = {"some lost": "some", "late bytes": "late", "source dies": "none"}
    world.decode.end_pull(pull, endings.get(accident, "well"), {1, 2} if accident == "some lost" else set())
    assert world.seen["admitted under its pull"] == (accident != "cancelled")
    world.check()
    world.drain()


def run_until(world: World, is_over: Callable[[], object]) -> None:
    """Steps and messages as they come, and pulls to their good ends while there is more to come."""
    while not is_over():
        for pull in list(world.decode.pulls):
            world.decode.begin_pull(pull)
            world.decode.end_pull(pull, "well")
        for connection, to_prefill in world.deliverable():
            world.deliver(connection, to_prefill)
        world.step_prefill()
        if not is_over():
            world.step_decode()


# ------------------------------------------------------------------------------------------------- it is able to fail


def reused_under_a_pull(*, verifies: bool) -> World:
    """A pull copies only after its lease has ended and its source blocks hold another prompt."""
    config = config_of(8, 24, 4)
    world = World(config, config, num_prefill_blocks=4, num_decode_blocks=16, verifies=verifies)
    world.add(BASES[0][:10], SamplingParams(max_tokens=5))
    while not world.decode.pulls:
        world.step_prefill()
        for connection, to_prefill in world.deliverable():
            world.deliver(connection, to_prefill)
    (pull,) = world.decode.pulls
    world.decode.begin_pull(pull)
    world.pass_time(LEASE_S + 0.5)
    world.add(BASES[1][:15], SamplingParams(max_tokens=5))
    for _ in range(4):
        for connection, to_prefill in world.deliverable():
            world.deliver(connection, to_prefill)
        world.step_prefill()
    world.check()
    world.decode.end_pull(pull, "well")
    world.check()
    world.drain()
    return world


def test_a_block_reused_under_a_pull_is_noticed_by_its_checksum_and_computed() -> None:
    world = reused_under_a_pull(verifies=True)
    assert world.seen["damaged"] == 3
    assert world.seen["finished"] == 2


def test_without_checksums_the_model_sees_the_wrong_content() -> None:
    with pytest.raises(AssertionError, match="a name never lies"):
        reused_under_a_pull(verifies=False)


allocate, keep, on_event = BlockPool.allocate, SequenceLedger.keep, LeaseBook.on_event
take_token, cancel = PublicationBook._take_token, StreamBook._cancel
end_pull, give_up = LoanBook._end_pull, LoanBook._give_up


def free_without_quarantine(pool: BlockPool, block_ids: Sequence[int], until_s: float) -> None:
    pool.unpin(block_ids)


def reuse_without_a_new_generation(pool: BlockPool, num_blocks: int) -> list[int]:
    block_ids = allocate(pool, num_blocks)
    for block_id in block_ids:
        pool._generations[block_id] -= 1
    return block_ids


def commit_bad_orphans(
    ledger: SequenceLedger, seq_id: str, bad_indexes: frozenset[int], quarantine_until_s: float | None
) -> None:
    for target in ledger.orphans.pop(seq_id, []):
        if target.name:
            ledger.pool.commit(target.block_id, target.name)
        ledger.pool.unpin([target.block_id])


def give_back_what_is_kept(ledger: SequenceLedger, seq: object) -> None:
    keep(ledger, seq)
    ledger._give_back(seq)


def forget_without_freeing(book: LeaseBook, request_ids: list[str], *, is_expired: bool = False) -> list[FreeBlocks]:
    for request_id in request_ids:
        del book._leases[request_id]
    return []


def never_expire(book: LeaseBook, event: LeaseEvent, now_s: float) -> list[FreeBlocks]:
    return [] if isinstance(event, leases.TimePassed) else on_event(book, event, now_s)


def lose_nobody(book: LeaseBook, event: LeaseEvent, now_s: float) -> list[FreeBlocks]:
    return [] if isinstance(event, AskerLost) else on_event(book, event, now_s)


def lose_everybody(book: LeaseBook, event: LeaseEvent, now_s: float) -> list[FreeBlocks]:
    return book._free(list(book._leases)) if isinstance(event, AskerLost) else on_event(book, event, now_s)


def publish_without_the_token(book: PublicationBook, offer: OfferBlocks, now_s: float) -> list[PublicationInstruction]:
    return book._publish(book._prompts[offer.seq_id], offer, None, now_s) if offer.seq_id in book._prompts else []


def fail_in_silence(book: PublicationBook, emitted: EmitTokens, now_s: float) -> list[PublicationInstruction]:
    told = take_token(book, emitted, now_s)
    return [instruction for instruction in told if not isinstance(instruction, TellFailed)]


def hold_what_failed(book: PublicationBook, emitted: EmitTokens, now_s: float) -> list[PublicationInstruction]:
    return take_token(book, emitted, now_s) if emitted.token_ids else []


def cancel_in_silence(book: StreamBook, request_id: str) -> list[StreamInstruction]:
    return [item for item in cancel(book, request_id) if not isinstance(item, CancelSequence)]


def release_nothing(book: LoanBook, seq_id: str, now_s: float) -> list[LoanInstruction]:
    return []


def wait_for_the_lost(book: LoanBook, loan_id: str, *, is_suspect: bool = False) -> list[LoanInstruction]:
    del book._loans[loan_id]
    return []


def forget_the_pull_of_who_left(book: LoanBook, stopped: PullStopped, now_s: float) -> list[LoanInstruction]:
    told = end_pull(book, stopped, now_s)
    return told if any(loan.is_wanted for _, loan in book._of(stopped.seq_id)) else []


def end_the_prompt_by_a_question(
    book: LoanBook, seq_id: str, source: str | None, *, teaches: bool = False
) -> list[LoanInstruction]:
    told = give_up(book, seq_id, source, teaches=teaches)
    is_same = any(loan.source == source and not loan.is_offered_whole for _, loan in book._of(seq_id))
    return [*told, *give_up(book, seq_id, None)] if is_same else told


def hold_what_was_lent(ledger: SequenceLedger, lease_id: str) -> None:
    pass


def lend_to_the_lost(lender: Lender, sender: bytes) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (LeaseMachine, "verifies", False),
        (BlockPool, "quarantine", free_without_quarantine),
        (BlockPool, "allocate", reuse_without_a_new_generation),
        (SequenceLedger, "free_orphans", commit_bad_orphans),
        (SequenceLedger, "keep", give_back_what_is_kept),
        (LeaseBook, "_free", forget_without_freeing),
        (LeaseBook, "on_event", never_expire),
        (LeaseBook, "on_event", lose_nobody),
        (LeaseBook, "on_event", lose_everybody),
        (PublicationBook, "_take_offer", publish_without_the_token),
        (PublicationBook, "_take_token", fail_in_silence),
        (PublicationBook, "_take_token", hold_what_failed),
        (StreamBook, "_cancel", cancel_in_silence),
        (LoanBook, "_release_if_over", release_nothing),
        (LoanBook, "_do_without", wait_for_the_lost),
        (LoanBook, "_end_pull", forget_the_pull_of_who_left),
        (LoanBook, "_give_up", end_the_prompt_by_a_question),
        (SequenceLedger, "end_lending", hold_what_was_lent),
        (Lender, "lose", lend_to_the_lost),
    ],
)
def test_the_machine_finds_what_is_wrong(monkeypatch, owner, name, wrong) -> None:
    monkeypatch.setattr(owner, name, wrong)
    enough = settings(
        max_examples=2000, stateful_step_count=50, derandomize=True, phases=[Phase.generate], database=None, **_SETTINGS
    )
    with pytest.raises((AssertionError, InvariantError)):
        run_state_machine_as_test(LeaseMachine, settings=enough)
