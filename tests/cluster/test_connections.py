"""What clients can hold of an ingress's HTTP server, over real sockets; the server is a process of its own."""

from __future__ import annotations

import contextlib
import json
import re
import select
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ConnectionsConfig
from cluster.connections import Connections

pytestmark = pytest.mark.slow  # clients that wait are waited for

#: As cluster/ingress.py runs it; argv: the limits, how long an answer's token takes, how many it has, what may be
#: tokenized, which event loop.
SERVER = """
import asyncio, json, socket, sys, uvloop
from cluster.config import ConnectionsConfig
from cluster.connections import http_server
from cluster.openai.app import create_app
from cluster.openai.backend import HttpLimits
from cluster.openai.metrics import HttpMetrics
from tests.cluster.openai.conftest import FakeBackend, make_tokenizer, served
backend = FakeBackend(make_tokenizer())
backend.delay_s = float(sys.argv[2])
backend.says("x" * int(sys.argv[3]))
metrics = HttpMetrics()
app = create_app(
    backend, served(backend.tokenizer, max_model_len=10**6), backend.tokenizer, version="1", metrics=metrics,
    limits=HttpLimits(max_body_bytes=8 * 2**20, max_tokenize_bytes=int(sys.argv[4])),
)
listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
print(listener.getsockname()[1], flush=True)
count = lambda reason: metrics.connections_ended.labels(reason).inc()
server = http_server(app, ConnectionsConfig(**json.loads(sys.argv[1])), count)
with asyncio.Runner(loop_factory={"asyncio": None, "uvloop": uvloop.new_event_loop}[sys.argv[5]]) as runner:
    runner.run(server.serve(sockets=[listener]))
"""
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
STREAM = json.dumps({"prompt": "a", "stream": True, "max_tokens": 40}).encode()
MIB = 2**20


class Server:
    def __init__(self, process: subprocess.Popen) -> None:
        self.process = psutil.Process(process.pid)
        self.address = ("127.0.0.1", int(process.stdout.readline()))
        self.url = f"http://127.0.0.1:{self.address[1]}"

    def connect(self, sends: bytes = b"") -> socket.socket:
        client = socket.create_connection(self.address, timeout=20)
        client.sendall(sends)
        return client

    def peak_bytes(self) -> int:
        """The most memory that it had, ever."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])

    def resident_bytes(self) -> int:
        return self.process.memory_info().rss

    def metric(self, name: str, label: str = "") -> dict[str, float]:
        """The values of a family by one of its labels."""
        page = httpx.get(f"{self.url}/metrics", timeout=5).text
        (family,) = [one for one in text_string_to_metric_families(page) if one.name == name]
        return {one.labels.get(label, ""): one.value for one in family.samples if not one.name.endswith("_created")}

    def counted(self) -> dict[str, float]:
        """Connections that were ended, by why."""
        return self.metric("kvray_connections_ended", "reason")

    def is_well(self) -> bool:
        """A request of usual size is answered, soon."""
        body = {"prompt": "a" * 20_000, "max_tokens": 1}
        return httpx.post(f"{self.url}/tokenize", json=body, timeout=5).status_code == 200


@contextlib.contextmanager
def starting():
    with contextlib.ExitStack() as stack:

        def start(
            delay_s: float = 0.0,
            num_tokens: int = 100,
            max_tokenize_bytes: int = 768 * 1024,
            loop: str = "asyncio",
            **limits: int,
        ) -> Server:
            arguments = [json.dumps(limits), str(delay_s), str(num_tokens), str(max_tokenize_bytes), loop]
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", SERVER, *arguments],
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=Path(__file__).parent.parent.parent,
                )
            )
            stack.callback(process.kill)
            return Server(process)

        yield start


@pytest.fixture
def start():
    with starting() as start:
        yield start


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def speaking(request) -> Iterator[Server]:
    """One server for all tests that leave it as it was: 40 tokens in half a second."""
    with starting() as start:
        yield start(delay_s=0.012, num_tokens=40, loop=request.param)


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def silent(request) -> Iterator[Server]:
    """As `speaking`, but the first token never comes."""
    with starting() as start:
        yield start(delay_s=600, loop=request.param)


def closed_within(clients: list[socket.socket], timeout_s: float) -> Iterator[bytes]:
    """What each client was told, by the time all are disconnected; fails where one is not."""
    ends_s = time.monotonic() + timeout_s
    told = dict.fromkeys(clients, b"")
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
        while selector.get_map():
            assert time.monotonic() < ends_s, f"{len(selector.get_map())} of {len(clients)} are still connected"
            for key, _ in selector.select(0.1):
                with contextlib.suppress(ConnectionError):
                    if data := key.fileobj.recv(65536):
                        told[key.fileobj] += data
                        continue
                selector.unregister(key.fileobj)
                key.fileobj.close()
    yield from told.values()


def code_of(answer: bytes) -> tuple[int, str]:
    """An answer's status and its error's code."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(answer[9:12]), json.loads(body)["error"]["code"]


