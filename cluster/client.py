"""How the command line asks a kvray that serves: over HTTP, with its API key."""

from __future__ import annotations

import http.client
import json
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.request import Request, urlopen

import typer

from cluster.announcement import servers_here
from cluster.credentials import api_keys
from cluster.direct_http import is_loopback, open_directly
from messages.errors import ConfigError, KvrayError

Url = Annotated[
    str | None,
    typer.Option("--url", help="Where kvray serves.", show_default="the one of this machine", envvar="KVRAY_URL"),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="An API key; every user sees it in `ps`.", show_default="that of --api-key-file"),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="API keys, one a line; the first is used.",
        show_default="KVRAY_API_KEY, else that of the server found here",
        envvar="KVRAY_API_KEY_FILE",
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.", show_default="once")
]
Interval = Annotated[
    float, typer.Option("--interval", help="Seconds between two looks with --watch.", min=0.2, max=86400.0)
]
AsJson = Annotated[bool, typer.Option("--json", help="The whole document.", show_default="for people")]

_DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_ERROR_BYTES = 1 << 16


class Server(NamedTuple):
    """A kvray that serves: where, and the key to ask with; None: without one."""

    url: str
    api_key: str | None = None


def server_of(url: str | None, api_key: str | None = None, api_key_file: Path | None = None) -> Server:
    """Return the server that is meant; without a URL that which runs on this machine, else where one would.

    Raises:
        ConfigError: several run here, or the file will not do.
    """
    key = api_key or next(iter(api_keys(None if api_key_file is None else str(api_key_file))), None)
    if url is not None:
        return Server(url.rstrip("/"), key)
    found = servers_here()
    if len(found) > 1:
        raise ConfigError(f"{len(found)} serve here, {', '.join(server.url for server in found)}: which one? (--url)")
    if not found:
        return Server(_DEFAULT_URL, key)
    if key is None and found[0].api_key_file is not None:
        key = next(iter(api_keys(found[0].api_key_file)), None)
    return Server(found[0].url, key)


@contextmanager
def asked(
    server: Server, path: str, what: str, timeout_s: float, body: dict[str, Any] | bytes | None = None
) -> Iterator[http.client.HTTPResponse]:
    """Ask for `path` (with a body: POST; bytes are MessagePack), and give the answer to be read; `what` it is about.

    Raises:
        ConfigError: nobody answers there, or no kvray, or the key is wrong.
        KvrayError: kvray refuses, with what it says.
    """
    url, api_key = server
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    if body is not None:
        headers["Content-Type"] = "application/json" if isinstance(body, dict) else "application/msgpack"
    try:
        request = Request(f"{url}{path}", data, headers)
        is_here = is_loopback(url)
        with open_directly(request, timeout_s) if is_here else urlopen(request, timeout=timeout_s) as response:
            yield response
    except urllib.error.HTTPError as error:
        raise _refusal(url, what, error) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or str(reason) or type(error).__name__
        raise ConfigError(f"no {what} from {url}: {text}; where does kvray serve? (--url)") from None


def _refusal(url: str, what: str, error: urllib.error.HTTPError) -> KvrayError:
    if error.code not in (401, 403):
        try:
            return KvrayError(str(json.loads(error.read(_MAX_ERROR_BYTES))["error"]["message"]), status=error.code)
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
            return ConfigError(f"no {what} from {url}: it answers HTTP {error.code}")
    hint = "wanted the right API key (--api-key-file, KVRAY_API_KEY)"
    return ConfigError(f"no {what} from {url}: it answers HTTP {error.code}: {hint}")
