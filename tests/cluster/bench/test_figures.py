"""Statistics, to the last digit: small numbers by hand, all others against the standard library."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bench.figures import Figures, Outcome, Spread, Targets, figures, percentile, ratios, shares, summary

NOTHING = Targets()


def answered(ttft_s: float, gaps_s: list[float], **fields) -> Outcome:
    numbers = {"num_prompt_tokens": 100, "num_output_tokens": len(gaps_s) + 1, "num_events": len(gaps_s) + 1}
    return Outcome(ttft_s=ttft_s, gaps_s=gaps_s, e2e_s=ttft_s + sum(gaps_s), **(numbers | fields))


def failed(fault: str, detail: str = "") -> Outcome:
    return Outcome(e2e_s=9.0, fault=fault, detail=detail)


def test_percentiles_lie_between_values_linearly():
    assert [percentile([1.0, 2.0, 4.0], rank) for rank in (0, 25, 50, 75, 99, 100)] == [1, 1.5, 2, 3, 3.96, 4]
    assert percentile([7.0], 99) == 7


@pytest.mark.slow
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles_are_those_of_the_standard_library(values):
    ordered = sorted(values)
    quantiles = statistics.quantiles(ordered, n=100, method="inclusive")
    for rank in (1, 50, 90, 99):
        assert percentile(ordered, rank) == pytest.approx(quantiles[rank - 1], rel=1e-9, abs=1e-9)


def test_times_are_told_in_ms_and_rates_by_the_second():
    found = figures([answered(0.1, [0.01, 0.03]), answered(0.3, [0.02])], 2.0, NOTHING, (50,)).values
    assert found["ttft_ms_mean"] == pytest.approx(200)
    assert found["ttft_ms_p50"] == pytest.approx(200)
    assert found["itl_ms_p50"] == pytest.approx(20)  # of all gaps: 10, 20, 30
    assert found["tpot_ms_p50"] == pytest.approx(20)  # of requests: 20, 20
    assert found["e2e_ms_mean"] == pytest.approx((140 + 320) / 2)
    assert found["requests_per_s"] == 1
    assert found["output_tokens_per_s"] == 2.5
    assert found["prompt_tokens_per_s"] == 100


def test_tokens_that_came_in_one_event_share_its_time():
    both = answered(0.1, [0.06], num_output_tokens=4)
    assert both.tpot_s == pytest.approx(0.02)
    late_end = answered(0.1, [0.02])
    late_end.e2e_s += 5.0  # what came after the last token: usage, the end
    assert late_end.tpot_s == pytest.approx(0.02)


def test_failures_are_counted_by_kind_and_in_no_time_or_rate():
    outcomes = [answered(0.1, [0.01]), failed("hung", "first"), failed("hung", "second"), failed("cut off")]
    found = figures(outcomes, 1.0, NOTHING, (99,))
    assert (found.values["requests"], found.values["failed"], found.values["requests_per_s"]) == (4, 3, 1)
    assert found.values["e2e_ms_p99"] == pytest.approx(110)
    assert found.faults == {"hung": 2, "cut off": 1}
    assert found.examples == {"hung": "first", "cut off": ""}


def test_where_nothing_was_answered_there_are_no_times():
    found = figures([failed("not reached")], 1.0, Targets(ttft_s=1.0)).values
    assert not [name for name in found if name.endswith("_ms_mean")]
    assert (found["goodput_per_s"], found["good_share"]) == (0, 0)


def test_goodput_counts_who_met_every_target():
    outcomes = [
        answered(0.2, [0.02, 0.02]),  # good
        answered(0.3, [0.02, 0.02]),  # first token late
        answered(0.2, [0.05, 0.01]),  # mean gap late
        answered(0.2, []),  # one token: no gap that could be late
        failed("hung"),
    ]
    found = figures(outcomes, 4.0, Targets(ttft_s=0.2, itl_s=0.0201)).values
    assert (found["goodput_per_s"], found["good_share"]) == (0.5, 0.4)
    assert "goodput_per_s" not in figures(outcomes, 4.0, NOTHING).values


def test_hits_are_a_share_of_all_prompt_tokens_by_source():
    outcomes = [
        answered(0.1, [], num_cached_tokens=60, sources={"device": 20, "host": 40, "computed": 40}),
        answered(0.1, [], num_cached_tokens=0, sources={"computed": 100, "disk": 0}, num_prompt_tokens=100),
    ]
    found = figures(outcomes, 1.0, NOTHING).values
    assert found["hit_share"] == 0.3
    assert {name: found[name] for name in found if name.startswith("from_")} == {
        "from_device": 0.1,
        "from_host": 0.2,
        "from_computed": 0.7,
    }


def test_hits_that_a_server_does_not_always_tell_are_not_told():
    outcomes = [answered(0.1, [], num_cached_tokens=60), answered(0.1, [])]
    assert "hit_share" not in figures(outcomes, 1.0, NOTHING).values


def test_the_spread_of_repeats_is_their_median_and_ends():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([4.0, 1.0]) == Spread(2.5, 1.0, 4.0)


def test_a_figure_that_one_repeat_lacks_has_no_spread():
    repeats = [Figures({"a": 1.0, "b": 2.0}, {}, {}, {}), Figures({"a": 3.0}, {}, {}, {})]
    assert summary(repeats) == {"a": Spread(2.0, 1.0, 3.0)}


def test_ratios_are_of_repeats_that_ran_beside_each_other():
    ours = [Figures({"ttft": 1.0, "failed": 0.0}, {}, {}, {}), Figures({"ttft": 8.0, "failed": 0.0}, {}, {}, {})]
    theirs = [Figures({"ttft": 2.0, "failed": 0.0}, {}, {}, {}), Figures({"ttft": 4.0, "failed": 0.0}, {}, {}, {})]
    assert ratios(ours, theirs) == {"ttft": Spread(1.25, 0.5, 2.0)}  # not 4.5 / 3; nothing is divided by 0


def test_shares_of_nothing_are_none():
    assert shares({"a": 0}) == {}
    assert shares({"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75}
