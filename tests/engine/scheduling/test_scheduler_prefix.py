"""What the scheduler decides of prompts that begin alike, case by case."""

from __future__ import annotations

import pytest

from engine.scheduling.plan import (
    SequenceCancelled,
    TimePassed,
)
from messages.errors import RequestError
from messages.stream import PromptSources
from tests.engine.scheduling.scheduler_bench import PROMPT, Bench, emitted


def test_a_prompt_seen_before_is_reused_up_to_its_last_full_block(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=1)
    bench.run()
    bench.add("b", PROMPT, max_tokens=1)
    assert bench.step() == [("b", "prefill", 16, 19)]
    assert emitted(bench.out)[0].sources == PromptSources(device=16, computed=3)


def test_at_least_one_token_is_computed(bench: Bench) -> None:
    bench.add("a", PROMPT[:16], max_tokens=1)
    bench.run()
    bench.add("b", PROMPT[:16], max_tokens=1)
    assert bench.step() == [("b", "prefill", 12, 16)]


def test_generated_blocks_are_reused_by_the_next_turn(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=6)
    bench.run()
    bench.add("b", [*PROMPT, *[7] * 6, 1], max_tokens=1)
    assert bench.step() == [("b", "prefill", 24, 26)]


def test_tenants_do_not_share(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=1, salt=b"one")
    bench.run()
    bench.add("b", PROMPT, max_tokens=1, salt=b"two")
    assert bench.step() == [("b", "prefill", 0, 19)]


def test_prompt_logprobs_compute_everything_and_are_told_once(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=2)
    bench.run()
    bench.add("b", PROMPT, max_tokens=2, prompt_logprobs=0)
    assert [bench.step() for _ in range(3)] == [
        [("b", "prefill", 0, 8)],
        [("b", "prefill", 8, 16)],
        [("b", "prefill", 16, 19)],
    ]
    [first] = emitted(bench.out)
    assert first.prompt_logprobs is not None
    assert [entry and entry.token_id for entry in first.prompt_logprobs] == [None, *PROMPT[1:]]
    bench.step()
    assert emitted(bench.out)[0].prompt_logprobs is None


def test_a_burst_with_one_prompt_computes_it_once(bench: Bench) -> None:
    for choice in range(4):
        bench.add(f"c{choice}", PROMPT, max_tokens=2)
    assert bench.step() == [("c0", "prefill", 0, 19)]
    assert bench.step() == [("c0", "decode", 19, 20), *((f"c{choice}", "prefill", 16, 19) for choice in (1, 2, 3))]
    bench.run()
    assert bench.scheduler.stats()["num_prompt_tokens_computed"] == 19 + 3 * 3


def test_who_shares_only_the_head_waits_only_for_the_head() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add("a", 40, max_tokens=1)
    prompt = bench.scheduler._ledger.sequences["a"].token_ids
    bench.add("b", [*prompt[:8], 1, 2, 3], max_tokens=1)
    assert bench.scheduler.num_waiting == 1
    assert bench.step() == [("a", "prefill", 0, 8)]
    assert bench.scheduler.num_waiting == 0
    assert ("b", "prefill", 8, 11) in bench.step()


def test_who_waits_for_a_prefix_goes_on_when_its_owner_is_cancelled(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.add("b", PROMPT)
    assert bench.scheduler.num_waiting == 1
    bench.post(SequenceCancelled("a"))
    assert bench.step() == [("b", "prefill", 0, 19)]


def test_the_urgent_do_not_wait_for_the_patient(bench: Bench) -> None:
    bench.add("a", PROMPT, priority=1)
    bench.add("b", PROMPT, priority=0)
    bench.add("c", PROMPT, priority=1)
    assert [span[0] for span in bench.step()] == ["b", "a"]


def test_an_id_in_use_costs_no_one_else_its_deadline(bench: Bench) -> None:
    bench.add("a", 5)
    bench.add("b", 5, deadline_s=1.0)
    bench.now_s = 1.0
    with pytest.raises(RequestError):
        bench.add("a", 5)
    assert [emit.seq_id for emit in emitted(bench.post(TimePassed()))] == ["b"]


def test_who_is_held_back_does_not_hold_back_others(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.add("b", PROMPT)
    bench.add("c", 5)
    assert bench.step() == [("c", "prefill", 0, 5), ("a", "prefill", 0, 19)]


def test_the_queue_counts_a_shared_prompt_once(bench: Bench) -> None:
    bench.add("a", PROMPT)
    bench.add("b", PROMPT)
    assert bench.scheduler.queued_tokens == 19 + 3


def test_who_shares_blocks_with_a_slow_pull_waits_no_longer_than_computing_them_takes(bench: Bench) -> None:
    for number in range(4):  # one more token costs 1 s
        bench.add(f"w{number}", 20 + number)
        bench.finish(elapsed_s=float(sum(part.num_tokens for part in bench.start())))
        bench.run()
    bench.add("slow", [*PROMPT[:8], *range(500, 590)], remote_s=50.0)
    bench.add("a", [*PROMPT[:8], 1, 2, 3])
    assert bench.step()[0][0] == "a"


def test_who_shares_blocks_with_a_pull_waits_for_it_as_long_as_was_predicted(bench: Bench) -> None:
    for number in range(4):
        bench.add(f"w{number}", 20 + number)
        bench.finish(elapsed_s=float(sum(part.num_tokens for part in bench.start())))
        bench.run()
    bench.add("quick", PROMPT, remote_s=3.0)
    bench.add("a", [*PROMPT, 1, 2, 3])
    bench.now_s += 2.9
    assert bench.step() == []
    bench.now_s += 0.2
    assert bench.step()[0][0] == "a"


def test_who_would_evict_what_is_used_again_waits_and_who_finds_its_prompt_goes_first():
    bench = Bench(num_blocks=16)
    bench.add("held", PROMPT, max_tokens=1)
    bench.run()  # four blocks are kept
    bench.pool.reused_share = 1.0
    bench.add("other", 8, max_tokens=100)
    bench.step()
    bench.add("large", 44, max_tokens=1)
    bench.add("again", PROMPT, max_tokens=1)
    assert [part.seq_id for part in bench.start()] == ["other", "again"]
    bench.finish()
    bench.now_s += 1.0  # longer than what it evicts is worth
    bench.post(TimePassed())
    assert [part.seq_id for part in bench.start()] == ["other", "large"]


def test_who_would_evict_does_not_wait_for_nobody():
    bench = Bench(num_blocks=16)
    bench.add("held", PROMPT, max_tokens=1)
    bench.run()
    bench.pool.reused_share = 1.0
    bench.add("large", 60, max_tokens=1)
    assert [part.seq_id for part in bench.start()] == ["large"]
