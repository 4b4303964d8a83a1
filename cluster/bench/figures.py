"""Statistics of answers: distributions, goodput, hits, spread over repeats, ratios. Pure; times in seconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Final

PERCENTILES: Final = (50.0, 90.0, 99.0)


@dataclass(slots=True)
class Outcome:
    """One request, as its client saw it. Times before the first token are 0 where none came."""

    began_s: float = 0.0  #: from the repeat's begin to its sending
    late_s: float = 0.0  #: sent after the time that the workload wanted
    ttft_s: float = 0.0  #: from sending to the first event with tokens
    e2e_s: float = 0.0  #: from sending to the end of the answer
    gaps_s: list[float] = field(default_factory=list)  #: between events with tokens
    num_prompt_tokens: int = 0  #: as usage says, else as they were sent
    num_output_tokens: int = 0  #: as usage says, else token ids, else events
    num_events: int = 0  #: with tokens
    num_cached_tokens: int | None = None  #: of the prompt; None: the server does not say
    sources: dict[str, int] = field(default_factory=dict)  #: prompt tokens by where their KV came from: kvray's
    fault: str | None = None  #: why it failed, in a few words that are the same for all of a kind
    detail: str = ""  #: of the fault: what was seen
    remarks: set[str] = field(default_factory=set)  #: what makes figures of a good answer less than they seem

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first, until the last one came; None: there was no other."""
        if self.num_output_tokens < 2:
            return None
        return sum(self.gaps_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a good answer keeps to; None: nothing is wanted. The ITL of a request is the mean of its gaps: its TPOT."""

    ttft_s: float | None = None
    itl_s: float | None = None

    @property
    def is_any(self) -> bool:
        """Whether anything is wanted."""
        return self.ttft_s is not None or self.itl_s is not None

    def are_met(self, outcome: Outcome) -> bool:
        """Tell whether a request was answered, in time."""
        tpot_s = outcome.tpot_s
        return (
            outcome.fault is None
            and (self.ttft_s is None or outcome.ttft_s <= self.ttft_s)
            and (self.itl_s is None or tpot_s is None or tpot_s <= self.itl_s)
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure of several repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of `values`, at least one."""
        found = sorted(values)
        return cls(median(found), found[0], found[-1])


@dataclass(frozen=True, slots=True)
class Figures:
    """What one repeat gave."""

    values: dict[str, float]  #: by name, in the order of a table; what cannot be told is absent
    faults: dict[str, int]  #: failed requests by kind
    examples: dict[str, str]  #: one detail of each kind
    remarks: dict[str, int]  #: answers by what was remarked of them


def percentile(ordered: Sequence[float], rank: float) -> float:
    """Return the percentile `rank` (0 to 100) of values in order, at least one; between two, linearly."""
    place = (len(ordered) - 1) * rank / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def figures(
    outcomes: Sequence[Outcome], seconds: float, targets: Targets, percentiles: Sequence[float] = PERCENTILES
) -> Figures:
    """Return the figures of all requests of a repeat that took `seconds`. Only answered ones count, but as failures."""
    answered = [outcome for outcome in outcomes if outcome.fault is None]
    faults = Counter(outcome.fault for outcome in outcomes if outcome.fault is not None)
    examples: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.fault is not None:
            examples.setdefault(outcome.fault, outcome.detail)
    values: dict[str, float] = {"requests": len(outcomes), "failed": len(outcomes) - len(answered), "seconds": seconds}
    if seconds > 0:
        values |= _rates(answered, seconds)
        if targets.is_any:
            met = sum(targets.are_met(outcome) for outcome in outcomes)
            values |= {"goodput_per_s": met / seconds, "good_share": met / len(outcomes) if outcomes else 0.0}
    samples = {
        "ttft_ms": [outcome.ttft_s for outcome in answered],
        "itl_ms": [gap_s for outcome in answered for gap_s in outcome.gaps_s],
        "tpot_ms": [tpot_s for outcome in answered if (tpot_s := outcome.tpot_s) is not None],
        "e2e_ms": [outcome.e2e_s for outcome in answered],
    }
    for name, seconds_each in samples.items():
        values |= _distribution(name, seconds_each, percentiles)
    values |= _hits(answered)
    if outcomes:
        values["late_ms_p99"] = 1e3 * percentile(sorted(outcome.late_s for outcome in outcomes), 99)
    remarks = Counter(remark for outcome in answered for remark in outcome.remarks)
    return Figures(values, dict(faults.most_common()), examples, dict(remarks.most_common()))


def summary(repeats: Sequence[Figures]) -> dict[str, Spread]:
    """Return the spread of each figure that all repeats have."""
    names = [name for name in repeats[0].values if all(name in repeat.values for repeat in repeats)]
    return {name: Spread.of(repeat.values[name] for repeat in repeats) for name in names}


def ratios(repeats: Sequence[Figures], others: Sequence[Figures]) -> dict[str, Spread]:
    """Return the spread of each figure over the other server's, repeat by repeat; of those that can be divided."""
    pairs = list(zip(repeats, others, strict=True))
    found = {}
    for name in repeats[0].values:
        if all(name in one.values and other.values.get(name, 0) > 0 for one, other in pairs):
            found[name] = Spread.of(one.values[name] / other.values[name] for one, other in pairs)
    return found


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Return each count as a share of all; none of nothing."""
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def _rates(answered: Sequence[Outcome], seconds: float) -> dict[str, float]:
    return {
        "requests_per_s": len(answered) / seconds,
        "prompt_tokens_per_s": sum(outcome.num_prompt_tokens for outcome in answered) / seconds,
        "output_tokens_per_s": sum(outcome.num_output_tokens for outcome in answered) / seconds,
    }


def _distribution(name: str, seconds: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    found = {f"{name}_mean": 1e3 * fmean(ordered)}
    return found | {f"{name}_p{rank:g}": 1e3 * percentile(ordered, rank) for rank in percentiles}


def _hits(answered: Sequence[Outcome]) -> dict[str, float]:
    """Return which share of prompt tokens was cached; none where a server does not say it of every answer."""
    num_tokens = sum(outcome.num_prompt_tokens for outcome in answered)
    cached = [outcome.num_cached_tokens for outcome in answered if outcome.num_cached_tokens is not None]
    if not num_tokens or len(cached) < len(answered):
        return {}
    found = {"prompt_tokens": float(num_tokens), "hit_share": sum(cached) / num_tokens}
    sources: Counter[str] = Counter()
    for outcome in answered:
        sources.update(outcome.sources)
    return found | {f"from_{source}": share for source, share in shares(sources).items() if share > 0}
