"""`kvray status`: what is gathered, what is shown, what is said where nothing answers."""

from __future__ import annotations

import http.server
import json
import threading
from contextlib import contextmanager
from unittest.mock import AsyncMock

import msgspec
import pytest

from cluster.status import fleet_status, status_table
from messages.fleet import RoadStatus, Stats, WorkerInfo
from tests.served import free_port, run_kvray

pytestmark = pytest.mark.slow


class FakeDispatcher:
    """A fleet of one decode worker, one prefill worker that does not answer, and maybe a router."""

    def __init__(self, *, has_router: bool) -> None:
        self.fleet = {name: _info(name) for name in ("prefill-a1b2c3d4", "decode-e5f6g7h8")}
        self._has_router = has_router

    async def fleet_stats(self) -> list[Stats]:
        values = {
            "kvray_blocks_free": 1200.0,
            "kvray_sequences_running": 3.0,
            "kvray_sequences_waiting": 1.0,
            "kvray_prefill_tokens_per_second": 15321.4,
            "kvray_decode_step_seconds": 0.0123,
            "kvray_queued_tokens": 2345.0,
            "kvray_queued_seconds": 0.15,
            "kvray_cache_blocks_held": 65536.0,
        }
        roads = (
            RoadStatus(
                peer="tcp://192.168.100.201:65535", road="ucx", carriers="tcp", bytes_per_s=1.234e9, num_failed=2
            ),
            RoadStatus(peer="tcp://10.0.0.9:1", road="", carriers="", bytes_per_s=0.0, num_failed=7),
        )
        stats = [Stats(query_id="1", worker_id="decode-e5f6g7h8", role="decode", values=values, roads=roads)]
        if self._has_router:
            values = {"kvray_router_workers": 2.0, "kvray_router_index_names": 4321.0, "kvray_router_requests": 3.0}
            stats.append(Stats(query_id="2", worker_id="router-i9j0k1l2", role="router", values=values))
        return stats


def _info(worker_id: str) -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        role="prefill" if worker_id.startswith("prefill") else "decode",
        address=f"tcp://192.168.100.20{int(worker_id.startswith('prefill'))}:65535",
        node_id="node",
        fingerprint=b"\x00" * 32,
        block_size=16,
        num_blocks=131072,
        block_bytes=16384,
        max_model_len=4096,
        max_num_seqs=256,
        roads=("shm",),
        kernel_path="cpu/dot/fused-73-36-36-36/native-16-bf16dot",
        checksum_path="avx512",
    )


@contextmanager
def answering(code: int, body: bytes):
    """A server that gives one answer to all; yields its URL."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_a_worker_that_does_not_answer_is_listed_without_numbers():
    status = await fleet_status(FakeDispatcher(has_router=True))
    by_id = {worker["worker_id"]: worker for worker in status["workers"]}
    assert by_id["decode-e5f6g7h8"]["is_answering"]
    assert by_id["decode-e5f6g7h8"]["values"]["kvray_blocks_free"] == 1200
    assert not by_id["prefill-a1b2c3d4"]["is_answering"]
    assert by_id["prefill-a1b2c3d4"]["values"] == {}
    assert status["is_routing_by_cache"]
    json.dumps(status)


async def test_the_table_says_what_each_worker_does_and_by_what_within_eighty_columns():
    lines = status_table(await fleet_status(FakeDispatcher(has_router=True))).splitlines()
    assert lines == [
        "WORKER            ADDRESS                FREE/BLOCKS  RUN  WAIT  TOK/S  STEP MS",
        "decode-e5f6g7h8   192.168.100.200:65535  1200/131072    3     1  15321     12.3",
        "prefill-a1b2c3d4  192.168.100.201:65535    no answer",
        "queue: 1 wait, 2,345 tokens to compute, 0.15 s at most",
        "first token of 1,000 new tokens: predicted in 0.22 s at decode-e5f6g7h8",
        "tiers: device 1.00 GiB of 2.00 GiB",
        "decode-e5f6g7h8 by cpu/dot/fused-73-36-36-36/native-16-bf16dot",
        "prefill-a1b2c3d4 by cpu/dot/fused-73-36-36-36/native-16-bf16dot",
        "checksums by avx512",
        "decode-e5f6g7h8 <- prefill-a1b2c3d4: ucx (tcp), 1.23 GB/s, 2 transfers failed",
        "decode-e5f6g7h8 <- tcp://10.0.0.9:1: no road works",
        "router-i9j0k1l2: 2 workers, 4321 block names known, 3 requests under way",
    ]
    assert max(len(line) for line in lines) <= 80


async def test_a_missing_router_is_said():
    lines = status_table(await fleet_status(FakeDispatcher(has_router=False))).splitlines()
    assert lines[-1] == "no router answers: requests are placed by rendezvous hashing"


def test_a_fleet_without_workers_is_said():
    status = {"workers": [], "routers": [], "is_routing_by_cache": False}
    assert status_table(status).splitlines()[0] == "no workers"


async def test_json_prints_the_document():
    status = await fleet_status(FakeDispatcher(has_router=True))
    with answering(200, json.dumps(status).encode()) as url:
        finished, _ = run_kvray("status", "--json", "--url", url)
        shown, _ = run_kvray("status", "--url", f"{url}/")
    assert json.loads(finished.stdout) == status
    assert finished.returncode == shown.returncode == 0
    assert shown.stdout == status_table(status) + "\n"


def test_nothing_listening_is_one_line_and_exit_code_2():
    url = f"http://127.0.0.1:{free_port()}"
    for arguments in (["status"], ["status", "--json"]):
        finished, _ = run_kvray(*arguments, "--url", url)
        assert finished.returncode == 2
        assert finished.stdout == ""
        assert finished.stderr == f"kvray: no status from {url}: Connection refused; where does kvray serve? (--url)\n"


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (401, b"{}", "it answers HTTP 401: wanted the right API key (--api-key-file, KVRAY_API_KEY)"),
        (404, b"", "it answers HTTP 404"),
        (200, b"<html>", "Expecting value"),
        (200, b"[1]", "what answers there is not kvray"),
        (200, b'{"workers": []}', "what answers there is not kvray"),
    ],
)
def test_an_answer_that_is_not_kvrays_is_one_line_and_exit_code_2(code, body, words):
    with answering(code, body) as url:
        finished, _ = run_kvray("status", "--url", url)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"kvray: no status from {url}: {words}")
    assert finished.stderr.count("\n") == 1


async def test_prompt_tokens_of_all_ingresses_are_added_up_and_the_least_wait_is_predicted():
    name = 'kvray_prompt_tokens_total{source="host"}'
    dispatcher = FakeDispatcher(has_router=True)
    told = await dispatcher.fleet_stats()
    other = Stats(query_id="", worker_id="i2", role="ingress", values={name: 30.0})
    told[1] = msgspec.structs.replace(told[1], ingresses=(other,))
    dispatcher.fleet_stats = AsyncMock(return_value=told)
    status = await fleet_status(dispatcher, {name: 12.0})
    assert status["prompt_tokens"] == {"device": 0, "peer": 0, "host": 42, "disk": 0, "remote": 0, "computed": 0}
    predicted = status["predicted_ttft"]
    assert (predicted["prompt_tokens"], predicted["worker_id"]) == (1000, "decode-e5f6g7h8")
    assert predicted["seconds"] == pytest.approx(0.15 + 1000 / 15321.4)


def test_what_was_not_measured_yet_is_not_predicted():
    assert status_table({"workers": [], "routers": [], "is_routing_by_cache": False, "predicted_ttft": None})
