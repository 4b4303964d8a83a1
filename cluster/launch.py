"""Starts and ends an application on Ray, from the command line: joins the cluster that is there, or starts one.

Everything that was started is ended again, whatever happens: on Ctrl-C, on SIGTERM, on an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import logging
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import psutil

from cluster.config import KvrayConfig, prepare_environment
from cluster.joining import NicenessCheck, check_credentials, cluster_to_join
from cluster.listener import SharedListener, bound_socket
from messages.errors import ConfigError, WorkerError, first_line

logger = logging.getLogger(__name__)

_LOCAL_OBJECT_STORE_BYTES = 128 * 2**20  #: only the road "plasma" goes through it, where no direct one works
_POLL_S = 0.1
_STATUS_POLL_S = 0.25
_ROUTE_TIMEOUT_S = 20.0  #: for Serve's proxy to know an application that runs
_SHUTDOWN_S = 7.0  #: for all to end politely; then it is killed
_KILL_S = 2.0
_PR_SET_CHILD_SUBREAPER = 36  #: linux/prctl.h


@dataclass(frozen=True, slots=True)
class Launched:
    """An application that answers requests."""

    url: str
    is_own_cluster: bool  #: Ray was started here, and ends with us


class Stopped(Exception):  # noqa: N818 - not an error: the user wants us to end
    """SIGINT or SIGTERM arrived."""


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set, from now until the block ends."""
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        # Where Ray's own SIGTERM handler (absl's, in C++) came first, it has set an alarm that aborts this process.
        signal.alarm(0)
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
    """Serve the application for as long as the block lasts. `on_progress` is called on another thread.

    Raises:
        ConfigError: the application cannot start as configured; one line says why.
        WorkerError: Ray or Serve failed.
        Stopped: `stop` was set while it started.
    """
    keeper = _Keeper(config, on_progress)
    try:
        yield keeper.wait_until_up(stop)
    finally:
        keeper.end()


