"""Compiles the block index for this machine, once, by an explicit command: `python -m kvrouter.build`."""

from __future__ import annotations

import sys

from kvrouter.index_library import INDEX
from transport.compiled import BuildError


def main() -> int:
    """Run the command: build, and print where the library lies. The exit code is 1 where it could not be built."""
    try:
        path = INDEX.build()
    except BuildError as error:
        sys.stderr.write(f"block index not built, Python will be used: {error}\n")
        return 1
    sys.stdout.write(f"block index ready: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
