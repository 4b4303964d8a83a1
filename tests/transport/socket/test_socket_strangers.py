"""Who does not know the secret gets nothing from the socket road, and keeps nobody out."""

import contextlib
import itertools
import socket
import time

import msgspec
import pytest

import transport.socket.road
import transport.socket.source
from tests.transport.links import wait_until
from tests.transport.socket_peers import (
    claim,
    connect_to,
    handle_of,
    proven_connection,
)
from transport.protocol import Copy, TransferError
from transport.secret import ClusterSecret
from transport.socket.frames import ANSWER, REQUEST, read_exactly


async def test_a_puller_with_another_secret_says_so_and_asks_nothing(owner, make, link, source, target):
    with pytest.raises(TransferError, match="has another cluster secret"):
        await make(ClusterSecret.generate()).pull(link, owner.register(source), [Copy(0, 0, 100)], target, 5)
    assert owner._source._connections == set()


async def test_a_puller_that_only_knows_the_key_id_gets_nothing_and_both_say_so(
    owner, make, link, source, target, caplog
):
    stranger = ClusterSecret.generate()
    region = owner.register(source)
    sly = msgspec.structs.replace(handle_of(region), key_id=stranger.key_id)
    with pytest.raises(TransferError, match="closed at our proof: another cluster secret"):
        await make(stranger).pull(
            link,
            msgspec.structs.replace(region, handle=msgspec.msgpack.encode(sly)),
            [Copy(0, 0, 100)],
            target,
            5,
        )
    assert bytes(target.view[:100]) == bytes(100)
    wait_until(lambda: owner.num_refused == 1)
    assert "refused 127.0.0.1, without the cluster secret" in caplog.text


async def test_while_one_secret_follows_another_every_process_pulls_from_every_other(make, link, source, target):
    old, new = ClusterSecret.generate().key, ClusterSecret.generate().key
    steps = [make(ClusterSecret(*keys)) for keys in ((old,), (old, new), (new, old), (new,))]
    for neighbours in itertools.pairwise(steps):
        for owner, puller in itertools.product(neighbours, repeat=2):
            target.view[:100] = bytes(100)
            await puller.pull(link, owner.register(source), [Copy(0, 0, 100)], target, 5)
            assert target.view[:100] == source.view[:100]
    with pytest.raises(TransferError, match="another cluster secret"):
        await steps[0].pull(link, steps[-1].register(source), [Copy(0, 0, 100)], target, 5)


async def test_refusals_are_counted_and_seldom_logged(owner, source, caplog):
    region = owner.register(source)
    for _ in range(9):
        connect_to(region).close()
    wait_until(lambda: owner.num_refused == 9)
    assert caplog.text.count("without the cluster secret") == 4  # 1, 2, 4, 8


async def test_a_source_without_the_secret_is_not_believed(fake, puller, link, source, target):
    def answer(connection, pull_id, num_bytes):
        raise AssertionError("it was asked")

    rogue = fake(answer, key=bytes(32))
    with pytest.raises(TransferError, match="does not have the cluster secret"):
        await puller.pull(link, rogue.describe(source), [Copy(0, 0, 100)], target, 5)


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
def test_a_stranger_who_proves_nothing_is_closed_in_time(owner, source, monkeypatch, drip):
    monkeypatch.setattr(transport.socket.source, "HANDSHAKE_S", 0.3)
    with connect_to(owner.register(source)) as stranger:
        began_s = time.monotonic()
        stranger.settimeout(0.03)
        got = b""
        while time.monotonic() - began_s < 3:
            try:
                if drip:
                    stranger.send(b"x")
                new = stranger.recv(1000)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not new:
                break
            got += new
        assert 0.25 < time.monotonic() - began_s < 1.5
        assert len(got) == 32  # the challenge


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n" * 10, bytes(80), b"\xff" * 4096], ids=["http", "zeros", "ones"])
def test_junk_instead_of_a_proof_gets_nothing(owner, source, junk):
    with connect_to(owner.register(source)) as stranger:
        stranger.sendall(junk)
        got = b""
        try:
            while new := stranger.recv(1000):
                got += new
        except ConnectionResetError:
            pass
        assert len(got) <= 32
    wait_until(lambda: owner.num_refused == 1)


def test_a_proof_is_good_for_one_connection_only(owner, source, secret):
    region = owner.register(source)
    with connect_to(region) as first, connect_to(region) as second:
        proof, _ = claim(secret, handle_of(region).instance, read_exactly(first, 32))
        read_exactly(second, 32)
        second.sendall(proof)
        assert second.recv(1) == b""
        first.sendall(proof)
        assert len(read_exactly(first, ANSWER.size)) == ANSWER.size


async def test_a_crowd_of_strangers_does_not_keep_peers_out(owner, puller, link, source, target, monkeypatch):
    monkeypatch.setattr(transport.socket.source, "MAX_UNPROVEN", 4)
    region = owner.register(source)
    crowd = [connect_to(region) for _ in range(12)]
    wait_until(lambda: len(owner._source._connections) == 4)
    await puller.pull(link, region, [Copy(0, 0, 100)], target, 5)
    assert target.view[:100] == source.view[:100]
    for stranger in crowd:
        stranger.close()
    wait_until(lambda: owner.num_refused == 12)


@pytest.mark.parametrize("frame", [REQUEST.pack(1, bytes(16), 10, 32769), b"\xff" * 100, b"\1\2\3"], ids=len)
async def test_junk_after_the_proof_ends_that_connection_alone(
    owner, puller, link, source, target, secret, frame, caplog
):
    region = owner.register(source)
    await puller.pull(link, region, [Copy(0, 0, 1)], target, 5)
    with proven_connection(secret, region) as connection:
        connection.sendall(frame)
        with contextlib.suppress(OSError):  # it may be cut off before it is done
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    wait_until(lambda: len(owner._source._connections) == 1)
    await puller.pull(link, region, [Copy(0, 0, 100)], target, 5)
    assert target.view[:100] == source.view[:100]
    assert owner.num_refused == 0
