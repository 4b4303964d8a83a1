"""Prints what kvray stands on, with that of the extras named, a line each: for a layer of an image of its own.

python tools/requirements.py [EXTRA ...]
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str], pyproject: Path) -> list[str]:
    """Return the requirements of the project that `pyproject` describes, and of `extras`.

    Raises:
        KeyError: there is no such extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(sys.argv[1:], Path("pyproject.toml"))) + "\n")
