import pytest

from messages.handoff import RoadMessage
from transport.incoming import IncomingLinks
from transport.memory import Memory
from transport.roads import Roads


@pytest.fixture
def roads():
    memory = Memory.allocate(4096)
    roads = Roads([], memory, memory, stall_s=1.0)
    yield roads
    roads.close()
    memory.close()


def test_a_sender_has_one_link_that_speaks_to_it_until_it_is_lost(roads):
    sent = []
    links = IncomingLinks(roads, lambda sender, message: sent.append((sender, message)) or True)
    one, other = links.open(b"one"), links.open(b"other")
    assert links.open(b"one") is one
    assert one is not other
    assert one.send("shm", b"hello")
    assert sent == [(b"one", RoadMessage(road="shm", body=b"hello"))]
    links.on_lost(b"one")
    links.on_lost(b"one")
    assert one.is_lost
    assert not one.send("shm", b"hello")
    assert links.open(b"one") is not one
    assert not other.is_lost


def test_what_a_senders_road_said_comes_to_the_same_road_here(roads, caplog):
    links = IncomingLinks(roads, lambda sender, message: True)
    links.on_message(b"one", RoadMessage(road="nowhere", body=b""))
    assert "nowhere" in caplog.text
