"""What a worker does about what it borrows from owners of blocks, case by case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from engine.loans import (
    AskOwner,
    BeginPull,
    Found,
    HandedOff,
    LearnHandoff,
    LoanBook,
    OwnerLost,
    PromptWanted,
    PullProgressed,
    PullStopped,
    Refused,
    SchedulerTold,
    SequenceOver,
    TellOwner,
    TellScheduler,
)
from engine.scheduling.plan import (
    AskAhead,
    AskBlocks,
    BlocksOffered,
    FoundAhead,
    KvOffered,
    KvRefused,
    PullBlocks,
    PullEnded,
    StopAsking,
    StopRemote,
)
from kvcache.locations import BlockLocation, pack_locations
from kvcache.names import pack_tokens
from messages.errors import InvariantError
from messages.handoff import (
    BlocksFound,
    BlocksRequest,
    FoundRun,
    KvHandoff,
    PrefetchBlocks,
    PrefillRequest,
    ReleaseLease,
    RenewLease,
)
from messages.request import GenerateRequest, SamplingParams
from messages.tier import Tier

P, Q = "tcp://p", "tcp://q"
NAMES = tuple(bytes([index]) * 16 for index in range(6))
BLOCKS = [BlockLocation(index, 7 + index, 1, name, 4) for index, name in enumerate(NAMES)]


def release(loan_id: str, source: str = P) -> TellOwner:
    return TellOwner(source, ReleaseLease(request_id=loan_id))


def renew(loan_id: str, source: str = P) -> TellOwner:
    return TellOwner(source, RenewLease(request_id=loan_id))


def pull_of(seq_id: str, source: str = P, blocks: Sequence[BlockLocation] = BLOCKS[:3]) -> PullBlocks:
    return PullBlocks(seq_id, source, pack_locations(blocks), (0,) * len(blocks))


class Bench:
    """A book, and the ids that its scheduler has."""

    def __init__(self) -> None:
        self.book = LoanBook()
        self.now_s = 0.0
        self.seq_ids: set[str] = set()

    def post(self, event):
        return self.book.on_event(event, self.now_s)

    def over(self, seq_id: str):
        self.seq_ids.discard(seq_id)
        return self.post(SequenceOver(seq_id))

    def want_prompt(self, seq_id: str = "r", source: str = P) -> PrefillRequest:
        request = GenerateRequest(
            request_id=seq_id,
            token_ids=pack_tokens(range(12)),
            num_prompt_tokens=12,
            params=SamplingParams(max_tokens=4),
        )
        message = PrefillRequest(request=request)
        self.seq_ids.add(seq_id)
        assert self.post(PromptWanted(source, message)) == [AskOwner(source, message)]
        return message

    def ask(self, seq_id: str = "r", source: str = P, begin: int = 0, end: int = len(NAMES)) -> str:
        """Ask a holder for blocks by name; the question's id."""
        self.seq_ids.add(seq_id)
        [*_, asked] = self.post(AskBlocks(seq_id, source, begin, NAMES[begin:end], is_tail_first=False))
        assert isinstance(asked, AskOwner)
        return asked.message.request_id

    def hand_off(
        self,
        loan_id: str = "r",
        source: str = P,
        blocks: Sequence[BlockLocation] = BLOCKS[:3],
        *,
        is_last: bool = False,
        first_token: int | None = None,
        elapsed_s: float = 0.0,
        tier: Tier = "device",
    ):
        handoff = KvHandoff(
            request_id=loan_id,
            lease_s=5.0,
            blocks=pack_locations(blocks),
            is_last=is_last,
            first_token=first_token,
            elapsed_s=elapsed_s,
            tier=tier,
        )
        return self.post(HandedOff(source, handoff))

    def begin_pull(self, pull: PullBlocks) -> None:
        [*renewed, begun] = self.post(pull)
        assert begun == BeginPull(pull)
        assert all(isinstance(told.message, RenewLease) for told in renewed)

    def end_pull(self, seq_id: str = "r", bad: frozenset[int] = frozenset()) -> None:
        assert self.post(PullStopped(seq_id, bad)) == [TellScheduler(seq_id, PullEnded(seq_id, bad))]

    def pulling_prompt(self, *, is_last: bool = False) -> None:
        """All that was offered of a prompt is being pulled."""
        self.want_prompt()
        self.hand_off(is_last=is_last)
        pull = pull_of("r")
        assert self.post(pull) == [renew("r"), BeginPull(pull)]
        assert self.post(SchedulerTold("r")) == []


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.book.check_invariants(bench.seq_ids)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_a_prompts_handoff_is_offered_with_its_source(bench):
    bench.want_prompt()
    assert bench.hand_off() == [TellScheduler("r", KvOffered("r", P, pack_locations(BLOCKS[:3]), False, None, None, 0))]
    assert bench.post(SchedulerTold("r")) == []
    last = KvOffered("r", P, b"", True, 42, None, 0)
    assert bench.hand_off(blocks=[], is_last=True, first_token=42) == [TellScheduler("r", last)]
    bench.post(SchedulerTold("r"))