def test_slow_senders_of_headers_are_told_and_closed_in_time(start):
    server = start(header_timeout_s=2)
    clients = [server.connect(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n") for _ in range(100)]
    started_s = time.monotonic()
    while time.monotonic() < started_s + 1.5:  # a byte now and then keeps nobody connected
        for number, client in enumerate(clients):
            client.sendall(b"x-%d: 1\r\n" % number)
        time.sleep(0.3)
    assert server.is_well()
    assert {code_of(answer) for answer in closed_within(clients, 8)} == {(408, "request_timeout")}


def test_connections_that_ask_nothing_or_nothing_more_are_closed(start):
    server = start(header_timeout_s=1, idle_timeout_s=1)
    silent = [server.connect() for _ in range(200)]
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    used = [server.connect(ask) for _ in range(100)]
    restless = server.connect(ask)
    time.sleep(0.5)
    restless.sendall(b"\r\n")  # begins no request, though it is a byte
    assert all(answer == b"" for answer in closed_within(silent, 6))
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in closed_within([*used, restless], 6))


def test_half_sent_bodies_are_bounded_all_together_and_keep_nobody_out(start):
    server = start(max_receiving_bytes=16 * MIB, body_timeout_s=3)
    assert server.is_well()
    before_bytes = server.resident_bytes()
    clients = [server.connect(HEAD % (8 * MIB)) for _ in range(48)]
    for client in clients:
        client.setblocking(False)
    most_bytes = 0
    left = {client: memoryview(bytes(7 * MIB)) for client in clients}
    for _ in range(400):
        for client in list(left):
            try:
                left[client] = left[client][client.send(left[client][: 256 * 1024]) :]
            except BlockingIOError:
                continue
            except ConnectionError:
                del left[client]
        most_bytes = max(most_bytes, server.resident_bytes() - before_bytes)
    assert most_bytes < 64 * MIB
    assert server.is_well()
    answers = [code_of(answer) for answer in closed_within(clients, 10) if answer]
    assert set(answers) == {(503, "too_many_bytes"), (408, "request_timeout")}
    assert server.is_well()


def test_headers_without_bound_are_431_and_streams_go_on(start):
    server = start(delay_s=0.02)
    stream = server.connect(HEAD % len(STREAM) + STREAM)
    before_bytes = server.resident_bytes()
    long_line = server.connect(b"GET /health HTTP/1.1\r\nx: ")
    many_lines = server.connect(b"GET /health HTTP/1.1\r\n")
    long_target = server.connect(b"GET /")
    endless_trailer = server.connect(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nx: "
    )
    clients = {long_line: b"y" * 4096, many_lines: b"a: b\r\n" * 700, long_target: b"z" * 4096}
    clients[endless_trailer] = clients[long_line]
    for client, more in clients.items():
        with contextlib.suppress(ConnectionError):
            for _ in range(2048):  # 8 MiB
                client.sendall(more)
    assert [code_of(answer) for answer in closed_within(list(clients), 10)] == [(431, "headers_too_large")] * 4
    assert server.resident_bytes() - before_bytes < 8 * MIB
    told = b""
    while b"[DONE]" not in told:
        told += stream.recv(65536)
    assert told.count(b"data: ") == 41


def test_a_full_server_closes_who_waits_longest_and_refuses_where_all_are_busy(start):
    server = start(delay_s=0.1, max_connections=8)
    waiting = [server.connect() for _ in range(8)]
    streams = [server.connect(HEAD % len(STREAM) + STREAM) for _ in range(8)]
    assert all(stream.recv(12) == b"HTTP/1.1 200" for stream in streams)
    assert all(answer == b"" for answer in closed_within(waiting, 2))
    assert [code_of(answer) for answer in closed_within([server.connect()], 5)] == [(503, "too_many_connections")]
    for stream in streams:
        stream.close()
    ends_s = time.monotonic() + 5
    while not server.is_well():
        assert time.monotonic() < ends_s
    assert server.counted()["too_many_connections"] >= 9


def test_who_does_not_read_gives_its_slot_up_and_who_reads_slowly_does_not(start):
    server = start(num_tokens=3000, unread_timeout_s=3)
    counted = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # so that order shows
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 3000, **counted}).encode()
    clients = []
    for _ in range(11):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else much fits into the kernel
        client.connect(server.address)
        client.settimeout(20)
        client.sendall(HEAD % len(body) + body)
        clients.append(client)
    slow, *unread = clients
    told = b""
    ends_s = time.monotonic() + 20
    while server.counted() != {"unread": 10.0}:
        assert time.monotonic() < ends_s, server.counted()
        told += slow.recv(16384)
        time.sleep(0.2)
    assert server.metric("kvray_requests_running") == {"": 1.0}
    for client in unread:
        with contextlib.suppress(ConnectionError):
            while client.recv(65536):
                pass
        client.close()
    while b"[DONE]" not in told[-200:]:
        told += slow.recv(65536)
    numbers = [int(number) for number in re.findall(rb'"completion_tokens":(\d+)', told)]
    assert numbers == [*range(1, 3001), 3000]
    assert server.counted() == {"unread": 10.0}


