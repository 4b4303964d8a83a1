"""The checksum of a block, alone or in one pass with a copy: against accidents, not against attackers.

All there is of it: here in numpy, in `checksum.cpp`, which serves where it was compiled, and in
`engine/memory/device_checksum.py` for accelerators. The same bits everywhere; they are part of the layout version
(`engine.memory.kv_pool.LAYOUT_VERSION`). Definition; all arithmetic is modulo 2^64, words are 8 bytes, little-endian:

    mix(x)      the finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014):
                x ^= x >> 30; x *= 0xbf58476d1ce4e5b9; x ^= x >> 27; x *= 0x94d049bb133111eb; x ^= x >> 31
    key(n)      mix((n + 1) * 0x9e3779b97f4a7c15): the numbers that SplitMix64 gives from the seed 0

    [line 0: lanes 0..7][line 1] ... [line 63] [line 64] ...        lines of 64 bytes, 8 words; zeros fill up the last
    ^ leaf 0: 64 lines, 512 words              ^ leaf 1 ...         the last leaf may have fewer lines

1. Word number n of a leaf, w, counts (2^32 + a) * (2^32 + b), where a and b are the lower and upper 32 bits of
   w ^ key(n). In each leaf, each lane sums up its words (n % 8 is the lane).
2. Each lane's total is the sum over all leaves l of mix(sum ^ key(512 + l)).
3. The checksum is h after: h = key(length in bytes); for lane 0 to 7: h = mix(h ^ total of the lane).

Whatever changes in one half of one word is found for certain, as both factors are at least 2^32 and below 2^33, and all
that follows is one to one in each lane. Other damage is missed with about 2^-64, but that of a few bits in just two
words of one lane in one leaf with about 2^-33 (products of this kind: Black and others, UMAC, 1999); where the two are
equal and the same bit of both flips it is found, as the keys of a lane differ in both halves. No step waits for the one
before it until the last 8, which is what an accelerator wants.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from transport.checksum_library import CHECKSUM
from transport.protocol import Copies, Copy, CopyWatch

_log = logging.getLogger(__name__)

LINE_BYTES = 64
LEAF_BYTES = 4096
NUM_LANES = 8
LEAF_LINES = LEAF_BYTES // LINE_BYTES
LEAF_WORDS = LEAF_BYTES // 8
GOLDEN = 0x9E3779B97F4A7C15  #: 2^64 over the golden ratio
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  #: shift, then factor

_HALF = np.uint64(32)
_LOWER = np.uint64((1 << 32) - 1)
_ABOVE = np.uint64(1 << 32)
_STRIDE_BYTES = 64 * LEAF_BYTES  # what numpy hashes at a time: its intermediate results stay in the cache

Bytes: TypeAlias = npt.NDArray[np.uint8]
Words: TypeAlias = npt.NDArray[np.uint64]
#: Anything that has bytes in a row: bytes, bytearray, memoryview, numpy arrays.
Buffer: TypeAlias = bytes | bytearray | memoryview | Bytes


def checksum(data: Buffer) -> int:
    """Compute the checksum of these bytes, in [0, 2^64). Releases the interpreter's lock; any thread.

    Raises:
        ValueError, BufferError: they do not lie in a row.
    """
    return _implementation().checksum(_as_bytes(data))


def copy_checked(target: Buffer, source: Buffer) -> int:
    """Copy all of `source` over all of `target`, and return the checksum of what was written.

    Raises:
        ValueError: as for `copy_all_checked`, or they are of different lengths.
    """
    into, whole = _as_bytes(target), _as_bytes(source)
    if len(into) != len(whole):
        raise ValueError(f"a target of {len(into)} bytes for {len(whole)} bytes")
    return copy_all_checked(into, whole, [Copy(0, 0, len(whole))])[0]


def copy_all_checked(
    target: Buffer, source: Buffer, copies: Sequence[Copy], watch: CopyWatch | None = None
) -> list[int]:
    """Carry out all copies, in order, and return the checksum of what each wrote. Any thread.

    Compiled, it is one pass without the interpreter's lock: each byte is read once, and what is hashed is the register
    that is written, so that a source that changes meanwhile cannot give bytes beside a checksum of others. The targets
    of one call must not overlap.

    Args:
        target: writable.
        source: may be memory that others write.
        copies: offsets into both.
        watch: shows how far it is, and may stop it: then the answer has only the copies that are whole.

    Raises:
        ValueError: `target` is read-only, a range lies outside, or one overlaps its own source. Nothing was written.
    """
    into, whole = _as_bytes(target), _as_bytes(source)
    if not into.flags.writeable:
        raise ValueError("the target is read-only")
    return _implementation().copy(into, whole, copies, watch or CopyWatch())


def checksum_path() -> str:
    """Name, for people, what computes checksums in this process: "avx512", "avx2", "sse2", "neon"; or "numpy"."""
    return _implementation().name


def _as_bytes(data: Buffer) -> Bytes:
    return np.frombuffer(data, np.uint8)


def _address(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _refused(copy: Copy, target: Bytes, source: Bytes) -> ValueError:
    return ValueError(
        f"{copy} is out of bounds, or overlaps itself: source {len(source)} bytes, target {len(target)} bytes"
    )


class Implementation(Protocol):
    """A way to compute the checksum; all give the same bits."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def checksum(self, data: Bytes) -> int:
        """As the function of this name."""
        ...

    def copy(self, target: Bytes, source: Bytes, copies: Sequence[Copy], watch: CopyWatch) -> list[int]:
        """As `copy_all_checked`, into what is known to be writable."""
        ...


