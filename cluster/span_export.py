"""Sends finished spans to a collector: OTLP over HTTP, by OpenTelemetry's exporter, on a thread of our own."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

_EXPORTER: Final = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PACKAGE: Final = "opentelemetry-exporter-otlp-proto-http"


def missing_package() -> str | None:
    """Return the package without which no span can be sent; None: it is there."""
    try:
        return None if find_spec(_EXPORTER) is not None else _PACKAGE
    except ModuleNotFoundError:  # of a package above it
        return _PACKAGE
