"""OpenStack Swift with its S3 API: a real object server in four processes, on free ports of this machine."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs

WRITER = ("kv:writer", "secretsecret")
READER = ("kv:reader", "readersecret")
_BIN = Path(sys.executable).parent
_START_S = 120.0
_HASH_PREFIX, _HASH_SUFFIX = "b", "a"
_PART_POWER = 4
_SERVICES = ("account", "container", "object", "proxy")

_SERVER = """\
[DEFAULT]
swift_dir = {root}/etc
devices = {devices}
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
log_address = {root}/no-syslog

"""
_BACKEND = """\
[pipeline:main]
pipeline = {service}-server

[app:{service}-server]
use = egg:swift#{service}
recon_cache_path = {root}/cache
"""
_PROXY = """\
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats s3api tempauth bulk slo dlo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
error_suppression_interval = 1

[filter:tempauth]
use = egg:swift#tempauth
user_kv_writer = secretsecret .admin
user_kv_reader = readersecret

[filter:s3api]
use = egg:swift#s3api
location = us-east-1

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:9
"""
_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "slo", "dlo")


class Swift:
    """One server; `root` must have user attributes. The processes are ended by `close`, by their ids."""

    def __init__(self, root: Path, devices: Path) -> None:
        self.root = root
        self.devices = devices
        self._ports = dict(zip(_SERVICES, _free_ports(len(_SERVICES)), strict=True))
        self.endpoint = f"127.0.0.1:{self._ports['proxy']}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._configure()
        try:
            for service in _SERVICES:
                self.start(service)
            self.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def uri(self, bucket: str, user: tuple[str, str] = WRITER) -> str:
        """Return where a bucket's cache lies, with the user's keys."""
        key, secret = user[0].replace(":", "%3A"), user[1]
        return f"s3://{key}:{secret}@{bucket}/cache?scheme=http&region=us-east-1&endpoint_override={self.endpoint}"

    def raw(self, user: tuple[str, str] = WRITER) -> pyarrow.fs.S3FileSystem:
        """Return a plain client, which may make buckets."""
        return pyarrow.fs.S3FileSystem(
            access_key=user[0],
            secret_key=user[1],
            endpoint_override=self.endpoint,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            allow_bucket_deletion=True,
            allow_delayed_open=True,
        )

    def let_read(self, bucket: str) -> None:
        """Let READER read a bucket of WRITER's, not write it.

        Said to the container server itself: the proxy asks for a token, which it would keep in memcache.
        """
        digest = hashlib.md5(f"{_HASH_PREFIX}/AUTH_kv/{bucket}{_HASH_SUFFIX}".encode()).digest()
        partition = int.from_bytes(digest[:4], "big") >> (32 - _PART_POWER)
        headers = {"X-Timestamp": f"{time.time():.5f}", "X-Container-Read": f"{READER[0]},.rlistings"}
        connection = http.client.HTTPConnection("127.0.0.1", self._ports["container"], timeout=30)
        connection.request("POST", f"/d1/{partition}/AUTH_kv/{bucket}", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 204, (answer.status, answer.read())
        connection.close()

    def start(self, service: str) -> None:
        """Start a service that does not run."""
        environment = {**os.environ, "SWIFT_DIR": str(self.root / "etc"), "PYTHONWARNINGS": "ignore"}
        with (self.root / f"{service}.log").open("ab") as log:
            self._processes[service] = subprocess.Popen(
                [_BIN / f"swift-{service}-server", self.root / f"{service}.conf"],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def kill(self, service: str) -> None:
        """End a service without a word."""
        process = self._processes.pop(service)
        process.kill()
        process.wait()

    def stop(self, service: str) -> None:
        """Let it stand still: it accepts, and never answers."""
        self._processes[service].send_signal(signal.SIGSTOP)

    def go_on(self, service: str) -> None:
        """Let it go on."""
        self._processes[service].send_signal(signal.SIGCONT)

    def wait_until_ready(self) -> None:
        """Return when all services answer."""
        end_s = time.monotonic() + _START_S
        while not self._is_ready():
            died = [service for service, process in self._processes.items() if process.poll() is not None]
            if died or time.monotonic() > end_s:
                logs = "\n".join((self.root / f"{service}.log").read_text()[-2000:] for service in _SERVICES)
                raise RuntimeError(f"swift does not start, {died} ended:\n{logs}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        for service in _SERVICES:
            connection = http.client.HTTPConnection("127.0.0.1", self._ports[service], timeout=5)
            try:
                connection.request("GET", "/healthcheck")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()
        return True

    def close(self) -> None:
        """End all of its processes."""
        for service in list(self._processes):
            self.kill(service)

    def _configure(self) -> None:
        etc = self.root / "etc"
        for path in (etc, self.root / "cache", self.devices / "d1"):
            path.mkdir(parents=True, exist_ok=True)
        (etc / "swift.conf").write_text(
            f"[swift-hash]\nswift_hash_path_suffix = {_HASH_SUFFIX}\nswift_hash_path_prefix = {_HASH_PREFIX}\n"
        )
        for service in _SERVICES[:3]:
            builder = etc / f"{service}.builder"
            device = f"r1z1-127.0.0.1:{self._ports[service]}/d1"
            for arguments in (["create", str(_PART_POWER), "1", "1"], ["add", device, "1"], ["rebalance"]):
                subprocess.run([_BIN / "swift-ring-builder", builder, *arguments], check=True, capture_output=True)
        user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
        for service, port in self._ports.items():
            text = _SERVER.format(root=self.root, devices=self.devices, port=port, user=user)
            if service == "proxy":
                text += _PROXY + "".join(f"\n[filter:{name}]\nuse = egg:swift#{name}\n" for name in _FILTERS)
            else:
                text += _BACKEND.format(service=service, root=self.root)
            (self.root / f"{service}.conf").write_text(text)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
