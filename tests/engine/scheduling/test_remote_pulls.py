"""What becomes of blocks that another worker offers: pulled, passed over, refused, kept, left."""

from __future__ import annotations

import pytest

from engine.scheduling.plan import BlocksOffered, Instruction, KvOffered, PullBlocks, PullEnded
from engine.scheduling.remote_pulls import RemotePulls, count_peer_tokens, take_peer_tokens
from engine.scheduling.sequence import Phase, Sequence
from kvcache.load_plan import Load
from kvcache.locations import BlockLocation, pack_locations
from kvcache.pool import BlockState
from messages.errors import InvariantError
from messages.request import Copy
from messages.stream import GotRun
from tests.engine.scheduling.ledger_bench import LedgerBench, locations
from tests.locations import pairs_of

PROMPT = list(range(100, 119))  # four full blocks and three tokens
WHOLE = list(range(100, 116))  # four full blocks


class Puller(LedgerBench):
    """A ledger, its pulls, and what is to be done about them."""

    def __init__(self) -> None:
        super().__init__()
        self.pulls = RemotePulls(self.ledger, lambda _: ())

    def offer(
        self, seq: Sequence, blocks: list[BlockLocation], *, source: str = "owner", is_last: bool = False
    ) -> list[Instruction]:
        out: list[Instruction] = []
        self.pulls.take_offer(seq, KvOffered(seq.seq_id, source, pack_locations(blocks), is_last, None, None, 0), out)
        self.ledger.check_invariants()
        return out

    def finish(self, seq_id: str, *bad_indexes: int, quarantine_until_s: float | None = None) -> list[Instruction]:
        out: list[Instruction] = []
        self.pulls.finish_pull(PullEnded(seq_id, frozenset(bad_indexes), quarantine_until_s), out)
        self.ledger.check_invariants()
        return out


@pytest.fixture
def bench() -> Puller:
    return Puller()


def indexes(instruction: Instruction) -> list[int]:
    assert isinstance(instruction, PullBlocks)
    return [location.index for location, _ in pairs_of(instruction)]


# -------------------------------------------------------------------------------------------------------------- offers


def test_each_block_is_pulled_into_the_one_that_was_reserved_for_it(bench):
    seq = bench.pulling("r", PROMPT)
    offered = locations(PROMPT)
    assert bench.offer(seq, offered) == [
        PullBlocks("r", "owner", pack_locations(offered), tuple(seq.block_table[: len(offered)]))
    ]


def test_what_is_held_on_its_way_or_here_already_is_passed_over_and_no_rejection(bench):
    bench.hold(PROMPT[:4])
    seq = bench.pulling("r", PROMPT)
    [first] = bench.offer(seq, locations(PROMPT, end=2))
    assert indexes(first) == [1]
    assert bench.offer(seq, locations(PROMPT, end=2)) == []
    bench.finish("r")
    assert bench.offer(seq, locations(PROMPT, end=2)) == []
    assert bench.pulls.num_rejected_blocks == 0


def test_a_block_beyond_the_prompt_is_nobodys(bench):
    seq = bench.pulling("r", PROMPT[:8])
    [pull] = bench.offer(seq, locations(PROMPT))
    assert indexes(pull) == [0, 1]
    assert bench.pulls.num_rejected_blocks == 0


@pytest.mark.parametrize(
    ("index", "name", "num_tokens"),
    [
        (0, b"another name 16b", 4),
        (0, b"", 4),  # a full block without a name proves nothing
        (0, None, 3),
        (4, b"", 4),
        (4, b"", 2),
        (4, b"a name too early", 3),
    ],
)
def test_a_block_that_is_not_the_sequences_is_rejected_and_counted(bench, index, name, num_tokens):
    seq = bench.pulling("r", PROMPT)
    right = locations(PROMPT)[index]
    wrong = BlockLocation(index, 90, 5, right.name if name is None else name, num_tokens)
    assert bench.offer(seq, [wrong]) == []
    assert bench.pulls.num_rejected_blocks == 1
    [pull] = bench.offer(seq, [right])
    assert indexes(pull) == [index]


def test_of_two_offers_of_a_block_that_waits_its_turn_the_later_one_is_pulled(bench):
    seq = bench.pulling("r", PROMPT)
    bench.offer(seq, locations(PROMPT, end=1))
    bench.offer(seq, locations(PROMPT, begin=1, end=3), source="a")
    bench.offer(seq, locations(PROMPT, begin=2, end=3), source="b")
    [second] = bench.finish("r")
    [third] = bench.finish("r")
    assert [(pull.source, indexes(pull)) for pull in (second, third)] == [("a", [1]), ("b", [2])]


def test_who_does_not_pull_has_no_use_for_an_offer(bench):
    with pytest.raises(InvariantError, match="'a' is running, and does not pull"):
        bench.offer(bench.running("a", PROMPT), locations(PROMPT))


# ---------------------------------------------------------------------------------------------------------------- ends


