"""Request ids, API keys, probes, counters, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time

import httpx
import msgspec
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.openai.backend import HttpLimits
from cluster.openai.callers import Callers
from cluster.openai.metrics import HttpMetrics
from messages.errors import CapacityError, ErrorInfo, WorkerError
from messages.stream import TokenChunk

USER = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


def raw_post(server, path, body, **headers):
    """An open socket on which a request was sent."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    sock.sendall(head.encode() + data)
    return sock


def wait_for(condition):
    deadline_s = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


# ----------------------------------------------------------------------------------------------- before the first token


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": USER}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/responses", {"input": "Hi"}),
    ],
)
def test_a_streams_head_comes_once_it_was_accepted_and_the_first_token_may_take_its_time(
    server, path, body, monkeypatch
):
    monkeypatch.setattr("cluster.openai.stream._COMMENT_AFTER_S", 0.05)
    server.backend.accepts = True
    server.backend.delay_s = 600
    with server.http.stream("POST", server.url + path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        if path == "/v1/responses":
            kinds = [next(lines) for _ in range(6)][::3]
            assert kinds == ["event: response.created", "event: response.in_progress"]
        assert [next(lines) for _ in range(4)] == [": the answer goes on", ""] * 2


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        (CHAT, {"messages": USER}, "error"),
        ("/v1/completions", {"prompt": "Hi"}, "error"),
        ("/v1/responses", {"input": "Hi"}, "response.failed"),
    ],
)
def test_what_fails_after_it_was_accepted_is_an_event_and_before_that_a_status(server, path, body, word):
    server.backend.accepts = True
    server.backend.delay_s = 0.05

    def fail(request):
        error = WorkerError("it burns", code="worker_lost").info()
        return [TokenChunk(request_id=request.request_id, finish_reason="error", error=error)]

    server.backend.script = fail
    answer = server.post(path, {**body, "stream": True})
    assert (answer.status_code, word in answer.text, "it burns" in answer.text) == (200, True, True)
    assert "[DONE]" not in answer.text
    server.backend.accepts = False
    answer = server.post(path, {**body, "stream": True})
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "it burns")


# ------------------------------------------------------------------------------------------------ clients that leave


def test_leaving_a_stream_stops_the_work_at_once(server):
    server.backend.delay_s = 0.01
    server.backend.says("x" * 400)
    with raw_post(server, CHAT, {"messages": USER, "stream": True}) as sock:
        assert b"200 OK" in sock.recv(4096)
        assert server.backend.num_active == 1
    left_s = time.monotonic()
    wait_for(lambda: server.backend.num_active == 0)
    assert time.monotonic() - left_s < 1
    assert server.backend.num_closed_early == 1


def test_leaving_before_the_first_token_stops_the_work(server):
    server.backend.delay_s = 30
    for stream in (True, False):
        with raw_post(server, CHAT, {"messages": USER, "stream": stream}):
            wait_for(lambda: server.backend.num_active == 1)
        wait_for(lambda: server.backend.num_active == 0)
    assert server.backend.num_closed_early == 2


def test_closing_the_openai_client_s_stream_stops_the_work(server):
    server.backend.delay_s = 0.01
    server.backend.says("x" * 400)
    with server.client().chat.completions.create(model="tiny", messages=USER, stream=True) as stream:
        next(iter(stream))
    wait_for(lambda: server.backend.num_active == 0)


def test_a_client_that_left_is_counted(serve):
    server = serve()
    server.backend.delay_s = 30
    with raw_post(server, CHAT, {"messages": USER}):
        wait_for(lambda: server.backend.num_active == 1)
    wait_for(lambda: server.backend.num_active == 0)
    text = server.http.get(f"{server.url}/metrics").text
    assert "kvray_client_disconnects_total 1.0" in text
    assert 'kvray_choices_finished_total{reason="abandoned"} 1.0' in text
    assert "kvray_requests_running 0.0" in text


# --------------------------------------------------------------------------------------------------------- failures


