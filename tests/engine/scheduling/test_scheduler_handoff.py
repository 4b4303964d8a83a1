"""What the scheduler decides of prompts that two workers share, case by case: kept here for a peer, or left to one."""

from __future__ import annotations

import math

import pytest

from engine.scheduling.plan import (
    AskRemote,
    BlocksReleased,
    EmitTokens,
    KvOffered,
    KvRefused,
    OfferBlocks,
    PullBlocks,
    PullEnded,
    SequenceCancelled,
    StopRemote,
    TimePassed,
)
from kvcache.locations import each_location, pack_locations
from kvcache.names import block_names, pack_tokens, split_names
from messages.errors import InvariantError, WorkerError
from messages.stream import PromptSources
from tests.engine.scheduling.scheduler_bench import PROMPT, Bench, emitted
from tests.locations import pairs_of

# -------------------------------------------------------------------------------------------------------------- kept


def test_a_kept_sequence_offers_its_blocks_just_before_its_token(bench: Bench) -> None:
    bench.add("a", PROMPT, is_kept=True, max_tokens=100)
    bench.start()
    table = list(bench.slots[bench.parts[0]].block_table)
    offer, emit = bench.finish()
    assert isinstance(offer, OfferBlocks)
    assert offer.is_last
    assert [location.block_id for location in each_location(offer.blocks)] == table
    names = split_names(block_names(b"model", b"", pack_tokens(PROMPT), 4))
    assert [location.name for location in each_location(offer.blocks)] == [*names, b""]
    assert [location.num_tokens for location in each_location(offer.blocks)] == [4, 4, 4, 4, 3]
    assert [location.generation for location in each_location(offer.blocks)] == [
        bench.pool.generation(b) for b in table
    ]
    assert emit == EmitTokens("a", [7], sources=PromptSources(computed=19), finish_reason="length")
    assert (bench.scheduler.num_kept, bench.pool.num_used) == (1, 5)
    assert bench.start() == []
    bench.post(BlocksReleased("a"))
    assert (bench.scheduler.num_kept, bench.pool.num_used) == (0, 0)


def test_finished_chunks_are_offered_while_prefill_goes_on() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add("a", PROMPT, is_kept=True)
    offers = []
    while bench.step():
        offers += [item for item in bench.out if isinstance(item, OfferBlocks)]
    assert [[location.index for location in each_location(offer.blocks)] for offer in offers] == [[0, 1], [2, 3], [4]]
    assert [offer.is_last for offer in offers] == [False, False, True]


def test_the_cached_head_of_a_long_prompt_is_offered_at_admission(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=1)
    bench.run()
    [offer] = bench.add("b", [*PROMPT[:16], *range(40)], is_kept=True)
    assert isinstance(offer, OfferBlocks)
    assert [location.index for location in each_location(offer.blocks)] == [0, 1, 2, 3]
    assert offer.num_cached_tokens == 16


def test_blocks_offered_before_a_preemption_are_offered_again() -> None:
    bench = Bench(num_blocks=8, max_num_batched_tokens=8)
    bench.add("a", 6, max_tokens=30)
    bench.step()
    bench.add("b", 20, is_kept=True)
    bench.step()
    assert [location.index for location in bench.offered] == [0, 1]
    bench.scheduler._ledger.preempt(bench.scheduler._ledger.sequences["b"])
    bench.offered.clear()
    while bench.scheduler.num_kept == 0:
        assert bench.step()
    assert [location.index for location in bench.offered] == [0, 1, 2, 3, 4]


def test_a_lease_that_ends_during_prefill_cancels_it(bench: Bench) -> None:
    bench.add("a", PROMPT, is_kept=True)
    bench.post(BlocksReleased("a"))
    assert bench.scheduler.seq_ids() == ()


# ------------------------------------------------------------------------------------------------------------ remote


def remote(bench: Bench, **fields) -> AskRemote:
    [ask] = bench.add("r", PROMPT, remote_s=0.0, **fields)
    assert isinstance(ask, AskRemote)
    return ask


def test_a_remote_prompt_is_asked_for_at_once_with_its_blocks_reserved(bench: Bench) -> None:
    assert remote(bench) == AskRemote("r", 0)
    assert bench.pool.num_used == 5
    assert bench.start() == []


def test_only_what_is_lacking_is_asked_for_and_pulled(bench: Bench) -> None:
    bench.add("a", PROMPT[:9], max_tokens=1)
    bench.run()
    assert remote(bench) == AskRemote("r", 8)
    emit, pull = bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 12))
    assert emit == EmitTokens("r", [42], sources=PromptSources(device=8, peer=4, computed=7))
    assert isinstance(pull, PullBlocks)
    assert [location.index for location, _ in pairs_of(pull)] == [2, 3, 4]
    bench.post(PullEnded("r", frozenset()))
    assert bench.step() == [("r", "decode", 19, 20)]


