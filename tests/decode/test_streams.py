"""What a decode worker does about its requests and what others hold for them, case by case."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from decode.streams import (
    AskOwner,
    BeginPull,
    Cancelled,
    HandedOff,
    IngressLost,
    LearnHandoff,
    OwnerLost,
    PullProgressed,
    PullStopped,
    Refused,
    Reply,
    Requested,
    SchedulerTold,
    StreamBook,
    TellOwner,
    TellScheduler,
)
from engine.scheduling.plan import (
    AskRemote,
    EmitTokens,
    KvOffered,
    KvRefused,
    PullBlocks,
    PullEnded,
    SequenceAdded,
    SequenceCancelled,
    StopRemote,
)
from kvcache.names import pack_tokens
from messages.errors import InvariantError, WorkerError
from messages.handoff import BlockLocation, KvHandoff, PrefillRequest, ReleaseLease, RenewLease
from messages.request import GenerateRequest, SamplingParams
from messages.stream import TokenChunk

A, B = b"ingress a", b"ingress b"
P, Q = "tcp://p", "tcp://q"
BLOCKS = [BlockLocation(index, 7 + index, 1, b"name", 4) for index in range(3)]
RELEASE, RENEW = TellOwner(P, ReleaseLease(request_id="r")), TellOwner(P, RenewLease(request_id="r"))
PULL = PullBlocks("r", P, [(block, 0) for block in BLOCKS])


class Bench:
    """A book, and the ids that its scheduler has."""

    def __init__(self) -> None:
        self.book = StreamBook()
        self.now_s = 0.0
        self.seq_ids: set[str] = set()

    def post(self, event):
        out = self.book.on_event(event, self.now_s)
        for instruction in out:
            match instruction:
                case TellScheduler(request_id, SequenceAdded()):
                    self.seq_ids.add(request_id)
                case TellScheduler(request_id, SequenceCancelled()):
                    self.seq_ids.discard(request_id)
                case Reply(_, TokenChunk(request_id=request_id, finish_reason=str())):
                    self.seq_ids.discard(request_id)
        return out

    def request(self, request_id: str = "r", ingress: bytes = A, *, can_pull: bool = True, **fields):
        values = {
            "token_ids": pack_tokens(range(12)),
            "num_prompt_tokens": 12,
            "params": SamplingParams(max_tokens=4),
            "prefill_address": P,
            **fields,
        }
        return self.post(Requested(ingress, GenerateRequest(request_id=request_id, **values), can_pull))

    def spec(self, *args, **fields):
        [told] = self.request(*args, **fields)
        return told.event.spec

    def asked(self, request_id: str = "r", **fields) -> None:
        self.request(request_id, **fields)
        [ask] = self.post(AskRemote(request_id, 0))
        assert isinstance(ask, AskOwner)

    def hand_off(self, request_id: str = "r", source: str = P, *, is_last: bool = False, elapsed_s: float = 0.0):
        first_token = 42 if is_last else None
        handoff = KvHandoff(
            request_id=request_id,
            lease_s=5.0,
            blocks=BLOCKS,
            is_last=is_last,
            first_token=first_token,
            elapsed_s=elapsed_s,
        )
        return self.post(HandedOff(source, handoff))

    def pulling(self, *, is_last: bool = False) -> None:
        """All that was offered is being pulled."""
        self.asked()
        self.hand_off(is_last=is_last)
        assert self.post(PULL) == [RENEW, BeginPull(PULL)]
        assert self.post(SchedulerTold("r")) == []


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.book.check_invariants(bench.seq_ids)


# ------------------------------------------------------------------------------------------------------------ requests


def test_a_request_becomes_a_sequence_whose_deadline_counts_from_its_arrival(bench):
    bench.now_s = 100.0
    spec = bench.spec(deadline_s=3.0, salt=b"s", priority=2, prefill_s=0.7)
    assert (spec.seq_id, spec.token_ids, spec.num_prompt_tokens) == ("r", list(range(12)), 12)
    assert (spec.deadline_s, spec.salt, spec.priority, spec.remote_s, spec.is_kept) == (103.0, b"s", 2, 0.7, False)
    assert bench.book.has("r")


@pytest.mark.parametrize(
    "fields",
    [
        {"can_pull": False},
        {"params": SamplingParams(max_tokens=4, prompt_logprobs=0)},
    ],
    ids=["no road", "prompt logprobs"],
)
def test_what_another_worker_cannot_give_is_computed_here(bench, fields):
    assert bench.spec(**fields).remote_s == math.inf


def test_nobody_is_asked_where_no_prefill_worker_was_named(bench):
    assert bench.spec(prefill_address=None).remote_s is None


def test_a_request_that_comes_twice_is_answered_once(bench):
    bench.request()
    assert bench.request() == []
    assert bench.book.num_open == 1


def test_tokens_go_to_the_ingress_that_asked_and_the_last_ones_end_the_stream(bench):
    bench.request("r", A)
    bench.request("q", B)
    assert bench.post(EmitTokens("q", [5])) == [Reply(B, TokenChunk(request_id="q", token_ids=[5]))]
    error = WorkerError("no")
    last = TokenChunk(request_id="r", finish_reason="error", error=error.info())
    assert bench.post(EmitTokens("r", finish_reason="error", error=error)) == [Reply(A, last)]
    assert bench.post(EmitTokens("r", [6])) == []
    assert (bench.book.has("r"), bench.book.num_open) == (False, 1)


def test_a_lost_ingress_ends_its_requests_and_no_others(bench):
    bench.request("a", A)
    bench.request("b", B)
    bench.request("c", A)
    assert bench.post(IngressLost(A)) == [
        TellScheduler("a", SequenceCancelled("a")),
        TellScheduler("c", SequenceCancelled("c")),
    ]
    assert bench.post(AskRemote("c", 0)) == []  # there is room for it now, and its cancel comes next
    assert bench.book.num_open == 1


def test_a_cancel_of_an_unknown_request_is_ignored(bench):
    assert bench.post(Cancelled("x")) == []


# -------------------------------------------------------------------------------------------------------------- leases


def test_the_owner_is_asked_for_what_is_not_held(bench):
    bench.request()
    [ask] = bench.post(AskRemote("r", 8))
    assert isinstance(ask.message, PrefillRequest)
    assert (ask.source, ask.message.request.request_id, ask.message.num_held_tokens) == (P, "r", 8)


def test_a_handoff_is_offered_with_its_source(bench):
    bench.asked()
    assert bench.hand_off() == [TellScheduler("r", KvOffered("r", P, BLOCKS, False, None, None, 0))]
    assert bench.post(SchedulerTold("r")) == []


def test_the_lease_is_released_when_the_last_pull_has_ended(bench):
    bench.pulling()
    bench.now_s += 2.0
    bench.hand_off(is_last=True, elapsed_s=1.5)
    assert bench.post(SchedulerTold("r")) == []
    told = bench.post(PullStopped("r", frozenset()))
    assert told == [TellScheduler("r", PullEnded("r", frozenset()))]
    assert bench.post(PULL) == [RENEW, BeginPull(PULL)]  # what was offered meanwhile
    assert bench.post(SchedulerTold("r")) == []
    bench.post(PullStopped("r", frozenset()))
    assert bench.post(SchedulerTold("r")) == [RELEASE, LearnHandoff(P, 2.0, 1.5, 2 * len(PULL.pairs))]
    assert bench.post(SchedulerTold("r")) == []


def test_what_did_not_come_whole_teaches_no_price(bench):
    bench.pulling(is_last=True)
    bench.post(PullStopped("r", frozenset({0})))
    assert bench.post(SchedulerTold("r")) == [RELEASE]


def test_between_two_handoffs_nothing_is_released(bench):
    bench.pulling()
    bench.post(PullStopped("r", frozenset()))
    assert bench.post(SchedulerTold("r")) == []


def test_a_last_handoff_of_which_nothing_is_lacking_is_released_at_once(bench):
    bench.asked()
    bench.hand_off(is_last=True)
    assert bench.post(SchedulerTold("r")) == [RELEASE, LearnHandoff(P, 0.0, 0.0, 0)]


def test_a_first_token_that_is_the_last_releases_at_once(bench):
    bench.asked()
    bench.hand_off(is_last=True)
    [_, release] = bench.post(EmitTokens("r", [42], finish_reason="length"))
    assert release == RELEASE
    assert bench.post(SchedulerTold("r")) == []


def test_whoever_leaves_while_the_prompt_is_computed_has_the_owner_stop_at_once(bench):
    bench.asked()
    assert bench.post(Cancelled("r")) == [TellScheduler("r", SequenceCancelled("r")), RELEASE]


def test_whoever_leaves_during_a_pull_has_the_owner_stop_computing_at_once(bench):
    bench.pulling()
    assert bench.post(Cancelled("r")) == [TellScheduler("r", SequenceCancelled("r")), RELEASE]
    assert bench.book.num_pulls == 1
    assert bench.post(PullStopped("r", frozenset({1}))) == [TellScheduler("r", PullEnded("r", frozenset({1})))]
    assert bench.post(SchedulerTold("r")) == []
    assert bench.book.num_pulls == 0


def test_whoever_leaves_when_all_was_offered_lets_the_pull_end_first(bench):
    bench.pulling(is_last=True)
    assert bench.post(Cancelled("r")) == [TellScheduler("r", SequenceCancelled("r"))]
    assert bench.post(PullProgressed("r", 1)) == [RENEW]
    bench.post(PullStopped("r", frozenset()))
    assert bench.post(SchedulerTold("r")) == [RELEASE]


def test_a_handoff_that_nobody_waits_for_is_released(bench):
    assert bench.hand_off() == [RELEASE]
    bench.request()  # not asked for anywhere
    assert bench.hand_off() == [RELEASE]


def test_a_handoff_of_another_owner_than_was_asked_is_not_taken(bench):
    bench.asked()
    assert bench.hand_off(source=Q) == [TellOwner(Q, ReleaseLease(request_id="r"))]
    assert bench.post(Refused(Q, "r")) == []
    assert bench.hand_off() != []


def test_a_lease_is_renewed_when_a_pull_begins_and_while_blocks_arrive(bench):
    bench.pulling()
    assert bench.post(PullProgressed("r", 0)) == []
    assert bench.post(PullProgressed("r", 2)) == [RENEW]
    assert bench.post(PullProgressed("r", 2)) == []
    assert bench.post(PullProgressed("r", 3)) == [RENEW]
    bench.post(PullStopped("r", frozenset()))
    assert bench.post(PULL) == [RENEW, BeginPull(PULL)]
    assert bench.post(PullProgressed("r", 3)) == [RENEW]  # another pull counts anew


def test_a_refused_prompt_is_computed_here_and_counted(bench):
    bench.asked()
    assert bench.post(Refused(P, "r")) == [TellScheduler("r", KvRefused("r"))]
    assert bench.book.num_refused == 1
    assert bench.post(Refused(P, "r")) == []
    assert bench.post(Cancelled("r")) == [TellScheduler("r", SequenceCancelled("r"))]


def test_a_refusal_for_a_stream_that_ended_is_ignored(bench):
    bench.asked()
    bench.post(Cancelled("r"))
    assert bench.post(Refused(P, "r")) == []
    assert bench.book.num_refused == 0


# --------------------------------------------------------------------------------------------------------- lost owners


def test_an_owner_that_took_too_long_is_told_to_stop_unless_it_offered_all(bench):
    bench.asked("r")
    assert bench.post(StopRemote("r")) == [RELEASE]
    assert bench.post(StopRemote("r")) == []
    bench.asked("s")
    bench.hand_off("s", is_last=True)
    bench.post(PullBlocks("s", P, PULL.pairs))
    assert bench.post(StopRemote("s")) == []  # the pull goes on, for whoever comes next


def test_a_lost_owners_prompts_are_computed_here_and_no_others(bench):
    bench.asked("a")
    bench.asked("b", prefill_address=Q)
    bench.asked("c")
    bench.hand_off("c", is_last=True)
    bench.post(PullBlocks("c", P, PULL.pairs))
    assert bench.post(OwnerLost(P)) == [TellScheduler("a", KvRefused("a", is_suspect=True))]
    assert bench.book.num_refused == 1
    assert bench.post(PullStopped("c", frozenset({0, 1, 2}))) != []
    assert bench.post(SchedulerTold("c")) == []  # nobody is there to be told


def test_a_lost_owner_is_left_alone_for_a_while(bench):
    bench.now_s = 10.0
    bench.post(OwnerLost(P))
    bench.now_s = 10.9
    assert bench.spec("a").remote_s == math.inf
    assert bench.spec("b", prefill_address=Q).remote_s == 0.0
    bench.now_s = 11.0
    assert bench.spec("c").remote_s == 0.0


# --------------------------------------------------------------------------------------------------------------- pulls


def test_late_bytes_quarantine_bad_blocks_from_the_pulls_end_on(bench):
    bench.pulling(is_last=True)
    bench.now_s = 7.0
    told = bench.post(PullStopped("r", frozenset({0}), quarantine_s=3.0))
    assert told == [TellScheduler("r", PullEnded("r", frozenset({0}), 10.0))]
    bench.post(SchedulerTold("r"))
    bench.asked("s")
    bench.post(PullBlocks("s", P, []))
    assert bench.post(PullStopped("s", frozenset(), 3.0)) == [TellScheduler("s", PullEnded("s", frozenset()))]


def test_a_pull_for_nobody_is_led_to_its_end_all_the_same(bench):
    assert bench.post(PULL) == [BeginPull(PULL)]
    assert bench.post(PullProgressed("r", 1)) == []
    assert bench.post(PullStopped("r", frozenset())) == [TellScheduler("r", PullEnded("r", frozenset()))]


def test_one_pull_at_a_time_and_only_what_began_can_end(bench):
    with pytest.raises(InvariantError, match="was not running"):
        bench.post(PullStopped("r", frozenset()))
    bench.post(PULL)
    with pytest.raises(InvariantError, match="another runs"):
        bench.post(PULL)
    bench.post(PullStopped("r", frozenset()))


def test_check_invariants_notices_a_forgotten_stream_and_a_lease_held_for_nothing():
    bench = Bench()
    bench.asked()
    bench.book.check_invariants(["r"])
    with pytest.raises(InvariantError, match="not the same"):
        bench.book.check_invariants([])
    bench.hand_off(is_last=True)
    with pytest.raises(InvariantError, match="not released"):
        bench.book.check_invariants(["r"])
