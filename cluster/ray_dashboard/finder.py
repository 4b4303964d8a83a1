"""Puts a folder of kvray's among those where Ray's dashboard looks for its modules.

`kvray dashboard install` copies this file beside the installed packages, where a .pth file has each interpreter import
it: it imports nothing but the standard library, and whatever is wrong leaves everything as it would be without it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_PACKAGE = "ray.dashboard.modules"


class _Finder:
    """Finds Ray's package of dashboard modules as it is, and adds the folder where Ray is the one that is meant."""

    def __init__(self, folder: str, ray_version: str) -> None:
        self._folder = folder
        self._ray_version = ray_version

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the package's spec; None for all other names."""
        if name != _PACKAGE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        version = str(getattr(sys.modules.get("ray"), "__version__", ""))
        is_ours = version.split(".")[:2] == self._ray_version.split(".")
        if spec is not None and spec.submodule_search_locations is not None and is_ours and Path(self._folder).is_dir():
            spec.submodule_search_locations.append(self._folder)
        return spec


def install(folder: str, ray_version: str) -> None:
    """Have Ray's dashboard find the modules in `folder`, where it is of this version, as 2.60."""
    sys.meta_path.insert(0, _Finder(folder, ray_version))