def test_the_first_token_does_not_wait_for_the_pull(bench: Bench) -> None:
    remote(bench)
    emit, _ = bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0))
    assert isinstance(emit, EmitTokens)
    assert bench.start() == []


def test_a_first_token_that_is_the_last_needs_no_pull(bench: Bench) -> None:
    remote(bench, max_tokens=1)
    [emit] = bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0))
    assert emitted([emit])[0].finish_reason == "length"
    assert bench.pool.num_used == 0


def test_offers_are_pulled_as_they_come_one_pull_at_a_time(bench: Bench) -> None:
    remote(bench)
    [first] = bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, end=2)), False, None, None, 0))
    assert (
        bench.post(
            KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, begin=2, end=3)), False, None, None, 0)
        )
        == []
    )
    [emit] = bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, begin=3)), True, 42, None, 0))
    assert emitted([emit])
    [second] = bench.post(PullEnded("r", frozenset()))
    assert isinstance(first, PullBlocks)
    assert isinstance(second, PullBlocks)
    assert [location.index for location, _ in [*pairs_of(first), *pairs_of(second)]] == [0, 1, 2, 3, 4]
    bench.post(PullEnded("r", frozenset()))
    assert bench.step() == [("r", "decode", 19, 20)]


def test_blocks_of_two_sources_are_pulled_one_source_after_the_other(bench: Bench) -> None:
    remote(bench)
    locations = bench.locations(PROMPT)
    [first] = bench.post(KvOffered("r", "a", pack_locations(locations[:1]), False, None, None, 0))
    assert bench.post(KvOffered("r", "b", pack_locations(locations[1:3]), False, None, None, 0)) == []
    [emit] = bench.post(KvOffered("r", "a", pack_locations(locations[3:]), True, 42, None, 0))
    assert emitted([emit])
    [second] = bench.post(PullEnded("r", frozenset()))
    [third] = bench.post(PullEnded("r", frozenset()))
    assert bench.post(PullEnded("r", frozenset())) == []
    pulls = [(pull.source, [location.index for location, _ in pairs_of(pull)]) for pull in (first, second, third)]
    assert pulls == [("a", [0]), ("b", [1, 2]), ("a", [3, 4])]
    assert bench.step() == [("r", "decode", 19, 20)]


def test_pulled_blocks_have_names_and_serve_the_next(bench: Bench) -> None:
    remote(bench, max_tokens=2)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0))
    bench.post(PullEnded("r", frozenset()))
    bench.add("b", PROMPT, max_tokens=1)
    assert ("b", "prefill", 16, 19) in bench.step()


def test_what_follows_a_bad_block_is_computed_and_the_token_replayed(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0))
    bench.post(PullEnded("r", frozenset({1, 4})))
    assert bench.scheduler.stats()["num_rejected_blocks"] == 2
    spans = bench.step()
    assert spans == [("r", "prefill", 4, 19)]
    assert emitted(bench.out) == [], "its first token was given already"
    assert bench.step() == [("r", "decode", 19, 20)]
    assert emitted(bench.out) == [EmitTokens("r", [7])]


def test_good_blocks_after_a_bad_one_are_not_computed_again() -> None:
    bench = Bench(max_num_batched_tokens=8)
    remote(bench)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0))
    bench.post(PullEnded("r", frozenset({1})))
    assert bench.step() == [("r", "prefill", 4, 8)]
    assert bench.step() == [("r", "prefill", 16, 19)]


def test_a_block_under_another_name_is_not_even_pulled(bench: Bench) -> None:
    remote(bench)
    wrong = bench.locations([*PROMPT[:4], *PROMPT])[:5]
    [_, pull] = bench.post(KvOffered("r", "owner", pack_locations(wrong), True, 42, None, 0))
    assert isinstance(pull, PullBlocks)
    assert [location.index for location, _ in pairs_of(pull)] == [0]
    assert bench.scheduler.stats()["num_rejected_blocks"] == 4


def test_a_bad_block_offered_again_is_pulled_again(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, end=2)), False, None, None, 0))
    bench.post(PullEnded("r", frozenset({1})))
    [pull] = bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, end=2)), False, None, None, 0))
    assert isinstance(pull, PullBlocks)
    assert [location.index for location, _ in pairs_of(pull)] == [1]


