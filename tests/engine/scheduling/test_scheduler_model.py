"""The scheduler against a worker made of lists: whatever happens, every token attends to exactly its own past.

The fake KV of a token is a number that stands for its whole prefix; the fake model's next token follows from the number
of the last one. A block used too early, too late, twice, or after it was given away therefore shows as a wrong number,
and the tokens that come out can be compared with a generation that never saw a pool.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.scheduling.config import SchedulerConfig
from engine.scheduling.plan import (
    KvRefused,
    SequenceSpec,
    TimePassed,
)
from kvcache import load_plan
from kvcache.pool import BlockPool
from messages.handoff import FoundRun
from messages.request import Copy, HeldRun, SamplingParams
from tests.engine.fake_worker import FakeWorker, expect
from tests.fake_kv import BASES, STOP, VOCABULARY, kv_numbers, next_token


def held_at_random(rng: random.Random, num_blocks: int) -> tuple[HeldRun, ...]:
    """Runs that follow each other, mostly, at holders of all kinds."""
    runs, position = [], 0
    while position < num_blocks and rng.random() < 0.8:
        end = rng.randint(position + 1, num_blocks)
        copies = tuple(
            Copy(rng.choice(["near", "far", "lost"]), rng.choice(["device", "host", "disk", "remote"]))
            for _ in range(rng.randint(1, 3))
        )
        runs.append(HeldRun(position, end, copies))
        position = end + (rng.random() < 0.1)
    return tuple(runs)


def held_by_seed(seed: int | None, num_blocks: int) -> tuple[HeldRun, ...] | None:
    """None: nobody holds any; 0: nobody said it."""
    if not seed:
        return () if seed is None else None
    return held_at_random(random.Random(seed), num_blocks)


def found_at_random(rng: random.Random, span: range) -> list[FoundRun]:
    """Where a holder has some of the blocks that it will be asked for."""
    cuts = sorted({span.start, span.stop, *(rng.randint(span.start, span.stop) for _ in range(2))})
    runs = [FoundRun(begin, end, rng.choice(["host", "disk", "remote"])) for begin, end in pairwise(cuts)]
    return [run for run in runs if rng.random() < 0.8]


class SchedulerMachine(RuleBasedStateMachine):
    """Everything that can happen to a scheduler, in any order, on a pool that is too small."""

    worker: FakeWorker

    @initialize(
        num_blocks=st.one_of(st.integers(4, 16), st.just(48)),
        quantum=st.sampled_from([4, 6, 8]),
        budget=st.sampled_from([8, 12, 24]),
        max_num_seqs=st.integers(1, 5),
        watermark=st.sampled_from([0.0, 0.1]),
        plans_ahead=st.booleans(),
    )
    def make(self, num_blocks, quantum, budget, max_num_seqs, watermark, plans_ahead) -> None:
        config = SchedulerConfig(
            max_model_len=44,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            chunk_quantum_tokens=quantum,
            remote_timeout_s=10.0,
            watermark=watermark,
            block_bytes=1,
            plans_ahead=plans_ahead,
            has_lower_tiers=True,
        )
        self.worker = FakeWorker(config, BlockPool(num_blocks, 4))
        self.num_added = 0

    def _alive(self) -> list[str]:
        return [seq_id for seq_id, expected in self.worker.sequences.items() if not expected.is_over]

    @rule(
        data=st.data(),
        num_choices=st.sampled_from([1, 1, 1, 3]),
        max_tokens=st.integers(1, 14),
        kind=st.sampled_from(["local", "local", "remote", "kept"]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        salt=st.sampled_from([b"", b"", b"s"]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        has_stop=st.booleans(),
        min_tokens=st.integers(0, 3),
        patience_s=st.sampled_from([None, None, None, 4.0]),
        remote_s=st.sampled_from([0.0, 0.0, 0.02, math.inf]),
        held_seed=st.sampled_from([None, None, 0, 1, 2, 3, 4]),
    )
    def add(
        self,
        data,
        num_choices,
        max_tokens,
        kind,
        priority,
        salt,
        prompt_logprobs,
        has_stop,
        min_tokens,
        patience_s,
        remote_s,
        held_seed,
    ):
        longest = min(self.worker.max_len - 1, 40)
        over = [e for e in self.worker.sequences.values() if e.is_over and len(e.token_ids) < longest]
        if over and data.draw(st.booleans()):  # the next turn of a conversation
            turn = data.draw(st.sampled_from(over))
            tokens = [*turn.token_ids, 1][:longest]
        else:
            length = data.draw(st.integers(1, longest))
            tokens = BASES[data.draw(st.integers(0, 1))][:length]
            if data.draw(st.booleans()):
                tokens = [*tokens[:-1], data.draw(st.integers(0, VOCABULARY - 1))]
        num_prompt = len(tokens)
        if kind != "kept" and data.draw(st.sampled_from([False, False, False, True])):  # a stream that moved here
            for _ in range(data.draw(st.integers(1, 6))):
                if len(tokens) < self.worker.max_len:
                    tokens.append(next_token(kv_numbers(salt, tokens)[-1]))
        for choice in range(num_choices):
            self.num_added += 1
            params = SamplingParams(
                max_tokens=max_tokens,
                choice=choice,
                prompt_logprobs=prompt_logprobs,
                stop_token_ids=(STOP,) if has_stop else (),
                min_tokens=min_tokens,
            )
            spec = SequenceSpec(
                seq_id=f"s{self.num_added}",
                token_ids=list(tokens),
                num_prompt_tokens=num_prompt,
                params=params,
                salt=salt,
                priority=priority,
                deadline_s=None if patience_s is None else self.worker.now_s + patience_s,
                remote_s=remote_s if kind == "remote" else None,
                is_kept=kind == "kept",
                held=held_by_seed(held_seed, len(tokens) // 4),
            )
            expected = expect(spec, self.worker.max_len)
            if expected.token_ids == spec.token_ids:
                continue  # ended before it moved; a test of its own
            self.worker.add(spec)

    @precondition(lambda self: self.worker.may_want_step)
    @rule()
    def start_step(self) -> None:
        self.worker.want_step()

    @precondition(lambda self: self.worker.step is not None)
    @rule(data=st.data(), token_s=st.sampled_from([1e-4, 1e-3, 0.05]))
    def end_step(self, data, token_s) -> None:
        failed = set()
        if data.draw(st.sampled_from([False] * 9 + [True])):
            failed = {data.draw(st.sampled_from([part.seq_id for part in self.worker.step.plan.parts]))}
        self.worker.end_step(failed, token_s)

    @precondition(lambda self: self.worker.may_want_step)
    @rule(num_steps=st.integers(1, 8))
    def run_steps(self, num_steps) -> None:
        for _ in range(num_steps):
            self.worker.want_steps()
            if self.worker.step is not None:
                self.worker.end_step()

    @precondition(lambda self: self._alive())
    @rule(data=st.data())
    def cancel(self, data) -> None:
        self.worker.cancel(data.draw(st.sampled_from(self._alive())))

    @precondition(lambda self: self.worker.asked)
    @rule(data=st.data(), is_last=st.booleans(), is_whole=st.booleans(), cached=st.integers(0, 40))
    def offer(self, data, is_last, is_whole, cached) -> None:
        seq_id = data.draw(st.sampled_from(list(self.worker.asked)))
        num_prompt = self.worker.sequences[seq_id].spec.num_prompt_tokens
        every = list(range(-(-num_prompt // 4)))
        indexes = every if is_whole else data.draw(st.lists(st.sampled_from(every), unique=True))
        wrong = set(data.draw(st.sampled_from([[], [], [], indexes[:1]])))
        self.worker.offer(seq_id, indexes, is_last=is_last, wrong=wrong, cached=min(cached, num_prompt))

    @precondition(lambda self: self.worker.asked)
    @rule(data=st.data())
    def refuse(self, data) -> None:
        seq_id = data.draw(st.sampled_from(list(self.worker.asked)))
        del self.worker.asked[seq_id]
        self.worker.post(KvRefused(seq_id))

    @precondition(lambda self: self.worker.pulls)
    @rule(data=st.data(), is_late=st.booleans())
    def end_pull(self, data, is_late) -> None:
        seq_id = data.draw(st.sampled_from(list(self.worker.pulls)))
        indexes = [location.index for location, _ in self.worker.pulls[seq_id][0]]
        bad = set(data.draw(st.sampled_from([[], [], indexes, indexes[:1], indexes[-1:], indexes[1:2]])))
        self.worker.end_pull(seq_id, bad, self.worker.now_s + 3 if is_late and bad else None)

    @precondition(lambda self: self.worker.questions)
    @rule(data=st.data(), is_last=st.booleans(), is_whole=st.booleans())
    def offer_blocks(self, data, is_last, is_whole) -> None:
        seq_id, source = data.draw(st.sampled_from(list(self.worker.questions)))
        every = list(self.worker.questions[seq_id, source])
        indexes = every if is_whole else data.draw(st.lists(st.sampled_from(every), unique=True))
        wrong = set(data.draw(st.sampled_from([[], [], [], indexes[:1]])))
        self.worker.offer_blocks(seq_id, source, indexes, is_last=is_last, wrong=wrong)

    @precondition(lambda self: self.worker.ahead)
    @rule(data=st.data(), seed=st.integers(0, 9))
    def find_ahead(self, data, seed) -> None:
        key = data.draw(st.sampled_from(list(self.worker.ahead)))
        self.worker.find_ahead(*key, found_at_random(random.Random(seed), self.worker.ahead[key]))

    @precondition(lambda self: self.worker.sequences)
    @rule(data=st.data(), first_index=st.integers(0, 3), lease_id=st.sampled_from(["a lease", "another"]))
    def lend(self, data, first_index, lease_id) -> None:
        self.worker.lend(lease_id, data.draw(st.sampled_from(list(self.worker.sequences))), first_index)

    @precondition(lambda self: self.worker.lent)
    @rule(data=st.data())
    def end_lending(self, data) -> None:
        self.worker.end_lending(data.draw(st.sampled_from(list(self.worker.lent))))

    @precondition(lambda self: self.worker.sequences)
    @rule(data=st.data(), first_index=st.integers(0, 3), age_s=st.sampled_from([None, -1.0, 0.0, 5.0]))
    def take_in(self, data, first_index, age_s) -> None:
        seq_id = data.draw(st.sampled_from(list(self.worker.sequences)))
        self.worker.take_in(seq_id, first_index, None if age_s is None else self.worker.now_s - age_s)

    @precondition(lambda self: self.worker.sequences)
    @rule(data=st.data(), first_index=st.integers(0, 3), is_spare=st.sampled_from([True, True, False]))
    def mark(self, data, first_index, is_spare) -> None:
        self.worker.mark(data.draw(st.sampled_from(list(self.worker.sequences))), first_index, is_spare=is_spare)

    @precondition(lambda self: self.worker.kept)
    @rule(data=st.data())
    def release(self, data) -> None:
        self.worker.release(data.draw(st.sampled_from(list(self.worker.kept))))

    @rule(seconds=st.sampled_from([1.0, 6.0]))
    def time_passes(self, seconds) -> None:
        self.worker.now_s += seconds
        self.worker.post(TimePassed())

    @rule()
    def clear(self) -> None:
        self.worker.pool.clear()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "worker"):
            self.worker.check()

    def teardown(self) -> None:
        if hasattr(self, "worker"):
            self.worker.drain()


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.slow
class TestSchedulerMachine(SchedulerMachine.TestCase):
    settings = settings(max_examples=30, stateful_step_count=40, derandomize=True, **_SETTINGS)


@pytest.mark.long
class TestSchedulerMachineAtLength(SchedulerMachine.TestCase):
    settings = settings(max_examples=300, stateful_step_count=80, **_SETTINGS)


def drive_at_random(seed: int, num_events: int, *, plans_ahead: bool = False) -> FakeWorker:
    """Steps most of the time, so that sequences get long, with everything else in between."""
    rng = random.Random(seed)
    config = SchedulerConfig(
        max_model_len=40,
        max_num_seqs=rng.randint(2, 6),
        max_num_batched_tokens=rng.choice([8, 16, 32]),
        chunk_quantum_tokens=rng.choice([4, 8]),
        remote_timeout_s=10.0,
        block_bytes=1,
        plans_ahead=plans_ahead,
        has_lower_tiers=True,
    )
    worker = FakeWorker(config, BlockPool(rng.randint(10, 20), 4))
    for number in range(num_events):
        action = rng.random()
        if action < 0.1:
            add_at_random(worker, rng, number)
        elif action < 0.14 and worker.scheduler.seq_ids():
            seq_id = rng.choice(worker.scheduler.seq_ids())
            worker.release(seq_id) if seq_id in worker.kept else worker.cancel(seq_id)
        elif action < 0.34 and worker.asked:
            seq_id = rng.choice(list(worker.asked))
            indexes = list(range(-(-worker.sequences[seq_id].spec.num_prompt_tokens // 4)))
            if rng.random() < 0.3:
                indexes = rng.sample(indexes, rng.randint(0, len(indexes)))
            wrong = {index for index in indexes if rng.random() < 0.1}
            worker.offer(seq_id, indexes, is_last=rng.random() < 0.4, wrong=wrong, cached=rng.randint(0, 9))
        elif action < 0.42 and worker.pulls:
            seq_id = rng.choice(list(worker.pulls))
            bad = {location.index for location, _ in worker.pulls[seq_id][0] if rng.random() < 0.3}
            worker.end_pull(seq_id, bad, worker.now_s + 3 if bad and rng.random() < 0.5 else None)
        elif action < 0.45 and worker.questions:
            seq_id, source = rng.choice(list(worker.questions))
            indexes = list(worker.questions[seq_id, source])
            if rng.random() < 0.4:
                indexes = rng.sample(indexes, rng.randint(0, len(indexes)))
            wrong = {index for index in indexes if rng.random() < 0.05}
            worker.offer_blocks(seq_id, source, indexes, is_last=rng.random() < 0.4, wrong=wrong)
        elif action < 0.47 and worker.ahead:
            key = rng.choice(list(worker.ahead))
            worker.find_ahead(*key, found_at_random(rng, worker.ahead[key]))
        elif action < 0.46 and worker.sequences:
            worker.lend(f"lease {rng.randint(0, 2)}", rng.choice(list(worker.sequences)), rng.randint(0, 3))
        elif action < 0.47 and worker.lent:
            worker.end_lending(rng.choice(list(worker.lent)))
        elif action < 0.48 and worker.kept:
            worker.release(rng.choice(list(worker.kept)))
        elif action < 0.495 and worker.sequences:
            seq_id = rng.choice(list(worker.sequences))
            worker.take_in(seq_id, rng.randint(0, 3), worker.now_s - rng.choice([0.0, 3.0]))
        elif action < 0.51 and worker.sequences:
            seq_id = rng.choice(list(worker.sequences))
            worker.mark(seq_id, rng.randint(0, 3), is_spare=rng.random() < 0.7)
        elif action < 0.52:
            worker.now_s += rng.choice([0.5, 4.0])
            worker.post(TimePassed())
        elif worker.step is not None and not (worker.may_want_step and rng.random() < 0.7):
            failed = {part.seq_id for part in worker.step.plan.parts if rng.random() < 0.005}
            worker.end_step(failed, token_s=rng.choice([1e-4, 5e-3]))
        else:
            worker.want_step()
    return worker


def add_at_random(worker: FakeWorker, rng: random.Random, number: int) -> None:
    tokens = [*BASES[rng.randrange(2)][: rng.randint(1, 34)], rng.randrange(VOCABULARY)]
    if len(tokens) >= worker.max_len:
        return
    kind = rng.choice(["local", "local", "remote", "kept"])
    params = SamplingParams(
        max_tokens=rng.randint(1, 20),
        prompt_logprobs=rng.choice([None] * 5 + [1]),
        stop_token_ids=(STOP,) if number % 2 else (),
    )
    priority = rng.choice([0, 0, 1])
    for choice in range(rng.choice([1, 1, 3])):
        spec = SequenceSpec(
            seq_id=f"r{number}.{choice}",
            token_ids=tokens,
            num_prompt_tokens=len(tokens),
            params=params,
            priority=priority,
            remote_s=rng.choice([0.0, 0.0, 0.02]) if kind == "remote" else None,
            is_kept=kind == "kept",
            held=rng.choice([held_at_random(rng, len(tokens) // 4), (), None]),
        )
        worker.add(spec)


@pytest.fixture(autouse=True)
def heads_are_often_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mix computing and loading where that does not pay, too: prompts are short here."""
    monkeypatch.setattr(load_plan, "_HALF_BATCH_S", 0.0)
    monkeypatch.setattr(load_plan, "_CLEARLY", 2.0)


