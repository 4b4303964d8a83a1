"""What the command line and its keeper, the process that Ray runs in, tell each other: JSON, a line each."""

from __future__ import annotations

import msgspec

from cluster.config import KvrayConfig
from messages.errors import ErrorInfo
from messages.fleet import WorkerInfo


class KeeperTask(msgspec.Struct, frozen=True, kw_only=True):
    """The first line that the command line sends, and the only one: when its end closes, all ends."""

    config: KvrayConfig
    address: str | None  #: of the Ray cluster to join; None: start one
    listener: str | None  #: name of the HTTP socket that ingresses take (cluster/listener.py); None: Serve's proxies


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Something else is being done now."""

    text: str


class InSession(msgspec.Struct, frozen=True, tag="in_session"):
    """A Ray of our own was started."""

    directory: str  #: of its session
    log_dir: str  #: where each process of ours keeps a file of what it says


class Up(msgspec.Struct, frozen=True, tag="up"):
    """Requests are answered."""

    url: str
    workers: tuple[WorkerInfo, ...] = ()  #: one of each kind


class Seen(msgspec.Struct, frozen=True, tag="seen"):
    """Ray Serve still knows the application."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The application cannot be brought up, or cannot become whole again: all ends."""

    error: ErrorInfo


Report = Progress | InSession | Up | Seen | Failed