def test_a_refusal_leads_to_computing_here(bench: Bench) -> None:
    remote(bench, max_tokens=1)
    bench.post(KvRefused("r"))
    assert bench.step() == [("r", "prefill", 0, 19)]
    assert emitted(bench.out)[0].sources == PromptSources(computed=19)


def test_what_came_before_a_refusal_is_kept(bench: Bench) -> None:
    remote(bench, max_tokens=1)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, end=3)), False, None, None, 8))
    bench.post(PullEnded("r", frozenset()))
    bench.post(KvRefused("r"))
    assert bench.step() == [("r", "prefill", 12, 19)]
    assert emitted(bench.out)[0].sources == PromptSources(peer=8, computed=11)


def test_a_peer_that_stays_silent_is_given_up(bench: Bench) -> None:
    remote(bench)
    bench.now_s = 29.9
    assert bench.start() == []
    bench.now_s = 30.0
    assert bench.step() == [("r", "prefill", 0, 19)]
    assert bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0)) == []


def test_targets_of_a_pull_that_was_given_up_are_nobodys_until_it_ends() -> None:
    bench = Bench(num_blocks=12)
    remote(bench)
    [pull] = bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, end=4)), False, None, None, 0))
    targets = {target for _, target in pairs_of(pull)}
    bench.post(KvRefused("r"))
    parts = bench.start()
    assert targets.isdisjoint(bench.slots[parts[0]].block_table)
    bench.finish()
    bench.post(SequenceCancelled("r"))
    assert bench.pool.num_used == 4
    bench.post(PullEnded("r", frozenset({0, 1, 2, 3})))
    assert bench.pool.num_used == 0


def test_a_pull_that_could_not_be_aborted_quarantines_its_targets(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0))
    bench.post(PullEnded("r", frozenset({3, 4}), quarantine_until_s=9.0))
    assert bench.pool.num_quarantined == 2
    assert bench.step() == [("r", "prefill", 12, 19)]
    bench.now_s = 9.0
    bench.post(TimePassed())
    assert bench.pool.num_quarantined == 0


def test_a_cancel_during_a_pull_frees_blocks_when_it_ends(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, end=2)), False, None, None, 0))
    bench.post(SequenceCancelled("r"))
    assert bench.pool.num_used == 2
    [refusal] = emitted(bench.add("r", 5))
    assert isinstance(refusal.error, WorkerError)
    bench.post(PullEnded("r", frozenset()))
    assert bench.pool.num_used == 0


def test_a_pull_that_nobody_ordered_cannot_end(bench: Bench) -> None:
    remote(bench)
    with pytest.raises(InvariantError, match="was not running"):
        bench.post(PullEnded("r", frozenset()))


def test_what_costs_clearly_less_here_than_a_handoff_is_computed_here(bench: Bench) -> None:
    assert bench.add("a", 19, remote_s=0.1, max_tokens=1) == []  # a millisecond a token is assumed
    assert bench.scheduler.declined_ids() == ("a",)
    assert bench.step(elapsed_s=19.0) == [("a", "prefill", 0, 19)]
    assert bench.add("b", 19, remote_s=0.1) == [AskRemote("b", 0)]  # now it is known to take a second
    assert bench.scheduler.declined_ids() == ()


def test_a_prompt_goes_where_it_was_placed_while_the_costs_are_about_the_same(bench: Bench) -> None:
    assert bench.add("a", 20, remote_s=0.026) == [AskRemote("a", 0)]  # 0.020 and what a newcomer might lose: 0.024


def test_what_waits_here_counts_against_computing_here(bench: Bench) -> None:
    bench.add("long", 100)
    assert bench.add("a", 20, remote_s=0.1) == [AskRemote("a", 0)]


def test_a_prefill_worker_out_of_reach_is_not_asked(bench: Bench) -> None:
    assert bench.add("a", 20, remote_s=math.inf) == []
    assert bench.scheduler.declined_ids() == ("a",)


def test_choices_of_a_remote_prompt_pull_it_once(bench: Bench) -> None:
    remote(bench)
    assert bench.add("r2", PROMPT, remote_s=0.1) == []
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0))
    assert bench.scheduler.num_waiting == 1
    bench.post(PullEnded("r", frozenset()))
    assert sorted(bench.step()) == [("r", "decode", 19, 20), ("r2", "prefill", 16, 19)]


def test_a_last_offer_without_a_token_counts_as_a_refusal(bench: Bench) -> None:
    remote(bench)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, None, None, 0))
    assert bench.step() == [("r", "prefill", 0, 19)]


def test_prompt_logprobs_are_never_left_to_a_peer(bench: Bench) -> None:
    assert bench.add("r", PROMPT, remote_s=0.0, prompt_logprobs=1) == []
    assert bench.step() == [("r", "prefill", 0, 8)]


