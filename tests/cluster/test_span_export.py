"""Spans on their way to a real collector that decodes OTLP; and what happens where it is slow, refuses, or is gone."""

from __future__ import annotations

import logging
import time

import pytest

from cluster.span_export import SpanExport, check_exporter, missing_package
from cluster.spans import RequestSpans, Span, TraceContext
from messages.errors import ConfigError
from tests.otlp_receiver import attributes_of, receiving
from tests.served import free_port, run_kvray

RESOURCE = {"service.name": "kvray", "service.version": "1", "service.instance.id": "i"}
CONTEXT = TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, is_sampled=True, state="vendor=x")

needs_exporter = pytest.mark.skipif(missing_package() is not None, reason="the extra otel is not installed")


def request(context: TraceContext | None = None, error: str = "") -> RequestSpans:
    now_s = time.monotonic()
    stage = Span("load", now_s - 0.5, now_s - 0.25, {"kvray.host_blocks": 3, "kvray.runs": ["0-16 host tcp://c"]})
    return RequestSpans(context, Span("POST /v1/completions", now_s - 1.0, now_s, {"a": "b"}, error), (stage,))


@needs_exporter
@pytest.mark.slow
def test_a_request_is_a_server_span_with_its_stages_below_it_in_the_clients_trace():
    with receiving() as receiver:
        export = SpanExport(receiver.url, RESOURCE)
        export.put(request(CONTEXT, error="it broke"))
        export.put(request())
        whole, stage, other, other_stage = receiver.wait_for(4)
        assert export.close(60.0)
    assert receiver.resources[0]["service.instance.id"] == "i"
    assert whole.trace_id.hex() == stage.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert (whole.parent_span_id.hex(), stage.parent_span_id) == ("b7ad6b7169203331", whole.span_id)
    assert whole.trace_state == "vendor=x"
    assert (whole.kind, stage.kind) == (2, 1)  # SERVER, INTERNAL
    assert (whole.status.code, whole.status.message, stage.status.code) == (2, "it broke", 0)
    assert attributes_of(stage) == {"kvray.host_blocks": 3, "kvray.runs": ["0-16 host tcp://c"]}
    assert stage.end_time_unix_nano - stage.start_time_unix_nano == pytest.approx(0.25e9, rel=1e-3)
    assert abs(whole.end_time_unix_nano - time.time_ns()) < 30e9
    assert other.trace_id == other_stage.trace_id != whole.trace_id
    assert other.parent_span_id == b""


@needs_exporter
@pytest.mark.slow
def test_what_waits_at_the_end_is_sent_with_it():
    with receiving() as receiver:
        export = SpanExport(receiver.url, RESOURCE)
        for _ in range(300):  # several messages
            export.put(request())
        assert export.close(60.0)
        assert len(receiver.spans) == 600
        assert export.close(0.0)  # again: nothing happens
    assert export.num_dropped == 0


@needs_exporter
@pytest.mark.slow
def test_a_collector_that_hangs_delays_neither_who_has_spans_nor_the_end():
    with receiving() as receiver:
        receiver.stalls.set()
        export = SpanExport(receiver.url, RESOURCE, max_waiting=10)
        export.put(request())
        ends_s = time.monotonic() + 5.0
        while receiver.num_messages == 0:
            assert time.monotonic() < ends_s
            time.sleep(0.01)
        began_s = time.monotonic()
        for _ in range(1000):
            export.put(request())
        assert time.monotonic() - began_s < 2.5
        assert export.num_dropped == 990
        began_s = time.monotonic()
        assert not export.close(0.2)
        assert time.monotonic() - began_s < 2.5  # the exporter's own limit is twice that
        receiver.stalls.clear()


@needs_exporter
@pytest.mark.slow
@pytest.mark.parametrize("is_there", [False, True])
def test_a_collector_that_is_gone_or_refuses_is_said_once_and_so_is_its_return(caplog, monkeypatch, is_there):
    monkeypatch.setattr("cluster.span_export._PAUSE_S", 0.05)
    monkeypatch.setattr("cluster.span_export._EXPORT_TIMEOUT_S", 0.5)
    port = free_port()
    caplog.set_level(logging.INFO)
    with receiving(port) as refusing:
        refusing.status = 400
        if not is_there:
            refusing.end()
        url = f"http://127.0.0.1:{port if is_there else free_port()}"
        export = SpanExport(url, RESOURCE)
        for number in (1, 2):
            export.put(request())
            ends_s = time.monotonic() + 20.0
            while export.num_dropped < number:
                assert time.monotonic() < ends_s
                time.sleep(0.02)
        if is_there:
            refusing.status = 200
            export.put(request())
            refusing.wait_for(2)
        assert export.close(60.0)
    said = [record.getMessage() for record in caplog.records if url in record.getMessage()]
    assert said[0].startswith(f"spans do not reach {url}/v1/traces, and are dropped: ")
    assert ("Bad Request" if is_there else "Connection refused") in said[0]
    assert said[1:] == [f"spans reach {url}/v1/traces again; those of 2 requests were dropped"] * is_there


def test_an_extra_that_is_missing_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("cluster.span_export._EXPORTER", "opentelemetry.nothing.of.that.kind")
    with pytest.raises(ConfigError) as refused:
        check_exporter("http://collector:4318")
    assert "pip install 'kvray[otel]'" in refused.value.message
    assert "http://collector:4318" in refused.value.message
    check_exporter(None)


@pytest.mark.slow
def test_kvray_serve_without_the_extra_says_so_in_one_line_before_anything_starts(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'opentelemetry.exporter.otlp':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    config = tmp_path / "kvray.yaml"
    endpoint = f"http://127.0.0.1:{free_port()}"
    config.write_text(f"observability: {{otlp_endpoint: '{endpoint}'}}\n")
    finished, left = run_kvray("serve", "--config", str(config), extra_environment={"PYTHONPATH": str(tmp_path)})
    assert (finished.returncode, left) == (2, [])
    assert finished.stderr.startswith(
        f"kvray: observability.otlp_endpoint: spans for {endpoint} want the extra kvray[otel], saw no opentelemetry-"
    )
    assert finished.stderr.count("\n") == 1
