"""The keeper: the process in which Ray's driver runs, for the command line. `python -m cluster.keeper FD PARENT`.

It brings the application up on a Ray of its own or on the cluster that was there, looks after it, and takes it down
when the command line closes its end of the socket FD. A process of its own, because Ray ends the one that its driver
runs in when the raylet or the GCS is lost, and cannot be started anew in a process that lost it.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from cluster.config import KvrayConfig, prepare_environment
from cluster.direct_http import open_directly
from cluster.joining import NicenessCheck, check_credentials
from cluster.keeper_messages import Failed, InSession, KeeperTask, Progress, Report, Seen, Up
from cluster.listener import bound_socket
from cluster.logs import configure_logging
from cluster.ray_output import filter_output
from cluster.sessions import Session, clean_former
from messages.errors import ConfigError, KvrayError, WorkerError, first_line
from messages.fleet import WorkerInfo

logger = logging.getLogger("cluster.keeper")  # not __name__, which is __main__ under python -m

_LOCAL_OBJECT_STORE_BYTES = 128 * 2**20  #: only the road "plasma" goes through it, where no direct one works
_POLL_S = 0.1
_STATUS_POLL_S = 0.25
_LOOK_S = 1.0
_WORKER_TIMEOUT_S = 5.0
_ROUTE_TIMEOUT_S = 20.0  #: for Serve's proxy to know an application that runs
_PR_SET_PDEATHSIG = 1  #: linux/prctl.h


class Stopped(Exception):  # noqa: N818 - not an error: the user wants us to end
    """The end is wanted."""


class Keeper:
    """Brings the application up, looks after it, and takes it down, on the main thread of a process.

    One thread all the way: Linux ends Ray's processes when the thread that started them ends (PR_SET_PDEATHSIG), and
    this process when the command line's thread does, which is why nothing survives a SIGKILL of the command line.
    """

    def __init__(self, task: KeeperTask, line: socket.socket) -> None:
        """Serve what `task` says; reports go out through `line`, whose end is the wish to end."""
        self._config = task.config
        self._address = task.address
        self._listener = task.listener
        self._line = line
        self._ending = threading.Event()
        self._has_touched_ray = False
        self._has_deployed = False
        self._session: Session | None = None  #: of a Ray of our own

    def run(self) -> None:
        """Bring the application up, look after it until its end is wanted, and take it down."""
        threading.Thread(target=self._wait_for_end, name="end", daemon=True).start()
        try:
            self._report(self._bring_up())
            while not self._ending.wait(_LOOK_S):
                self._look()
        except Stopped:
            pass
        except KvrayError as error:
            self._report(Failed(error.info()))
        except Exception as error:
            logger.exception("unexpected")
            self._report(Failed(WorkerError(first_line(error)).info()))
        finally:
            if self._has_touched_ray:
                # Nothing is worth telling about the end of what is being ended.
                with contextlib.suppress(Exception):
                    self._take_down()

    def _wait_for_end(self) -> None:
        with contextlib.suppress(OSError):
            while self._line.recv(1):
                pass
        self._ending.set()

    def _report(self, report: Report) -> None:
        with contextlib.suppress(OSError):  # the command line went: the end is wanted
            self._line.sendall(msgspec.json.encode(report) + b"\n")

    def _say(self, text: str) -> None:
        """Report progress; raise Stopped where the start is no longer wanted."""
        if self._ending.is_set():
            raise Stopped
        self._report(Progress(text))

    def _bring_up(self) -> Up:
        """Return the URL at which the application answers now, and who computes."""
        config = self._config
        if self._address is not None:
            check_credentials(self._address)
        self._say("reading the model's configuration")
        # Imports torch, as the application does anyway: most mistakes show before Ray is started.
        from engine.model.load import check_model

        check_model(Path(config.model.path), max_model_len=config.model.max_model_len)
        prepare_environment(is_own_cluster=self._address is None)
        # Imported late: Ray reads its environment when it is imported.
        import ray
        from ray import serve

        level = logging.INFO if config.log.level == "debug" else logging.ERROR
        logging.getLogger("ray").setLevel(level)
        logging.getLogger("ray.serve").setLevel(level)
        self._connect(ray)
        _leave_signals_alone()  # once more: Ray's own SIGTERM handler, in C++, prints a stack and aborts
        niceness = None
        if self._address is None:
            _check_resources(config, ray.cluster_resources())
            if config.network.host is None:
                # One node, this one: the channels need not be seen by anybody else.
                network = msgspec.structs.replace(config.network, host="127.0.0.1")
                config = msgspec.structs.replace(config, network=network)
        else:
            niceness = NicenessCheck(ray)
        self._deploy(config, serve)
        if niceness is not None:
            niceness.warn()
        return Up(url_of(config), self._workers(config, serve))

    def _workers(self, config: KvrayConfig, serve: Any) -> tuple[WorkerInfo, ...]:
        """Ask one worker of each kind what it is; one that does not answer is left out: it is for people."""
        from cluster.app import APP_NAME

        found = []
        for name, num_workers in (("Decode", config.pools.decode), ("Prefill", config.pools.prefill)):
            if num_workers:
                handle = serve.get_deployment_handle(name, APP_NAME)
                try:
                    told = handle.record_replica_metadata.remote().result(timeout_s=_WORKER_TIMEOUT_S)
                except Exception as error:  # noqa: BLE001 - Serve and Ray raise many kinds for a replica that was lost
                    logger.debug("asking a worker of %s what it is: %s", name, error)
                else:
                    found.append(msgspec.convert(told, WorkerInfo))
        return tuple(found)

    def _connect(self, ray: Any) -> None:
        address = self._address
        quiet = {"log_to_driver": address is not None, "logging_level": logging.ERROR, "configure_logging": True}
        self._say("starting Ray" if address is None else f"joining the Ray cluster at {address}")
        self._has_touched_ray = True
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
        if address is None:
            self._enter_session(ray.get_runtime_context())

    def _enter_session(self, context: Any) -> None:
        """Take the session of a Ray of our own, and clean those of former ones that ended without doing so."""
        ray_dir = Path(context.get_temp_dir())
        self._session = Session(ray_dir / context.get_session_name())
        self._report(InSession(str(self._session.directory), str(self._session.log_dir)))
        for former in clean_former(ray_dir):
            logger.info("cleaned what a former kvray left in %s", former)

    def _deploy(self, config: KvrayConfig, serve: Any) -> None:
        from cluster.app import APP_NAME, build_application

        self._say("placing workers")
        if self._address is not None:
            self._check_room(config, serve, APP_NAME)
        is_debug = config.log.level == "debug"
        logging_config = {"log_level": "DEBUG" if is_debug else "ERROR", "enable_access_log": is_debug}
        if self._listener is not None:
            serve.start(proxy_location="Disabled", logging_config=logging_config)
        else:
            serve.start(
                http_options={"host": config.http.host, "port": config.http.port, "request_timeout_s": None},
                proxy_location="HeadOnly" if config.http.host == "127.0.0.1" else "EveryNode",
                logging_config=logging_config,
            )
        log_dir = None if self._session is None else str(self._session.log_dir)
        application = build_application(config, self._listener, log_dir)
        target = serve.RunTarget(target=application, name=APP_NAME, route_prefix="/", logging_config=logging_config)
        self._say("placing workers")
        self._has_deployed = True
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        while not self._is_running(serve.status().applications.get(APP_NAME)):
            time.sleep(_STATUS_POLL_S)
        self._wait_until_ready(url_of(config))

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
        _raise_config_error(application)
        parts = []
        for name, deployment in sorted(application.deployments.items()):
            counts = {str(state): count for state, count in deployment.replica_states.items()}
            parts.append(f"{name} {counts.get('RUNNING', 0)}/{sum(counts.values())}")
        if parts:
            self._say("starting " + ", ".join(parts))
        status = application.status.value
        if status == "DEPLOY_FAILED":
            texts = [application.message, *(item.message for item in application.deployments.values())]
            # On a Ray of our own the replicas' tracebacks are on the terminal already.
            level = logging.ERROR if self._session is None else logging.DEBUG
            for line in "\n".join(text for text in texts if text).splitlines():
                logger.log(level, "Ray Serve: %s", line)
            reason = failure_in("\n".join(texts))
            raise WorkerError("Ray Serve could not start the application" + (f": {reason}" if reason else ""))
        return bool(status == "RUNNING")

    def _wait_until_ready(self, url: str) -> None:
        """Wait until /ready answers: a proxy of Serve hears of an application only a moment after it runs."""
        ends_s = time.monotonic() + _ROUTE_TIMEOUT_S
        while not _is_ready(url):
            self._say("waiting for HTTP")
            if time.monotonic() > ends_s:
                if self._address is None:
                    raise WorkerError(f"the application runs, and {url}/ready does not answer")
                logger.warning("%s does not answer on this node; the cluster's head has the proxy", url)
                return
            time.sleep(_POLL_S)

    def _look(self) -> None:
        """Report that Serve knows the application; this may wait for ever where its controller hangs.

        Raises:
            ConfigError: nothing answers, and what was lost cannot start again as configured.
            WorkerError: somebody deleted the application.
        """
        from ray import serve

        from cluster.app import APP_NAME

        try:
            application = serve.status().applications.get(APP_NAME)
        except Exception as error:  # noqa: BLE001 - Serve raises many kinds while its controller is replaced
            logger.debug("asking Serve for its status: %s", error)
            return
        if application is None:
            raise WorkerError(f"the application {APP_NAME} was deleted from Ray Serve")
        if application.status.value != "RUNNING" and not _is_ready(url_of(self._config)):
            _raise_config_error(application)
        self._report(Seen())

    def _take_down(self) -> None:
        import ray
        from ray import serve

        if self._address is not None and self._has_deployed:
            from cluster.app import APP_NAME

            serve.delete(APP_NAME, _blocking=False)
        # With a cluster of our own nothing outlives it, and Ray ends its processes faster than Serve drains them.
        ray.shutdown()


def url_of(config: KvrayConfig) -> str:
    """Return the URL at which this machine reaches the application."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.http.host, config.http.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{config.http.port}"


