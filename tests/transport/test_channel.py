import asyncio
import itertools
import os
import signal
import subprocess
import sys
import textwrap

import msgspec
import psutil
import pytest
import uvloop
import zmq

from messages.errors import ConfigError
from messages.fleet import GetStats, Stats, Subscribe
from messages.stream import TokenBatch, TokenChunk
from transport import channel as channel_module
from transport.channel import ChannelClient, ChannelConfig, ChannelServer
from transport.secret import ClusterSecret

SECRET = ClusterSecret(b"\x07" * 32)
FAST = ChannelConfig(heartbeat_s=0.05, lost_after_s=0.3, connect_timeout_s=1.0)


class Server:
    """A ChannelServer that keeps what came, and answers GetStats."""

    def __init__(self, secret=SECRET, config=FAST):
        self.messages = []
        self.lost = []
        self.lost_event = asyncio.Event()
        self.channel = ChannelServer(secret, "127.0.0.1", self._on_message, self._on_lost, config)

    def _on_message(self, peer, message):
        self.messages.append((peer, message))
        if isinstance(message, GetStats):
            self.channel.send(peer, stats(message.query_id))

    def _on_lost(self, peer):
        self.lost.append(peer)
        self.lost_event.set()


class Client:
    def __init__(self, address, secret=SECRET, config=FAST):
        self.messages = asyncio.Queue()
        self.lost = asyncio.get_running_loop().create_future()
        self.ready = asyncio.Event()
        self.channel = ChannelClient(
            secret, address, self.messages.put_nowait, self.lost.set_result, self.ready.set, config
        )

    async def ask(self, query_id):
        self.channel.send(GetStats(query_id=query_id))
        return await asyncio.wait_for(self.messages.get(), 5)


def endpoint_of(server):
    """As ZeroMQ takes it."""
    return f"tcp://{server.channel.address.rpartition('@')[2]}"


def stats(query_id):
    return Stats(query_id=query_id, worker_id="w", role="prefill", values={"a": 1.0})


@pytest.fixture
def opened():
    channels = []
    yield lambda endpoint: channels.append(endpoint.channel) or endpoint
    for channel in channels:
        channel.close()


