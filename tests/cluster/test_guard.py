"""What a served cluster shows to others: who listens where, and what is asked of whoever connects."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import stat
import time
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from tests.served import Served, serving

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

SECURITY = Path(__file__).parent.parent.parent / "docs" / "SECURITY.md"
#: What listens on all addresses, by its process's title; docs/SECURITY.md says why. It wants Ray's token.
ON_ALL_ADDRESSES = "ray::ServeReplica"
HANDLES = "/ray.serve.ASGIService/HandleRequest"
NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("guard")
    config = directory / "kvray.yaml"
    config.write_text("connections: {header_timeout_s: 1}\n")
    # As where nothing is set: empty is unset, and tests/served.py sets both.
    as_a_user_has_it = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": ""}
    with serving("--config", str(config), log_dir=directory, extra_environment=as_a_user_has_it) as process:
        yield process


def listening(served: Served) -> list[tuple[str, int, str]]:
    """Address, port and command line of whatever waits for others, in every process of the cluster."""
    found = []
    for process in [psutil.Process(served.process.pid), *served.descendants()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline()).strip()
            found += [
                (connection.laddr.ip, connection.laddr.port, title)
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
            ]
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def answer_without_token(port: int, method: str) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def test_whatever_listens_is_on_loopback_or_wants_a_token(served):
    found = listening(served)
    assert any(title.startswith("ray::ServeReplica:kvray:Ingress") for _, _, title in found)
    others = [(port, title) for address, port, title in found if not is_loopback(address)]
    assert all(title.startswith(ON_ALL_ADDRESSES) for _, title in others), others
    assert {answer_without_token(port, HANDLES) for port, _ in others} <= {"UNAUTHENTICATED"}
    assert f"`{ON_ALL_ADDRESSES}`" in SECURITY.read_text()


def test_rays_control_wants_a_token_on_loopback_too(served):
    ports = [port for _, port, title in listening(served) if "/gcs_server " in title]
    assert [answer_without_token(port, NODES) for port in ports] == ["UNAUTHENTICATED"]


def test_rays_agent_that_runs_commands_wants_a_token_too(served):
    ports = [port for _, port, title in listening(served) if title.startswith("ray::RuntimeEnvAgent")]
    assert [httpx.post(f"http://127.0.0.1:{port}/get_runtime_envs_info").status_code for port in ports] == [401]


def test_no_other_user_can_write_to_a_unix_socket_of_the_cluster(served):
    paths = set()
    for process in served.descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            paths |= {item.laddr for item in process.net_connections("unix") if item.laddr.startswith("/")}
    assert any(path.endswith("/raylet") for path in paths)
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            assert not Path(path).stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


def test_an_ingress_outlives_headers_without_bound_and_closes_who_is_slow(served):
    (ingress,) = served.replicas("Ingress")
    address = ("127.0.0.1", int(served.url.rsplit(":", 1)[1]))
    slow = [socket.create_connection(address, timeout=10) for _ in range(20)]
    for client in slow:
        client.sendall(b"GET /health HTTP/1.1\r\nx: ")
    with socket.create_connection(address, timeout=10) as endless, contextlib.suppress(ConnectionError):
        endless.sendall(b"GET /health HTTP/1.1\r\nx: ")
        for _ in range(4096):  # 16 MiB
            endless.sendall(b"y" * 4096)
    for client in slow:
        assert client.recv(12) == b"HTTP/1.1 408"
    time.sleep(1.5)  # one more health check
    assert served.replicas("Ingress") == [ingress]
    assert httpx.get(f"{served.url}/health").status_code == 200
