"""How a block's bytes are made fewer and back, without loss. Pure: bytes in, bytes out.

Of a number of KV the byte with the sign and the upper bits of the exponent takes few values, the others take all.
Measured on real KV (benchmarks/compression.py), a codec over that byte alone leaves less than one over all planes does,
or over the bytes as they are, and takes less time. So an encoded block of n numbers of w bytes is:

    [byte 0 of each number][byte 1] ... [byte w - 2][zstd frame of byte w - 1]      (w - 1) * n bytes and a frame
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

#: The bytes as they are.
PLAIN: Final = 0
#: Bytes of a number, by codec. Part of what lies in stores for years: a number here is never given another meaning.
_WIDTHS: Final = {1: 2, 2: 4}
KNOWN: Final = (PLAIN, *_WIDTHS)  #: what `decode` can make something of
#: Higher ones give no less: the planes have next to nothing that repeats.
_ZSTD_LEVEL: Final = 1

Bytes: TypeAlias = npt.NDArray[np.uint8]


def lossless_codec(element_bytes: int) -> int:
    """Return the codec for KV of numbers of so many bytes; PLAIN where there is none."""
    return next((codec for codec, width in _WIDTHS.items() if width == element_bytes), PLAIN)


def encode(codec: int, plain: Bytes) -> Bytes | None:
    """Encode a block; None where it would not be shorter, or is no whole number of numbers: it is to be kept plain.

    Args:
        codec: one of KNOWN.
        plain: `[num_bytes]`.
    """
    width = _WIDTHS.get(codec)
    if width is None or len(plain) % width:
        return None
    numbers = plain.view(f"<u{width}")
    if not numbers.flags.aligned:
        numbers = numbers.copy()
    top = (numbers >> numbers.dtype.type(8 * (width - 1))).astype(np.uint8)
    frame = np.frombuffer(_zstd().compress(top), np.uint8)
    num_numbers = len(numbers)
    if len(frame) >= num_numbers:
        return None
    encoded = np.empty((width - 1) * num_numbers + len(frame), np.uint8)
    for number in range(width - 1):
        plane = encoded[number * num_numbers : (number + 1) * num_numbers]
        plane[:] = (numbers >> numbers.dtype.type(8 * number)).astype(np.uint8)
    encoded[(width - 1) * num_numbers :] = frame
    return encoded


def decode(codec: int, stored: memoryview, num_bytes: int) -> memoryview | None:
    """Decode what `encode` gave for a block of `num_bytes` bytes; None where it is nothing of the kind.

    No more memory than twice that is taken, whatever is in it. That the bytes are those of the block, only their
    checksum tells.
    """
    if codec == PLAIN:
        return stored if len(stored) == num_bytes else None
    width = _WIDTHS.get(codec)
    if width is None or num_bytes % width:
        return None
    num_numbers = num_bytes // width
    begin = (width - 1) * num_numbers
    if not begin < len(stored) < num_bytes:
        return None
    try:
        top = np.frombuffer(_zstd().decompress(stored[begin:], num_numbers), np.uint8)
    except (OSError, pa.ArrowException):
        return None
    if len(top) != num_numbers:
        return None
    numbers = top.astype(f"<u{width}")
    planes = np.frombuffer(stored[:begin], np.uint8).reshape(width - 1, num_numbers)
    for plane in planes[::-1]:
        numbers <<= numbers.dtype.type(8)
        numbers |= plane
    return numbers.view(np.uint8).data


def _zstd() -> pa.Codec:
    """Return a codec for one call: made in a microsecond, and not said to bear several threads at once."""
    return pa.Codec("zstd", _ZSTD_LEVEL)
