"""What a person sees in the terminal of a real `kvray serve`, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.cluster.starting import ROOT, Starting, wait_until
from tests.models import make_tiny_model
from tests.served import free_port, kvray_command, own_environment, run_kvray

pytestmark = [pytest.mark.timeout(300), pytest.mark.alone]

#: Imported by every Python that starts: a worker's engine cannot be built, after a library has warned.
BREAK = """
import importlib.util, sys, warnings
class Break:
    def find_spec(self, name, path=None, target=None):
        if name != "engine.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.Engine.build = build
        spec.loader.exec_module = exec_module
        return spec
def build(*_, **__):
    warnings.warn("a library warns")
    raise RuntimeError("no engine today")
sys.meta_path.insert(0, Break())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def sessions(environment: dict[str, str]) -> list[Path]:
    return sorted(path for path in Path(environment["RAY_TMPDIR"]).glob("ray/session_2*"))


def kvray(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        kvray_command(*arguments), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.long
def test_a_worker_that_cannot_start_shows_its_warning_and_its_traceback_a_line_each_with_its_name(model, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BREAK)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    finished, left = run_kvray("serve", str(model), "--port", str(free_port()), extra_environment=environment)
    assert (finished.returncode, finished.stdout, left) == (1, "", [])
    lines = [
        line.split(" | ", 1) for line in finished.stderr.splitlines() if re.match(r"(decode|prefill)-\w+ \| ", line)
    ]
    name = lines[0][0]
    said = [line for process, line in lines if process == name]
    assert any(re.search(r"info    engine\.worker: loading llama", line) for line in said)
    assert any("UserWarning: a library warns" in line for line in said)
    begin = said.index("Traceback (most recent call last):")
    assert said[begin - 1].endswith(f"error   cluster.replica: {name} cannot start")
    assert said[said.index("RuntimeError: no engine today", begin) - 1] == '    raise RuntimeError("no engine today")'
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("kvray: Ray Serve could not start the application: RuntimeError: no engine today; what its")
    assert last.endswith("/logs/kvray")


def test_a_server_tells_of_itself_is_found_and_cleans_what_a_killed_one_left(model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    keys.chmod(0o600)
    with own_environment() as environment:
        # An empty cache holds no kernels. Ray's files stay where own_environment looks for them.
        environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "KVRAY_API_KEY_FILE": str(keys)}
        first = Starting(model, tmp_path, environment)
        try:
            first.wait_for("Ctrl-C ends everything")
            [former] = sessions(environment)
            first.process.kill()
            first.process.wait(5)
            wait_until(lambda: not psutil.pid_exists(first.process.pid), 5)
            (tmp_path / "second").mkdir()
            port = free_port()
            second = Starting(model, tmp_path / "second", environment | {"KVRAY_LOG_LEVEL": "debug"}, port)
            second.wait_for("Ctrl-C ends everything")
            text = second.log.read_text()
            [session] = sessions(environment)
            assert f"cleaned what a former kvray left in {former}" in text
            assert f"logs: {session}/logs/kvray\n" in text
            assert re.search(r"^(decode|prefill)-\w+ \| .* warning .*kernels not built", text, re.MULTILINE)
            assert re.search(r"^  kernels: SLOW ones, cpu/.*, about half", text, re.MULTILINE)
            for words in ("model: float32, context of 1,024 tokens", "KV tokens: ", "tiers: none", "/docs", "/metrics"):
                assert words in text
            assert re.search(r"^\S+ \| .* debug ", text, re.MULTILINE)  # of another process than the command line

            shown = kvray("status", "--json", environment=environment | {"KVRAY_API_KEY_FILE": ""})
            assert [worker["role"] for worker in json.loads(shown.stdout)["workers"]] == ["decode", "prefill"]
            headers = {"Authorization": "Bearer a-key", "X-Request-Id": "mine"}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers=headers)
            with urllib.request.urlopen(request, timeout=10):
                pass
            line = r'^ingress-\w+ \| .* cluster\.access: 127\.0\.0\.1:\d+ "GET /v1/models HTTP/1\.1" 200 .* ms mine$'
            wait_until(lambda: re.search(line, second.log.read_text(), re.MULTILINE) is not None, 10)
            second.process.send_signal(signal.SIGTERM)
            assert second.process.wait(20) == 0
            assert sessions(environment) == []
        finally:
            first.clean()


@pytest.mark.long
def test_json_is_json_in_every_line_and_an_access_log_that_is_off_is_silent(model, tmp_path):
    with own_environment() as environment:
        port = free_port()
        environment |= {"KVRAY_LOG_FORMAT": "json", "KVRAY_ACCESS_LOG": "false"}
        served = Starting(model, tmp_path, environment, port)
        try:
            served.wait_for("Ctrl-C ends everything")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10):
                pass
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(20) == 0
        finally:
            served.clean()
        lines = served.log.read_text().splitlines()
        said = [json.loads(line) for line in lines if not line.startswith(("kvray serves", "  "))]
        assert {one.get("worker", "").partition("-")[0] for one in said} >= {"", "decode", "prefill", "ingress"}
        assert not [one for one in said if one.get("logger") == "cluster.access"]