class _Keeper(threading.Thread):
    """The thread that brings the application up, keeps it, and takes it down.

    Not the main thread, so that a signal is noticed at once whatever Ray waits for, and so that Ray leaves the signal
    handlers alone. One thread all the way: Linux ends Ray's processes when the thread that started them ends
    (PR_SET_PDEATHSIG), which is also why nothing survives a SIGKILL of this process.
    """

    def __init__(self, config: KvrayConfig, on_progress: Callable[[str], None]) -> None:
        super().__init__(name="keeper", daemon=True)
        self._config = config
        self._on_progress = on_progress
        self._others = set(psutil.Process().children(recursive=True))  #: not ours to end
        self._launched: Launched | None = None
        self._error: BaseException | None = None
        self._has_touched_ray = False
        self._is_up = threading.Event()
        self._is_connected = threading.Event()
        self._ending = threading.Event()
        self._is_own_cluster = False
        self._has_deployed = False
        self._listener: SharedListener | None = None

    def wait_until_up(self, stop: threading.Event) -> Launched:
        """Start, and wait until requests are answered; raises what `running` raises."""
        self.start()
        has_handlers = False
        while not self._is_up.is_set():
            if stop.wait(_POLL_S):
                raise Stopped
            if self._is_connected.is_set() and not has_handlers:
                # Ray has put a SIGTERM handler of its own under Python's, which prints a stack and aborts.
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.getsignal(number))
                has_handlers = True
            if not self.is_alive() and not self._is_up.is_set():
                assert self._error is not None, "it ends early with an error only"
                raise self._error
        assert self._launched is not None
        return self._launched

    def end(self) -> None:
        """End all that was started; what does not end politely is killed."""
        self._ending.set()
        if not self._has_touched_ray:
            return
        # Orphans come to us from now on: a worker process that the raylet was just starting is found too.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.join(_SHUTDOWN_S)
        ends_s = time.monotonic() + _KILL_S
        while (family := self._family()) and time.monotonic() < ends_s:
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=_POLL_S)

    def run(self) -> None:
        """Bring the application up, keep it until its end is wanted, and take it down."""
        try:
            self._bring_up()
            self._ending.wait()
        except Exception as error:  # noqa: BLE001 - carried to whoever waits
            self._error = error
        finally:
            if self._listener is not None:
                self._listener.close()
            if self._has_touched_ray:
                # Nothing is worth telling about the end of what is being ended.
                with contextlib.suppress(Exception):
                    self._take_down()

    def _family(self) -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - self._others

    def _say(self, text: str) -> None:
        """Report progress; raise Stopped where the start is no longer wanted."""
        if self._ending.is_set():
            raise Stopped
        self._on_progress(text)

    def _bring_up(self) -> None:
        config = self._config
        address = cluster_to_join()
        if address is None:
            self._listener = SharedListener(config.http.host, config.http.port)
        else:
            check_credentials(address)
        self._say("reading the model's configuration")
        # Imports torch, as the application does anyway: most mistakes show before Ray is started.
        from engine.model.load import check_model

        check_model(Path(config.model.path), max_model_len=config.model.max_model_len)
        prepare_environment(is_own_cluster=address is None)
        # Imported late: Ray reads its environment when it is imported.
        import ray
        from ray import serve

        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self._connect(ray, address)
        self._is_connected.set()
        if self._is_own_cluster:
            _check_resources(config, ray.cluster_resources())
            if config.network.host is None:
                # One node, this one: the channels need not be seen by anybody else.
                network = msgspec.structs.replace(config.network, host="127.0.0.1")
                config = msgspec.structs.replace(config, network=network)
        niceness = None if self._is_own_cluster else NicenessCheck(ray)
        self._deploy(config, serve)
        if niceness is not None:
            niceness.warn()
        self._launched = Launched(url=_url(config), is_own_cluster=self._is_own_cluster)
        self._is_up.set()

    def _connect(self, ray: Any, address: str | None) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        self._say("starting Ray" if address is None else f"joining the Ray cluster at {address}")
        self._has_touched_ray = True
        self._is_own_cluster = address is None
        try:
            if address is not None:
                ray.init(address=address, **quiet)
            else:
                store_bytes = _LOCAL_OBJECT_STORE_BYTES
                ray.init(address="local", include_dashboard=False, object_store_memory=store_bytes, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"Ray cannot {_verb(address)}: {error}") from error
        except Exception as error:  # bare ones, after 30 s, where its processes are slow to start
            raise WorkerError(f"Ray did not {_verb(address)}, this time: {first_line(error)}") from error

    def _deploy(self, config: KvrayConfig, serve: Any) -> None:
        from cluster.app import APP_NAME, build_application

        self._say("placing workers")
        if not self._is_own_cluster:
            self._check_room(config, serve, APP_NAME)
        logging_config = {"log_level": "ERROR", "enable_access_log": False}
        if self._listener is not None:
            serve.start(proxy_location="Disabled", logging_config=logging_config)
        else:
            serve.start(
                http_options={"host": config.http.host, "port": config.http.port, "request_timeout_s": None},
                proxy_location="HeadOnly" if config.http.host == "127.0.0.1" else "EveryNode",
                logging_config=logging_config,
            )
        application = build_application(config, None if self._listener is None else self._listener.name)
        target = serve.RunTarget(target=application, name=APP_NAME, route_prefix="/")
        self._say("placing workers")
        self._has_deployed = True
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        while not self._is_running(serve.status().applications.get(APP_NAME)):
            time.sleep(_STATUS_POLL_S)
        self._wait_until_ready(_url(config))

    def _check_room(self, config: KvrayConfig, serve: Any, app_name: str) -> None:
        """Wait until a former application ended, on a cluster that was there.

        Raises:
            ConfigError: an application of that name lives there, or Serve listens on another host or port.
        """
        while (present := serve.status().applications.get(app_name)) is not None:
            if str(present.status.value) != "DELETING":
                raise ConfigError(f"the Ray cluster has an application {app_name} already: end that one first")
            self._say(f"waiting for the former {app_name} to end")
            time.sleep(_STATUS_POLL_S)
        # The public status does not tell the port.
        client = serve.context._get_global_client(raise_if_no_controller_running=False)  # noqa: SLF001
        if client is None:
            bound_socket(config.http.host, config.http.port).close()
        elif (client.http_config.host, client.http_config.port) != (config.http.host, config.http.port):
            seen = f"{client.http_config.host} port {client.http_config.port}"
            raise ConfigError(
                f"http: Ray Serve on this cluster listens on {seen} already, wanted {config.http.host} port "
                f"{config.http.port}: give --host and --port as they are there"
            )

    def _is_running(self, application: Any) -> bool:
        """Tell whether the application runs, and report progress.

        Raises:
            ConfigError: a replica says that it cannot start as configured.
            WorkerError: Serve could not start the application.
        """
        if application is None:
            return False
        parts = []
        for name, deployment in sorted(application.deployments.items()):
            reason = config_error_in(deployment.message or "")
            if reason is not None:
                raise ConfigError(reason)
            counts = {str(state): count for state, count in deployment.replica_states.items()}
            parts.append(f"{name} {counts.get('RUNNING', 0)}/{sum(counts.values())}")
        if parts:
            self._say("starting " + ", ".join(parts))
        status = application.status.value
        if status == "DEPLOY_FAILED":
            texts = [application.message, *(item.message for item in application.deployments.values())]
            logger.error("what Ray Serve says: %s", "\n".join(text for text in texts if text))
            raise WorkerError("Ray Serve could not start the application")
        return bool(status == "RUNNING")

    def _wait_until_ready(self, url: str) -> None:
        """Wait until /ready answers: a proxy of Serve hears of an application only a moment after it runs."""
        ends_s = time.monotonic() + _ROUTE_TIMEOUT_S
        while not _is_ready(url):
            self._say("waiting for HTTP")
            if time.monotonic() > ends_s:
                if self._is_own_cluster:
                    raise WorkerError(f"the application runs, and {url}/ready does not answer")
                logger.warning("%s does not answer on this node; the cluster's head has the proxy", url)
                return
            time.sleep(_POLL_S)

    def _take_down(self) -> None:
        import ray
        from ray import serve

        if not self._is_own_cluster and self._has_deployed:
            from cluster.app import APP_NAME

            serve.delete(APP_NAME, _blocking=False)
        # With a cluster of our own nothing outlives it, and Ray ends its processes faster than Serve drains them.
        ray.shutdown()


def _verb(address: str | None) -> str:
    return "start" if address is None else f"join the cluster at {address}"


def config_error_in(text: str) -> str | None:
    """Find the one line of a ConfigError in what Serve says of a replica that failed; None where there is none."""
    found = re.search(r"ConfigError: (.+)", text)
    return None if found is None else found.group(1).strip()


def _check_resources(config: KvrayConfig, available: dict[str, float]) -> None:
    """Raise ConfigError where Serve would wait for ever, on a cluster of our own, which never grows."""
    num_workers = config.pools.prefill + config.pools.decode
    wants = {"CPU": config.pools.cpus_per_worker, "GPU": config.pools.gpus_per_worker}
    for name, each in wants.items():
        if num_workers * each > available.get(name, 0.0):
            raise ConfigError(
                f"pools.{name.lower()}s_per_worker: {num_workers} workers with {each:g} each were asked for, "
                f"this node has {available.get(name, 0.0):g}"
            )


def _url(config: KvrayConfig) -> str:
    """Return the URL at which this machine reaches the application."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.http.port}"


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=2.0) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False