@pytest.mark.parametrize("ends", [b"Connection: close\r\n", b""])
def test_who_does_not_read_a_whole_answer_is_disconnected_though_nothing_runs_any_more(start, ends):
    server = start(unread_timeout_s=3, idle_timeout_s=1)
    body = json.dumps({"prompt": "ab " * 100_000, "return_token_strs": True}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(server.address)
    client.sendall(HEAD.replace(b"/v1/completions", b"/tokenize").replace(b"Host", ends + b"Host") % len(body) + body)
    ends_s = time.monotonic() + 10
    while server.counted() != {"unread": 1.0}:
        assert time.monotonic() < ends_s
        time.sleep(0.2)
    client.close()


def test_who_leaves_while_requests_wait_behind_the_one_that_runs_ends_it(start):
    server = start(delay_s=0.05, num_tokens=1000)
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 1000}).encode()
    client = server.connect(HEAD % len(body) + body + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.recv(12) == b"HTTP/1.1 200"
    client.close()
    ends_s = time.monotonic() + 5
    while server.metric("kvray_requests_running") != {"": 0.0}:
        assert time.monotonic() < ends_s
        time.sleep(0.1)


def test_too_many_requests_at_once_on_one_connection_are_cut(start):
    server = start(delay_s=0.1)
    client = server.connect(HEAD % len(STREAM) + STREAM + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    list(closed_within([client], 3))
    assert server.is_well()


def test_what_is_no_http_is_400_in_our_form(start):
    server = start()
    assert [code_of(answer) for answer in closed_within([server.connect(b"hello\r\n\r\n")], 5)] == [
        (400, "invalid_http")
    ]


def test_who_sends_all_of_a_body_that_is_too_long_gets_to_read_so(start):
    server = start()
    head = HEAD % (20 * MIB)
    client = server.connect(head)
    for _ in range(20):
        client.sendall(b"a" * MIB)
    (answer,) = closed_within([client], 5)
    assert code_of(answer) == (413, "request_too_large")


def test_who_never_ends_a_body_that_is_too_long_is_disconnected(start):
    server = start()
    before_bytes = server.resident_bytes()
    client = server.connect(HEAD % 10**15)
    ends_s = time.monotonic() + 10

    def send_on() -> None:
        while time.monotonic() < ends_s:
            client.sendall(b"a" * MIB)

    with pytest.raises(ConnectionError):
        send_on()
    assert server.resident_bytes() - before_bytes < 16 * MIB
    assert server.is_well()


@pytest.mark.slow
def test_huge_texts_hold_nobody_up(start):
    server = start(max_tokenize_bytes=8 * MIB)
    body = json.dumps({"prompt": "é漢 " * MIB}, ensure_ascii=False).encode()
    head = HEAD.replace(b"/v1/completions", b"/tokenize") % len(body)
    clients = [server.connect(head + body) for _ in range(6)]
    num_others = 0
    while not select.select(clients, [], [], 0)[0]:
        assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200
        num_others += 1
    assert num_others >= 20  # before the first of them: a second's work or more, beside some milliseconds
    for client in clients:
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        client.close()


@pytest.mark.slow
def test_a_text_to_be_tokenized_takes_little_memory_or_is_refused(start):
    server = start()
    for text, status in (("ab" * MIB, 413), ("é漢" * (200 * 1024), 413), ("a " * (384 * 1024), 200)):
        reply = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}, timeout=60)
        assert reply.status_code == status
    assert server.peak_bytes() < 450 * MIB  # 100 of them before the first