async def eventually(predicate, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while True:
            if predicate():
                return
            await asyncio.sleep(0.005)


async def test_messages_arrive_whole_and_in_order(opened):
    server = opened(Server())
    client = opened(Client(server.channel.address))
    batches = [TokenBatch(chunks=[TokenChunk(request_id=str(i), token_ids=[i] * (i % 50))]) for i in range(3000)]
    for batch in batches:
        assert client.channel.send(batch)
    await eventually(lambda: len(server.messages) == len(batches))
    assert [message for _, message in server.messages] == batches
    peer = server.messages[0][0]
    for batch in batches:
        assert server.channel.send(peer, batch)
    assert [await asyncio.wait_for(client.messages.get(), 5) for _ in batches] == batches


async def test_peers_are_told_apart(opened):
    server = opened(Server())
    clients = [opened(Client(server.channel.address)) for _ in range(5)]
    answers = await asyncio.gather(*(client.ask(str(i)) for i, client in enumerate(clients)))
    assert [answer.query_id for answer in answers] == [str(i) for i in range(5)]
    assert len(server.channel.peers) == 5


async def test_large_message_crosses(opened):
    server = opened(Server())
    client = opened(Client(server.channel.address))
    client.channel.send(GetStats(query_id="x" * (20 << 20)))
    answer = await asyncio.wait_for(client.messages.get(), 20)
    assert len(answer.query_id) == 20 << 20


@pytest.mark.parametrize("says_key_id", [True, False], ids=["honest", "sly"])
async def test_wrong_secret_gets_nothing(opened, says_key_id):
    server = opened(Server())
    address = server.channel.address if says_key_id else endpoint_of(server)
    client = opened(Client(address, secret=ClusterSecret(b"\x08" * 32)))
    client.channel.send(GetStats(query_id="steal"))
    await asyncio.wait_for(client.lost, 5)
    assert client.messages.empty()
    assert not client.ready.is_set()
    assert server.messages == []


async def test_another_secret_is_told_as_such_and_not_as_a_lost_connection(opened):
    server = opened(Server())
    other = ClusterSecret(b"\x08" * 32)
    client = opened(Client(server.channel.address, secret=other))
    reason = await asyncio.wait_for(client.lost, 5)
    assert reason == f"it has another cluster secret (key id {SECRET.key_id}, here {other.key_id})"


OLD, NEW = b"\x07" * 32, b"\x08" * 32
#: How one secret follows another, process after process: neighbours are there at the same time.
ROTATION = [ClusterSecret(OLD), ClusterSecret(OLD, NEW), ClusterSecret(NEW, OLD), ClusterSecret(NEW)]


@pytest.mark.parametrize("step", range(3))
async def test_while_one_secret_follows_another_every_process_talks_to_every_other(opened, step):
    present = ROTATION[step : step + 2]
    for listening, connecting in itertools.product(present, repeat=2):
        server = opened(Server(listening))
        client = opened(Client(server.channel.address, connecting))
        assert (await client.ask("a")).query_id == "a"


async def test_who_knows_only_the_secret_that_is_gone_is_a_stranger(opened):
    server = opened(Server(ClusterSecret(NEW)))
    client = opened(Client(server.channel.address, ClusterSecret(OLD)))
    assert "another cluster secret" in await asyncio.wait_for(client.lost, 5)


async def test_servers_public_key_alone_opens_nothing(opened):
    server = opened(Server())
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        public, secret = zmq.curve_keypair()
        stranger.curve_publickey, stranger.curve_secretkey = public, secret
        stranger.curve_serverkey = SECRET.server_keys().public
        stranger.linger = 0
        stranger.connect(endpoint_of(server))
        stranger.send(b"hello", zmq.DONTWAIT)
        await eventually(lambda: server.channel.num_refused > 0)
        await asyncio.sleep(0.1)
        assert stranger.poll(0) == 0
    assert server.messages == []
    assert server.channel.peers == ()


async def test_unencrypted_client_gets_nothing(opened):
    server = opened(Server())
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(endpoint_of(server))
        stranger.send(b"hello", zmq.DONTWAIT)
        await asyncio.sleep(0.3)
        assert stranger.poll(0) == 0
    assert server.messages == []
    assert server.channel.peers == ()


async def test_malformed_bytes_drop_the_peer(opened, caplog):
    server = opened(Server())
    good = opened(Client(server.channel.address))
    await asyncio.wait_for(good.ready.wait(), 5)
    bad = opened(Client(server.channel.address))
    await asyncio.wait_for(bad.ready.wait(), 5)
    for junk in (b"", b"\xc1", msgspec.msgpack.encode({"type": "Nonsense"})):
        bad.channel._socket.send(junk)
    await asyncio.wait_for(bad.lost, 5)
    assert caplog.text.count("something that is no message") == 1
    assert len(server.lost) == 1
    assert (await good.ask("still here")).query_id == "still here"


async def test_bug_in_a_callback_does_not_silence_the_channel(opened):
    reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context["exception"]))
    seen = []

    def on_message(peer, message):
        seen.append(message)
        if len(seen) == 1:
            raise KeyError("bug")

    channel = ChannelServer(SECRET, "127.0.0.1", on_message, lambda peer: None, FAST)
    client = opened(Client(channel.address))
    for _ in range(3):
        client.channel.send(Subscribe())
    await eventually(lambda: len(seen) == 3)
    channel.close()
    assert [type(report) for report in reports] == [KeyError]


async def test_nobody_listening_is_lost_within_the_deadline(opened):
    closed = ChannelServer(SECRET, "127.0.0.1", lambda *_: None, lambda _: None, FAST)
    closed.close()
    await asyncio.sleep(0.1)
    client = opened(Client(closed.address))
    client.channel.send(Subscribe())
    await asyncio.wait_for(client.lost, 3)
    assert not client.channel.send(Subscribe())


@pytest.mark.slow
async def test_lost_client_does_not_knock_again(opened):
    server = opened(Server())
    client = opened(Client(server.channel.address))
    await client.ask("a")
    port = int(server.channel.address.rpartition(":")[2])
    server.channel.close()
    await asyncio.wait_for(client.lost, 3)
    knocks = []
    listener = await asyncio.start_server(lambda *connection: knocks.append(connection), "127.0.0.1", port)
    await asyncio.sleep(0.5)
    listener.close()
    assert knocks == []


async def test_clients_that_leave_together_are_all_noticed_and_the_others_kept(opened):
    server = opened(Server())
    clients = [opened(Client(server.channel.address)) for _ in range(40)]
    await asyncio.gather(*(client.ask("a") for client in clients))
    for client in clients[:30]:
        client.channel.close()
    await eventually(lambda: len(server.lost) == 30)
    assert len(set(server.lost)) == 30
    assert len(server.channel.peers) == 10
    assert (await clients[30].ask("still here")).query_id == "still here"