def test_a_loan_is_released_when_the_last_pull_has_ended(bench):
    bench.pulling_prompt()
    bench.now_s += 2.0
    bench.hand_off(is_last=True, elapsed_s=1.5)
    assert bench.post(SchedulerTold("r")) == []
    bench.end_pull()
    bench.begin_pull(pull_of("r"))  # what was offered meanwhile
    assert bench.post(SchedulerTold("r")) == []
    bench.end_pull()
    assert bench.post(SchedulerTold("r")) == [release("r"), LearnHandoff(P, None, 2.0, 1.5, 6, 0.0)]
    assert bench.post(SchedulerTold("r")) == []


def test_what_did_not_come_whole_teaches_no_price(bench):
    bench.pulling_prompt(is_last=True)
    bench.end_pull(bad=frozenset({0}))
    assert bench.post(SchedulerTold("r")) == [release("r")]


def test_between_two_handoffs_nothing_is_released(bench):
    bench.pulling_prompt()
    bench.end_pull()
    assert bench.post(SchedulerTold("r")) == []


def test_a_last_handoff_of_which_nothing_is_lacking_is_released_at_once(bench):
    bench.want_prompt()
    bench.hand_off(is_last=True)
    assert bench.post(SchedulerTold("r")) == [release("r"), LearnHandoff(P, None, 0.0, 0.0, 0, 0.0)]


def test_a_first_token_that_is_the_last_releases_at_once(bench):
    bench.want_prompt()
    bench.hand_off(is_last=True, first_token=42)
    assert bench.over("r") == [release("r")]
    assert bench.post(SchedulerTold("r")) == []


def test_a_sequence_that_ends_while_its_prompt_is_computed_has_the_owner_stop_at_once(bench):
    bench.want_prompt()
    assert bench.over("r") == [release("r")]


def test_a_sequence_that_ends_during_a_pull_has_the_owner_stop_computing_at_once(bench):
    bench.pulling_prompt()
    assert bench.over("r") == [release("r")]
    assert bench.book.num_pulls == 1
    bench.end_pull(bad=frozenset({1}))
    assert bench.post(SchedulerTold("r")) == []
    assert bench.book.num_pulls == 0


def test_a_sequence_that_ends_when_all_was_offered_lets_the_pull_end_first(bench):
    bench.pulling_prompt(is_last=True)
    assert bench.over("r") == []
    assert bench.post(PullProgressed("r", 1)) == [renew("r")]
    bench.end_pull()
    assert bench.post(SchedulerTold("r")) == [release("r")]


def test_a_handoff_that_nobody_waits_for_is_released(bench):
    assert bench.hand_off() == [release("r")]
    bench.pulling_prompt(is_last=True)
    bench.over("r")
    assert bench.hand_off() == [release("r")]
    bench.end_pull()
    bench.post(SchedulerTold("r"))


def test_a_handoff_of_another_owner_than_was_asked_is_not_taken(bench):
    bench.want_prompt()
    assert bench.hand_off(source=Q) == [release("r", Q)]
    assert bench.post(Refused(Q, "r")) == []
    assert bench.hand_off() != []