def test_a_usual_client_notices_nothing(start):
    server = start()
    with httpx.Client(timeout=30) as client:
        for size in (10, 100_000, 700_000, 10):
            reply = client.post(f"{server.url}/tokenize", content=json.dumps({"prompt": "ab " * (size // 3)}))
            assert reply.json()["count"] == size // 3 * 3
        assert client.post(f"{server.url}/v1/completions", content=STREAM).text.endswith("[DONE]\n\n")


def test_the_heaviest_body_gives_way_and_what_ended_is_not_counted():
    book = Connections(ConnectionsConfig(max_receiving_bytes=1024), lambda _: None)
    light, heavy = object(), object()
    assert book.add_body(heavy, 900) is None
    assert book.add_body(light, 124) is None
    assert book.add_body(light, 1) is heavy
    book.end_body(heavy)
    book.end_body(heavy)
    assert book.add_body(light, 899) is None
    assert book.add_body(light, 1) is light


# ------------------------------------------------------------------------------------------------ old and half-closed


def wait_until_idle(server: Server) -> None:
    ends_s = time.monotonic() + 5
    while server.metric("kvray_requests_running") != {"": 0.0}:
        assert time.monotonic() < ends_s
        time.sleep(0.02)


def post(body: dict, *, version: str = "1.1", headers: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def read_all(client: socket.socket) -> tuple[bytes, bytes]:
    """An answer's head and body, which ends with the connection."""
    told = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = told.partition(b"\r\n\r\n")
    return head.lower(), body


def dechunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        assert rest[int(size, 16) :][:2] == b"\r\n"
        parts.append(rest[: int(size, 16)])
        body = rest[int(size, 16) + 2 :]
    return b"".join(parts)


@pytest.mark.parametrize("headers", ["", "Connection: keep-alive\r\n"])
def test_a_client_of_http_1_0_is_sent_no_chunks_and_its_stream_ends_with_the_connection(speaking, headers):
    stream = {"prompt": "a", "stream": True, "max_tokens": 40}
    head, body = read_all(speaking.connect(post(stream, version="1.0", headers=headers)))
    assert head.startswith(b"http/1.1 200")
    assert b"transfer-encoding" not in head
    assert b"content-length" not in head
    events = body.decode().split("\n\n")
    assert [event[:6] for event in events] == ["data: "] * (len(events) - 1) + [""]
    assert events[-2] == "data: [DONE]"
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]) == "x" * 40


@pytest.mark.parametrize("target", ["/v1/models", "/metrics", "/nowhere"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_client_of_http_1_0_is_told_an_answers_length(speaking, method, target):
    head, body = read_all(speaking.connect(f"{method} {target} HTTP/1.0\r\n\r\n".encode()))
    (length,) = re.findall(rb"content-length: (\d+)", head)
    assert len(body) == (int(length) if method == "GET" else 0)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_sends_nothing_more_gets_its_answer(speaking, version, is_streamed):
    """As `nc -N` and others do: they shut their sending side down with the request."""
    client = speaking.connect(post({"prompt": "a", "stream": is_streamed, "max_tokens": 40}, version=version))
    client.shutdown(socket.SHUT_WR)
    head, body = read_all(client)
    assert head.startswith(b"http/1.1 200 ok\r\n")
    assert head.count(b"http/1.1") == 1
    if b"transfer-encoding: chunked" in head:
        body = dechunked(body)
    if is_streamed:
        assert body.endswith(b"data: [DONE]\n\n")
        assert body.count(b"data: {") == 40
    else:
        assert json.loads(body)["choices"][0]["text"] == "x" * 40
    wait_until_idle(speaking)


def test_a_client_that_sends_nothing_more_in_the_middle_of_a_stream_gets_the_rest(speaking):
    client = speaking.connect(post({"prompt": "a", "stream": True, "max_tokens": 40}))
    told = client.recv(65536)
    client.shutdown(socket.SHUT_WR)
    told += b"".join(iter(lambda: client.recv(65536), b""))
    body = dechunked(told.partition(b"\r\n\r\n")[2])
    assert body.endswith(b"data: [DONE]\n\n")
    assert body.count(b"data: {") == 40


def test_errors_reach_a_client_that_sends_nothing_more(speaking):
    for request in (post({"prompt": 5}), b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"):
        client = speaking.connect(request)
        client.shutdown(socket.SHUT_WR)
        head, body = read_all(client)
        assert head.startswith(b"http/1.1 4")
        assert json.loads(body)["error"]["message"]


def test_all_requests_of_a_client_that_sends_nothing_more_are_answered_in_order(speaking):
    client = speaking.connect(post({"prompt": "a", "max_tokens": 20}) + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
    client.shutdown(socket.SHUT_WR)
    told = b"".join(iter(lambda: client.recv(65536), b""))
    assert told.count(b"HTTP/1.1 200 OK") == 2
    assert told.index(b'"text":"xxxxx') < told.index(b'{"version"')


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_work_for_a_client_that_is_gone_ends_though_it_looks_as_if_it_only_sent_nothing_more(silent, is_streamed):
    client = silent.connect(post({"prompt": "a", "stream": is_streamed, "max_tokens": 40}))
    while silent.metric("kvray_requests_running") != {"": 1.0}:
        time.sleep(0.02)
    client.close()
    wait_until_idle(silent)


def test_a_request_that_was_cut_off_is_not_waited_for(speaking):
    client = speaking.connect(post({"prompt": "a" * 100})[:-50])
    client.shutdown(socket.SHUT_WR)
    assert list(closed_within([client], 3)) == [b""]
