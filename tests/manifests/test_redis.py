"""Redis takes two passwords while one follows another, and nobody without."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest

from tests.manifests.kustomizations import built
from tests.served import free_port

pytestmark = pytest.mark.slow

STARTED_S = 10.0


@pytest.fixture(scope="module")
def container():
    (service,) = [document for document in built("base") if document["kind"] == "StatefulSet"]
    return service["spec"]["template"]["spec"]["containers"][0]


@pytest.fixture(params=["", "previous"])
def redis(container, request, tmp_path):
    """The container's command, run here, with and without an old password; its port."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not here")
    port = free_port()
    *shell, script = container["command"]
    script = script.replace("/data", str(tmp_path)).replace("yes <<", f"yes --port {port} --bind 127.0.0.1 <<")
    variables = {**os.environ, "PASSWORD": "current", "OLD_PASSWORD": request.param}
    process = subprocess.Popen([*shell, script], env=variables, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        ends_s = time.monotonic() + STARTED_S
        while not ping(port, "current") and time.monotonic() < ends_s:
            time.sleep(0.05)
        yield port, request.param
    finally:
        process.terminate()  # as Kubernetes ends it: the shell has become Redis, which takes the signal
        assert process.wait(10) == 0


def ping(port: int, password: str) -> bool:
    variables = {**os.environ, "REDISCLI_AUTH": password}
    if not password:
        del variables["REDISCLI_AUTH"]
    command = ["redis-cli", "-p", str(port), "ping"]
    return "PONG" in subprocess.run(command, env=variables, capture_output=True, text=True, check=False).stdout


def test_it_takes_the_password_and_the_one_before_it(redis):
    port, old = redis
    assert ping(port, "current")
    assert ping(port, "previous") is (old == "previous")
    assert not ping(port, "another")
    assert not ping(port, "")


def test_it_answers_the_probe_of_its_pod(redis, container):
    port, _ = redis
    *shell, script = container["readinessProbe"]["exec"]["command"]
    script = script.replace("redis-cli", f"redis-cli -p {port}")
    for password, code in (("current", 0), ("another", 1)):
        variables = {**os.environ, "REDISCLI_AUTH": password}
        assert subprocess.run([*shell, script], env=variables, capture_output=True, check=False).returncode == code
