"""Starts and ends an application on Ray, from the command line: joins the cluster that is there, or starts one.

Everything that was started is ended again, whatever happens: on Ctrl-C, on SIGTERM, on an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import msgspec

from cluster.config import KvrayConfig, ray_address, serve_environment
from messages.errors import ConfigError

logger = logging.getLogger(__name__)

_LOCAL_OBJECT_STORE_BYTES = 128 * 2**20  #: nothing of ours goes through it yet
_POLL_S = 0.1
_SHUTDOWN_S = 4.0  #: for the application to end politely, before Ray is ended under it


@dataclass(frozen=True, slots=True)
class Launched:
    """An application that answers requests."""

    url: str
    is_own_cluster: bool  #: Ray was started here, and ends with us


class Stopped(Exception):  # noqa: N818 - not an error: the user wants us to end
    """SIGINT or SIGTERM arrived."""


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, from now until the block ends."""
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def running(
    config: KvrayConfig, stop: threading.Event, on_progress: Callable[[str], None] = lambda _: None
) -> Iterator[Launched]:
    """The application, serving, for as long as the block lasts.

    Raises:
        ConfigError: it cannot start as configured; one line says why.
        Stopped: `stop` was set while it started.
    """
    os.environ.update(serve_environment())
    _check_port_is_free(config.http.host, config.http.port)
    # Imported here: Ray reads its environment when it is imported, and `kvray --help` should not wait for it.
    import ray
    from ray import serve

    is_own_cluster = _connect(ray, on_progress)
    signal_handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        if is_own_cluster and config.network.host is None:
            # One node, this one: the channels need not be seen by anybody else.
            network = msgspec.structs.replace(config.network, host="127.0.0.1")
            config = msgspec.structs.replace(config, network=network)
        _start(config, serve, stop, on_progress)
        yield Launched(url=f"http://{config.http.host}:{config.http.port}", is_own_cluster=is_own_cluster)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), signal_handlers, strict=True):
            signal.signal(number, handler)
        _end(ray, serve, is_own_cluster=is_own_cluster)


def _connect(ray: Any, on_progress: Callable[[str], None]) -> bool:
    """True: a cluster of our own was started."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(ConnectionError):
            ray.init(address=ray_address() or "auto", **quiet)
            on_progress("joined the Ray cluster that is there")
            return False
        if ray_address() is not None:
            raise ConfigError(f"no Ray cluster answers at RAY_ADDRESS={ray_address()}")
        on_progress("starting Ray")
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            **quiet,
        )
        return True
    finally:
        for number, handler in handlers.items():  # Ray puts its own SIGTERM handler in place
            signal.signal(number, handler)


def _start(config: KvrayConfig, serve: Any, stop: threading.Event, on_progress: Callable[[str], None]) -> None:
    from cluster.app import APP_NAME, build_application

    failure: list[BaseException] = []

    def deploy() -> None:
        try:
            serve.start(
                http_options={"host": config.http.host, "port": config.http.port, "request_timeout_s": None},
                proxy_location="HeadOnly" if config.http.host == "127.0.0.1" else "EveryNode",
                logging_config={"log_level": "ERROR", "enable_access_log": False},
            )
            serve.run(build_application(config), name=APP_NAME, route_prefix="/", logging_config=None)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread
            failure.append(error)

    on_progress("placing workers")
    thread = threading.Thread(target=deploy, daemon=True, name="deploy")
    thread.start()
    while thread.is_alive():
        if stop.wait(_POLL_S):
            raise Stopped
        _report_progress(serve, APP_NAME, on_progress)
    if failure:
        reason = _config_error_in(str(failure[0]))
        raise ConfigError(reason) if reason else failure[0]


def _report_progress(serve: Any, app_name: str, on_progress: Callable[[str], None]) -> None:
    """What the replicas do; raises as soon as one of them says that the configuration will not do."""
    try:
        application = serve.status().applications.get(app_name)
    except Exception:  # noqa: BLE001 - Serve itself is still starting; the deploy thread reports real failures
        return
    if application is None:
        return
    parts = []
    for name, deployment in sorted(application.deployments.items()):
        reason = _config_error_in(deployment.message or "")
        if reason is not None:
            raise ConfigError(reason)
        running = sum(count for state, count in deployment.replica_states.items() if str(state) == "RUNNING")
        total = sum(deployment.replica_states.values())
        parts.append(f"{name} {running}/{total}")
    on_progress("starting " + ", ".join(parts))


def _config_error_in(text: str) -> str | None:
    """The one line of a ConfigError in what Serve says of a replica that failed."""
    found = re.search(r"ConfigError: (.+)", text)
    return None if found is None else found.group(1).strip()


def _end(ray: Any, serve: Any, *, is_own_cluster: bool) -> None:
    from cluster.app import APP_NAME

    if is_own_cluster:
        # Nothing outlives the cluster, and Ray ends its processes faster than Serve drains them.
        ray.shutdown()
        return
    ender = threading.Thread(target=lambda: serve.delete(APP_NAME, _blocking=False), daemon=True)
    ender.start()
    ender.join(_SHUTDOWN_S)
    ray.shutdown()


def _check_port_is_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"http: cannot listen on {host} port {port}: {error.strerror}") from None


def wait_until(stop: threading.Event, seconds: float | None = None) -> None:
    """Return when `stop` is set, or after `seconds`."""
    ends_s = None if seconds is None else time.monotonic() + seconds
    while not stop.wait(0.5):
        if ends_s is not None and time.monotonic() >= ends_s:
            return
