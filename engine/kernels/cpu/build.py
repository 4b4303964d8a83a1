"""Compiles for this machine, once, by an explicit command: `python -m engine.kernels.cpu.build`.

The kernels (see `engine.kernels.cpu.native`) and the checksum (`transport.checksum`), which lie in a cache afterwards
(`transport.compiled`). Nothing else ever starts a compiler, but the building of a wheel (`hatch_build.py`).
"""

from __future__ import annotations

import argparse
import sys
import time

from engine.kernels.cpu.library import KERNELS
from engine.kernels.cpu.native import import_library
from transport.checksum import CompiledChecksum
from transport.checksum_library import CHECKSUM
from transport.compiled import BuildError


def main() -> int:
    """Run the command: build, and print where the libraries lie. The exit code is 1 where one could not be built."""
    parser = argparse.ArgumentParser(prog="python -m engine.kernels.cpu.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="build again though the cache holds it")
    is_forced = parser.parse_args().force
    begin_s = time.monotonic()
    try:
        if is_forced:
            CHECKSUM.path().unlink(missing_ok=True)
        path = CHECKSUM.build()
        name = CompiledChecksum(path).name
    except (BuildError, OSError) as error:
        sys.stderr.write(f"checksum not built, numpy will be used: {error}\n")
        return 1
    sys.stdout.write(f"checksum ready in {time.monotonic() - begin_s:.1f} s ({name}): {path}\n")
    begin_s = time.monotonic()
    try:
        if is_forced:
            KERNELS.path().unlink(missing_ok=True)
        path = KERNELS.build()
        module = import_library(path)
    except (BuildError, OSError, ImportError) as error:
        sys.stderr.write(f"kernels not built, the engine will use torch's operators: {error}\n")
        return 1
    sys.stdout.write(
        f"kernels ready in {time.monotonic() - begin_s:.1f} s ({module.vector_floats} floats a vector, "
        f"bfloat16 dot products: {'yes' if module.has_bf16_dot else 'no'}): {path}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
