"""The few lines about a whole fleet: from a status document, and from the one before."""

from __future__ import annotations

from cluster.status_summary import summary_lines

GIB = 2**30


def worker(role: str = "decode", **values: float) -> dict:
    return {"role": role, "is_answering": True, "num_blocks": 1024, "block_bytes": 2**20, "values": values}


def status(**fields: object) -> dict:
    return {"workers": [worker()], "caches": [], **fields}


def cache(**values: float) -> dict:
    return {"num_blocks": 2048, "block_bytes": 2**20, "values": values}


def test_tiers_are_added_up_over_all_who_have_them_and_one_remote_store_is_counted_once():
    caches = [
        cache(
            kvray_cache_blocks_held=1024.0,
            kvray_disk_bytes=3.0 * GIB,
            kvray_disk_capacity_bytes=10.0 * GIB,
            kvray_remote_bytes=remote * GIB,
        )
        for remote in (4.0, 5.0)
    ]
    workers = [worker(kvray_cache_blocks_held=512.0), worker(kvray_cache_blocks_held=256.0)]
    lines = summary_lines(status(workers=workers, caches=caches), None, 0.0)
    assert (
        lines[1]
        == "tiers: device 768.0 MiB of 2.00 GiB, host 2.00 GiB of 4.00 GiB, disk 6.00 GiB of 20.00 GiB, remote 5.00 GiB"
    )


def test_the_queue_is_that_of_all_workers_and_its_seconds_are_the_longest():
    workers = [
        worker(kvray_sequences_waiting=2.0, kvray_queued_tokens=1000.0, kvray_queued_seconds=0.5),
        worker("prefill", kvray_sequences_waiting=1.0, kvray_queued_tokens=500.0, kvray_queued_seconds=1.25),
    ]
    assert (
        summary_lines(status(workers=workers), None, 0.0)[0] == "queue: 3 wait, 1,500 tokens to compute, 1.25 s at most"
    )


def test_hits_are_told_by_source_since_the_start_and_since_the_status_before():
    before = status(prompt_tokens={"device": 100, "host": 0, "computed": 100}, workers=[worker()])
    now = status(
        prompt_tokens={"device": 100, "host": 300, "computed": 200},
        workers=[worker(kvray_generated_tokens_total=50.0), worker("prefill", kvray_generated_tokens_total=9.0)],
    )
    assert summary_lines(now, before, 2.0)[2:] == [
        "hits: 66.7% (device 16.7%, host 50.0%) of 600 prompt tokens",
        "last 2 s: 25 tokens/s generated, 75.0% (host 75.0%) of 400 prompt tokens",
    ]
    assert summary_lines(now, now, 2.0)[3] == "last 2 s: 0 tokens/s generated"


def test_counters_that_began_anew_are_no_negative_rates():
    before = status(prompt_tokens={"computed": 900}, workers=[worker(kvray_generated_tokens_total=900.0)])
    assert summary_lines(status(prompt_tokens={"computed": 1}), before, 2.0)[-1] == "last 2 s: 0 tokens/s generated"


def test_nothing_is_said_of_what_nobody_answers_for_or_has():
    silent = {"role": "decode", "is_answering": False, "num_blocks": 1, "block_bytes": 1, "values": {}}
    assert summary_lines(status(workers=[silent]), None, 0.0) == []
    assert summary_lines({"workers": []}, None, 0.0) == []  # of a kvray that tells less
