from cluster.explained_runs import Asked, ExplainedRun, expected_runs, explained_runs, missed_tokens, num_absent_tokens
from messages.miss import MissedRun
from messages.request import Copy, HeldRun
from messages.stream import GotRun

OWN, OTHER, CACHE = Copy("tcp://d:1", "device"), Copy("tcp://e:1", "device"), Copy("tcp://c:1", "host")


def asked(num_tokens=100, held=(), missing=(), **changes):
    return Asked(num_tokens, 10, "tcp://d:1", held, missing, **changes)


def computed(begin, end, why, missed_holder="", holder=""):
    return ExplainedRun(begin, end, "computed", holder, why, missed_holder)


def test_what_was_had_is_told_as_its_worker_told_it():
    got = [GotRun(0, 40, "device"), GotRun(40, 90, "host", "tcp://c:1"), GotRun(90, 100, "computed")]
    assert explained_runs(asked(), got) == (
        ExplainedRun(0, 40, "device", ""),
        ExplainedRun(40, 90, "host", "tcp://c:1"),
        computed(90, 100, "prompt_end"),
    )


def test_what_nobody_held_is_told_by_what_the_router_remembers():
    missing = (MissedRun(2, 4, "evicted"), MissedRun(4, 6, "holder_lost", "w"), MissedRun(6, 10, "never_seen"))
    got = [GotRun(0, 20, "device"), GotRun(20, 100, "computed")]
    runs = explained_runs(asked(held=[HeldRun(0, 2, (OWN,))], missing=missing), got)
    assert runs[1:] == (
        computed(20, 40, "evicted"),
        computed(40, 60, "holder_lost", "w"),
        computed(60, 90, "never_seen"),
        computed(90, 100, "prompt_end"),
    )
    assert missed_tokens(runs) == {"evicted": 20, "holder_lost": 20, "never_seen": 30}


def test_what_others_hold_and_was_computed_was_slower_to_bring():
    runs = explained_runs(asked(held=[HeldRun(0, 9, (CACHE, OTHER))]), [GotRun(0, 100, "computed")])
    assert runs == (computed(0, 90, "slower_than_computing", "tcp://c:1"), computed(90, 100, "prompt_end"))


def test_what_only_the_worker_itself_was_said_to_hold_and_it_computed_was_evicted_meanwhile():
    runs = explained_runs(asked(held=[HeldRun(0, 9, (OWN,))]), [GotRun(0, 100, "computed")])
    assert runs == (computed(0, 90, "evicted", "tcp://d:1"), computed(90, 100, "prompt_end"))
    assert num_absent_tokens(runs, 90) == 90
    assert num_absent_tokens(runs, 0) == 0


def test_what_the_worker_knows_of_a_block_that_did_not_come_counts_before_all_else():
    got = [GotRun(0, 10, "computed", "tcp://c:1", "damaged"), GotRun(10, 100, "computed", "tcp://p:1")]
    assert explained_runs(asked(held=[HeldRun(0, 5, (CACHE,))], missing=(MissedRun(5, 10, "never_seen"),)), got) == (
        computed(0, 10, "damaged", "tcp://c:1"),
        computed(10, 50, "slower_than_computing", "tcp://c:1", holder="tcp://p:1"),
        computed(50, 90, "never_seen", holder="tcp://p:1"),
        computed(90, 100, "prompt_end", holder="tcp://p:1"),
    )


def test_without_a_router_nobody_knows_why():
    assert explained_runs(asked(held=None), [GotRun(0, 100, "computed")]) == (
        computed(0, 90, "not_known"),
        computed(90, 100, "prompt_end"),
    )


def test_a_prompt_whose_logprobs_are_wanted_is_no_miss():
    runs = explained_runs(
        asked(held=[HeldRun(0, 10, (OWN,))], wants_prompt_logprobs=True), [GotRun(0, 100, "computed")]
    )
    assert runs == (computed(0, 100, "prompt_logprobs"),)
    assert missed_tokens(runs) == {}


def test_a_prompt_of_whole_blocks_ends_with_the_last_of_them():
    held = [HeldRun(0, 10, (OWN,))]
    runs = explained_runs(asked(held=held), [GotRun(0, 90, "device"), GotRun(90, 100, "computed")])
    assert runs[1:] == (computed(90, 100, "prompt_end"),)
    assert num_absent_tokens(runs, 100) == 0


def test_a_prompt_shorter_than_a_block_is_all_end():
    assert explained_runs(asked(5, missing=()), [GotRun(0, 5, "computed")]) == (computed(0, 5, "prompt_end"),)


def test_what_is_to_be_expected_is_what_lies_where_and_why_the_rest_does_not():
    held = [HeldRun(0, 3, (OWN, CACHE)), HeldRun(3, 5, (OTHER,)), HeldRun(5, 6, (CACHE,))]
    assert expected_runs(asked(held=held, missing=(MissedRun(6, 10, "evicted"),))) == (
        ExplainedRun(0, 30, "device", ""),
        ExplainedRun(30, 50, "peer", "tcp://e:1"),
        ExplainedRun(50, 60, "host", "tcp://c:1"),
        computed(60, 90, "evicted"),
        computed(90, 100, "prompt_end"),
    )
    whole = expected_runs(asked(held=[HeldRun(0, 10, (OWN,))]))
    assert whole == (ExplainedRun(0, 90, "device", ""), computed(90, 100, "prompt_end"))


def test_blocks_that_no_such_request_ever_reuses_are_not_said_to_be_absent():
    runs = (ExplainedRun(0, 90, "computed", "", "prompt_logprobs"), ExplainedRun(90, 100, "computed", "", "prompt_end"))
    assert num_absent_tokens(runs, 100) == 0
    assert num_absent_tokens((ExplainedRun(0, 90, "computed", "", "evicted"),), 80) == 80
