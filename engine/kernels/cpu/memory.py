"""How this process's memory behaves under a model on the CPU: buffers are kept for reuse, weights lie in huge pages.

Measured 2026-11 on two cores (AVX-512, 120 M parameters): kept buffers take 10 % off a prefill step, whose activations
are otherwise mapped, zeroed and unmapped operator by operator (150,000 page faults in a run of 66 steps, then 17,000);
huge pages take 10-15 % off a decode step in float32, which reads all weights once.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

# <malloc.h> and <linux/mman.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # Linux 6.1

_KEPT_BYTES = (1 << 31) - 1
_LARGE_BYTES = 4 << 20


def keep_freed_buffers() -> bool:
    """Tell the allocator to keep what is freed for the next operator; this process only. False: not with this libc.

    Threads that begin later share one arena: an arena of their own would give every large buffer back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)


def use_huge_pages() -> int:
    """Move the large private memory that this process holds now (its weights) to huge pages.

    Takes about 1 s per GB, the kernel's copying. Content and addresses stay.

    Returns:
        Bytes that the kernel was asked for and granted; 0 where it knows no huge pages.
    """
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    granted = 0
    for begin, end in list(_large_mappings()):
        if madvise(begin, end - begin, _MADV_HUGEPAGE) == 0 and madvise(begin, end - begin, _MADV_COLLAPSE) == 0:
            granted += end - begin
    return granted


def _large_mappings() -> Iterator[tuple[int, int]]:
    """Yield the addresses `[begin, end)` of large mappings that are private, writable and anonymous."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()  # begin-end, permissions, offset, device, inode, name
        is_anonymous = len(fields) == 5 or fields[5] == "[heap]"
        begin, end = (int(address, 16) for address in fields[0].split("-"))
        if fields[1] == "rw-p" and is_anonymous and end - begin >= _LARGE_BYTES:
            yield begin, end
