"""What hatchling calls when it builds a wheel: compiles kernels, checksum and block index for each baseline.

Where there is no C++ compiler the wheel is one for any machine, without them: kvray serves, slowly, and says so.
"""

from __future__ import annotations

import platform
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PYTHON_TAG = "cp311-abi3"  #: as in engine/kernels/cpu/arguments.h


class KernelsHook(BuildHookInterface):
    """Puts compiled libraries into a wheel. An editable install has none: `make kernels` compiles for its machine."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name what is to be in the wheel."""
        if version == "editable":
            return
        sys.path.insert(0, self.root)
        from engine.kernels.cpu.library import KERNELS
        from kvrouter.index_library import INDEX
        from transport.checksum_library import CHECKSUM
        from transport.compiled import BASELINES, BuildError

        self._work = tempfile.TemporaryDirectory()
        for baseline, (_, flags) in BASELINES.get(platform.machine(), {}).items():
            for library in (KERNELS, CHECKSUM, INDEX):
                directory = Path(self._work.name) / baseline / library.name
                directory.mkdir(parents=True)
                self.app.display_info(f"compiling {library.name} for {baseline}")
                try:
                    path = library.compile(directory, flags)
                except BuildError as error:
                    self.app.display_warning(f"this wheel has no {library.name} for {baseline}: {error}")
                    continue
                inside = library.prebuilt(baseline).relative_to(self.root)
                build_data["force_include"][str(path)] = str(inside)
        if build_data["force_include"]:
            where = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"{PYTHON_TAG}-{where}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Forget what was compiled: the wheel has it."""
        if version != "editable":
            self._work.cleanup()
