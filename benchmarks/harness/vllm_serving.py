"""`vllm serve` for CPU as its users start it, for as long as a block lasts, in the peers' environment."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from harness.serving import free_port

_START_TIMEOUT_S = 600.0  #: it compiles at first
_STOP_TIMEOUT_S = 30.0


@contextlib.contextmanager
def vllm_serving(python: Path, model_dir: str, dtype: str, kv_cache_bytes: int) -> Iterator[str]:
    """Serve with its defaults and so much KV memory; the answer is its URL. `python`: of vLLM's environment.

    Raises:
        RuntimeError: it ended, or did not get ready; with what it printed.
    """
    port = free_port()
    directory = Path(tempfile.mkdtemp(prefix="kvray-vllm-"))
    log = directory / "serve.log"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    command = [
        # what `vllm serve` runs; the command itself looks for a package by another name than the CPU build has
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model_dir),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", "bench", "--dtype", dtype, "--kv-cache-memory-bytes", str(kv_cache_bytes)),
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        ends_s = time.monotonic() + _START_TIMEOUT_S
        while not _is_answering(url):
            if process.poll() is not None or time.monotonic() > ends_s:
                raise RuntimeError(f"vllm serve is not ready: {log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def _is_answering(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
