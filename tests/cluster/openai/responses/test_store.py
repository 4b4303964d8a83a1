"""Responses that are kept: within bytes, number and age, each found by its owner alone."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.openai.responses.protocol import InputItem
from cluster.openai.responses.store import ResponseStore, StoredResponse, StoreLimits


def stored(text: str = "x", previous: StoredResponse | None = None, num_bytes: int = 0) -> StoredResponse:
    said = [{"type": "message", "id": f"out-{text}", "role": "assistant", "content": f"{text}!"}]
    reply = msgspec.json.encode({"output": said}).ljust(num_bytes)
    items = msgspec.json.encode([InputItem(type="message", id=f"in-{text}", role="user", content=text)])
    return StoredResponse(reply, items, previous)


@pytest.fixture
def store():
    made = ResponseStore(StoreLimits(max_bytes=10_000, max_responses=5, max_age_s=60.0))
    yield made
    made.check_invariants()


def test_a_conversation_is_that_of_all_before(store):
    first = stored("one")
    second = stored("two", first)
    store.put("me", "r1", first, 0.0)
    store.put("me", "r2", second, 0.0)
    assert [item.content for item in second.conversation()] == ["one", "one!", "two", "two!"]
    assert [item.content for item in second.given()] == ["one", "one!", "two"]


def test_no_other_owner_finds_or_drops_it(store):
    store.put("me", "r1", stored(), 0.0)
    assert store.find("you", "r1", 0.0) is None
    assert not store.drop("you", "r1", 0.0)
    assert store.find("me", "r1", 0.0) is not None


def test_what_is_too_old_is_gone(store):
    store.put("me", "r1", stored(), 0.0)
    store.put("me", "r2", stored(), 30.0)
    assert store.find("me", "r1", 59.9) is not None
    assert store.find("me", "r1", 60.0) is None
    assert len(store) == 1


def test_who_has_most_makes_room_with_what_is_oldest(store):
    store.put("small", "s", stored(num_bytes=1000), 0.0)
    for number in range(20):
        store.put("big", f"b{number}", stored(num_bytes=3000), 1.0 + number)
    assert store.find("small", "s", 30.0) is not None
    assert store.find("big", "b19", 30.0) is not None
    assert store.find("big", "b0", 30.0) is None


def test_the_number_is_bounded_too(store):
    store.put("few", "f", stored(), 0.0)
    for number in range(9):
        store.put("many", f"m{number}", stored(), 1.0)
    assert len(store) == 5
    assert store.find("few", "f", 1.0) is not None


def test_what_others_go_on_from_counts_until_they_go(store):
    first = stored("one", num_bytes=4000)
    second = stored("two", first, num_bytes=4000)
    store.put("me", "r1", first, 0.0)
    store.put("me", "r2", second, 0.0)
    assert store.drop("me", "r1", 0.0)
    assert store.num_bytes > 8000
    assert store.drop("me", "r2", 0.0)
    assert store.num_bytes == 0


def test_what_is_larger_than_all_room_is_not_kept(store):
    store.put("me", "r1", stored(num_bytes=20_000), 0.0)
    assert store.find("me", "r1", 0.0) is None


def test_none_are_kept_where_none_may_be():
    store = ResponseStore(StoreLimits(max_responses=0))
    store.put("me", "r1", stored(), 0.0)
    assert len(store) == store.num_bytes == 0


class StoreMachine(RuleBasedStateMachine):
    """Whatever is kept, gone on from, dropped or grown old: what is counted is what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.store = ResponseStore(StoreLimits(max_bytes=2000, max_responses=6, max_age_s=10.0))
        self.now_s = 0.0
        self.ids: dict[str, str] = {}  #: of all that were ever kept, with their owners

    @rule(owner=st.sampled_from("abc"), size=st.integers(0, 900), pick=st.integers(0, 20))
    def keep(self, owner: str, size: int, pick: int) -> None:
        own = [each for each, whose in self.ids.items() if whose == owner]
        previous = self.store.find(owner, own[pick % len(own)], self.now_s) if own and pick else None
        name = f"r{len(self.ids)}"
        self.ids[name] = owner
        self.store.put(owner, name, stored(name, previous, size), self.now_s)

    @rule(pick=st.integers(0, 50))
    def drop(self, pick: int) -> None:
        if self.ids:
            name = list(self.ids)[pick % len(self.ids)]
            was_there = self.store.find(self.ids[name], name, self.now_s) is not None
            assert self.store.drop(self.ids[name], name, self.now_s) == was_there
            assert self.store.find(self.ids[name], name, self.now_s) is None

    @rule(seconds=st.floats(0.0, 6.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def counts_are_right(self) -> None:
        self.store.check_invariants()
        for name, owner in self.ids.items():
            found = self.store.find(owner, name, self.now_s)
            if found is not None:
                assert found.conversation()[-1].content == f"{name}!"


TestStoreMachine = pytest.mark.slow(StoreMachine.TestCase)
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