@pytest.mark.slow
@pytest.mark.parametrize("address", ["", "tcp://", "nonsense", "tcp://host.invalid:99999"])
async def test_address_that_is_none_is_lost_not_raised(opened, address):
    client = opened(Client(address))
    await asyncio.wait_for(client.lost, 3)


async def test_a_name_that_means_no_address_is_told_as_one(opened):
    client = opened(Client(f"tcp://{SECRET.key_id}@no..name:1"))
    assert "its name means no address" in await asyncio.wait_for(client.lost, 3)


async def test_host_that_is_not_ours_is_a_config_error():
    with pytest.raises(ConfigError, match=r"198\.51\.100\.1"):
        ChannelServer(SECRET, "198.51.100.1", lambda *_: None, lambda _: None)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
async def test_address_is_of_the_host_it_was_bound_to(opened, host, shown):
    channel = ChannelServer(SECRET, host, lambda *_: None, lambda _: None, FAST)
    client = opened(Client(channel.address))
    await asyncio.wait_for(client.ready.wait(), 3)
    channel.close()
    assert channel.address.startswith(f"tcp://{SECRET.key_id}@{shown}:")


async def test_closing_either_side_is_noticed_by_the_other(opened):
    server = opened(Server())
    leaving, staying = opened(Client(server.channel.address)), opened(Client(server.channel.address))
    await leaving.ask("a")
    await staying.ask("b")
    leaving.channel.close()
    await asyncio.wait_for(server.lost_event.wait(), 0.25)  # by the connection's end, before any heartbeat
    assert len(server.lost) == 1
    server.channel.close()
    await asyncio.wait_for(staying.lost, 3)
    assert not leaving.lost.done()


async def test_last_words_before_close_arrive(opened):
    server = opened(Server())
    client = opened(Client(server.channel.address))
    await client.ask("a")
    peer = server.channel.peers[0]
    for i in range(1000):
        server.channel.send(peer, stats(str(i)))
    server.channel.close()
    await asyncio.wait_for(client.lost, 5)
    words = [client.messages.get_nowait().query_id for _ in range(client.messages.qsize())]
    assert words == [str(i) for i in range(1000)]


async def test_peer_that_does_not_read_is_dropped_not_waited_for(opened):
    server = opened(Server(config=ChannelConfig(heartbeat_s=0.1, lost_after_s=30, max_queued_messages=10)))
    client = opened(Client(server.channel.address, config=ChannelConfig(max_queued_messages=10)))
    await client.ask("a")
    peer = server.channel.peers[0]
    started = asyncio.get_running_loop().time()
    word = stats("x" * 1_000_000)  # more than sockets and queues take, while this loop does not read them
    outcomes = [server.channel.send(peer, word) for _ in range(200)]
    assert outcomes == sorted(outcomes, reverse=True)
    assert not outcomes[-1]
    assert asyncio.get_running_loop().time() - started < 5
    await asyncio.wait_for(server.lost_event.wait(), 1)
    assert server.lost == [peer]
    assert not server.channel.send(peer, stats("b"))


@pytest.mark.slow
async def test_own_pause_is_not_blamed_on_the_peers(opened):
    server = opened(Server())
    client = opened(Client(server.channel.address))
    await client.ask("a")
    import time

    time.sleep(0.8)  # noqa: ASYNC251 - the loop stands still for longer than the silence allowed
    assert (await client.ask("b")).query_id == "b"
    assert not client.lost.done()
    assert server.lost == []


def test_works_on_uvloop():
    async def scenario():
        server = Server()
        client = Client(server.channel.address)
        answers = [await client.ask(str(i)) for i in range(200)]
        client.channel.close()
        await asyncio.wait_for(server.lost_event.wait(), 5)
        server.channel.close()
        return answers

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answers = runner.run(scenario())
    assert [answer.query_id for answer in answers] == [str(i) for i in range(200)]


# ------------------------------------------------------------------------------------------------- other processes

SERVER_PROCESS = """
import asyncio
from messages.fleet import GetStats, Stats
from transport.channel import ChannelConfig, ChannelServer
from transport.secret import ClusterSecret

async def main():
    def answer(peer, message):
        server.send(peer, Stats(query_id=message.query_id, worker_id="w", role="prefill", values={}))
    server = ChannelServer(ClusterSecret(bytes([7]) * 32), "127.0.0.1", answer, lambda peer: None)
    print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

CLIENT_PROCESS = """
import asyncio, sys
from messages.fleet import Subscribe
from transport.channel import ChannelClient
from transport.secret import ClusterSecret