def test_a_loan_is_renewed_when_a_pull_begins_and_while_blocks_arrive(bench):
    bench.pulling_prompt()
    assert bench.post(PullProgressed("r", 0)) == []
    assert bench.post(PullProgressed("r", 2)) == [renew("r")]
    assert bench.post(PullProgressed("r", 2)) == []
    assert bench.post(PullProgressed("r", 3)) == [renew("r")]
    bench.end_pull()
    pull = pull_of("r")
    assert bench.post(pull) == [renew("r"), BeginPull(pull)]
    assert bench.post(PullProgressed("r", 3)) == [renew("r")]  # another pull counts anew


def test_a_refused_prompt_is_computed_here_and_counted(bench):
    bench.want_prompt()
    assert bench.post(Refused(P, "r")) == [TellScheduler("r", KvRefused("r"))]
    assert bench.book.num_refused == 1
    assert bench.post(Refused(P, "r")) == []
    assert bench.over("r") == []


def test_a_refusal_for_a_sequence_that_ended_is_ignored(bench):
    bench.want_prompt()
    bench.over("r")
    assert bench.post(Refused(P, "r")) == []
    assert bench.book.num_refused == 0


def test_an_owner_that_took_too_long_is_told_to_stop_unless_it_offered_all(bench):
    bench.want_prompt("r")
    assert bench.post(StopRemote("r")) == [release("r")]
    assert bench.post(StopRemote("r")) == []
    assert bench.book.num_refused == 1
    bench.want_prompt("s")
    bench.hand_off("s", is_last=True)
    bench.begin_pull(pull_of("s"))
    assert bench.post(StopRemote("s")) == []  # the pull goes on, for whoever comes next


# ------------------------------------------------------------------------------------------------------ blocks by name


def test_a_holder_is_asked_by_name_under_an_id_of_its_own(bench):
    bench.seq_ids.add("r")
    ids = []
    for source, begin, end in ((P, 1, 3), (Q, 3, 6)):
        [asked] = bench.post(AskBlocks("r", source, begin, NAMES[begin:end], is_tail_first=True))
        ids.append(asked.message.request_id)
        message = BlocksRequest(
            request_id=ids[-1], first_index=begin, names=b"".join(NAMES[begin:end]), is_tail_first=True
        )
        assert asked == AskOwner(source, message)
    assert len({*ids, "r"}) == 3


def test_what_a_holder_offers_in_parts_is_told_in_parts_and_released_when_all_of_it_was_pulled(bench):
    loan_id = bench.ask()
    assert bench.hand_off(loan_id) == [
        TellScheduler("r", BlocksOffered("r", P, pack_locations(BLOCKS[:3]), is_last=False))
    ]
    bench.begin_pull(pull_of("r"))
    assert bench.post(SchedulerTold("r")) == []
    bench.end_pull()
    assert bench.post(SchedulerTold("r")) == []  # more may come
    bench.now_s = 3.0
    last = TellScheduler("r", BlocksOffered("r", P, pack_locations(BLOCKS[3:]), is_last=True))
    assert bench.hand_off(loan_id, blocks=BLOCKS[3:], is_last=True, elapsed_s=0.5, tier="disk") == [last]
    bench.begin_pull(pull_of("r", blocks=BLOCKS[3:]))
    assert bench.post(SchedulerTold("r")) == []
    bench.end_pull()
    assert bench.post(SchedulerTold("r")) == [release(loan_id), LearnHandoff(P, "disk", 3.0, 0.5, 6, 0.0)]


def test_what_a_holder_offers_whole_is_released_when_its_pull_has_ended(bench):
    loan_id = bench.ask()
    bench.hand_off(loan_id, is_last=True)
    bench.begin_pull(pull_of("r"))
    assert bench.post(SchedulerTold("r")) == []
    bench.end_pull()
    assert bench.post(SchedulerTold("r")) == [release(loan_id), LearnHandoff(P, "device", 0.0, 0.0, 3, 0.0)]


def test_a_holder_that_has_nothing_any_more_teaches_no_price(bench):
    loan_id = bench.ask()
    told = TellScheduler("r", BlocksOffered("r", P, b"", is_last=True))
    assert bench.hand_off(loan_id, blocks=[], is_last=True) == [told]
    assert bench.post(SchedulerTold("r")) == [release(loan_id)]


