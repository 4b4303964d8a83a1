import random
import threading

import pytest

from tests.transport.links import wait_until
from tests.transport.socket_peers import (
    HOST,
    SIZE,
    FakeSource,
)
from transport.memory import Memory
from transport.protocol import Link
from transport.secret import ClusterSecret
from transport.socket.road import SocketTransport


@pytest.fixture
def secret():
    return ClusterSecret.generate()


@pytest.fixture
def make(secret):
    """Makes transports, closes them at the end, and sees that no thread of theirs is left."""
    made = []

    def make_one(secret=secret, **options):
        made.append(SocketTransport(secret, HOST, **options))
        return made[-1]

    yield make_one
    for transport_ in made:
        transport_.close()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("socket-")])


@pytest.fixture
def owner(make):
    return make()


@pytest.fixture
def puller(make):
    return make()


@pytest.fixture
def link():
    return Link(lambda road, body: True)


@pytest.fixture(scope="module")
def source():
    memory = Memory.allocate(SIZE)
    memory.view[:] = random.Random(1).randbytes(SIZE)
    yield memory
    memory.close()


@pytest.fixture(scope="module")
def _target():
    memory = Memory.allocate(SIZE)
    yield memory
    memory.close()


@pytest.fixture
def target(_target):
    _target.view[:] = bytes(SIZE)
    return _target


@pytest.fixture
def fake(secret):
    """Makes sources that answer as they are told."""
    made = []

    def make_one(answer, **options):
        made.append(FakeSource(secret, answer, **options))
        return made[-1]

    yield make_one
    for source_ in made:
        source_.close()