def test_a_stream_that_moved_pulls_its_prompt_and_replays_its_tokens(bench: Bench) -> None:
    [ask] = bench.add("r", PROMPT, generated=3, remote_s=0.0, max_tokens=9)
    assert isinstance(ask, AskRemote)
    [pull] = bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 0))
    assert isinstance(pull, PullBlocks)
    bench.post(PullEnded("r", frozenset()))
    assert bench.step() == [("r", "decode", 19, 22)]


# -------------------------------------------------------------------------------------------------------------- load


def test_load_is_what_is_still_to_be_computed(bench: Bench) -> None:
    bench.add("a", 10, max_tokens=5)
    bench.add("b", 30, max_tokens=5)
    remote(bench)
    assert bench.scheduler.queued_tokens == 40
    assert bench.scheduler.queued_s == pytest.approx(0.04)
    assert (bench.scheduler.num_running, bench.scheduler.num_pulling, bench.scheduler.num_waiting) == (2, 1, 0)
    bench.step(elapsed_s=0.5)
    assert bench.scheduler.queued_tokens == 0
    assert bench.scheduler.prefill_tokens_per_s == pytest.approx(80)
    assert bench.scheduler.decode_step_s == 0
    bench.step(elapsed_s=0.02)
    assert bench.scheduler.decode_step_s == 0.02
    assert set(bench.scheduler.seq_ids()) == {"a", "b", "r"}


def test_the_last_token_of_a_prompt_counts_as_queued(bench: Bench) -> None:
    bench.add("a", 1)
    assert bench.scheduler.queued_tokens == 1


def test_prompt_tokens_are_counted_by_where_they_came_from(bench: Bench) -> None:
    bench.add("a", PROMPT, max_tokens=1)
    bench.run()
    bench.add("b", PROMPT, max_tokens=2)
    bench.run()
    stats = bench.scheduler.stats()
    assert stats["num_prompt_tokens_device"] == 16
    assert stats["num_prompt_tokens_computed"] == 19 + 3
    assert stats["num_generated_tokens"] == 3


def counted_prompt_tokens(bench: Bench) -> tuple[int, int, int]:
    stats = bench.scheduler.stats()
    device, peer, computed = (stats[f"num_prompt_tokens_{source}"] for source in ("device", "peer", "computed"))
    return device, peer, computed


def test_a_worker_counts_what_it_pulled_as_a_peers_whoever_computed_it(bench: Bench) -> None:
    bench.add("a", PROMPT[:9], max_tokens=1)
    bench.run()
    remote(bench, max_tokens=2)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 12))
    assert counted_prompt_tokens(bench) == (0, 0, 9), "what is not there yet is not counted"
    bench.post(PullEnded("r", frozenset()))
    assert counted_prompt_tokens(bench) == (8, 11, 9)
    bench.run()
    assert counted_prompt_tokens(bench) == (8, 11, 9)


def test_a_worker_counts_what_did_not_arrive_as_computed(bench: Bench) -> None:
    remote(bench, max_tokens=2)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT)), True, 42, None, 12))
    bench.post(PullEnded("r", frozenset({3})))
    bench.run()
    assert counted_prompt_tokens(bench) == (0, 12, 7)


def test_a_worker_counts_what_came_before_a_refusal_as_pulled(bench: Bench) -> None:
    remote(bench, max_tokens=1)
    bench.post(KvOffered("r", "owner", pack_locations(bench.locations(PROMPT, end=3)), False, None, None, 8))
    bench.post(PullEnded("r", frozenset()))
    bench.post(KvRefused("r"))
    bench.run()
    assert counted_prompt_tokens(bench) == (0, 12, 7)


def test_prompt_logprobs_take_one_quantum_a_step():
    """A chunk of them keeps logits of [chunk, vocabulary]: 2,048 tokens of a large vocabulary would be gigabytes."""
    bench = Bench(num_blocks=64)
    bench.add("p", 28, prompt_logprobs=0, max_tokens=1)
    assert [bench.step()[0][2:] for _ in range(4)] == [(0, 8), (8, 16), (16, 24), (24, 28)]


def test_a_prefill_worker_that_took_too_long_is_told_to_stop(bench: Bench) -> None:
    bench.add("a", PROMPT, remote_s=0.0)
    bench.now_s += 29.9
    assert bench.post(TimePassed()) == []
    bench.now_s += 0.2
    assert bench.post(TimePassed()) == [StopRemote("a")]
    assert bench.run()["a"] == [7] * 4
