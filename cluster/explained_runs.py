"""What really happened to a prompt, run by run of its tokens: where its KV came from, why not from a cache. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from messages.miss import MISS_REASONS, ComputedWhy, MissedRun, MissReason
from messages.request import HeldRun
from messages.stream import GotRun


class ExplainedRun(NamedTuple):
    """Prompt tokens [begin, end) have their KV from one source, and, where they were computed, for one reason."""

    begin: int
    end: int
    source: str  #: device, peer, host, disk, remote, computed
    holder: str  #: who had them, or computed them, by channel endpoint; "": the decode worker
    why: ComputedWhy | None = None  #: of computed ones
    missed_holder: str = ""  #: of a miss: who had them last, by worker id or channel endpoint, where that is known


class Asked(NamedTuple):
    """What is known of a prompt when its first token comes, besides what its worker tells."""

    num_tokens: int
    block_size: int
    decode_address: str
    held: Sequence[HeldRun] | None  #: as its placement said; None: nobody knew
    missing: Sequence[MissedRun]
    wants_prompt_logprobs: bool = False


class _Reason(NamedTuple):
    end: int  #: tokens
    why: ComputedWhy
    holder: str = ""


def explained_runs(asked: Asked, got: Iterable[GotRun]) -> tuple[ExplainedRun, ...]:
    """Say of each run that was computed why it was; of the others where they came from."""
    runs: list[ExplainedRun] = []
    reasons = _reasons(asked)
    for run in got:
        if run.source != "computed" or run.why is not None:
            missed_holder = run.owner if run.why is not None else ""
            _append(
                runs, ExplainedRun(run.begin, run.end, run.source, "" if run.why else run.owner, run.why, missed_holder)
            )
            continue
        begin = run.begin
        while begin < run.end:
            reason = next(one for one in reasons if one.end > begin)
            end = min(run.end, reason.end)
            _append(runs, ExplainedRun(begin, end, "computed", run.owner, reason.why, reason.holder))
            begin = end
    return tuple(runs)


def expected_runs(asked: Asked) -> tuple[ExplainedRun, ...]:
    """Say of a prompt that nobody asked for where its tokens lie, by each run's first copy, and why others do not."""
    runs: list[ExplainedRun] = []
    held, size = asked.held or (), asked.block_size
    for run in held:
        copy = run.copies[0] if run.copies else None
        if copy is not None:
            is_own = copy.address == asked.decode_address and copy.tier == "device"
            source = "device" if is_own else "peer" if copy.tier == "device" else copy.tier
            end = min(run.end * size, _end_begins(asked))
            if run.begin * size < end:
                _append(runs, ExplainedRun(run.begin * size, end, source, "" if is_own else copy.address))
    begin = runs[-1].end if runs else 0
    return (*runs, *explained_runs(asked, [GotRun(begin, asked.num_tokens, "computed")]))


def missed_tokens(runs: Iterable[ExplainedRun]) -> dict[MissReason, int]:
    """Count the tokens that were computed for each reason that is a miss."""
    known: dict[str, MissReason] = {reason: reason for reason in MISS_REASONS}
    tokens: dict[MissReason, int] = {}
    for run in runs:
        reason = None if run.why is None else known.get(run.why)
        if reason is not None:
            tokens[reason] = tokens.get(reason, 0) + run.end - run.begin
    return tokens


#: Of a prompt that is held: its last token is always computed, and all of one whose log-probabilities are wanted.
_NEVER_REUSED: Final = ("prompt_end", "prompt_logprobs")


def num_absent_tokens(runs: Iterable[ExplainedRun], num_matched_tokens: int) -> int:
    """Count, of the head that the decode worker's pool was said to hold, the tokens that it did not have."""
    return sum(
        min(run.end, num_matched_tokens) - run.begin
        for run in runs
        if run.begin < num_matched_tokens and run.source != "device" and run.why not in _NEVER_REUSED
    )


def _end_begins(asked: Asked) -> int:
    """Return where the block begins that is computed in any case: a block in part has no name, one token is wanted."""
    return (asked.num_tokens - 1) // asked.block_size * asked.block_size


def _reasons(asked: Asked) -> list[_Reason]:
    """Say of all tokens, in order, why they would be computed."""
    if asked.wants_prompt_logprobs:
        return [_Reason(asked.num_tokens, "prompt_logprobs")]
    size, last = asked.block_size, _end_begins(asked)
    reasons: list[_Reason] = []
    for run in asked.held or ():
        others = [copy.address for copy in run.copies if copy.address != asked.decode_address]
        if others:
            reasons.append(_Reason(run.end * size, "slower_than_computing", others[0]))
        else:  # only the decode worker itself had it, and did not when it looked
            reasons.append(_Reason(run.end * size, "evicted", asked.decode_address))
    reasons += [_Reason(run.end * size, run.why, run.holder) for run in asked.missing]
    reasons = [one._replace(end=min(one.end, last)) for one in reasons if asked.held is not None]
    if not reasons or reasons[-1].end < last:
        reasons.append(_Reason(last, "not_known"))
    return [*reasons, _Reason(asked.num_tokens, "prompt_end")]


def _append(runs: list[ExplainedRun], run: ExplainedRun) -> None:
    last = runs[-1] if runs else None
    if last is not None and last.end == run.begin and last[2:] == run[2:]:
        runs[-1] = last._replace(end=run.end)
    else:
        runs.append(run)
