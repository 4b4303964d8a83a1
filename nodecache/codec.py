"""How a block's bytes are made fewer and back. Pure: bytes in, bytes out.

Of a number of KV the byte with the sign and the upper bits of the exponent takes few values, the others take all.
Measured on real KV (benchmarks/compression.py), a codec over that byte alone leaves less than one over all planes does,
or over the bytes as they are, and takes less time. So an encoded block of n numbers of w bytes is:

    [byte 0 of each number][byte 1] ... [byte w - 2][zstd frame of byte w - 1]      (w - 1) * n bytes and a frame

With a loss, for who asks for it: int8 for each channel (one place of a token's K or V), whose largest magnitude in the
block is 127 times its scale, which is as the upper half of a float32:

    [scale of each channel: uint16][numbers: int8, in their order]

What it gives when it is decoded is the block, of which the checksum is; it is the same on all machines, as a product of
two such numbers is exact in float32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvcache.region import BlockNumbers

#: The bytes as they are.
PLAIN: Final = 0
#: Bytes of a number, by codec. Part of what lies in stores for years: a number here is never given another meaning.
_WIDTHS: Final = {1: 2, 2: 4}
#: With a loss.
INT8: Final = 3
LOSSLESS: Final = (PLAIN, *_WIDTHS)
#: Higher ones give no less: the planes have next to nothing that repeats.
_ZSTD_LEVEL: Final = 1

#: Larger magnitudes would become infinite.
_LARGEST: Final = {"bfloat16": 3.3895e38, "float16": 65504.0, "float32": 3.4028e38}
_STEPS: Final = 127

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]


def lossless_codec(element_bytes: int) -> int:
    """Return the codec for KV of numbers of so many bytes; PLAIN where there is none."""
    return next((codec for codec, width in _WIDTHS.items() if width == element_bytes), PLAIN)


def encode(codec: int, plain: Bytes, numbers: BlockNumbers | None = None) -> Bytes | None:
    """Encode a block; None where it would not be shorter, or is no such block: it is to be kept plain.

    Args:
        codec: one that `decode` takes.
        plain: `[num_bytes]`.
        numbers: what they are; INT8 needs it.
    """
    if codec == INT8:
        return None if numbers is None else _encode_int8(plain, numbers)
    width = _WIDTHS.get(codec)
    if width is None or len(plain) % width:
        return None
    words = plain.view(f"<u{width}")
    if not words.flags.aligned:
        words = words.copy()
    top = (words >> words.dtype.type(8 * (width - 1))).astype(np.uint8)
    frame = np.frombuffer(_zstd().compress(top), np.uint8)
    num_numbers = len(words)
    if len(frame) >= num_numbers:
        return None
    encoded = np.empty((width - 1) * num_numbers + len(frame), np.uint8)
    for number in range(width - 1):
        plane = encoded[number * num_numbers : (number + 1) * num_numbers]
        plane[:] = (words >> words.dtype.type(8 * number)).astype(np.uint8)
    encoded[(width - 1) * num_numbers :] = frame
    return encoded


def decode(codec: int, stored: memoryview, num_bytes: int, numbers: BlockNumbers | None = None) -> memoryview | None:
    """Decode what `encode` gave for a block of `num_bytes` bytes; None where it is nothing of the kind.

    No more memory than twice that is taken, whatever is in it. That the bytes are those of the block, only their
    checksum tells.
    """
    if codec == PLAIN:
        return stored if len(stored) == num_bytes else None
    if codec == INT8:
        return None if numbers is None else _decode_int8(stored, num_bytes, numbers)
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
    words = top.astype(f"<u{width}")
    planes = np.frombuffer(stored[:begin], np.uint8).reshape(width - 1, num_numbers)
    for plane in planes[::-1]:
        words <<= words.dtype.type(8)
        words |= plane
    return words.view(np.uint8).data


def _zstd() -> pa.Codec:
    """Return a codec for one call: made in a microsecond, and not said to bear several threads at once."""
    return pa.Codec("zstd", _ZSTD_LEVEL)


def _encode_int8(plain: Bytes, numbers: BlockNumbers) -> Bytes | None:
    num_channels = numbers.num_channels
    if len(plain) != numbers.num_numbers * numbers.element_bytes:
        return None
    encoded = np.empty(2 * num_channels + numbers.num_numbers, np.uint8)
    scales, steps = encoded[: 2 * num_channels].view("<u2"), encoded[2 * num_channels :].view(np.int8)
    for channels, group, kv in _groups(numbers, _as_float32(plain, numbers)):
        largest = np.abs(kv).max(axis=1)
        # Rounded up, so that no number has more than 127 steps; 0 stays 0.
        scale = ((largest / _STEPS).view("<u4") + np.uint32(0xFFFF)) >> np.uint32(16)
        step = _from_upper_half(scale)
        bound = _LARGEST[numbers.kind]
        if not ((largest <= bound) & (step <= bound / _STEPS)).all():  # nor where one is no number
            return None
        scales[channels] = scale.ravel()
        step[step == 0] = 1
        steps[group] = np.rint(kv / step[:, None]).astype(np.int8).ravel()
    return encoded if len(encoded) < len(plain) else None


def _decode_int8(stored: memoryview, num_bytes: int, numbers: BlockNumbers) -> memoryview | None:
    num_channels = numbers.num_channels
    is_whole = len(stored) == 2 * num_channels + numbers.num_numbers
    if not is_whole or num_bytes != numbers.num_numbers * numbers.element_bytes:
        return None
    step = _from_upper_half(np.frombuffer(stored[: 2 * num_channels], "<u2"))
    kv = np.frombuffer(stored[2 * num_channels :], np.int8).astype(np.float32)
    with np.errstate(all="ignore"):  # of scales that nobody wrote
        for channels, _, one in _groups(numbers, kv):
            one *= step[channels].reshape(len(one), 1, -1)
        match numbers.kind:
            case "float32":
                return kv.view(np.uint8).data
            case "float16":
                return kv.astype("<f2").view(np.uint8).data
            case "bfloat16":
                bits = kv.view("<u4")
                bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to the nearest, ties to even
                return (bits >> np.uint32(16)).astype("<u2").view(np.uint8).data
            case _:
                assert_never(numbers.kind)


def _groups(numbers: BlockNumbers, kv: Floats) -> Iterator[tuple[slice, slice, Floats]]:
    """Cut a block's numbers into groups: which channels, which numbers, and these, `[num_heads, block_size, dim]`."""
    channel = 0
    for num_heads, dim in numbers.groups:
        end = channel + num_heads * dim
        group = slice(channel * numbers.block_size, end * numbers.block_size)
        yield slice(channel, end), group, kv[group].reshape(num_heads, numbers.block_size, dim)
        channel = end


def _as_float32(plain: Bytes, numbers: BlockNumbers) -> Floats:
    match numbers.kind:
        case "float32":
            return plain.view("<f4")
        case "float16":
            return plain.view("<f2").astype(np.float32)
        case "bfloat16":
            return _from_upper_half(plain.view("<u2"))
        case _:
            assert_never(numbers.kind)


def _from_upper_half(bits: npt.NDArray[np.unsignedinteger]) -> Floats:
    """Return the float32 numbers whose upper halves these are, as bfloat16 is."""
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")