def config_error_in(text: str) -> str | None:
    """Find the one line of a ConfigError in what Serve says of a replica that failed; None where there is none."""
    found = re.search(r"ConfigError: (.+)", text)
    return None if found is None else found.group(1).strip()


def failure_in(text: str) -> str | None:
    """Find what a traceback that Serve tells of a replica ends with; None where there is none."""
    found = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+", text, re.MULTILINE)
    return found[-1].strip() if found else None


def _raise_config_error(application: Any) -> None:
    """Raise the ConfigError that Serve tells of a replica of `application`, if there is one."""
    for _, deployment in sorted(application.deployments.items()):
        reason = config_error_in(deployment.message or "")
        if reason is not None:
            raise ConfigError(reason)


def _check_resources(config: KvrayConfig, available: dict[str, float]) -> None:
    """Raise ConfigError where Serve would wait for ever, on a cluster of our own, which never grows."""
    most = config.autoscaling
    num_workers = (most.max_prefill or config.pools.prefill) + (most.max_decode or config.pools.decode)
    wants = {"CPU": config.pools.cpus_per_worker, "GPU": config.pools.gpus_per_worker}
    for name, each in wants.items():
        if num_workers * each > available.get(name, 0.0):
            raise ConfigError(
                f"pools.{name.lower()}s_per_worker: {num_workers} workers with {each:g} each were asked for, "
                f"this node has {available.get(name, 0.0):g}"
            )


