import pytest

from kvcache.leases import (
    Asked,
    AskerLost,
    Failed,
    FreeBlocks,
    LeaseBook,
    Published,
    Released,
    Renewed,
    TimePassed,
)
from messages.errors import InvariantError

LEASE_S = 5.0
A, B = b"decode a", b"decode b"


@pytest.fixture
def book() -> LeaseBook:
    return LeaseBook(LEASE_S)


def leased(book: LeaseBook, request_id: str, asker: bytes = A, now_s: float = 0.0) -> None:
    assert book.on_event(Asked(request_id, asker), now_s) == []
    assert book.on_event(Published(request_id), now_s) == []


def expired_at(book: LeaseBook, now_s: float) -> list[str]:
    freed = book.on_event(TimePassed(), now_s)
    assert all(item.is_expired for item in freed)
    return [item.request_id for item in freed]


def test_a_lease_begins_at_publication_not_at_the_request(book):
    book.on_event(Asked("r", A), 0.0)
    assert (book.num_open, book.num_leased) == (1, 0)
    book.on_event(Published("r"), 100.0)
    assert (book.num_open, book.num_leased) == (1, 1)
    assert expired_at(book, 100.0 + LEASE_S) == []
    assert expired_at(book, 100.1 + LEASE_S) == ["r"]


def test_before_publication_nothing_expires(book):
    book.on_event(Asked("r", A), 0.0)
    assert expired_at(book, 1e9) == []
    assert book.asker_of("r") == A


def test_another_publication_begins_the_lease_anew(book):
    leased(book, "r")
    book.on_event(Published("r"), 4.0)
    assert expired_at(book, 4.0 + LEASE_S) == []
    assert expired_at(book, 4.1 + LEASE_S) == ["r"]


def test_renewing_moves_the_end(book):
    leased(book, "r")
    for now_s in (4.0, 8.0, 12.0):
        assert book.on_event(Renewed("r", A), now_s) == []
        assert expired_at(book, now_s) == []
    assert expired_at(book, 12.0 + LEASE_S) == []
    assert expired_at(book, 12.1 + LEASE_S) == ["r"]


def test_renewing_before_publication_begins_no_lease(book):
    book.on_event(Asked("r", A), 0.0)
    book.on_event(Renewed("r", A), 1.0)
    assert book.num_leased == 0
    assert expired_at(book, 1e9) == []


def test_only_the_askers_own_renewal_counts(book):
    leased(book, "r")
    book.on_event(Renewed("r", B), 4.0)
    assert expired_at(book, LEASE_S + 0.1) == ["r"]


def test_a_release_frees_at_once_and_only_once(book):
    leased(book, "r")
    assert book.on_event(Released("r", A), 1.0) == [FreeBlocks("r")]
    assert book.on_event(Released("r", A), 1.0) == []
    assert expired_at(book, 1e9) == []
    assert book.num_open == 0


def test_only_the_askers_own_release_counts(book):
    leased(book, "r")
    assert book.on_event(Released("r", B), 1.0) == []
    assert (book.asker_of("r"), book.num_leased) == (A, 1)


def test_a_release_before_publication_ends_the_computation(book):
    book.on_event(Asked("r", A), 0.0)
    assert book.on_event(Released("r", A), 1.0) == [FreeBlocks("r")]
    assert book.on_event(Published("r"), 2.0) == []  # what was under way then counts for nobody
    assert book.num_open == 0


def test_asking_again_frees_the_old_one_and_begins_without_a_lease(book):
    leased(book, "r")
    assert book.on_event(Asked("r", A), 1.0) == [FreeBlocks("r")]
    assert (book.num_open, book.num_leased) == (1, 0)
    assert expired_at(book, 1e9) == []


def test_a_request_that_moved_belongs_to_who_asked_last(book):
    leased(book, "r", A)
    assert book.on_event(Asked("r", B), 1.0) == [FreeBlocks("r")]
    assert book.asker_of("r") == B
    assert book.on_event(Released("r", A), 2.0) == []
    assert book.on_event(AskerLost(A), 3.0) == []
    assert book.on_event(AskerLost(B), 4.0) == [FreeBlocks("r")]


def test_all_of_a_lost_peer_is_freed_and_nothing_of_others(book):
    leased(book, "a-leased", A)
    book.on_event(Asked("a-computing", A), 0.0)
    leased(book, "b-leased", B)
    book.on_event(Asked("b-computing", B), 0.0)
    freed = book.on_event(AskerLost(A), 1.0)
    assert sorted(item.request_id for item in freed) == ["a-computing", "a-leased"]
    assert not any(item.is_expired for item in freed)
    book.check_invariants(["b-leased", "b-computing"])
    assert book.on_event(AskerLost(A), 2.0) == []


def test_expiry_frees_once_and_is_counted(book):
    leased(book, "r1", now_s=0.0)
    leased(book, "r2", now_s=1.0)
    leased(book, "r3", now_s=9.0)
    assert book.on_event(TimePassed(), 8.0) == [FreeBlocks("r1", is_expired=True), FreeBlocks("r2", is_expired=True)]
    assert book.num_expired == 2
    assert expired_at(book, 8.0) == []
    assert book.on_event(Released("r1", A), 8.0) == []
    assert (book.num_expired, book.num_open) == (2, 1)


def test_nothing_but_expiry_counts_as_expired(book):
    for number, event in enumerate([Released("r", A), AskerLost(A), Asked("r", A), Failed("r")]):
        leased(book, "r", now_s=float(number))
        book.on_event(event, float(number))
        book.on_event(Failed("r"), float(number))
    assert book.num_expired == 0


@pytest.mark.parametrize("is_published", [False, True])
def test_what_failed_is_forgotten_without_freeing(book, is_published):
    book.on_event(Asked("r", A), 0.0)
    if is_published:
        book.on_event(Published("r"), 0.0)
    assert book.on_event(Failed("r"), 1.0) == []
    assert (book.asker_of("r"), book.num_open, book.num_leased) == (None, 0, 0)
    assert expired_at(book, 1e9) == []


@pytest.mark.parametrize(
    "event", [Published("x"), Renewed("x", A), Released("x", A), Failed("x"), AskerLost(B), TimePassed()]
)
def test_unknown_ids_and_peers_are_ignored(book, event):
    leased(book, "r")
    assert book.on_event(event, 1.0) == []
    assert (book.num_open, book.num_leased, book.num_expired) == (1, 1, 0)
    assert book.asker_of("x") is None


@pytest.mark.parametrize("held", [[], ["r1"], ["r1", "r2", "r3"], ["r1", "r3"]])
def test_check_invariants_notices_every_difference_from_the_sequences_held(book, held):
    leased(book, "r1")
    book.on_event(Asked("r2", B), 0.0)
    book.check_invariants(["r2", "r1"])
    with pytest.raises(InvariantError, match="not the same"):
        book.check_invariants(held)
