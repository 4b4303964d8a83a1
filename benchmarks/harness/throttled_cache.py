"""A node cache as a process of its own, whose disk gives so many bytes a second and no more: for benchmarks.

    python benchmarks/harness/throttled_cache.py < job.json

One JSON line comes in: {"options": nodecache.process.CacheOptions, "secret": 64 hexadecimal digits,
"bytes_per_s": ...}. Out comes one line with its WorkerInfo. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from nodecache.disk.files import Files
from nodecache.disk.layout import Model
from nodecache.disk.store import DiskStore
from nodecache.process import CacheOptions, CacheProcess
from transport.checksum import checksum
from transport.secret import ClusterSecret


class ThrottledFiles(Files):
    """Files whose reads, of all threads together, take as long as a slower disk would."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0  #: when the disk has nothing more to do

    def read(self, fd: int, target: memoryview, offset: int) -> int:
        """As `Files.read`, and then wait for one's turn."""
        came = super().read(fd, target, offset)
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic()) + came / self._bytes_per_s
            wait_s = self._free_s - time.monotonic()
        time.sleep(max(0.0, wait_s))
        return came


async def main() -> None:
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    options = msgspec.convert(job["options"], CacheOptions)
    layout, settings = options.layout, options.settings
    model = Model(layout.fingerprint, layout.version, layout.block_bytes)
    files = ThrottledFiles(job["bytes_per_s"])
    assert settings.disk_dir is not None
    store = DiskStore(Path(settings.disk_dir), model, settings.disk_capacity_bytes, checksum, files=files)
    process = CacheProcess(options, ClusterSecret.from_hex(job["secret"]), layout.allocate(), {"disk": store})
    sys.stdout.write(json.dumps(msgspec.to_builtins(await process.start())) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await process.close()


if __name__ == "__main__":
    asyncio.run(main())