def test_of_a_holder_that_refuses_nothing_more_comes(bench):
    loan_id = bench.ask()
    [told] = bench.post(Refused(P, loan_id))
    assert told == TellScheduler("r", BlocksOffered("r", P, b"", is_last=True))
    assert not told.event.is_lost
    assert bench.post(SchedulerTold("r")) == []
    assert bench.post(Refused(P, loan_id)) == []
    assert bench.book.num_refused == 0  # it is no prompt


def test_a_lost_holder_offers_nothing_more_but_what_it_offered_whole_is_pulled_to_the_end(bench):
    bench.ask("a")
    whole = bench.ask("b")
    bench.hand_off(whole, is_last=True)
    bench.begin_pull(pull_of("b"))
    bench.ask("c", source=Q)
    [told] = bench.post(OwnerLost(P))
    assert told == TellScheduler("a", BlocksOffered("a", P, b"", is_last=True))
    assert told.event.is_lost
    bench.end_pull("b", frozenset({0, 1, 2}))
    assert bench.post(SchedulerTold("b")) == []  # nobody is there to be told


def test_a_holder_that_is_given_up_is_released_even_under_a_pull_and_others_are_not(bench):
    bench.want_prompt("r", Q)
    loan_id = bench.ask()
    bench.hand_off(loan_id)
    bench.begin_pull(pull_of("r"))
    assert bench.post(StopAsking("r", P)) == [release(loan_id)]
    assert bench.post(StopAsking("r", P)) == []
    assert bench.post(PullProgressed("r", 1)) == [renew("r", Q)]
    assert bench.hand_off(loan_id, is_last=True) == [release(loan_id)]  # it was on its way
    bench.end_pull()
    assert bench.post(SchedulerTold("r")) == []


@pytest.mark.parametrize(("tier", "teaches"), [("disk", True), ("remote", True), ("host", False)])
def test_what_came_before_it_was_given_up_teaches_how_slow_a_tier_is(bench, tier, teaches):
    loan_id = bench.ask()
    bench.hand_off(loan_id, tier=tier, elapsed_s=2.5)
    bench.begin_pull(pull_of("r"))
    bench.now_s = 3.0
    bench.end_pull()
    bench.begin_pull(pull_of("r"))  # of what came next, which is not waited for
    bench.now_s = 8.0
    learned = [LearnHandoff(P, tier, 3.0, 2.5, 3, 0.0)] if teaches else []
    assert bench.post(StopAsking("r", P)) == [release(loan_id), *learned]
    bench.end_pull()


def test_what_came_teaches_the_price_of_where_it_lay_and_not_of_what_was_offered_since(bench):
    loan_id = bench.ask()
    bench.hand_off(loan_id, tier="host", blocks=BLOCKS[:1], elapsed_s=0.1)
    bench.hand_off(loan_id, tier="disk", blocks=BLOCKS[1:3], elapsed_s=2.5)
    bench.hand_off(loan_id, tier="host", blocks=BLOCKS[3:4], elapsed_s=2.6)
    bench.begin_pull(pull_of("r"))
    bench.now_s = 3.0
    bench.end_pull()
    bench.hand_off(loan_id, tier="remote", blocks=BLOCKS[4:], elapsed_s=7.0)
    assert bench.post(StopAsking("r", P)) == [release(loan_id), LearnHandoff(P, "disk", 3.0, 2.6, 3, 0.0)]


def test_what_was_read_up_last_from_memory_does_not_make_a_disk_fast(bench):
    loan_id = bench.ask()
    bench.hand_off(loan_id, tier="disk", elapsed_s=2.5)
    bench.hand_off(loan_id, tier="host", blocks=BLOCKS[3:], elapsed_s=2.6, is_last=True)
    bench.begin_pull(pull_of("r"))
    bench.now_s = 3.0
    bench.end_pull()
    assert bench.post(SchedulerTold("r")) == [release(loan_id), LearnHandoff(P, "disk", 3.0, 2.6, 3, 0.0)]


def test_what_came_badly_or_not_at_all_teaches_nothing(bench):
    assert bench.post(StopAsking("r", bench.book._loans[bench.ask()].source))[1:] == []
    loan_id = bench.ask()
    bench.hand_off(loan_id, tier="disk")
    bench.begin_pull(pull_of("r"))
    bench.end_pull("r", frozenset({1}))
    assert bench.post(StopAsking("r", P)) == [release(loan_id)]


