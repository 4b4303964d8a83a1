"""LMCache's server and its own benchmark client, in an environment of their own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from harness.report import CACHE

VERSION = "0.5.6"
#: What of its requirements the CPU mode imports; the others want CUDA or a store's client.
_NEEDS = (
    *("torch", "transformers>=5.4", "safetensors", "huggingface_hub>=1.5.0", "numpy<=2.2.6", "numba", "nvtx"),
    *("aiofile", "aiofiles", "aiohttp", "blake3", "cachetools", "cryptography", "fastapi", "httptools", "httpx"),
    *("msgspec", "psutil", "py-cpuinfo", "pytest", "pyyaml", "pyzmq>=25.0.0", "sortedcontainers", "uvicorn"),
    *("grpcio>=1.78.0", "protobuf<7,>=6.31.1", "prometheus_client<=0.24.1,>=0.18.0", "setuptools<81.0.0,>=77.0.3"),
    *("opentelemetry-api<=1.40.0,>=1.20.0", "opentelemetry-sdk>=1.20.0", "opentelemetry-exporter-otlp>=1.20.0"),
    "opentelemetry-exporter-prometheus<=0.61b0,>=0.50b0",
)
_START_S = 90.0
_RUN_S = 300.0
#: As harness.tier_worker.LAYERS: K and V of 1,024 blocks of 16 tokens, four heads of 64, eight layers.
_SHAPE = "(2,1024,16,4,64):bfloat16:8"


class Peer(NamedTuple):
    """What its client said."""

    store_ms: float  #: p50
    retrieve_ms: float  #: p50
    num_requests: int
    num_wrong: int  #: retrievals that did not have their checksum


def lmcache_home(*, is_wanted: bool) -> Path | None:
    """Return where its commands are, installed if `is_wanted`; None where they are not."""
    home = CACHE / "peers" / f"lmcache-{VERSION}"
    done = home / "installed"
    if done.exists() or not is_wanted:
        return home / "bin" if done.exists() else None
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    pip = [home / "bin" / "python", "-m", "pip", "install", "-q"]
    for what in (_NEEDS, ("--no-deps", f"lmcache=={VERSION}")):
        if subprocess.run([*pip, *what]).returncode != 0:
            return None
    done.touch()
    return home / "bin"


class LmcacheServer:
    """A running server with 2 GB of host memory."""

    def __init__(self, home: Path, port: int, http_port: int) -> None:
        self._home = home
        self._port = port
        self._http_port = http_port
        self._num_asked = 0

    def measure(self, num_tokens: int, num_requests: int, transfer_mode: str) -> Peer:
        """Let its client store and retrieve prompts that were not there before, and compare their checksums."""
        first = self._num_asked
        self._num_asked += num_requests
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory) / "figures.json"
            command = [self._home / "lmcache", "bench", "server", "--rpc-url", f"tcp://127.0.0.1:{self._port}"]
            command += ["--url", f"http://127.0.0.1:{self._http_port}", "--mode", "cpu"]
            command += ["--transfer-mode", transfer_mode, "--num-tokens", str(num_tokens), "--interval", "0"]
            command += ["--kvcache-shape-spec", _SHAPE, "--start", str(first), "--end", str(first + num_requests)]
            command += ["--format", "json", "--output", output]
            subprocess.run(command, env=_variables(), check=True, capture_output=True, timeout=_RUN_S)
            told = json.loads(output.read_text())["metrics"]
        return Peer(
            told["cold_store"]["cold_store_p50"],
            told["warm_retrieve"]["warm_retrieve_p50"],
            told["results"]["total_requests"],
            told["results"]["checksum_fail"],
        )


@contextlib.contextmanager
def lmcache_server(home: Path) -> Iterator[LmcacheServer]:
    """Run a server until the block ends.

    Raises:
        RuntimeError: it ended, or does not answer.
    """
    port, http_port = _free_port(), _free_port()
    command = [home / "lmcache", "server", "--host", "127.0.0.1", "--port", str(port), "--http-host", "127.0.0.1"]
    command += ["--http-port", str(http_port), "--l1-size-gb", "2", "--eviction-policy", "LRU"]
    command += ["--supported-transfer-mode", "auto", "--disable-observability"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=_variables(), stdout=log, stderr=log)
        try:
            _wait(process, f"http://127.0.0.1:{http_port}/healthcheck")
            yield LmcacheServer(home, port, http_port)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _variables() -> dict[str, str]:
    return os.environ | {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false"}


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    ends_s = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        if process.poll() is not None or time.monotonic() > ends_s:
            raise RuntimeError(f"lmcache server does not answer at {url}")
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
