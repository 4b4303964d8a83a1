"""A Ray head with its dashboard, in a Python environment beside the one of these tests, which has the page."""

from __future__ import annotations

import contextlib
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

from tests.served import free_port, own_environment, using

ROOT = Path(__file__).parents[3]


def environment_beside(folder: Path) -> Path:
    """Make a Python environment in `folder` that has all packages of this one; return its interpreter."""
    venv.create(folder, symlinks=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    # Behind ours in the alphabet, and so run after them.
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (packages / "beside.pth").write_text(line)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run kvray's command line in that environment."""
    return subprocess.run(
        [python, "-m", "cluster.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
        **options,
    )


class RayHead:
    """A head that runs."""

    def __init__(self, variables: dict[str, str], address: str, port: int, process: subprocess.Popen[bytes]) -> None:
        self.variables = variables
        self.address = address
        self.url = f"http://127.0.0.1:{port}"
        self.process = process

    def get(self, path: str, *, with_token: bool = True, timeout_s: float = 20.0) -> tuple[int, str]:
        """Status and body of a GET; no redirect is followed."""
        headers = {"Authorization": f"Bearer {self.variables['RAY_AUTH_TOKEN']}"} if with_token else {}
        request = urllib.request.Request(f"{self.url}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_until_up(self, timeout_s: float = 60.0) -> None:
        """Until the dashboard answers."""
        ends_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                if self.get("/api/version")[0] == 200:
                    return
            assert self.process.poll() is None, "ray start --head ended"
            assert time.monotonic() < ends_s, "the dashboard does not answer"
            time.sleep(0.2)


@contextlib.contextmanager
def ray_head(python: Path, num_cpus: int = 2, extra_environment: dict[str, str] | None = None) -> Iterator[RayHead]:
    """`ray start --head` with a dashboard; all that it started is ended with the block."""
    with own_environment() as variables:
        port, head_port = free_port(), free_port()
        variables |= {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": f"127.0.0.1:{head_port}"}
        variables |= extra_environment or {}
        process = subprocess.Popen(
            [
                *(python, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--node-ip-address", "127.0.0.1", "--port", str(head_port)),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(port), "--include-dashboard", "true"),
                *("--num-cpus", str(num_cpus), "--object-store-memory", "100000000"),
                *("--temp-dir", variables["RAY_TMPDIR"], "--disable-usage-stats"),
            ],
            env={key: value for key, value in variables.items() if key != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        try:
            head = RayHead(variables, f"127.0.0.1:{head_port}", port, process)
            head.wait_until_up()
            yield head
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            for left in using(variables["RAY_TMPDIR"]):
                with contextlib.suppress(Exception):
                    left.kill()


def dashboard_log(head: RayHead) -> str:
    """What the dashboard logged."""
    return "".join(path.read_text() for path in Path(head.variables["RAY_TMPDIR"]).glob("**/dashboard.log"))