def test_what_was_offered_whole_is_not_given_up_before_its_pull_has_ended(bench):
    loan_id = bench.ask()
    bench.hand_off(loan_id, is_last=True)
    bench.begin_pull(pull_of("r"))
    assert bench.post(StopAsking("r", P)) == []
    bench.end_pull()
    assert bench.post(SchedulerTold("r"))[0] == release(loan_id)


def ask_ahead(bench) -> str:
    bench.seq_ids.add("r")
    [asked] = bench.post(AskAhead("r", P, 2, NAMES[2:]))
    message = asked.message
    assert message == PrefetchBlocks(request_id=message.request_id, first_index=2, names=b"".join(NAMES[2:]))
    return message.request_id


def find(bench, loan_id: str, source: str = P):
    return bench.post(Found(source, BlocksFound(request_id=loan_id, runs=(FoundRun(2, 4, "disk"),))))


def test_what_an_owner_makes_ready_is_told_as_often_as_it_says_it_until_it_is_given_up(bench):
    loan_id = ask_ahead(bench)
    told = [TellScheduler("r", FoundAhead("r", P, (FoundRun(2, 4, "disk"),)))]
    assert find(bench, loan_id) == find(bench, loan_id) == told
    assert bench.post(SchedulerTold("r")) == []
    assert find(bench, loan_id, Q) == find(bench, "another") == []
    assert bench.post(StopAsking("r", P)) == [release(loan_id)]
    assert find(bench, loan_id) == []
    bench.ask()


def test_of_an_owner_that_is_lost_nothing_is_ready(bench):
    ask_ahead(bench)
    assert bench.post(OwnerLost(P)) == [TellScheduler("r", FoundAhead("r", P, ()))]
    assert bench.over("r") == []


def test_an_owner_need_not_go_on_for_a_sequence_that_ended(bench):
    loan_id = ask_ahead(bench)
    assert bench.over("r") == [release(loan_id)]
    assert find(bench, loan_id) == []


def test_who_computes_a_prompt_is_given_up_alone(bench):
    bench.want_prompt("r", Q)
    bench.ask()
    assert bench.post(StopRemote("r")) == [release("r", Q)]
    assert bench.book.num_refused == 1


def test_a_second_question_to_the_same_holder_ends_the_first(bench):
    first = bench.ask()
    second_asked = AskBlocks("r", P, 2, NAMES[2:], is_tail_first=False)
    [released, asked] = bench.post(second_asked)
    assert released == release(first)
    second = asked.message.request_id
    assert second != first
    assert bench.hand_off(first, is_last=True) == [release(first)]  # it was on its way
    assert bench.hand_off(second) == [
        TellScheduler("r", BlocksOffered("r", P, pack_locations(BLOCKS[:3]), is_last=False))
    ]


def test_who_computes_the_prompt_goes_on_when_asked_by_name_too(bench):
    bench.want_prompt()
    asked = bench.post(AskBlocks("r", P, 0, NAMES[:2], is_tail_first=False))
    assert [type(instruction) for instruction in asked] == [AskOwner]
    loan_id = asked[0].message.request_id
    assert bench.post(StopAsking("r", P)) == [release(loan_id)]
    assert bench.hand_off() == [TellScheduler("r", KvOffered("r", P, pack_locations(BLOCKS[:3]), False, None, None, 0))]


def test_of_two_holders_one_that_offered_all_is_kept_while_the_other_is_pulled(bench):
    far, near = bench.ask(source=Q, begin=3), bench.ask(end=3)
    bench.hand_off(near, is_last=True)
    bench.begin_pull(pull_of("r"))
    bench.post(SchedulerTold("r"))
    bench.hand_off(far, Q, BLOCKS[3:], is_last=True)
    assert bench.post(SchedulerTold("r")) == []
    renewed = [renew(far, Q), renew(near)]
    assert bench.post(PullProgressed("r", 1)) == renewed  # what waits for its turn must not expire
    bench.end_pull()
    pull = pull_of("r", Q, BLOCKS[3:])
    assert bench.post(pull) == [*renewed, BeginPull(pull)]
    assert bench.post(SchedulerTold("r")) == []
    bench.end_pull()
    told = bench.post(SchedulerTold("r"))
    assert told == [
        release(far, Q),
        LearnHandoff(Q, "device", 0.0, 0.0, 3, 0.0),
        release(near),
        LearnHandoff(P, "device", 0.0, 0.0, 3, 0.0),
    ]


