import contextlib
import os
import socket
import subprocess
import sys

import pytest

from cluster.listener import SharedListener, bound_socket, take_listener
from messages.errors import ConfigError
from tests.served import free_port

#: A process that accepts one connection, says who it is, and goes.
ACCEPT_ONE = """
import os, sys
from cluster.listener import take_listener
taken = take_listener(sys.argv[1])
print("listens", flush=True)
connection, _ = taken.accept()
connection.sendall(str(os.getpid()).encode())
"""

#: Somebody who asks for it.
ASK = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as asking:
    asking.connect(chr(0) + sys.argv[1])
    print(len(socket.recv_fds(asking, 1, 1)[1]))
"""


@pytest.fixture
def address():
    return "127.0.0.1", free_port()


@pytest.fixture
def listener(address):
    made = SharedListener(*address)
    yield made
    made.close()


def acceptor(listener: SharedListener) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", ACCEPT_ONE, listener.name], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listens\n"
    return process


@pytest.mark.slow
def test_a_connection_waits_while_its_acceptor_is_replaced(listener, address):
    with pytest.raises(ConnectionRefusedError):  # nobody is ready yet
        socket.create_connection(address)
    with acceptor(listener) as first, socket.create_connection(address) as connection:
        assert int(connection.recv(100)) == first.pid
    with socket.create_connection(address) as connection, acceptor(listener) as second:
        assert int(connection.recv(100)) == second.pid


@pytest.mark.slow
def test_two_acceptors_share_the_port(listener, address):
    with acceptor(listener) as first, acceptor(listener) as second:
        pids = set()
        for _ in range(2):
            with socket.create_connection(address) as connection:
                pids.add(int(connection.recv(100)))
    assert pids == {first.pid, second.pid}


def test_a_port_that_is_taken_is_one_clear_line(address):
    taken = f"http: cannot listen on 127.0.0.1 port {address[1]}: Address already in use"
    first = SharedListener(*address)
    with pytest.raises(ConfigError, match=taken):  # it does not listen yet
        SharedListener(*address)
    with take_listener(first.name):
        with pytest.raises(ConfigError, match=taken):
            SharedListener(*address)
        first.close()
        with pytest.raises(ConfigError, match=taken):
            bound_socket(*address)
    bound_socket(*address).close()


def test_a_port_can_be_had_again_at_once_after_connections_were_closed_here(address):
    for _ in range(2):
        listener = SharedListener(*address)
        with take_listener(listener.name) as taken, socket.create_connection(address) as client:
            connection, _ = taken.accept()
            connection.close()  # first, so that the kernel remembers it on this side
            assert client.recv(1) == b""
        listener.close()


def test_somebody_who_listens_first_is_seen_when_we_want_to(address):
    former = SharedListener(*address)
    with take_listener(former.name) as taken, socket.create_connection(address):
        taken.accept()[0].close()
    former.close()
    late = SharedListener(*address)  # has to reuse the address
    with socket.create_server(address), pytest.raises(ConfigError, match="Address already in use"):
        take_listener(late.name)
    late.close()


def test_nobody_there_is_a_clear_error(listener):
    listener.close()
    with pytest.raises(ConfigError, match="does not give its socket: Connection refused"):
        take_listener(listener.name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_gets_nothing(listener):
    def num_given(user: int) -> int:
        return int(subprocess.check_output([sys.executable, "-c", ASK, listener.name, str(user)]))

    assert [num_given(user) for user in (0, 65534, 0)] == [1, 0, 1]


def test_connections_are_refused_at_once_while_nobody_serves():
    port = free_port()
    listener = SharedListener("127.0.0.1", port)
    with contextlib.closing(listener):
        listener.refuse()  # nobody has taken it: nothing to refuse
        former = take_listener(listener.name)
        with socket.create_connection(("127.0.0.1", port)) as waiting:
            listener.refuse()
            with contextlib.suppress(ConnectionResetError):
                assert waiting.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        former.close()
        with take_listener(listener.name) as taken, socket.create_connection(("127.0.0.1", port)):
            taken.accept()[0].close()
