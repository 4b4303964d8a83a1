"""Has Ray's dashboard, in this Python's environment, show the placement page; or not any more.

Two files beside the installed packages: the finder, and a .pth file of one line that has each interpreter import it.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from messages.errors import ConfigError

#: The Ray whose private parts the page uses.
RAY_VERSION: Final = "2.60"
MODULES: Final = Path(__file__).parent / "head_modules"
_FINDER: Final = Path(__file__).parent / "finder.py"
_NAME: Final = "kvray_ray_dashboard"


class DashboardState(msgspec.Struct, frozen=True, kw_only=True):
    """What is so in this environment."""

    is_installed: bool  #: whole, and for this kvray
    files: list[str]  #: of it that are there
    folder: str  #: where they belong
    ray_version: str  #: "": there is no Ray
    fits: bool  #: it is the Ray that the page is for


def state(folder: Path | None = None) -> DashboardState:
    """Say whether the page is installed. `folder`: of the installed packages; None: of this Python."""
    folder = folder or _packages()
    wanted = _files(folder)
    try:
        ray_version = version("ray")
    except PackageNotFoundError:
        ray_version = ""
    return DashboardState(
        is_installed=all(path.is_file() and path.read_text("utf-8") == text for path, text in wanted.items()),
        files=[str(path) for path in wanted if path.exists()],
        folder=str(folder),
        ray_version=ray_version,
        fits=ray_version.split(".")[:2] == RAY_VERSION.split("."),
    )


def install(folder: Path | None = None) -> DashboardState:
    """Put the files there, over those of another kvray.

    Raises:
        ConfigError: Ray is another one than the page is for, or nothing can be written there.
    """
    found = state(folder)
    if not found.fits:
        seen = f"Ray {found.ray_version}" if found.ray_version else "no Ray"
        raise ConfigError(
            f"dashboard install: got {seen} in this environment, want {RAY_VERSION}: the page uses parts of Ray's "
            "dashboard that are another version's own; at /cache of kvray it is there with any"
        )
    for path, text in _files(Path(found.folder)).items():
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(
                f"dashboard install: {path} cannot be written: {error.strerror}; whose packages are these?"
            ) from None
    return state(folder)


def uninstall(folder: Path | None = None) -> DashboardState:
    """Take the files away.

    Raises:
        ConfigError: one cannot be.
    """
    for path in reversed(_files(folder or _packages())):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"dashboard uninstall: {path} cannot be removed: {error.strerror}") from None
    return state(folder)


def _packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _files(folder: Path) -> dict[Path, str]:
    """Return what is to be in which file, the one that has the other imported last."""
    line = f"import {_NAME}; {_NAME}.install({str(MODULES)!r}, {RAY_VERSION!r})\n"
    return {folder / f"{_NAME}.py": _FINDER.read_text("utf-8"), folder / f"{_NAME}.pth": line}
