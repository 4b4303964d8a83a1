"""A Ray cluster that is there: joined, outlived, or refused in one line that says what to set."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.joining import cluster_to_join
from messages.errors import ConfigError
from tests.cluster.starting import Starting, started_ray, wait_until
from tests.models import make_tiny_model
from tests.served import free_port, run_kvray, using
from transport.secret import ClusterSecret

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

STOPPED_WITHIN_S = 10.0
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def http_status(url: str) -> int | None:
    """None: nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture
def credentials():
    """What the environment of the node has of ours."""
    return {"KVRAY_SECRET": ClusterSecret.generate().hex()}


@pytest.fixture
def ray_head(credentials):
    with started_ray(credentials) as environment:
        yield environment


@pytest.mark.alone
def test_a_cluster_that_is_there_is_joined_and_outlives_the_application(tiny_model, tmp_path, ray_head):
    members = {process.pid for process in using(ray_head["RAY_TMPDIR"])}
    port = free_port()
    # Empty is unset: as the user's shell has it, where the file alone tells of the token.
    starting = Starting(tiny_model, tmp_path, ray_head | {"RAY_AUTH_MODE": ""}, port)
    try:
        starting.wait_for("Ctrl-C ends everything")
        assert "on the Ray cluster that was there" in starting.log.read_text()
        assert "runs workers at niceness 15" in starting.log.read_text()
        starting.wait_for(": loading llama", 20)
        assert re.search(r"^decode-\w+ \| .* engine\.worker: loading llama", starting.log.read_text(), re.MULTILINE)
        assert http_status(f"http://127.0.0.1:{port}/ready") == 200

        finished, _ = run_kvray("serve", str(tiny_model), "--port", str(port), extra_environment=ray_head)
        assert finished.returncode == 2
        assert finished.stderr.splitlines()[-1] == (
            "kvray: the Ray cluster has an application kvray already: end that one first"
        )
        assert http_status(f"http://127.0.0.1:{port}/ready") == 200

        began_s = time.monotonic()
        starting.process.send_signal(signal.SIGINT)
        assert starting.process.wait(STOPPED_WITHIN_S + 5) == 0
        assert time.monotonic() - began_s < STOPPED_WITHIN_S
        wait_until(lambda: http_status(f"http://127.0.0.1:{port}/ready") in (404, None), 15)
        alive = {process.pid for process in using(ray_head["RAY_TMPDIR"])}
        assert members <= alive
    finally:
        if starting.process.poll() is None:
            starting.process.kill()


@pytest.mark.alone
def test_a_cluster_that_wants_another_token_is_one_line_that_says_what_to_set(tiny_model, tmp_path, ray_head):
    address = (Path(ray_head["RAY_TMPDIR"]) / "ray" / "ray_current_cluster").read_text()
    environment = ray_head | {"RAY_AUTH_MODE": ""}
    complaints = {
        f"the Ray cluster at {address} wants a token: RAY_AUTH_MODE=disabled forbids one": {
            "RAY_AUTH_MODE": "disabled"
        },
        f"the Ray cluster at {address} wants a token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH": {
            "HOME": str(tmp_path)
        },
        f"the Ray cluster at {address} wants another token than the one in RAY_AUTH_TOKEN": {
            "RAY_AUTH_TOKEN": "5ecre7"
        },
        "RAY_AUTH_TOKEN_PATH: /no/token cannot be read": {"RAY_AUTH_TOKEN_PATH": "/no/token"},
    }
    for complaint, changes in complaints.items():
        finished, _ = run_kvray("serve", str(tiny_model), extra_environment=environment | changes)
        assert finished.returncode == 2
        (line,) = finished.stderr.splitlines()
        assert line.startswith(f"kvray: {complaint}")
        assert "5ecre7" not in line


@pytest.mark.alone
@pytest.mark.parametrize("credentials", [{}])
def test_a_node_without_credentials_is_one_line_that_names_it_and_what_to_set(tiny_model, ray_head):
    """The command line has them in its own environment; nothing carries them to where they are not."""
    arguments = ("serve", str(tiny_model), "--prefill", "0", "--port", str(free_port()))
    secret = ClusterSecret.generate().hex()
    finished, _ = run_kvray(*arguments, extra_environment=ray_head | {"RAY_AUTH_MODE": "", "KVRAY_SECRET": secret})
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith(
        f"kvray: no cluster secret on node {os.uname().nodename}: set KVRAY_SECRET or KVRAY_SECRET_FILE"
    )
    assert secret not in finished.stderr

    file = Path(ray_head["HOME"]) / "secret"
    file.write_text(secret)
    file.chmod(0o600)
    config = Path(ray_head["HOME"]) / "kvray.yaml"
    config.write_text(f"network: {{secret_file: {file}}}")
    keyed = ray_head | {"RAY_AUTH_MODE": "", "KVRAY_API_KEY": "5417041"}
    finished, _ = run_kvray(*arguments, "--config", str(config), extra_environment=keyed)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith(
        f"kvray: no API key on node {os.uname().nodename}, and http.requires_api_key is set: set KVRAY_API_KEY"
    )


@pytest.mark.alone
def test_serves_own_config_file_runs_the_same_application(tiny_model, tmp_path, ray_head):
    port = free_port()
    document = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "kvray",
                "route_prefix": "/",
                "import_path": "cluster.app:build",
                "args": {
                    "model": {"path": str(tiny_model), "served_names": ["tiny"]},
                    "pools": {"prefill": 0, "decode": 1},
                    "network": {"host": "127.0.0.1"},
                },
            }
        ],
    }
    ServeDeploySchema.model_validate(document)
    address = (Path(ray_head["RAY_TMPDIR"]) / "ray" / "ray_current_cluster").read_text()
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.serve.scripts", "run", "--blocking", str(path)],
        env=ray_head | {"RAY_ADDRESS": address},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: http_status(f"http://127.0.0.1:{port}/ready") == 200, 120)
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 3, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
    finally:
        process.kill()
        process.wait(10)


def test_a_recorded_cluster_that_crashed_is_not_joined(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    record = tmp_path / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    record.write_text(f"127.0.0.1:{free_port()}")
    assert cluster_to_join() is None


def test_a_recorded_cluster_that_answers_is_joined_unless_a_local_one_is_wanted(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        record = tmp_path / "ray" / "ray_current_cluster"
        record.parent.mkdir()
        record.write_text(address)
        assert cluster_to_join() == address
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert cluster_to_join() is None
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
        with pytest.raises(ConfigError, match="wanted host:port of a Ray head"):
            cluster_to_join()
