"""`kvray serve` that sends spans to a real collector, and one that has none: nothing of it is felt."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import pytest

from cluster.span_export import missing_package
from tests.otlp_receiver import attributes_of, receiving
from tests.served import serving

pytestmark = [
    pytest.mark.alone,
    pytest.mark.long,
    pytest.mark.skipif(missing_package() is not None, reason="the extra otel is not installed"),
]

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STAGES = {"route", "queue", "prefill", "decode"}


def ask(url: str, prompt: str, **fields: object) -> bytes:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    headers = {"Content-Type": "application/json", "traceparent": PARENT}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read()


def configured(directory: Path, endpoint: str) -> str:
    path = directory / "kvray.yaml"
    path.write_text(f"observability: {{otlp_endpoint: {endpoint!r}}}\nhttp: {{access_log: false}}\n")
    return str(path)


def test_spans_of_answers_reach_the_collector_those_at_the_very_end_included(tmp_path):
    with receiving() as receiver:
        with serving("--config", configured(tmp_path, receiver.url), log_dir=tmp_path) as served:
            words = " ".join(f"word{number}" for number in range(300))
            ask(served.url, words)
            ask(served.url, f"{words} and more", stream=True)
            receiver.wait_for(2 * (1 + len(STAGES)), timeout_s=20.0)
            ask(served.url, "the last one")
            served.stop()
        names = [span.name for span in receiver.spans]
        assert names.count("POST /v1/completions") == 3, names
        assert set(names) >= STAGES
        assert {span.trace_id.hex() for span in receiver.spans} == {"0af7651916cd43dd8448eb211c80319c"}
        whole = [span for span in receiver.spans if span.name.startswith("POST")]
        assert {span.parent_span_id.hex() for span in whole} == {"b7ad6b7169203331"}
        ids = {span.span_id for span in whole}
        assert all(span.parent_span_id in ids for span in receiver.spans if span not in whole)
        held = [attributes_of(span) for span in receiver.spans if span.name == "queue"][1]
        assert held["kvray.device_blocks"] > 10


def test_a_collector_that_hangs_delays_neither_an_answer_nor_the_end(tmp_path):
    with receiving() as receiver:
        receiver.stalls.set()
        with serving("--config", configured(tmp_path, receiver.url), log_dir=tmp_path) as served:
            ask(served.url, "warm up")
            while receiver.num_messages == 0:
                time.sleep(0.1)
            began_s = time.monotonic()
            for number in range(10):
                ask(served.url, f"request {number}")
            assert time.monotonic() - began_s < 10.0
            assert served.stop() < 15.0