@pytest.mark.slow
def test_long_random_runs_preempt_evict_share_and_lose_nothing() -> None:
    seen: dict[str, int] = {}
    num_evicted = num_hits = num_quarantined = num_mixed = num_spare = num_taken_in = num_offloaded = num_ahead = 0
    for seed in range(40):
        worker = drive_at_random(seed, 400)
        worker.drain()
        for name, value in worker.scheduler.stats().items():
            seen[name] = seen.get(name, 0) + value
        num_evicted += worker.pool.stats.num_evicted_blocks
        num_hits += worker.pool.stats.num_hit_blocks
        num_quarantined += worker.pool.stats.num_quarantined_blocks
        num_mixed += worker.num_mixed
        num_spare += worker.pool.stats.num_evicted_spare_blocks
        num_taken_in += worker.scheduler.num_blocks_taken_in
        num_offloaded += len(worker.offloaded)
        num_ahead += worker.num_found_ahead
    assert min(seen.values()) >= 10, f"the runs must meet everything that is counted: {seen}"
    assert min(num_evicted, num_hits, num_offloaded) > 500
    assert min(num_spare, num_taken_in, num_ahead) > 20
    assert min(num_quarantined, num_mixed) > 0


@pytest.mark.slow
def test_steps_that_are_planned_ahead_lose_nothing_in_random_runs_either() -> None:
    num_preemptions = num_ahead = num_for_nothing = num_hits = 0
    for seed in range(12):
        worker = drive_at_random(seed, 400, plans_ahead=True)
        worker.drain()
        num_preemptions += worker.scheduler.stats()["num_preemptions"]
        num_hits += worker.pool.stats.num_hit_blocks
        num_ahead += worker.num_ahead
        num_for_nothing += worker.num_for_nothing
    assert min(num_ahead, num_hits) > 300
    assert num_for_nothing > 30
    assert num_preemptions > 10


