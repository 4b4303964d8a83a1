"""Sends the spans of requests to a collector: OTLP over HTTP, by OpenTelemetry's exporter, on a thread of our own.

Whoever has spans puts them into a bounded queue and goes on: a collector that is slow, hangs or is gone costs spans,
and never a request or the stop. The exporter's time-outs are of an attempt, and OpenTelemetry's own processor waits for
it at the end, whatever limit it is told; so the end is a limit of ours on a thread that nobody waits for beyond it.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import urlsplit

from cluster.spans import RequestSpans, Span
from messages.errors import ConfigError

logger = logging.getLogger(__name__)

_EXPORTER: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PACKAGE: Final = "opentelemetry-exporter-otlp-proto-http"
_SIGNAL_PATH: Final = "/v1/traces"
_MAX_WAITING: Final = 2048  #: requests whose spans wait; some 10 KB each
_MAX_BATCH: Final = 128  #: requests in one message
_GATHER_S: Final = 0.5  #: for which more are gathered, once there is one
_EXPORT_TIMEOUT_S: Final = 5.0  #: of a message, its further attempts included, as far as the exporter keeps it
_PAUSE_S: Final = 5.0  #: after one that failed


def missing_package() -> str | None:
    """Return the package without which no span can be sent; None: it is there."""
    try:
        return None if find_spec(_EXPORTER) is not None else _PACKAGE
    except ModuleNotFoundError:  # of a package above it
        return _PACKAGE


def check_exporter(endpoint: str | None) -> None:
    """Check that spans could be sent, if there is an endpoint to send them to.

    Raises:
        ConfigError: a package is missing.
    """
    if endpoint is not None and (package := missing_package()) is not None:
        raise ConfigError(
            f"observability.otlp_endpoint: spans for {endpoint} want the extra kvray[otel], saw no {package}: "
            "pip install 'kvray[otel]' on every node, or leave the setting out"
        )


class _Words(logging.Filter):
    """Keeps what the exporter says from the log, where it would be lines for each message, for whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Take a record in; it is never logged."""
        self._said[1:] = [" ".join(record.getMessage().split())[:300]]
        return False

    def take(self) -> str:
        """Return the first and the last of what was said since the last time: a cause, and that it is given up."""
        said, self._said = self._said, []
        return "; ".join(said)


_words = _Words()  # one for all: of several filters only the first is asked


class SpanExport:
    """A queue of requests' spans, and the thread that sends them. `put` and `close` from any thread."""

    def __init__(self, endpoint: str, resource: Mapping[str, str], *, max_waiting: int = _MAX_WAITING) -> None:
        """Begin; nobody is connected to yet. `resource` says who sends, by OpenTelemetry's names.

        Raises:
            ConfigError: the packages for it are missing.
        """
        check_exporter(endpoint)
        self.num_dropped = 0  #: requests whose spans were not sent
        self._endpoint = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + _SIGNAL_PATH
        self._encoder = _Encoder(resource)
        self._waiting: queue.Queue[RequestSpans | None] = queue.Queue(max_waiting)
        self._closing = threading.Event()
        self._works = True
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def put(self, spans: RequestSpans) -> None:
        """Have `spans` sent, unless too many wait already; returns at once."""
        try:
            self._waiting.put_nowait(spans)
        except queue.Full:
            self.num_dropped += 1

    def close(self, limit_s: float) -> bool:
        """Send what waits, for as long as `limit_s` at most; tell whether all of it was sent or given up by then."""
        self._closing.set()
        try:
            self._waiting.put_nowait(None)
        except queue.Full:  # the thread looks at the event, too
            logger.debug("spans of %d requests wait", self._waiting.qsize())
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import SpanExportResult

        for name in (_EXPORTER, "opentelemetry.exporter.otlp.common.http", "urllib3.connectionpool"):
            logging.getLogger(name).addFilter(_words)
        exporter = OTLPSpanExporter(endpoint=self._endpoint, timeout=_EXPORT_TIMEOUT_S)
        while True:
            batch = self._next_batch()
            if not batch:
                return
            try:
                spans = [span for request in batch for span in self._encoder.spans_of(request)]
                is_sent = exporter.export(spans) is SpanExportResult.SUCCESS
            except Exception:  # the edge of a thread that others depend on for nothing but spans
                logger.exception("the spans of %d requests could not be written", len(batch))
                is_sent = False
            self._note(_words.take(), len(batch), is_sent=is_sent)
            if not is_sent and self._closing.wait(_PAUSE_S):
                return

    def _next_batch(self) -> list[RequestSpans]:
        """Return what is to be sent next, at the end nothing."""
        first = None if self._closing.is_set() and self._waiting.empty() else self._waiting.get()
        if first is None:
            return []
        if self._waiting.qsize() < _MAX_BATCH - 1:
            self._closing.wait(_GATHER_S)
        batch = [first]
        while len(batch) < _MAX_BATCH and not self._waiting.empty():
            another = self._waiting.get()
            if another is not None:
                batch.append(another)
        return batch

    def _note(self, words: str, num_requests: int, *, is_sent: bool) -> None:
        if is_sent and not self._works:
            logger.info("spans reach %s again; those of %d requests were dropped", self._endpoint, self.num_dropped)
        if not is_sent:
            self.num_dropped += num_requests
            if self._works:
                logger.warning("spans do not reach %s, and are dropped: %s", self._endpoint, words)
        self._works = is_sent


class _Encoder:
    """Makes OpenTelemetry's spans of ours; ids of spans are drawn here."""

    def __init__(self, resource: Mapping[str, str]) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self._resource = Resource(dict(resource))
        self._scope = InstrumentationScope("kvray")
        self._random = random.SystemRandom()

    def spans_of(self, request: RequestSpans) -> list[Any]:
        """Return a request's spans as the exporter takes them: its own, then its stages below it."""
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
        from opentelemetry.trace.span import TraceState

        context = request.context
        trace_id = self._random.getrandbits(128) or 1 if context is None else context.trace_id
        state = TraceState.from_header([context.state]) if context is not None and context.state else TraceState()
        flags = TraceFlags(TraceFlags.SAMPLED)

        def named(span_id: int, *, is_remote: bool = False) -> Any:
            return SpanContext(trace_id, span_id, is_remote=is_remote, trace_flags=flags, trace_state=state)

        whole = named(self._random.getrandbits(64) or 1)
        parent = None if context is None else named(context.parent_id, is_remote=True)
        offset_ns = time.time_ns() - time.monotonic_ns()
        return [
            self._made(request.whole, whole, parent, SpanKind.SERVER, offset_ns),
            *(
                self._made(stage, named(self._random.getrandbits(64) or 1), whole, SpanKind.INTERNAL, offset_ns)
                for stage in request.stages
            ),
        ]

    def _made(self, span: Span, context: Any, parent: Any, kind: Any, offset_ns: int) -> Any:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import Status, StatusCode

        return ReadableSpan(
            span.name,
            context,
            parent,
            self._resource,
            attributes=dict(span.attributes),
            kind=kind,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
            start_time=int(span.begin_s * 1e9) + offset_ns,
            end_time=int(span.end_s * 1e9) + offset_ns,
            instrumentation_scope=self._scope,
        )
