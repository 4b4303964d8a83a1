"""`kvray explain` as a user types it, against a server that answers from a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import pytest
from typer.testing import CliRunner

from cluster import cli, explain_cli
from cluster.openai.route_protocol import PlacementCandidate, PlacementParts, PredictedRoute, RouteReply, RouteRun
from messages.errors import KvrayError

PARTS = PlacementParts(
    wait_s=0.0, load_s=0.0, queue_s=0.01, compute_s=0.12, handoff_s=0.0, crowding_s=0.005, displaced_s=0.0
)
REPLY = RouteReply(
    request_id="abc",
    began_s=1.0,
    model="tiny",
    num_prompt_tokens=100,
    num_cached_tokens=60,
    num_sequences=1,
    num_placements=2,
    state="answered",
    placed_by="router",
    reason="because",
    decode_worker="decode-1",
    prefill_worker="prefill-1",
    predicted_ttft_s=0.13,
    ttft_s=0.2,
    predicted=PredictedRoute(
        candidates=[
            PlacementCandidate(
                decode_worker="decode-1",
                prefill_worker="prefill-1",
                cost_s=0.135,
                ttft_s=0.13,
                parts=PARTS,
                matched_tokens={"device": 60},
                num_computed_tokens=40,
                is_chosen=True,
            )
        ],
        num_possible=4,
    ),
    runs=[
        RouteRun(begin=0, end=60, source="device", holder="decode-1", why=None),
        RouteRun(begin=60, end=100, source="computed", holder="prefill-1", why="holder_lost", missed_holder="decode-0"),
    ],
    error=None,
    sentences=["One sentence.", "Another one."],
)


@contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/route/a%2Fb%3Ac"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr(explain_cli._out, "_width", 140)  # of a terminal, which it looks for as it is made


def explain(*arguments: str, status: int = 200, body: bytes | None = None):
    with server(status, body or msgspec.json.encode(REPLY)) as url:
        return CliRunner().invoke(cli.app, ["explain", "a/b:c", "--url", url, *arguments])


@pytest.mark.slow
def test_people_get_tables_and_the_sentences():
    shown = explain()
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert lines[:3] == [
        "request abc: 100 prompt tokens, answered",
        "placed on decode-1, prompt computed by prefill-1, by router",
        "placed 2 times: its worker was lost or failed it",
    ]
    assert "1 of 4 placements, in ms" in lines
    assert "* decode-1 prefill-1 135.0 130.0 10.0 120.0 5.0 60 device" in lines
    assert "60-100 computed prefill-1 holder_lost decode-0" in lines
    assert lines[-2:] == ["One sentence.", "Another one."]


@pytest.mark.slow
def test_scripts_get_the_whole_document():
    assert json.loads(explain("--json").output) == json.loads(msgspec.json.encode(REPLY))


def test_an_unknown_id_is_the_servers_one_line():
    body = json.dumps({"error": {"message": "request_id: got nobody's, want another"}}).encode()
    refused = explain(status=404, body=body)
    assert isinstance(refused.exception, KvrayError)
    assert str(refused.exception) == "request_id: got nobody's, want another"
