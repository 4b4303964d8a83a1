"""What a decode worker does about the requests that it is to answer, case by case."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from decode.streams import (
    Accepted,
    AskPrefill,
    BeginSequence,
    Cancelled,
    CancelSequence,
    IngressLost,
    Reply,
    Requested,
    StreamBook,
    each_choice,
)
from engine.scheduling.plan import AskRemote, EmitTokens
from kvcache.names import pack_tokens
from messages.errors import InvariantError, WorkerError
from messages.handoff import PrefillRequest
from messages.request import Choice, Copy, GenerateRequest, HeldRun, SamplingParams
from messages.stream import TokenChunk

A, B = b"ingress a", b"ingress b"
P = "tcp://p"


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
                case BeginSequence(spec):
                    self.seq_ids.add(spec.seq_id)
                case CancelSequence(request_id):
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
        [begin] = self.request(*args, **fields)
        return begin.spec


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.book.check_invariants(bench.seq_ids)


def test_a_request_becomes_a_sequence_whose_deadline_counts_from_its_arrival(bench):
    bench.now_s = 100.0
    held = (HeldRun(0, 2, (Copy("tcp://d", "device"),)),)
    spec = bench.spec(deadline_s=3.0, salt=b"s", priority=2, prefill_s=0.7, held=held)
    assert (spec.seq_id, [*spec.token_ids], spec.num_prompt_tokens) == ("r", list(range(12)), 12)
    assert (spec.deadline_s, spec.salt, spec.priority, spec.is_kept) == (103.0, b"s", 2, False)
    assert (spec.remote_s, spec.remote_source, spec.held) == (0.7, P, held)
    assert bench.book.has("r")


@pytest.mark.parametrize(
    "fields",
    [
        {"can_pull": False},
        {"params": SamplingParams(max_tokens=4, prompt_logprobs=0)},
    ],
    ids=["nothing comes from there", "prompt logprobs"],
)
def test_what_another_worker_cannot_give_is_computed_here(bench, fields):
    assert bench.spec(**fields).remote_s == math.inf


@pytest.mark.parametrize("fields", [{"prefill_address": None}, {"is_suspect": True}], ids=["none", "a suspect"])
def test_nobody_is_asked_where_no_prefill_worker_was_named_or_may_be_ended_by_it(bench, fields):
    assert bench.spec(**fields).remote_s is None


def test_who_wants_word_is_told_that_a_prompt_was_accepted_once_and_not_after_its_end(bench):
    bench.request(wants_word=True, others=(Choice("r-1", 1),))
    bench.request("silent")
    assert bench.post(Accepted("r")) == [Reply(A, TokenChunk(request_id="r", is_accepted=True))]
    for request_id in ("r-1", "silent", "unknown"):
        assert bench.post(Accepted(request_id)) == []
    bench.post(EmitTokens("r", finish_reason="error", error=WorkerError("x")))
    assert bench.post(Accepted("r")) == []


def test_a_request_that_comes_twice_is_answered_once(bench):
    bench.request()
    assert bench.request() == []
    assert bench.book.num_open == 1


def test_choices_of_one_prompt_are_streams_of_their_own_and_share_its_tokens(bench):
    others = (Choice("r-1", 1), Choice("r-2", 2, pack_tokens([50, 51])))
    first, second, moved = (one.spec for one in bench.request(others=others))
    assert [spec.seq_id for spec in (first, second, moved)] == ["r", "r-1", "r-2"]
    assert [spec.params.choice for spec in (first, second, moved)] == [0, 1, 2]
    assert second.token_ids is first.token_ids
    assert [*moved.token_ids] == [*range(12), 50, 51]
    [reply] = bench.post(EmitTokens("r-2", [52]))
    assert (reply.chunk.request_id, reply.chunk.position) == ("r-2", 2)
    [ask] = bench.post(AskRemote("r-1", 0))
    assert ask.message.request == next(
        one for one in each_choice(GenerateRequest(**request_of("r", others))) if one.request_id == "r-1"
    )
    assert bench.post(Cancelled("r-1")) == [CancelSequence("r-1")]
    assert bench.book.num_open == 2


def request_of(request_id, others):
    return {
        "request_id": request_id,
        "token_ids": pack_tokens(range(12)),
        "num_prompt_tokens": 12,
        "params": SamplingParams(max_tokens=4),
        "prefill_address": P,
        "others": others,
    }


def test_tokens_go_to_the_ingress_that_asked_and_the_last_ones_end_the_stream(bench):
    bench.request("r", A)
    bench.request("q", B)
    assert bench.post(EmitTokens("q", [5])) == [Reply(B, TokenChunk(request_id="q", token_ids=[5]))]
    error = WorkerError("no")
    last = TokenChunk(request_id="r", finish_reason="error", error=error.info())
    assert bench.post(EmitTokens("r", finish_reason="error", error=error)) == [Reply(A, last)]
    assert bench.post(EmitTokens("r", [6])) == []
    assert (bench.book.has("r"), bench.book.num_open) == (False, 1)


def test_tokens_are_numbered_on_from_those_that_came_with_the_request(bench):
    bench.request(num_prompt_tokens=10)
    for position in (2, 4):
        [reply] = bench.post(EmitTokens("r", [5, 6]))
        assert reply.chunk.position == position


def test_the_prefill_worker_is_asked_for_what_is_not_held(bench):
    bench.request()
    [ask] = bench.post(AskRemote("r", 8))
    assert isinstance(ask, AskPrefill)
    assert isinstance(ask.message, PrefillRequest)
    assert (ask.source, ask.message.request.request_id, ask.message.num_held_tokens) == (P, "r", 8)


def test_a_cancelled_request_ends_its_sequence_and_nobody_is_asked_for_it(bench):
    bench.request()
    assert bench.post(Cancelled("r")) == [CancelSequence("r")]
    assert bench.post(AskRemote("r", 0)) == []  # there is room for it now, and its cancel comes next
    assert bench.post(Cancelled("r")) == []


def test_a_lost_ingress_ends_its_requests_and_no_others(bench):
    bench.request("a", A)
    bench.request("b", B)
    bench.request("c", A)
    assert bench.post(IngressLost(A)) == [CancelSequence("a"), CancelSequence("c")]
    assert bench.book.num_open == 1


def test_check_invariants_notices_a_forgotten_stream():
    bench = Bench()
    bench.request()
    bench.book.check_invariants(["r"])
    for seq_ids in ([], ["r", "s"]):
        with pytest.raises(InvariantError, match="not the same"):
            bench.book.check_invariants(seq_ids)