def test_blocks_have_their_names_as_soon_as_they_came_and_a_partial_one_has_none(bench):
    seq = bench.pulling("r", PROMPT)
    bench.offer(seq, locations(PROMPT, begin=3))
    bench.finish("r")
    assert [bench.pool.name(block_id) for block_id in seq.block_table] == [None, None, None, seq.names[3], None]


def test_with_the_last_block_of_the_last_offer_it_runs(bench):
    seq = bench.pulling("r", PROMPT)
    bench.append(seq)
    bench.offer(seq, locations(PROMPT, end=2))
    bench.offer(seq, locations(PROMPT, begin=2), is_last=True)
    assert len(bench.finish("r")) == 1
    assert seq.phase is Phase.PULLING
    assert bench.finish("r") == []
    assert (seq.phase, seq.num_computed, seq.is_decoding) == (Phase.RUNNING, 19, True)
    assert bench.pulls.num_fallbacks == 0


def test_a_last_offer_that_brings_nothing_more_is_the_end_too(bench):
    seq = bench.pulling("r", PROMPT)
    bench.append(seq)
    bench.offer(seq, locations(PROMPT))
    bench.finish("r")
    assert seq.phase is Phase.PULLING
    bench.offer(seq, [], is_last=True)
    assert (seq.phase, seq.num_computed) == (Phase.RUNNING, 19)


def test_a_bad_block_before_the_last_offer_may_still_come(bench):
    seq = bench.pulling("r", PROMPT)
    bench.append(seq)
    bench.offer(seq, locations(PROMPT))
    bench.finish("r", 2)
    assert (seq.phase, bench.pulls.num_rejected_blocks, bench.pulls.num_fallbacks) == (Phase.PULLING, 1, 0)
    [again] = bench.offer(seq, locations(PROMPT), source="another", is_last=True)
    assert (again.source, indexes(again)) == ("another", [2])
    bench.finish("r")
    assert (seq.phase, seq.num_computed) == (Phase.RUNNING, 19)


def test_a_gap_after_the_last_offer_is_computed_from_there(bench):
    seq = bench.pulling("r", PROMPT)
    bench.append(seq)
    bench.offer(seq, locations(PROMPT), is_last=True)
    bench.finish("r", 2)
    assert (seq.phase, seq.num_computed, bench.pulls.num_fallbacks) == (Phase.RUNNING, 8, 1)
    assert len(bench.pool.match(seq.names[3:])) == 1, "what came behind the gap is kept under its name"


@pytest.mark.parametrize(("bad", "num_computed"), [((), 4), ((0, 1), 0)])
def test_where_late_bytes_may_come_the_pull_goes_on_unless_one_of_its_blocks_is_bad(bench, bad, num_computed):
    seq = bench.pulling("r", PROMPT)
    table = list(seq.block_table)
    bench.offer(seq, locations(PROMPT, end=1))
    bench.offer(seq, locations(PROMPT, begin=1, end=2))
    out = bench.finish("r", *bad, quarantine_until_s=9.0)
    if bad:
        assert (out, seq.phase, seq.num_computed, bench.pulls.num_fallbacks) == ([], Phase.RUNNING, num_computed, 1)
        assert bench.pool.state(table[0]) is BlockState.QUARANTINED
        assert bench.ledger.orphans == {}
    else:
        assert indexes(out[0]) == [1]
        assert seq.phase is Phase.PULLING


def test_the_good_blocks_of_a_pull_that_could_not_be_stopped_are_used(bench):
    seq = bench.pulling("r", PROMPT)
    table = list(seq.block_table)
    bench.offer(seq, locations(PROMPT, end=3))
    bench.finish("r", 1, quarantine_until_s=9.0)
    assert (seq.num_computed, seq.block_table) == (4, table[:1])
    assert [bench.pool.state(block_id) for block_id in table[:3]] == [
        BlockState.PINNED,
        BlockState.QUARANTINED,
        BlockState.EVICTABLE,
    ]


def test_a_pull_of_who_went_on_without_it_ends_for_its_blocks_only(bench):
    seq = bench.pulling("r", PROMPT)
    bench.offer(seq, locations(PROMPT, end=2))
    bench.pulls.fall_back(seq, [])
    assert bench.finish("r", 1) == []
    assert (seq.phase, seq.num_computed, bench.pool.num_used) == (Phase.RUNNING, 0, 0)
    assert len(bench.pool.match(seq.names)) == 1
    assert bench.pulls.num_rejected_blocks == 0


@pytest.mark.parametrize("phase", ["waiting", "running", "pulling"])
def test_a_pull_that_was_not_begun_cannot_end(bench, phase):
    getattr(bench, phase)("r", PROMPT)
    with pytest.raises(InvariantError, match="a pull of sequence 'r' ended that was not running"):
        bench.finish("r")
    with pytest.raises(InvariantError, match="'nobody'"):
        bench.finish("nobody")


# ----------------------------------------------------------------------------------------------------------- fall back