# ------------------------------------------------------------------------------------------------------ as is defined


def mixed(words: Words) -> Words:
    """Apply `mix` to each word."""
    for shift, factor in MIX:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words


def keys(first: int, count: int) -> Words:
    """Return `key(first)` and following."""
    return mixed(np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(GOLDEN))


_LINE_KEYS = keys(0, LEAF_WORDS).reshape(LEAF_LINES, NUM_LANES)


class PortableChecksum:
    """Everywhere, at some 2 GB/s."""

    name = "numpy"

    def checksum(self, data: Bytes) -> int:
        """As the function of this name."""
        totals = np.zeros(NUM_LANES, np.uint64)
        for begin in range(0, len(data), _STRIDE_BYTES):
            _add(totals, data[begin : begin + _STRIDE_BYTES], begin // LEAF_BYTES)
        return _ended(totals, len(data))

    def copy(self, target: Bytes, source: Bytes, copies: Sequence[Copy], watch: CopyWatch) -> list[int]:
        """Copy in strides, each of which is hashed where it lies then."""
        distance = _address(target) - _address(source)
        for copy in copies:
            begin, into, length = copy
            is_inside = length >= 0 and 0 <= begin <= len(source) - length and 0 <= into <= len(target) - length
            if not is_inside or (length > 0 and abs(distance + into - begin) < length):
                raise _refused(copy, target, source)
        checksums: list[int] = []
        for begin, into, num_bytes in copies:
            totals = np.zeros(NUM_LANES, np.uint64)
            for done in range(0, num_bytes, _STRIDE_BYTES):
                if watch.is_stopped:
                    return checksums
                length = min(_STRIDE_BYTES, num_bytes - done)
                stride = target[into + done : into + done + length]
                stride[:] = source[begin + done : begin + done + length]
                _add(totals, stride, done // LEAF_BYTES)
                watch.words[0] += length
            checksums.append(_ended(totals, num_bytes))
        return checksums


def _add(totals: Words, data: Bytes, first_leaf: int) -> None:
    """Add the leaves of `data`, which begins with leaf `first_leaf`, to each lane's total."""
    num_leaves = len(data) // LEAF_BYTES
    end = num_leaves * LEAF_BYTES
    leaves = data[:end].view("<u8").reshape(num_leaves, LEAF_LINES, NUM_LANES)
    totals += mixed(_leaf_sums(leaves) ^ keys(LEAF_WORDS + first_leaf, num_leaves)[:, None]).sum(axis=0)
    if end < len(data):
        rest = np.zeros(-(-(len(data) - end) // LINE_BYTES) * LINE_BYTES, np.uint8)
        rest[: len(data) - end] = data[end:]
        lines = rest.view("<u8").reshape(1, -1, NUM_LANES)
        totals += mixed(_leaf_sums(lines) ^ keys(LEAF_WORDS + first_leaf + num_leaves, 1)).sum(axis=0)


def _leaf_sums(leaves: Words) -> Words:
    """Sum up `[num_leaves, num_lines, lanes]` over the lines."""
    words = leaves ^ _LINE_KEYS[: leaves.shape[1]]
    sums: Words = (((words & _LOWER) | _ABOVE) * ((words >> _HALF) | _ABOVE)).sum(axis=1, dtype=np.uint64)
    return sums


def _ended(totals: Words, num_bytes: int) -> int:
    value = keys(num_bytes, 1)
    for lane in totals:
        value = mixed(value ^ lane)
    return int(value[0])


# ---------------------------------------------------------------------------------------------------------- compiled


class CompiledChecksum:
    """`checksum.cpp`, from a library that was built."""

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            OSError: it does not load.
            AttributeError: it is another library.
        """
        library = ctypes.CDLL(str(path))
        library.kvray_checksum_name.restype = ctypes.c_char_p
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._checksum = library.kvray_checksum
        self._checksum.argtypes, self._checksum.restype = [pointer, number], ctypes.c_uint64
        self._copy = library.kvray_copy_checked
        self._copy.argtypes = [pointer, number, pointer, number, pointer, number, pointer, pointer]
        self._copy.restype = number
        self.name: str = library.kvray_checksum_name().decode()

    def checksum(self, data: Bytes) -> int:
        """As the function of this name."""
        value: int = self._checksum(_address(data), len(data))
        return value

    def copy(self, target: Bytes, source: Bytes, copies: Sequence[Copy], watch: CopyWatch) -> list[int]:
        """Copy and hash in one pass, past the caches where more than 1 MiB is copied at once."""
        num_copies = len(copies)
        table = Copies.of(copies).table
        checksums = (ctypes.c_uint64 * num_copies)()
        where = (_address(source), len(source), _address(target), len(target))
        num_whole: int = self._copy(*where, _address(table), num_copies, checksums, watch.words)
        if num_whole < 0:
            raise _refused(copies[-1 - num_whole], target, source)
        return checksums[:num_whole]


@functools.cache
def _implementation() -> Implementation:
    """Take the compiled one where it was built and loads; otherwise numpy, with log lines that say why."""
    compiled = CHECKSUM.opened(CompiledChecksum)
    if compiled is None:
        _log.warning(
            "checksums not compiled, or do not load, using numpy (build them: %s)", "python -m engine.kernels.cpu.build"
        )
    return compiled or PortableChecksum()
