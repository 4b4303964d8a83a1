"""The image: linted, of the constraints, and, where buildah and debootstrap are, built and run as KubeRay runs it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.requirements import requirements

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEBIAN = "g++ python3-dev python3-venv"


def test_the_linter_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not here")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_both_targets_are_there_and_run_as_no_root():
    targets = DOCKERFILE.split("\nFROM ")
    for target in ("cpu", "cuda"):
        (text,) = [part for part in targets if part.startswith(f"run AS {target}\n")]
        assert "USER 1000:1000" in text


def test_requirements_are_the_projects_and_those_of_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert requirements([], ROOT / "pyproject.toml") == project["dependencies"]
    assert [line for line in requirements(["ucx-cu12"], ROOT / "pyproject.toml") if line.startswith("ucxx")]
    with pytest.raises(KeyError):
        requirements(["ucx"], ROOT / "pyproject.toml")


@pytest.fixture(scope="module")
def image() -> Iterator[tuple[list[str], str]]:
    """The cpu target on a Debian of its own, as no registry is asked; how buildah is called, and the image's name."""
    if not (shutil.which("buildah") and shutil.which("debootstrap")):
        pytest.skip("buildah and debootstrap are not here")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        packages = "--include=python3,python3-venv,bash,wget,ca-certificates"
        run("debootstrap", "--variant=minbase", packages, "bookworm", str(root))
        buildah = [
            "buildah",
            "--storage-driver",
            "vfs",
            "--root",
            f"{directory}/store",
            "--runroot",
            f"{directory}/run",
        ]
        container = run(*buildah, "from", "scratch").strip()
        run("cp", "-a", f"{root}/.", run(*buildah, "mount", container).strip())
        run(*buildah, "commit", "--quiet", "--rm", container, "localhost/base:12")
        arguments = ["--build-arg", "BASE=localhost/base:12", "--build-arg", f"BUILD_PACKAGES={DEBIAN}"]
        arguments += ["--build-arg", "TORCH_INDEX=", *configuration_of_pip()]
        run(*buildah, "bud", "--isolation", "chroot", "--network", "host", "--format", "docker", "--target", "cpu",
            *arguments, "--tag", "localhost/kvray:test", str(ROOT))  # fmt: skip
        yield buildah, "localhost/kvray:test"
        run(*buildah, "rm", "--all")
        run(*buildah, "rmi", "--all", "--force")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def configuration_of_pip() -> list[str]:
    """Let pip find in there what it finds here: its configuration, and the directories that this names."""
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    debugged = run(sys.executable, "-m", "pip", "config", "debug").splitlines()
    files = [line.partition(",")[0].strip() for line in debugged if line.endswith("exists: True")]
    arguments = []
    for word in {*shown.replace("'", " ").replace("file://", " ").split(), *files}:
        with contextlib.suppress(OSError):
            if word.startswith("/") and Path(word).exists():
                place = word.removesuffix("/simple")
                arguments += ["--volume", f"{place}:{place}:ro"]
    for line in shown.splitlines():
        if line.startswith(":env:."):
            name, _, value = line.removeprefix(":env:.").partition("=")
            arguments += ["--env", f"PIP_{name.upper().replace('-', '_')}={value.strip(chr(39))}"]
    return arguments


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_it_builds_and_what_kuberay_needs_runs_in_it(image):
    buildah, name = image
    container = run(*buildah, "from", name).strip()

    def inside(script: str, *shell: str) -> str:
        return run(*buildah, "run", "--isolation", "chroot", "--user", "1000:1000", container, *shell, script)

    assert inside("id -u", "bash", "-c").strip() == "1000"
    # KubeRay's probes, and what it starts: with a login shell or without.
    for shell in (("bash", "-c"), ("bash", "-lc")):
        found = inside("command -v wget ray kvray python", *shell).split()
        assert found[1:] == ["/opt/kvray/bin/ray", "/opt/kvray/bin/kvray", "/opt/kvray/bin/python"]
    imported = inside(
        "import cluster.app, ray, ray.autoscaler._private.kuberay.run_autoscaler; print(ray.__version__)",
        "python",
        "-c",
    )
    assert f"ray=={imported.split()[-1]}\n" in (ROOT / "constraints.txt").read_text()
    kernels = inside(
        "from engine.kernels.cpu.library import KERNELS; from kvrouter.index_library import INDEX;"
        "from transport.checksum_library import CHECKSUM; print(*(x.found() for x in (KERNELS, INDEX, CHECKSUM)))",
        "python",
        "-c",
    )
    assert kernels.count("transport/prebuilt/") == 3
    answered = inside("cd && kvray demo", "bash", "-c")
    assert "prompt" in answered