def test_refusals_keep_their_status_and_say_when_to_retry(server):
    server.backend.refusal = CapacityError("full", retry_after_s=2.4)
    for stream in (True, False):
        response = server.post(CHAT, {"messages": USER, "stream": stream})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"] == {
            "message": "full",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
        }
    server.backend.refusal = CapacityError("nobody", status=503, retry_after_s=1)
    assert server.post(CHAT, {"messages": USER}).status_code == 503
    server.backend.refusal = WorkerError("gone")
    with pytest.raises(openai.InternalServerError, match="gone"):
        server.client().chat.completions.create(model="tiny", messages=USER)


def failing_after(server, num_chunks):
    def script(request):
        chunks = server.backend.spoken(request, "Hello")[:num_chunks]
        info = ErrorInfo(kind="WorkerError", message="worker d1 vanished", status=503, code="worker_lost")
        return [*chunks, TokenChunk(request_id=request.request_id, finish_reason="error", error=info)]

    return script


def test_an_error_in_mid_stream_is_an_event_and_the_end(server):
    server.backend.script = failing_after(server, 2)
    response = server.post(CHAT, {"messages": USER, "stream": True})
    assert response.status_code == 200
    events = [e for e in response.text.split("\n\n") if e]
    assert json.loads(events[-1][6:]) == {
        "error": {
            "message": "worker d1 vanished",
            "type": "service_unavailable_error",
            "param": None,
            "code": "worker_lost",
        }
    }
    stream = server.client().chat.completions.create(model="tiny", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="vanished"):
        list(stream)


def test_an_error_before_the_first_token_has_its_own_status(server):
    server.backend.script = failing_after(server, 0)
    for stream in (True, False):
        assert server.post(CHAT, {"messages": USER, "stream": stream}).status_code == 503


def test_one_failed_choice_fails_the_request_and_stops_the_others(server):
    failing = failing_after(server, 1)
    server.backend.script = lambda r: failing(r) if r.params.choice else server.backend.spoken(r, "x" * 100)
    assert server.post(CHAT, {"messages": USER, "n": 2}).status_code == 503
    assert server.backend.num_closed_early == 1


def test_a_sequence_that_ends_without_a_last_token_is_an_error(server):
    server.backend.script = lambda r: server.backend.spoken(r, "Hello")[:2]
    assert server.post(CHAT, {"messages": USER}).status_code == 503
    assert "error" in server.post(CHAT, {"messages": USER, "stream": True}).text


def test_a_bug_below_is_a_500_in_our_form_and_ends_a_stream(server, caplog):
    def bug(request):
        raise ZeroDivisionError

    server.backend.script = bug
    response = server.post(CHAT, {"messages": USER})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error"
    good = server.backend.spoken

    def half_good(request):
        chunk = good(request, "Hello")[0]
        return [chunk, msgspec.structs.replace(chunk, token_ids=None)]

    server.backend.script = half_good
    text = server.post(CHAT, {"messages": USER, "stream": True}).text
    assert '"message":"internal error"' in text.split("\n\n")[-2]


# ------------------------------------------------------------------------------------------------- ids, keys, probes


def test_the_request_id_goes_in_and_comes_out(server):
    response = server.post(CHAT, {"messages": USER}, **{"X-Request-Id": "my-id.1"})
    assert response.headers["x-request-id"] == "my-id.1"
    assert response.json()["id"] == "chatcmpl-my-id.1"
    assert server.backend.requests[0].request_id.startswith("my-id.1-")
    response = server.post(CHAT, {"messages": USER, "request_id": "body-id"}, **{"X-Request-Id": "my-id"})
    assert response.headers["x-request-id"] == "body-id"


def test_a_request_id_that_could_forge_a_log_line_is_replaced(server):
    for bad in ("x" * 200, "a b", 'a"b'):
        response = server.post(CHAT, {"messages": USER}, **{"X-Request-Id": bad})
        assert response.status_code == 200
        assert len(response.headers["x-request-id"]) == 32


def test_the_same_request_id_twice_gives_distinct_sequences(server):
    for _ in range(2):
        server.post(CHAT, {"messages": USER, "request_id": "same"})
    assert len({r.request_id for r in server.backend.requests}) == 2


