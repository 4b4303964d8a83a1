"""HTTP to what serves on this machine, past a proxy that the environment names: that one looks for it elsewhere."""

from __future__ import annotations

import http.client
import ipaddress
import urllib.request
from typing import cast
from urllib.parse import urlsplit


def open_directly(request: str | urllib.request.Request, timeout_s: float) -> http.client.HTTPResponse:
    """As urllib's `urlopen`, and never by way of a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return cast("http.client.HTTPResponse", opener.open(request, timeout=timeout_s))


def is_loopback(url: str) -> bool:
    """Tell whether `url` leads to this machine for certain."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
