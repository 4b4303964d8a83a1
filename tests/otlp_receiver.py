"""A collector of spans for tests: a real HTTP server that decodes OTLP's protobuf, and can stall, refuse or vanish."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import threading
import time
from collections.abc import Iterator

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Receiver:
    """What came."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.num_messages = 0
        self.status = 200
        self.stalls = threading.Event()  #: an answer waits until it is not set any more
        self._ended = threading.Event()

    def wait_for(self, num_spans: int, timeout_s: float = 10.0) -> list[Span]:
        ends_s = time.monotonic() + timeout_s
        while len(self.spans) < num_spans:
            assert time.monotonic() < ends_s, f"{len(self.spans)} of {num_spans} spans: {[s.name for s in self.spans]}"
            time.sleep(0.02)
        return self.spans

    def take(self, body: bytes) -> None:
        message = ExportTraceServiceRequest.FromString(body)
        self.num_messages += 1
        while self.stalls.is_set() and not self._ended.wait(0.02):
            pass
        if self.status == 200:
            for one in message.resource_spans:
                self.resources.append({pair.key: pair.value.string_value for pair in one.resource.attributes})
                for scope in one.scope_spans:
                    assert scope.scope.name == "kvray"
                    self.spans += scope.spans

    def end(self) -> None:
        self._ended.set()


def attributes_of(span: Span) -> dict[str, object]:
    """The attributes as Python's values."""
    found: dict[str, object] = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


@contextlib.contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    """A collector that listens until the block ends."""
    receiver = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.take(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            with contextlib.suppress(OSError):  # who asked is gone
                self.send_response(receiver.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.end()
        server.shutdown()
        server.server_close()
        thread.join()