def test_errors_and_streams_carry_the_request_id_too(server):
    assert server.http.get(f"{server.url}/nowhere").headers["x-request-id"]
    assert server.post(CHAT, {"messages": USER, "stream": True}).headers["x-request-id"]


def test_api_keys_guard_all_but_probes(serve):
    server = serve(callers=Callers.of_keys(["first", "sécond"]))
    for path in ("/health", "/ready", "/version", "/docs", "/openapi.json"):
        assert server.http.get(server.url + path).status_code == 200
    for path in ("/v1/models", "/metrics", "/status", "/tokenizer_info", "/docs/oauth2-redirect", "/nowhere"):
        response = server.http.get(server.url + path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    for header in ("Bearer wrong", "Basic first", "first", "Bearer", b"Bearer \xff\xfe"):
        response = server.http.get(f"{server.url}/v1/models", headers={"Authorization": header})
        assert response.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    assert server.client("first").models.list().data[0].id == "tiny"
    scraped = server.http.get(f"{server.url}/metrics", headers={"Authorization": "Bearer first"})
    assert "kvray_requests_running 0.0" in scraped.text


def test_head_gives_what_get_would_without_its_body(server):
    for path in ("/health", "/ready", "/version", "/v1/models", "/v1/models/alias", "/metrics", "/docs", "/nowhere"):
        got, head = server.http.get(server.url + path), server.http.head(server.url + path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers.get("content-type") == got.headers.get("content-type"), path
        if path != "/metrics":  # which counts this
            assert head.headers["content-length"] == got.headers["content-length"], path
    assert server.http.head(server.url + CHAT).status_code == 405
    assert server.http.head(server.url + CHAT).headers["allow"] == "POST"
    assert server.http.put(f"{server.url}/v1/models").headers["allow"] == "GET, HEAD"


def test_head_wants_a_key_where_get_does(serve):
    server = serve(callers=Callers.of_keys(["first"]))
    assert server.http.head(f"{server.url}/v1/models").status_code == 401
    assert server.http.head(f"{server.url}/health").status_code == 200
    with_key = {"Authorization": "Bearer first"}
    assert server.http.head(f"{server.url}/v1/models", headers=with_key).status_code == 200


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def test_a_preflight_never_asks_for_a_key_and_allows_the_origins_that_were_named(serve):
    server = serve(callers=Callers.of_keys(["first"]), allowed_origins=("https://chat.example.com", "null"))
    for origin, status in (("https://chat.example.com", 200), ("null", 200), ("https://evil.example.com", 400)):
        told = server.http.options(server.url + CHAT, headers={"Origin": origin, **PREFLIGHT})
        assert told.status_code == status
        assert told.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    told = server.http.options(server.url + CHAT, headers={"Origin": "https://chat.example.com", **PREFLIGHT})
    assert "POST" in told.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(told.headers["access-control-allow-headers"].split(","))


def test_a_page_may_read_answers_errors_and_streams_where_its_origin_was_named(serve):
    server = serve(callers=Callers.of_keys(["first"]), allowed_origins=("https://chat.example.com",))
    page = {"Origin": "https://chat.example.com"}
    with_key = page | {"Authorization": "Bearer first"}
    refused = server.post(CHAT, {"messages": USER}, **page)
    assert refused.status_code == 401
    for body in ({"messages": USER}, {"messages": USER, "stream": True}, {"messages": 3}):
        answer = server.post(CHAT, body, **with_key)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example.com"
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert refused.headers["access-control-allow-origin"] == "https://chat.example.com"
    other = server.post(CHAT, {"messages": USER}, **with_key | {"Origin": "https://evil.example.com"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.slow
def test_any_page_may_call_where_all_may(serve):
    server = serve(allowed_origins=("*",))
    assert server.post(CHAT, {"messages": USER}, Origin="http://x").headers["access-control-allow-origin"] == "*"
    told = server.http.options(server.url + CHAT, headers={"Origin": "http://x", **PREFLIGHT})
    assert (told.status_code, told.headers["access-control-allow-origin"]) == (200, "*")


def test_no_page_may_call_where_none_was_named_and_its_preflight_is_asked_for_no_key(serve):
    server = serve(callers=Callers.of_keys(["first"]))
    told = server.http.options(server.url + CHAT, headers={"Origin": "http://x", **PREFLIGHT})
    assert told.status_code == 405
    answer = server.post(CHAT, {"messages": USER}, Origin="http://x", Authorization="Bearer first")
    assert answer.status_code == 200
    for each in (told, answer):
        assert not any(name.startswith("access-control") for name in each.headers)


def test_health_ready_and_version(server):
    assert server.http.get(f"{server.url}/health").status_code == 200
    ready = server.http.get(f"{server.url}/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "decode_workers": 2})
    server.backend.is_ready = False
    assert server.http.get(f"{server.url}/ready").status_code == 503
    assert server.http.get(f"{server.url}/version").json() == {"version": "1.2.3"}


def test_models_are_listed_by_all_their_names(server):
    models = server.client().models.list().data
    assert [m.id for m in models] == ["tiny", "alias"]
    assert models[0].model_extra["max_model_len"] == 512
    assert server.client().models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="want one of tiny, alias"):
        server.client().models.retrieve("org/other")


def test_metrics_count_tokens_latencies_and_sources(serve):
    server = serve()
    server.post(CHAT, {"messages": USER})
    server.post(CHAT, {"messages": 3})
    text = server.http.get(f"{server.url}/metrics").text
    for line in (
        'kvray_http_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0',
        'kvray_http_requests_total{endpoint="/v1/chat/completions",status="400"} 1.0',
        "kvray_time_to_first_token_seconds_count 1.0",
        "kvray_inter_token_latency_seconds_count 12.0",
        "kvray_request_latency_seconds_count 1.0",
        "kvray_generation_tokens_total 13.0",
        'kvray_prompt_tokens_total{source="peer"} 2.0',
        'kvray_prompt_tokens_total{source="disk"} 0.0',
        'kvray_choices_finished_total{reason="stop"} 1.0',
        "kvray_requests_running 0.0",
        "kvray_fake 1.0",
    ):
        assert line in text.splitlines()


def test_the_surfaces_families_and_the_fleets_are_one_page_with_each_family_once(serve):
    server = serve()
    server.post(CHAT, {"messages": USER})
    text = server.http.get(f"{server.url}/metrics").text
    for word in ("HELP", "TYPE"):
        names = [line.split()[2] for line in text.splitlines() if line.startswith(f"# {word} ")]
        assert len(names) == len(set(names))
    found = {family.name: family for family in text_string_to_metric_families(text)}
    tokens = found["kvray_prompt_tokens"]
    assert (tokens.type, tokens.documentation) == (
        "counter",
        "Prompt tokens of answered requests, by where their KV came from",
    )
    peers = [sample.labels for sample in tokens.samples if sample.labels["source"] == "peer"]
    assert peers == [{"source": "peer"}, {"worker": "d1", "source": "peer"}]
    assert all(family.documentation for family in found.values())


def test_unknown_paths_share_one_label(serve):
    server = serve()
    for i in range(3):
        server.http.get(f"{server.url}/scan{i}")
    text = server.http.get(f"{server.url}/metrics").text
    assert 'kvray_http_requests_total{endpoint="other",status="404"} 3.0' in text.splitlines()
    assert "scan" not in text


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("first",)])
def test_docs_are_a_page_whose_files_come_from_here_and_which_asks_for_a_key_where_one_is_wanted(serve, keys):
    server = serve(callers=Callers.of_keys(keys))
    page = server.http.get(f"{server.url}/docs").text
    loaded = re.findall(r"""(?:src|href)=["']([^"']+)|url: ["']([^"']+)""", page)
    assert len(loaded) == 4  # style, script, icon, schema
    for path in map("".join, loaded):
        assert path.startswith("/")
        assert server.http.get(server.url + path).status_code == 200
    schema = server.http.get(f"{server.url}/openapi.json").json()
    schemes = {"API key": {"type": "http", "scheme": "bearer"}} if keys else None
    assert schema["components"].get("securitySchemes") == schemes
    assert schema.get("security") == ([{"API key": []}] if keys else None)


def test_each_request_is_a_line_of_the_access_log_without_its_query(server, caplog):
    access = logging.getLogger("cluster.access")
    with caplog.at_level(logging.INFO, "cluster.access"):
        access.addHandler(caplog.handler)
        server.http.get(f"{server.url}/v1/mod els?key=secret", headers={"X-Request-Id": "mine"})
        access.removeHandler(caplog.handler)
    assert re.fullmatch(r'127\.0\.0\.1:\d+ "GET /v1/mod%20els HTTP/1\.1" 404 \d+\.\d ms mine', caplog.messages[-1])


def test_openapi_describes_bodies_replies_and_bounds(server):
    schema = server.http.get(f"{server.url}/openapi.json").json()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "top_k", "return_token_ids"} <= fields.keys()
    assert fields["top_p"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 1}
    names = schema["components"]["schemas"].keys()
    assert all(ref in names for ref in _references(schema))


def _references(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value.rsplit("/", 1)[1]
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for item in node:
            yield from _references(item)


# ------------------------------------------------------------------------------------------------------------ tokens


def test_tokenize_and_detokenize_are_each_others_inverse(server):
    reply = server.post("/tokenize", {"model": "tiny", "prompt": "né", "return_token_strs": True}).json()
    assert (reply["count"], reply["max_model_len"]) == (3, 512)
    assert reply["token_strs"] == ["n", "\ufffd", "\ufffd"]
    assert server.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": "né"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_tokenize_renders_messages(server):
    tokens = server.post("/tokenize", {"messages": USER}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "<user>Hi\n<assistant>"
    tokens = server.post("/tokenize", {"messages": USER, "add_generation_prompt": False}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "<user>Hi\n"


def test_what_takes_too_much_memory_to_encode_or_decode_is_refused(serve):
    server = serve(limits=HttpLimits(max_tokenize_bytes=8))
    for text in ("a" * 9, "é" * 5):
        reply = server.post("/tokenize", {"prompt": text})
        assert (reply.status_code, reply.json()["error"]["param"]) == (413, "prompt")
    assert server.post("/tokenize", {"messages": USER}).json()["error"]["param"] == "messages"
    assert server.post("/tokenize", {"prompt": "é" * 4}).json()["count"] == 8
    assert server.post("/detokenize", {"tokens": [5] * 512}).status_code == 200
    error = server.post("/detokenize", {"tokens": [5] * 513}).json()["error"]
    assert (error["param"], "at most 512" in error["message"]) == ("tokens", True)


@pytest.mark.slow
async def test_a_long_prompt_being_encoded_holds_nobody_up(server):
    async with httpx.AsyncClient(timeout=10) as client:
        long = asyncio.ensure_future(client.post(f"{server.url}/tokenize", json={"prompt": "ab " * 20_000}))
        while not long.done():
            assert (await client.get(f"{server.url}/health")).status_code == 200
        assert (await long).json()["count"] == 60_000


def test_the_tokenizers_configuration_agrees_with_what_it_does(server):
    info = server.http.get(f"{server.url}/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|end|>", "<|bos|>")
    assert info["tokenizer_class"]
    assert "generation_prompt" in info["chat_template"]
    for token_id, token in info["added_tokens_decoder"].items():
        assert server.post("/tokenize", {"prompt": token}).json()["tokens"] == [int(token_id)]
        assert server.post("/detokenize", {"tokens": [int(token_id)]}).json() == {"prompt": token}


def test_where_nothing_is_counted_there_is_no_metrics_page_and_it_says_why(serve):
    server = serve(metrics=HttpMetrics(is_counting=False))
    server.post(CHAT, {"messages": USER})
    answer = server.http.get(f"{server.url}/metrics")
    assert answer.status_code == 404
    assert "observability.level is off" in answer.json()["error"]["message"]