async def main():
    client = ChannelClient(ClusterSecret(bytes([7]) * 32), sys.argv[1], lambda message: None, lambda reason: None)
    client.send(Subscribe())
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def spawn():
    processes = []

    def start(source, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source), *arguments], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_killed_server_is_noticed_in_well_under_a_second(opened, spawn):
    process = spawn(SERVER_PROCESS)
    client = opened(Client(process.stdout.readline().strip(), config=ChannelConfig()))
    await client.ask("a")
    os.kill(process.pid, signal.SIGKILL)
    assert await asyncio.wait_for(client.lost, 0.8) == "disconnected"


async def test_killed_client_is_noticed_in_well_under_a_second(opened, spawn):
    server = opened(Server(config=ChannelConfig()))
    process = spawn(CLIENT_PROCESS, server.channel.address)
    await eventually(lambda: server.messages)
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.wait_for(server.lost_event.wait(), 0.8)
    assert server.lost == [server.messages[0][0]]


@pytest.mark.slow
async def test_stopped_server_is_noticed_by_its_silence(opened, spawn):
    process = spawn(SERVER_PROCESS)
    client = opened(Client(process.stdout.readline().strip(), config=FAST))
    await client.ask("a")
    os.kill(process.pid, signal.SIGSTOP)
    await asyncio.wait_for(client.lost, 3)


@pytest.mark.slow
async def test_stopped_client_is_noticed_by_its_silence(opened, spawn):
    server = opened(Server(config=ChannelConfig(heartbeat_s=0.25, lost_after_s=1.0)))
    process = spawn(CLIENT_PROCESS, server.channel.address)
    await eventually(lambda: server.messages)
    os.kill(process.pid, signal.SIGSTOP)
    await asyncio.wait_for(server.lost_event.wait(), 4)
    assert server.channel.peers == ()


@pytest.mark.slow
async def test_stopped_server_does_not_hang_a_new_client(opened, spawn):
    process = spawn(SERVER_PROCESS)
    address = process.stdout.readline().strip()
    os.kill(process.pid, signal.SIGSTOP)
    client = opened(Client(address, config=FAST))
    await asyncio.wait_for(client.lost, 3)


async def test_messages_that_take_long_leave_others_on_the_loop_their_turns(opened, monkeypatch):
    monkeypatch.setattr("transport.inbox._TURN_S", 0.0)  # one message is as long as a turn may be
    server = opened(Server())
    client = opened(Client(server.channel.address))
    await client.ask("first")
    most = 0
    for number in range(50):
        client.channel.send(GetStats(query_id=str(number)))
    while len(server.messages) < 51:
        before = len(server.messages)
        await asyncio.sleep(0)
        most = max(most, len(server.messages) - before)
    assert most <= 2  # the socket may be looked at once because it is readable, and once because it was poked
    assert [message.query_id for _, message in server.messages[1:]] == [str(number) for number in range(50)]


# ----------------------------------------------------------------------------------------------------------- many peers


@pytest.mark.slow
async def test_a_process_has_hundreds_of_peers_and_nothing_is_left_of_them(opened):
    server = opened(Server(config=ChannelConfig()))
    first = opened(Client(server.channel.address, config=ChannelConfig()))
    await first.ask("first")
    before = psutil.Process().num_fds()
    clients = [Client(server.channel.address, config=ChannelConfig()) for _ in range(400)]  # 341 were too many
    for client in clients:
        client.channel.send(GetStats(query_id="all"))
    for client in clients:
        assert (await asyncio.wait_for(client.messages.get(), 20)).query_id == "all"
    assert len(server.channel.peers) == 401
    for client in clients:
        client.channel.close()
    await eventually(lambda: psutil.Process().num_fds() <= before, 10)
    await eventually(lambda: len(server.lost) == 400)


LIMITED = """
import asyncio, os, resource, sys
from messages.fleet import GetStats
from transport.channel import ChannelClient
from transport.secret import ClusterSecret

address, hard = sys.argv[1], int(sys.argv[2])
secret = ClusterSecret(b"\\x07" * 32)

def num_descriptors():
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # none is left to look with
        return hard

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    answers, lost = asyncio.Queue(), asyncio.Queue()

    def client():
        made = ChannelClient(secret, address, answers.put_nowait, lost.put_nowait)
        made.send(GetStats(query_id=""))
        return made

    first = client()
    await asyncio.wait_for(answers.get(), 5)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    before, nums = num_descriptors(), []
    for _ in range(3):
        clients = []
        while lost.empty():
            clients.append(client())
            while lost.empty() and answers.empty():
                await asyncio.sleep(0.001)
            if lost.empty():
                answers.get_nowait()
        reason = lost.get_nowait()
        assert f"four of its {hard} file descriptors" in reason, reason
        assert not clients[-1].send(GetStats(query_id=""))
        first.send(GetStats(query_id=""))  # those that are there go on
        await asyncio.wait_for(answers.get(), 5)
        nums.append(len(clients))
        for one in clients:
            one.close()
        async with asyncio.timeout(10):
            while num_descriptors() > before:
                await asyncio.sleep(0.01)
    assert max(nums) - min(nums) <= 1, nums
    first.close()

asyncio.run(main())
"""