@pytest.mark.long
@pytest.mark.parametrize("plans_ahead", [False, True])
def test_many_long_random_runs_lose_nothing(plans_ahead: bool) -> None:
    for seed in range(100, 200):
        drive_at_random(seed, 600, plans_ahead=plans_ahead).drain()


def test_who_was_preempted_under_a_pull_loads_nothing_before_that_has_ended() -> None:
    config = SchedulerConfig(
        max_model_len=44, max_num_seqs=5, max_num_batched_tokens=8, chunk_quantum_tokens=4, watermark=0.0, block_bytes=1
    )
    worker = FakeWorker(config, BlockPool(17, 4))
    for i in range(3):
        params = SamplingParams(max_tokens=10 + 3 * i)
        worker.add(SequenceSpec(seq_id=f"senior {i}", token_ids=[i, 1, i], num_prompt_tokens=3, params=params))
    for _ in range(3):
        worker.want_step()
        worker.end_step()
    held = (HeldRun(0, 9, (Copy("near", "disk"),)),)
    params = SamplingParams(max_tokens=4)
    worker.add(SequenceSpec(seq_id="r", token_ids=BASES[1], num_prompt_tokens=40, params=params, held=held))
    assert worker.num_mixed == 1
    worker.offer_blocks("r", "near", [8], is_last=False)
    while worker.want_step():  # the seniors grow until "r" is preempted, and end; then it begins anew
        worker.end_step()
    assert worker.scheduler.stats()["num_preemptions"] == 1
    assert worker.num_mixed == 1
    assert list(worker.pulls) == ["r"]
    assert worker.questions == {}  # who is preempted wants nothing more
    worker.drain()
