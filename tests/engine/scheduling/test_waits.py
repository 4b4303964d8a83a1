"""How long sequences wait to be admitted, and how long their prompts then take."""

from __future__ import annotations

from engine.scheduling.waits import QueueWaits
from tests.engine.scheduling.scheduler_bench import Bench, emitted


def test_waits_are_counted_by_bucket_each_with_those_below_it():
    waits = QueueWaits()
    for waited_s in (0.0, 0.01, 0.011, 3.0, 1000.0):
        waits.observe(waited_s)
    stats = waits.stats()
    counted = {name: stats[f'kvray_queue_seconds_bucket{{le="{name}"}}'] for name in ("0.01", "0.05", "2.5", "5", "60")}
    assert counted == {"0.01": 2, "0.05": 3, "2.5": 3, "5": 4, "60": 4}
    assert stats['kvray_queue_seconds_bucket{le="+Inf"}'] == stats["kvray_queue_seconds_count"] == 5
    assert stats["kvray_queue_seconds_sum"] == 1003.021


def test_a_sequence_tells_with_its_first_token_how_long_it_waited_and_how_long_its_prompt_took():
    bench = Bench(max_num_seqs=1)
    bench.add("first", 5, max_tokens=1)
    bench.add("second", 5, max_tokens=2)
    bench.start()
    bench.now_s = 2.0
    (token,) = emitted(bench.finish())
    assert (token.plan.queued_s, token.plan.prefill_s) == (0.0, 2.0)
    bench.start()
    bench.now_s = 2.5
    (token,) = emitted(bench.finish())
    assert (token.seq_id, token.plan.queued_s, token.plan.prefill_s) == ("second", 2.0, 0.5)
    bench.now_s = 9.0
    bench.step()
    (token,) = emitted(bench.out)
    assert token.plan is None, "told once"
    stats = bench.scheduler.waits.stats()
    assert (stats["kvray_queue_seconds_count"], stats["kvray_queue_seconds_sum"]) == (2, 2.0)


def test_a_sequence_that_is_preempted_counts_once():
    bench = Bench(num_blocks=6, max_num_seqs=2)
    bench.add("senior", 8, max_tokens=12)
    bench.add("junior", 8, max_tokens=12)
    bench.run()
    assert bench.scheduler.stats()["num_preemptions"] > 0
    assert bench.scheduler.waits.stats()["kvray_queue_seconds_count"] == 2