@pytest.mark.slow
async def test_past_the_limit_a_peer_is_lost_with_a_reason_that_names_it_and_nothing_of_it_is_left(opened):
    server = opened(Server(config=ChannelConfig()))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LIMITED, server.channel.address, "200", stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, said.decode()


class Turns:
    """Counts the loop's turns, and what is noted in each."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self.noted = [0]
        self._loop.call_soon(self._next)

    def _next(self):
        self.noted.append(0)
        self._loop.call_soon(self._next)

    def note(self):
        self.noted[-1] += 1


NUM_QUEUED = 2000


def until_known(monitor, inbox):
    """Have the loop stand still until the end of a connection is known."""
    assert monitor.poll(10_000)
    inbox.poke()


async def test_what_a_server_sent_before_it_ended_is_read_in_bounded_turns(opened):
    server, turns = opened(Server()), Turns()
    lost = asyncio.get_running_loop().create_future()
    client = ChannelClient(SECRET, server.channel.address, lambda _: turns.note(), lost.set_result, config=FAST)
    await eventually(lambda: client.is_ready and server.channel.peers)
    for number in range(NUM_QUEUED):
        assert server.channel.send(server.channel.peers[0], stats(str(number)))
    server.channel.close()
    until_known(client._sockets[1], client._inboxes[1])
    assert await asyncio.wait_for(lost, 5) == "disconnected"
    assert sum(turns.noted) == NUM_QUEUED
    assert max(turns.noted) <= 256


async def test_what_a_client_sent_before_it_ended_is_read_in_bounded_turns(monkeypatch):
    monkeypatch.setattr("transport.inbox._TURN_S", 0.0)  # a message each: there is something left to read at each probe
    turns, lost = Turns(), asyncio.get_running_loop().create_future()
    server = ChannelServer(SECRET, "127.0.0.1", lambda *_: turns.note(), lost.set_result, FAST)
    client = ChannelClient(SECRET, server.address, lambda _: None, lambda _: None, config=FAST)
    await eventually(lambda: client.is_ready)
    for number in range(NUM_QUEUED):
        assert client.send(stats(str(number)))
    client.close()
    until_known(server._monitor, server._inboxes[2])
    await asyncio.wait_for(lost, 5)
    assert sum(turns.noted) == NUM_QUEUED
    assert max(turns.noted) <= 256
    server.close()


@pytest.mark.parametrize(
    ("sends", "hears", "num_pings"), [(False, False, 4), (True, False, 4), (False, True, 4), (True, True, 0)]
)
async def test_pings_are_for_links_on_which_nothing_else_goes_both_ways(opened, sends, hears, num_pings):
    server = opened(Server())
    client = opened(Client(server.channel.address))
    await asyncio.wait_for(client.ready.wait(), 5)
    pinged = [beat(client, sends=sends, hears=hears) for _ in range(4 * FAST.beats_per_ping)]
    assert sum(pinged) == num_pings


async def test_a_peer_is_pinged_before_it_counts_as_lost_whenever_the_last_word_came(opened):
    server = opened(Server())
    client = opened(Client(server.channel.address))
    await asyncio.wait_for(client.ready.wait(), 5)
    for num_quiet_beats in range(2 * FAST.beats_per_ping):
        for _ in range(num_quiet_beats):
            beat(client)
        beat(client, sends=True, hears=True)
        pinged = [beat(client) for _ in range(FAST.max_silent_beats - 1)]
        assert sum(pinged) >= channel_module._PINGS_PER_SILENCE - 1
        assert pinged.index(True) < FAST.beats_per_ping


def beat(client, *, sends=False, hears=False):
    """Have the client's heart beat once, after a word from either end or none; whether it pings, which is answered."""
    channel = client.channel
    if sends:
        channel.send(GetStats(query_id="1"))
    if hears:
        channel._receive([channel_module._PONG])
    pings = []
    send, channel._send = channel._send, lambda data: pings.append(data) or send(data)
    channel._beat_timer.cancel()
    channel._beat()
    channel._beat_timer.cancel()
    channel._send = send
    if pings:
        assert pings == [channel_module._PING]
        channel._receive([channel_module._PONG])
    return bool(pings)