def _verb(address: str | None) -> str:
    return "start" if address is None else f"join the cluster at {address}"


def _is_ready(url: str) -> bool:
    try:
        with open_directly(f"{url}/ready", 2.0) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _leave_signals_alone() -> None:
    """Let SIGINT and SIGTERM, which reach everything in the foreground, do nothing here: the command line decides."""

    def nothing(_number: int, _frame: FrameType | None) -> None:
        signal.alarm(0)  # Ray's handler may have come first, and has set one that aborts this process

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, nothing)  # not SIG_IGN, which Ray's processes would inherit


def _keep_ray_off_the_terminal(config: KvrayConfig, *, is_own_cluster: bool) -> None:
    """Log to the terminal, and let only us: Ray tells it of each process that was lost, with pages of its logs.

    On a cluster that was there what our processes write comes by way of Ray, and is let through.
    """
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, encoding="utf-8")
    with contextlib.redirect_stderr(terminal):
        configure_logging(config.log.level, config.log.format)
    if config.log.level == "debug":
        return
    if not is_own_cluster:
        filter_output(terminal, config.log.format)
    else:
        with open(os.devnull, "w") as nothing:  # noqa: PTH123 - a descriptor is wanted
            os.dup2(nothing.fileno(), sys.stdout.fileno())
            os.dup2(nothing.fileno(), sys.stderr.fileno())


def main() -> None:
    """Keep the application that the command line asks for, until it hangs up."""
    descriptor, parent = (int(argument) for argument in sys.argv[1:])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return  # it has ended before it could be watched
    _leave_signals_alone()
    line = socket.socket(fileno=descriptor)
    with line.makefile("rb", buffering=0) as lines:
        task = msgspec.json.decode(lines.readline(), type=KeeperTask)
    _keep_ray_off_the_terminal(task.config, is_own_cluster=task.address is None)
    Keeper(task, line).run()
    # Ray's threads may linger in the interpreter; everything of ours has ended by now.
    os._exit(0)


if __name__ == "__main__":
    main()
