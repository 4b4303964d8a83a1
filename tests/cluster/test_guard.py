"""What a served cluster shows to others: who listens where, and what is asked of whoever connects."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import psutil
import pytest

from tests.served import Served, run_kvray, serving
from transport.secret import ClusterSecret

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

SECURITY = Path(__file__).parent.parent.parent / "docs" / "SECURITY.md"
#: What listens on all addresses, by its process's title; docs/SECURITY.md says why. It wants Ray's token.
ON_ALL_ADDRESSES = "ray::ServeReplica"
HANDLES = "/ray.serve.ASGIService/HandleRequest"
NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
SECRET = ClusterSecret.generate()
API_KEY = f"key-{secrets.token_hex(16)}"
#: Run beside the cluster: which of the words on its standard input Ray and Serve give out about the application.
ASK_RAY = """
import sys, ray
from ray import serve
words = sys.stdin.read().split()
ray.init(address=sys.argv[1], log_to_driver=False)
controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
deployments = ray.get(controller.list_deployments_internal.remote())
configs = [info.replica_config for info, _ in deployments.values()]
arguments = b"".join(config.serialized_init_args + config.serialized_deployment_def for config in configs)
assert b"KvrayConfig" in arguments
shown = [ray.get(controller.get_serve_instance_details.remote()), serve.status(), ray._private.state.jobs()]
told = arguments + repr([*shown, ray._private.state.actors()]).encode()
print([word for word in words if word.encode() in told])
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("guard")
    config = directory / "kvray.yaml"
    config.write_text("connections: {header_timeout_s: 1}\n")
    # As where nothing is set: empty is unset, and tests/served.py sets both.
    environment = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", "KVRAY_SECRET": SECRET.hex(), "KVRAY_API_KEY": API_KEY}
    with serving("--config", str(config), log_dir=directory, extra_environment=environment) as process:
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


def test_the_secret_and_the_key_are_in_use(served):
    assert httpx.get(f"{served.url}/status").status_code == 401
    answer = httpx.get(f"{served.url}/status", headers={"Authorization": f"Bearer {API_KEY}"})
    assert [worker["address"][: len("tcp://12345678@")] for worker in answer.json()["workers"]] == [
        f"tcp://{SECRET.key_id}@"
    ] * 2


def test_the_status_command_takes_its_key_from_the_environment_or_a_file(served, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{API_KEY}\n")
    file.chmod(0o600)
    of_file, _ = run_kvray("status", "--url", served.url, "--api-key-file", str(file))
    of_environment, _ = run_kvray("status", "--url", served.url, extra_environment={"KVRAY_API_KEY": API_KEY})
    assert (of_file.returncode, of_environment.returncode) == (0, 0)
    without, _ = run_kvray("status", "--url", served.url)
    assert without.returncode == 2
    assert "HTTP 401: wanted the right API key (--api-key-file, KVRAY_API_KEY)" in without.stderr


def test_no_credential_is_in_a_command_line_an_environment_or_a_file_of_ray(served):
    words = [SECRET.hex().encode(), API_KEY.encode()]
    command = psutil.Process(served.process.pid)
    for process in [command, *served.descendants()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen = " ".join(process.cmdline())
            if process != command:  # there the operator has put it
                seen += repr(process.environ())
            assert not any(word in seen.encode() for word in words), process
    assert not any(word in served.log.read_bytes() for word in words)
    directory = Path(command.environ()["RAY_TMPDIR"])
    paths = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("serve" in path.parts for path in paths)
    for path in paths:
        assert not any(word in path.read_bytes() for word in words), path


def test_ray_and_serve_give_out_no_credential(served):
    (raylet,) = [process for process in served.descendants() if process.name() == "raylet"]
    (address,) = [word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--gcs-address=")]
    finished = subprocess.run(
        [sys.executable, "-c", ASK_RAY, address],
        input=f"{SECRET.hex()} {API_KEY}",
        env=raylet.environ() | {"RAY_TMPDIR": served.log.parent.as_posix()},
        cwd=SECURITY.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (finished.stdout, finished.returncode) == ("[]\n", 0), finished.stderr


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
