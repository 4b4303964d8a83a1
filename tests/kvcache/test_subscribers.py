import pytest

from kvcache.subscribers import Subscribers
from messages.fleet import KvEvents
from transport.channel import ChannelConfig


@pytest.fixture
def sent():
    return []


@pytest.fixture
def subscribers(sent):
    return Subscribers("w", lambda subscriber, message: sent.append((subscriber, message)))


def test_a_snapshot_begins_at_zero_clears_once_and_has_a_message_for_each_tier(subscribers, sent):
    subscribers.add(b"r", [("host", b"a" * 16), ("disk", b"b" * 16)])
    assert sent == [
        (b"r", KvEvents(worker_id="w", seq=0, tier="host", cleared=True, num_pieces_left=1, stored=b"a" * 16)),
        (b"r", KvEvents(worker_id="w", seq=1, tier="disk", num_pieces_left=0, stored=b"b" * 16)),
    ]


def test_a_long_snapshot_comes_in_pieces_and_changes_go_on_behind_the_last_one(subscribers, sent):
    names = bytes(range(256)) * 300  # 4,800 names
    subscribers.add(b"r", [("device", names), ("disk", b"")])
    subscribers.tell("device", b"a" * 16, b"")
    messages = [message for _, message in sent]
    assert [message.seq for message in messages] == list(range(len(messages)))
    assert [message.num_pieces_left for message in messages] == [*range(len(messages) - 2, -1, -1), None]
    assert [message.cleared for message in messages] == [True] + [False] * (len(messages) - 1)
    assert b"".join(message.stored for message in messages if message.num_pieces_left) == names
    assert max(len(message.stored) for message in messages) <= 16 * 1024


def test_changes_are_numbered_for_each_subscriber(subscribers, sent):
    subscribers.add(b"one", [("device", b"")])
    subscribers.tell("device", b"a" * 16, b"")
    subscribers.add(b"two", [("device", b"a" * 16)])
    del sent[:]
    subscribers.tell("device", b"", b"a" * 16)
    assert [(who, message.seq, message.removed) for who, message in sent] == [
        (b"one", 2, b"a" * 16),
        (b"two", 1, b"a" * 16),
    ]
    assert list(subscribers) == [b"one", b"two"]


def test_who_subscribes_anew_begins_anew_and_who_is_gone_hears_nothing(subscribers, sent):
    subscribers.add(b"r", [("device", b"")])
    subscribers.tell("device", b"a" * 16, b"")
    subscribers.add(b"r", [("device", b"a" * 16)])
    subscribers.tell("device", b"b" * 16, b"")
    assert [message.seq for _, message in sent] == [0, 1, 0, 1]
    subscribers.remove(b"r")
    subscribers.remove(b"r")
    subscribers.tell("device", b"c" * 16, b"")
    assert len(sent) == 4


def test_what_changes_at_once_comes_in_pieces_too(subscribers, sent):
    subscribers.add(b"r", [("device", b"")])
    del sent[:]
    stored, removed = bytes(range(256)) * 100, b"r" * 16 * 3000
    subscribers.tell("device", stored, removed)
    messages = [message for _, message in sent]
    assert [message.seq for message in messages] == [1, 2, 3]
    assert b"".join(message.stored for message in messages) == stored
    assert b"".join(message.removed for message in messages) == removed


@pytest.mark.slow
def test_however_many_names_there_are_a_channel_can_queue_the_pieces(subscribers, sent):
    names = bytes(16 * 12_000_000)
    subscribers.add(b"r", [("host", b"a" * 16), ("remote", names)])
    subscribers.tell("remote", b"", names)
    messages = [message for _, message in sent]
    assert [message.seq for message in messages] == list(range(len(messages)))
    assert sum(len(message.stored) for message in messages) == len(names) + 16
    assert sum(len(message.removed) for message in messages) == len(names)
    assert all(len(message.stored) % 16 == len(message.removed) % 16 == 0 for message in messages)
    assert len(messages) < ChannelConfig().max_queued_messages
