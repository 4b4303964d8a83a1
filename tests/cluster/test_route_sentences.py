from cluster.openai.route_protocol import PlacementCandidate, PlacementParts, RouteRun
from cluster.route_sentences import how_long, what_happened, why_won


def candidate(decode_worker, *, prefill_worker=None, is_chosen=False, **parts):
    seconds = dict.fromkeys(PlacementParts.__struct_fields__, 0.0) | parts
    return PlacementCandidate(
        decode_worker=decode_worker,
        prefill_worker=prefill_worker,
        cost_s=sum(seconds.values()),
        ttft_s=sum(seconds.values()),
        parts=PlacementParts(**seconds),
        matched_tokens={},
        num_computed_tokens=0,
        is_chosen=is_chosen,
    )


def run(begin, end, source, why=None):
    return RouteRun(begin=begin, end=end, source=source, holder="w", why=why)


def test_the_winner_is_told_by_the_part_that_it_saves_most_of():
    chosen = candidate("d0", is_chosen=True, compute_s=0.1, queue_s=0.2)
    other = candidate("d1", prefill_worker="p", compute_s=0.6, queue_s=0.1)
    assert why_won([chosen, other]) == (
        "d0 alone was chosen: a cost of 300.0 ms, 400.0 ms less than d1 with p, mostly for computing: 100.0 ms instead "
        "of 600.0 ms."
    )


def test_the_only_one_and_equals_are_told_as_such():
    chosen = candidate("d0", is_chosen=True, compute_s=0.1)
    assert why_won([chosen]) == "d0 alone was chosen: a cost of 100.0 ms, and no other placement was possible."
    assert "to a millisecond the same as d1 alone" in why_won([chosen, candidate("d1", compute_s=0.1004)])
    assert "less than d1 alone" in why_won([chosen, candidate("d1", compute_s=0.1006)])
    assert "d1 alone would cost 50.0 ms less" in why_won([candidate("d1", compute_s=0.05), chosen])
    assert why_won([]) == ""


def test_what_happened_adds_up_by_source_and_reason():
    runs = [
        run(0, 60, "device"),
        run(60, 70, "computed", "evicted"),
        run(70, 80, "host"),
        run(80, 90, "computed", "evicted"),
        run(90, 100, "computed", "prompt_end"),
    ]
    assert what_happened(runs) == (
        "Of 100 prompt tokens 60 were in the pool of the decode worker, 20 were computed (who held them dropped them), "
        "10 came from the memory of a node cache, and 10 were computed (the end of a prompt is computed in any case)."
    )
    assert "60 lie in the pool" in what_happened(runs, is_expected=True)
    assert what_happened([]) == ""


def test_the_first_token_is_told_beside_its_prediction():
    assert how_long(0.1, 0.25) == "The first token came after 0.250 s; 0.100 s were predicted."
    assert how_long(0.1, None) == ""
