"""What serves on this machine is reached though the environment names a proxy; what is elsewhere goes by way of it."""

from __future__ import annotations

import http.server
import threading

import pytest

from cluster.client import Server, asked
from cluster.direct_http import is_loopback
from cluster.keeper import _is_ready
from messages.errors import ConfigError


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def url(monkeypatch):
    """Of a server, where the proxy is one that nobody answers at."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_proxy_is_not_asked_for_what_serves_here(url):
    assert _is_ready(url)
    with asked(Server(url), "/status", "status", 5.0) as response:
        assert response.read() == b"{}"


def test_a_proxy_is_asked_for_what_serves_elsewhere(url):
    with pytest.raises(ConfigError, match="Connection refused"), asked(Server("http://kvray.test"), "/", "status", 5.0):
        pass


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.1", False),
        ("https://example.com", False),
        ("nonsense", False),
    ],
)
def test_loopback_is_here(url, is_here):
    assert is_loopback(url) == is_here
