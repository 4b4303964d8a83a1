"""What a prefill worker tells of the prompts it was asked for, case by case."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.scheduling.plan import EmitTokens, OfferBlocks
from kvcache.leases import AskerLost, FreeBlocks, Released, Renewed, TimePassed
from kvcache.locations import BlockLocation, each_location, pack_locations
from kvcache.names import pack_tokens
from messages.errors import InvariantError, WorkerError
from messages.handoff import KvHandoff, PrefillFailed, PrefillRequest
from messages.request import GenerateRequest, SamplingParams
from messages.stream import TokenLogprob
from prefill.publications import BeginPrompt, BlocksFreed, PromptAsked, PublicationBook, Publish, TellFailed

A, B = b"asker a", b"asker b"
LEASE_S = 5.0
SIZE = 4


def blocks(begin: int, end: int) -> bytes:
    return pack_locations(BlockLocation(index, 7 + index, 1, b"name".ljust(16), SIZE) for index in range(begin, end))


class Bench:
    """A book, and the ids that its scheduler has."""

    def __init__(self) -> None:
        self.book = PublicationBook(LEASE_S, SIZE)
        self.now_s = 0.0
        self.seq_ids: set[str] = set()

    def post(self, event):
        out = self.book.on_event(event, self.now_s)
        for instruction in out:
            match instruction:
                case BeginPrompt(spec):
                    self.seq_ids.add(spec.seq_id)
                case FreeBlocks(request_id) | TellFailed(_, PrefillFailed(request_id=request_id)):
                    self.seq_ids.discard(request_id)
        return out

    def ask(self, request_id: str = "r", asker: bytes = A, *, held: int = 0, **fields):
        values = {
            "token_ids": pack_tokens(range(20)),
            "num_prompt_tokens": 18,
            "params": SamplingParams(max_tokens=9),
            **fields,
        }
        request = GenerateRequest(request_id=request_id, **values)
        return self.post(PromptAsked(asker, PrefillRequest(request=request, num_held_tokens=held)))

    def publish(self, request_id: str = "r") -> Publish:
        assert self.post(OfferBlocks(request_id, blocks(0, 5), True, 0)) == []
        [published] = self.post(EmitTokens(request_id, [42], finish_reason="length"))
        return published


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.book.check_invariants(bench.seq_ids)


def test_a_prompt_is_begun_without_what_was_generated_and_its_blocks_are_kept(bench):
    bench.now_s = 100.0
    [begin] = bench.ask(deadline_s=2.0, salt=b"s", priority=1)
    spec = begin.spec
    assert (spec.seq_id, [*spec.token_ids], spec.num_prompt_tokens) == ("r", list(range(18)), 18)
    assert (spec.deadline_s, spec.salt, spec.priority, spec.is_kept, spec.remote_s) == (102.0, b"s", 1, True, None)
    assert (bench.book.num_asked, bench.book.num_open) == (1, 1)


def test_finished_chunks_are_published_at_once_to_who_asked(bench):
    bench.ask("r", A)
    bench.ask("q", B)
    [published] = bench.post(OfferBlocks("q", blocks(0, 2), False, 4))
    handoff = KvHandoff(request_id="q", lease_s=LEASE_S, blocks=blocks(0, 2), is_last=False, num_cached_tokens=4)
    assert published == Publish(B, handoff)
    assert bench.book.leases.num_leased == 0


def test_the_last_offer_waits_for_the_first_token_and_the_lease_begins_with_both(bench):
    bench.ask()
    assert bench.post(OfferBlocks("r", blocks(2, 5), True, 0)) == []
    with pytest.raises(InvariantError, match="not published"):
        bench.book.check_invariants(bench.seq_ids)
    assert bench.book.leases.num_leased == 0
    logprob = TokenLogprob(42, -1.0, 1)
    [published] = bench.post(EmitTokens("r", [42], [logprob], finish_reason="length"))
    handoff = published.handoff
    assert (handoff.is_last, handoff.first_token, handoff.first_logprob) == (True, 42, logprob)
    assert handoff.blocks == blocks(2, 5)
    assert (bench.book.leases.num_leased, bench.book.num_published_blocks) == (1, 3)


def test_blocks_that_the_asker_holds_are_not_published(bench):
    bench.ask(held=2 * SIZE)
    assert [block.index for block in each_location(bench.publish().handoff.blocks)] == [2, 3, 4]
    assert bench.book.num_published_blocks == 3


@pytest.mark.parametrize(
    ("emitted", "kind"),
    [
        (EmitTokens("r", finish_reason="error", error=WorkerError("no")), "WorkerError"),
        (EmitTokens("r", finish_reason="cancelled"), "KvrayError"),
        (EmitTokens("r", [42], finish_reason="length"), "KvrayError"),
    ],
    ids=["error", "no token", "no offer"],
)
def test_what_came_to_nothing_is_told_and_forgotten(bench, emitted, kind):
    bench.ask()
    [told] = bench.post(emitted)
    assert isinstance(told, TellFailed)
    assert (told.asker, told.message.request_id, told.message.error.kind) == (A, "r", kind)
    assert (bench.book.num_open, bench.book.leases.num_open) == (0, 0)
    assert bench.post(Released("r", A)) == []


@pytest.mark.parametrize("event", [Released("r", A), AskerLost(A)])
@pytest.mark.parametrize("is_published", [False, True])
def test_what_nobody_wants_any_more_is_freed_and_nothing_of_it_is_told(bench, event, is_published):
    bench.ask()
    bench.ask("other", B)
    if is_published:
        bench.publish()
    assert bench.post(event) == [FreeBlocks("r")]
    assert bench.post(BlocksFreed("r")) == []
    assert bench.post(OfferBlocks("r", blocks(0, 1), False, 0)) == []
    assert bench.post(EmitTokens("r", [42], finish_reason="length")) == []
    assert bench.book.num_open == 1


def test_a_lease_that_is_not_renewed_ends(bench):
    bench.ask()
    bench.publish()
    bench.now_s = 4.0
    assert bench.post(Renewed("r", A)) == []
    bench.now_s = 4.0 + LEASE_S
    assert bench.post(TimePassed()) == []
    bench.now_s += 0.1
    assert bench.post(TimePassed()) == [FreeBlocks("r", is_expired=True)]
    assert bench.book.num_open == 0


def test_a_prompt_asked_again_begins_when_the_old_one_is_freed(bench):
    bench.ask()
    bench.publish()
    assert bench.ask() == [FreeBlocks("r")]
    [begin] = bench.post(BlocksFreed("r"))
    assert isinstance(begin, BeginPrompt)
    assert bench.post(BlocksFreed("r")) == []


def test_what_the_scheduler_still_says_of_the_old_prompt_is_not_taken_for_the_new(bench):
    bench.ask()
    bench.ask(held=8)
    assert bench.post(OfferBlocks("r", blocks(0, 1), False, 0)) == []
    assert bench.post(EmitTokens("r", finish_reason="error", error=WorkerError("too late"))) == []
    assert len(bench.post(BlocksFreed("r"))) == 1


def test_whoever_asked_before_another_is_told_that_it_gets_nothing(bench):
    bench.ask("r", A)
    bench.publish()
    [told, freed] = bench.ask("r", B)
    assert isinstance(told, TellFailed)
    assert (told.asker, told.message.request_id, freed) == (A, "r", FreeBlocks("r"))
    bench.post(BlocksFreed("r"))
    assert bench.post(Released("r", A)) == []
    assert bench.publish().asker == B


@pytest.mark.parametrize(
    "event", [OfferBlocks("x", b"", True, 0), EmitTokens("x", [1]), BlocksFreed("x"), Renewed("x", A), AskerLost(B)]
)
def test_unknown_ids_and_askers_are_ignored(bench, event):
    bench.ask()
    assert bench.post(event) == []
    assert bench.book.num_open == 1


def test_check_invariants_notices_every_difference_from_the_sequences_held():
    bench = Bench()
    bench.ask()
    bench.book.check_invariants(["r"])
    with pytest.raises(InvariantError, match="not the same"):
        bench.book.check_invariants([])
    bench.ask()
    with pytest.raises(InvariantError, match="not begun"):
        bench.book.check_invariants(["r"])
