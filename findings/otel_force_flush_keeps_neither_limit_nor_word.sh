#!/usr/bin/env bash
# opentelemetry-sdk 1.45.2, opentelemetry-exporter-otlp-proto-http 1.45.2.
#
# TracerProvider.force_flush(timeout_millis=200) waits for the exporter's own time-out, here 3 s, where the collector
# takes the connection and never answers; then it says True, though no span has arrived. shutdown() waits as long. Who
# has to end by a time needs a thread of its own for it, and a limit of its own on waiting for that thread.
#
# Seen:
#   force_flush(0.2 s): True after 3.0 s
#   shutdown: after 3.0 s
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    opentelemetry-sdk==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2
cat > "$work/run.py" <<'P'
import logging, socket, sys, time
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
logging.disable(logging.CRITICAL)
silent = socket.create_server(("127.0.0.1", 0))  # takes connections, never answers
endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=3)))
tracer = provider.get_tracer("finding")
tracer.start_span("a").end()
began = time.monotonic()
word = provider.force_flush(timeout_millis=200)
flushed = time.monotonic() - began
tracer.start_span("b").end()
began = time.monotonic()
provider.shutdown()
ended = time.monotonic() - began
print(f"force_flush(0.2 s): {word} after {flushed:.1f} s")
print(f"shutdown: after {ended:.1f} s")
sys.exit(not (word is True and flushed > 2 and ended > 2))
P
"$work/venv/bin/python" "$work/run.py" || { echo "changed: it is otherwise now"; exit 1; }
