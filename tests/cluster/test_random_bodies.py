"""Whatever anybody sends to whatever route: an answer or a 4xx that says why, and nothing left behind afterwards."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.random_bodies import ROUTES, Sent, drawn
from tests.models import make_tiny_model
from tests.served import STATUS_AGE_S, Served, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(1200), pytest.mark.usefixtures("one_thread")]

KEYS = ("operator-key", "acme-key", "globex-key")
NUM_AT_ONCE = 8
NUM_SHORT, NUM_LONG = 300, 2500  #: bodies, for each of the two servers
ANSWER_S = 60.0
MOST_GROWTH_BYTES = 160 * 2**20  #: of a process, after the first tenth of the bodies
CONFIG = """
engine: {{kv_cache_memory: 8MiB}}
pools: {{prefill: 1, decode: 1}}
tiers: {{host_memory: 8MiB, disk_dir: {folder}/disk, disk_capacity: 64MiB}}
responses: {{max_responses: 50}}
"""
#: Codes of errors that are those of a whole body.
OF_BODIES = {"invalid_json", "invalid_type", "invalid_body", "request_too_large", "unsupported_media_type"}
IDLE = {
    *(
        "kvray_blocks_pinned",
        "kvray_sequences_running",
        "kvray_sequences_waiting",
        "kvray_leases",
        "kvray_pulls_running",
    ),
    *("kvray_blocks_quarantined", "kvray_router_requests", "kvray_router_reservations", "kvray_queued_tokens"),
    "kvray_streams",
}


@dataclass
class Target:
    """A server, and who may ask it."""

    served: Served
    keys: tuple[str, ...]

    @property
    def port(self) -> int:
        return int(self.served.url.rpartition(":")[2])

    @property
    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[0]}"} if self.keys else {}
        return httpx.Client(base_url=self.served.url, headers=headers, timeout=60)

    def state(self) -> dict[str, Any]:
        time.sleep(STATUS_AGE_S)  # what was asked for last is given again before
        with self.http as http:
            return http.get("/status").raise_for_status().json()


@pytest.fixture(scope="module", params=["open", "keyed"])
def target(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bodies")
    model = make_tiny_model(folder / "tiny")
    config, keys = CONFIG.format(folder=folder), ()
    if request.param == "keyed":
        keys = KEYS
        files = {"operators": KEYS[0], "acme": KEYS[1], "globex": KEYS[2], "salt": "ab" * 32}
        for name, text in files.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o600)
        config += (
            f"http: {{api_key_file: {folder}/operators}}\n"
            f"tenants: {{salt_file: {folder}/salt, members: [{{name: acme, api_key_file: {folder}/acme}}, "
            f"{{name: globex, api_key_file: {folder}/globex, cache_hints: use}}]}}\n"
        )
    path = folder / "kvray.yaml"
    path.write_text(config)
    with serving(str(model), "--dtype", "float32", "--config", str(path), log_dir=folder) as served:
        target = Target(served, keys)
        ends_s = time.monotonic() + 60
        while not (target.state()["caches"] and target.state()["is_routing_by_cache"]):
            assert time.monotonic() < ends_s, target.state()
        yield target


# ------------------------------------------------------------------------------------------------------------- sending


@dataclass(frozen=True)
class Answer:
    status: int  #: 0: none came
    kind: str  #: of content
    body: bytes


def exchange(port: int, sent: Sent, key: str | None) -> Answer:
    """Send a request as it was drawn, on a connection of its own; its answer, as far as it is read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    connection.connect()
    try:
        connection.putrequest("POST", sent.path, skip_accept_encoding=True)
        for name, value in ({"Connection": "close"} | sent.headers).items():
            connection.putheader(name, value)
        if key is not None:
            connection.putheader("Authorization", f"Bearer {key}")
        if sent.chunks:
            connection.putheader("Transfer-Encoding", "chunked")
            pieces = [sent.body[at : at + sent.chunks] for at in range(0, len(sent.body), sent.chunks)]
            connection.endheaders(iter(pieces), encode_chunked=True)
        else:
            connection.putheader("Content-Length", str(len(sent.body) if sent.declared is None else sent.declared))
            connection.endheaders(sent.body)
        if sent.reads is not None:
            return Answer(0, "", connection.sock.recv(sent.reads) if sent.reads else b"")
        with connection.getresponse() as response:
            return Answer(response.status, response.headers.get_content_type(), response.read())
    except (BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
        return Answer(0, "", b"")
    finally:
        connection.close()


def complaint(sent: Sent, answer: Answer) -> str | None:
    """What is wrong with an answer; None where nothing is."""
    if sent.reads is not None or (answer.status == 0 and len(sent.body) > 2**16):
        return None
    if answer.status == 200:
        return stream_complaint(answer.body.decode()) if answer.kind == "text/event-stream" else None
    if not 400 <= answer.status < 500:
        return f"status {answer.status}"
    error = json.loads(answer.body)["error"]
    if answer.status == 400 and error["param"] is None and error["code"] not in OF_BODIES:
        return "no param"
    if answer.status == 400 and not any(word in error["message"] for word in ("want", "refused", "broken", "must")):
        return "does not say what is wanted"
    return None if len(error["message"]) < 2000 else "a message without end"


def stream_complaint(text: str) -> str | None:
    events = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    ends = events and (events[-1] == "[DONE]" or json.loads(events[-1])["type"].startswith("response."))
    if not ends:
        return "a stream without an end"
    for event in events:
        if event != "[DONE]" and json.loads(event).get("error"):
            return f"an error in the stream: {event}"
    return None


def send_all(target: Target, seeds: range) -> dict[int, int]:
    """Send the bodies of `seeds`, some at once; how many had which status."""
    port = target.port
    worker_ids = [worker["worker_id"] for worker in target.state()["workers"]]

    def one(seed: int) -> Answer:
        sent = drawn(seed, "tiny", worker_ids)
        key = (*target.keys, *target.keys, None, "wrong")[seed % (2 * len(target.keys) + 2)] if target.keys else None
        try:
            answer = exchange(port, sent, key)
        except TimeoutError:
            answer = Answer(-1, "", b"no answer")
        wrong = complaint(sent, answer)
        if wrong is not None:
            complaints.append((wrong, seed, sent.path, sent.kind, sent.body[:600], answer.status, answer.body[-600:]))
        return answer

    complaints: list[tuple] = []
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        answers = list(pool.map(one, seeds))
    assert not complaints, "\n".join(map(str, complaints[:20]))
    counts: dict[int, int] = {}
    for answer in answers:
        counts[answer.status] = counts.get(answer.status, 0) + 1
    return counts


# ---------------------------------------------------------------------------------------------------------- afterwards


def busy(target: Target) -> dict[str, Any]:
    """What somebody still holds or does: of workers, router and ingress, and connections; {}: nothing."""
    state = target.state()
    parts = [*state["workers"], *state["routers"]]
    held: dict[str, Any] = {
        f"{part['worker_id']} {name}": value for part in parts for name, value in part["values"].items() if name in IDLE
    }
    held |= {worker["worker_id"]: "no answer" for worker in state["workers"] if not worker["is_answering"]}
    with target.http as http:
        lines = http.get("/metrics").text.splitlines()
    held |= dict(line.rsplit(" ", 1) for line in lines if line.startswith("kvray_requests_running"))
    [ingress] = target.served.replicas("Ingress")
    open_ones = [one for one in ingress.net_connections("tcp") if one.laddr.port == target.port and one.raddr]
    held["connections"] = [one for one in open_ones if one.status == psutil.CONN_ESTABLISHED]
    return {name: value for name, value in held.items() if value and value != "0.0"}


def wait_until_idle(target: Target) -> None:
    ends_s = time.monotonic() + 60
    while held := busy(target):
        assert time.monotonic() < ends_s, held


def processes(served: Served) -> dict[int, psutil.Process]:
    """Replicas and node caches, by process id."""
    names = ("ServeReplica:kvray", "NodeCache", "nodecache")
    found = (process for process in served.descendants() if any(name in " ".join(process.cmdline()) for name in names))
    return {process.pid: process for process in found}


def tokens_of(target: Target) -> list[int]:
    body = {"prompt": [5, 6, 7] * 9, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with target.http as http:
        return http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["token_ids"]


def test_every_route_that_takes_a_body_has_bodies(target):
    with target.http as http:
        paths = http.get("/openapi.json").json()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == ROUTES.keys()


@pytest.mark.parametrize("num", [NUM_SHORT, pytest.param(NUM_LONG, marks=pytest.mark.long)])
def test_bodies_of_all_kinds_give_no_5xx_and_leave_nothing_behind(target, num):
    served, begin = target.served, num * 2 + bool(target.keys) * 10**6
    tokens, family = tokens_of(target), processes(served)
    counts = send_all(target, range(begin, begin + num // 10))
    sizes = {pid: process.memory_info().rss for pid, process in family.items()}
    for status, count in send_all(target, range(begin + num // 10, begin + num)).items():
        counts[status] = counts.get(status, 0) + count
    assert counts[200] > num / 10, counts
    assert counts[400] > num / 10, counts
    wait_until_idle(target)
    assert processes(served).keys() == family.keys()
    for pid, process in family.items():
        assert process.memory_info().rss - sizes[pid] < MOST_GROWTH_BYTES, process
    with target.http as http:
        cleared = http.post("/v1/cache/clear", json={"everything": True, "dry_run": False}).raise_for_status().json()
    assert not cleared["failures"]
    assert not any(tier["in_use"] for tier in cleared["tiers"].values())
    wait_until_idle(target)
    state = target.state()
    assert {worker["values"]["kvray_blocks_free"] - worker["num_blocks"] for worker in state["workers"]} == {0}
    assert [cache["values"]["kvray_cache_blocks_held"] for cache in state["caches"]] == [0]
    assert tokens_of(target) == tokens