@pytest.mark.parametrize(
    ("prompt", "has_token", "num_computed"),
    [
        (WHOLE, False, 12),  # a token must be left whose logits give the first one
        (WHOLE, True, 16),
        (PROMPT, False, 16),
        (PROMPT, True, 19),
    ],
)
def test_what_came_is_kept_up_to_the_token_that_is_still_to_be_computed(bench, prompt, has_token, num_computed):
    seq = bench.pulling("r", prompt)
    if has_token:
        bench.append(seq)
    bench.offer(seq, locations(prompt))
    bench.finish("r")
    bench.pulls.fall_back(seq, [])
    assert (seq.phase, seq.num_computed) == (Phase.RUNNING, num_computed)
    bench.ledger.check_invariants()


@pytest.mark.parametrize(("num_came", "peer_tokens"), [(1, 0), (3, 6), (4, 6)])
def test_of_what_the_peer_had_cached_only_what_came_counts_and_not_what_was_here(bench, num_came, peer_tokens):
    bench.hold(PROMPT[:4])
    seq = bench.pulling("r", PROMPT)
    seq.pull.num_peer_cached_tokens = 10
    bench.offer(seq, locations(PROMPT, begin=1, end=num_came))
    if num_came > 1:
        bench.finish("r")
    bench.pulls.fall_back(seq, [])
    assert (seq.num_device_tokens, seq.num_peer_tokens) == (4, peer_tokens)


def test_after_the_first_emission_nothing_more_is_said_of_the_prompts_sources(bench):
    seq = bench.pulling("r", PROMPT)
    seq.num_peer_tokens = 5
    bench.append(seq)
    bench.pulls.fall_back(seq, [])
    assert seq.num_peer_tokens == 5


@pytest.mark.parametrize(
    ("cached", "pulled", "here", "counted"),
    [(0, 19, 0, 0), (10, 19, 0, 10), (10, 8, 0, 8), (10, 19, 4, 6), (4, 19, 8, 0), (100, 100, 0, 19)],
)
def test_peer_tokens_are_what_it_had_cached_and_came_and_was_not_here(bench, cached, pulled, here, counted):
    seq = bench.pulling("r", PROMPT)
    seq.pull.first_index, seq.pull.num_peer_cached_tokens = here // 4, cached
    assert count_peer_tokens(seq, pulled) == counted


# ------------------------------------------------------------------------------------------------------------- origins


def loading(bench: Puller) -> Sequence:
    """A sequence that waits for its four full blocks from one holder."""
    seq = bench.running("r", PROMPT)
    bench.ledger.begin_pull(seq, 30.0, 4).has_last_offer = True
    bench.pulls.ask(seq, [Load(0, 4, Copy("a", "host"))], [])
    return seq


def test_what_a_holder_gave_and_what_came_damaged_or_not_at_all_is_told_with_whom_it_was_asked_of(bench):
    seq = loading(bench)
    offered = BlocksOffered("r", "a", pack_locations(locations(PROMPT, end=4)), is_last=True)
    bench.pulls.take_blocks(seq, offered, [])
    bench.pulls.finish_pull(PullEnded("r", frozenset({2, 3}), damaged_indexes=frozenset({2})), [])
    assert seq.phase is Phase.RUNNING
    assert seq.origins.told(19, 4) == (
        GotRun(0, 8, "host", "a"),
        GotRun(8, 12, "computed", "a", "damaged"),
        GotRun(12, 16, "computed", "a", "holder_lost"),
        GotRun(16, 19, "computed"),
    )


@pytest.mark.parametrize(("is_lost", "why"), [(False, "evicted"), (True, "holder_lost")])
def test_what_a_holder_does_not_offer_it_had_not_any_more_unless_it_was_lost(bench, is_lost, why):
    seq = loading(bench)
    bench.pulls.take_blocks(seq, BlocksOffered("r", "a", pack_locations(locations(PROMPT, end=1)), is_last=False), [])
    bench.pulls.finish_pull(PullEnded("r", frozenset()), [])
    bench.pulls.take_blocks(seq, BlocksOffered("r", "a", b"", is_last=True, is_lost=is_lost), [])
    assert seq.origins.told(19, 4) == (
        GotRun(0, 4, "host", "a"),
        GotRun(4, 16, "computed", "a", why),
        GotRun(16, 19, "computed"),
    )


def test_what_a_prefill_worker_had_and_what_it_computed_are_told_apart(bench):
    seq = bench.running("r", PROMPT, remote_s=1.0, remote_source="p")
    seq.is_handed_over = True
    pull = bench.ledger.begin_pull(seq, 30.0)
    bench.pulls.ask(seq, [Load(0, 1, Copy("a", "disk"))], [])
    pull.num_peer_cached_tokens = 8
    take_peer_tokens(seq, seq.num_prompt_tokens)
    assert seq.num_peer_tokens == 4
    assert seq.origins.told(19, 4) == (
        GotRun(0, 4, "disk", "a"),
        GotRun(4, 8, "peer", "p"),
        GotRun(8, 19, "computed", "p"),
    )