def test_a_bad_block_of_one_holder_says_nothing_of_the_other(bench):
    far, near = bench.ask(source=Q, begin=3), bench.ask(end=3)
    for loan_id, source, blocks in ((far, Q, BLOCKS[3:]), (near, P, BLOCKS[:3])):
        bench.hand_off(loan_id, source, blocks, is_last=True)
    bench.begin_pull(pull_of("r"))
    bench.end_pull(bad=frozenset({0}))
    bench.begin_pull(pull_of("r", Q, BLOCKS[3:]))
    bench.end_pull()
    learned = [told for told in bench.post(SchedulerTold("r")) if isinstance(told, LearnHandoff)]
    assert learned == [LearnHandoff(Q, "device", 0.0, 0.0, 3, 0.0)]


def test_a_sequence_that_is_over_releases_all_that_still_makes_its_blocks(bench):
    bench.want_prompt("r", Q)
    loan_id = bench.ask()
    bench.ask("another")
    assert bench.over("r") == [release("r", Q), release(loan_id)]
    assert bench.hand_off(loan_id) == [release(loan_id)]


# --------------------------------------------------------------------------------------------------------- lost owners


def test_a_lost_owners_prompts_are_computed_here_and_no_others(bench):
    bench.want_prompt("a")
    bench.want_prompt("b", Q)
    bench.want_prompt("c")
    bench.hand_off("c", is_last=True)
    bench.begin_pull(pull_of("c"))
    assert bench.post(OwnerLost(P)) == [TellScheduler("a", KvRefused("a", is_suspect=True))]
    assert bench.book.num_refused == 1
    bench.end_pull("c", frozenset({0, 1, 2}))
    assert bench.post(SchedulerTold("c")) == []  # nobody is there to be told


def test_a_lost_owner_is_left_alone_for_a_while(bench):
    assert not bench.book.is_avoided(P, 10.0)
    bench.now_s = 10.0
    bench.post(OwnerLost(P))
    assert bench.book.is_avoided(P, 10.9)
    assert not bench.book.is_avoided(Q, 10.9)
    assert not bench.book.is_avoided(P, 11.0)
    bench.now_s = 20.0
    bench.post(OwnerLost(Q))
    assert bench.book.is_avoided(Q, 20.0)


# --------------------------------------------------------------------------------------------------------------- pulls


def test_late_bytes_quarantine_bad_blocks_from_the_pulls_end_on(bench):
    bench.pulling_prompt(is_last=True)
    bench.now_s = 7.0
    told = bench.post(PullStopped("r", frozenset({0}), quarantine_s=3.0))
    assert told == [TellScheduler("r", PullEnded("r", frozenset({0}), 10.0))]
    bench.post(SchedulerTold("r"))
    bench.begin_pull(pull_of("s"))
    assert bench.post(PullStopped("s", frozenset(), 3.0)) == [TellScheduler("s", PullEnded("s", frozenset()))]


def test_a_pull_for_nobody_is_led_to_its_end_all_the_same(bench):
    pull = pull_of("r")
    assert bench.post(pull) == [BeginPull(pull)]
    assert bench.post(PullProgressed("r", 1)) == []
    bench.end_pull()


def test_one_pull_at_a_time_and_only_what_began_can_end(bench):
    with pytest.raises(InvariantError, match="was not running"):
        bench.post(PullStopped("r", frozenset()))
    bench.begin_pull(pull_of("r"))
    with pytest.raises(InvariantError, match="another runs"):
        bench.post(pull_of("r", Q))
    bench.end_pull()


def test_check_invariants_notices_a_loan_that_is_held_for_nothing():
    bench = Bench()
    bench.want_prompt()
    bench.book.check_invariants(["r"])
    with pytest.raises(InvariantError, match="is not there"):
        bench.book.check_invariants([])
    bench.hand_off(is_last=True)
    with pytest.raises(InvariantError, match="not released"):
        bench.book.check_invariants(["r"])
