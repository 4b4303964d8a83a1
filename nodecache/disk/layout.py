"""How a segment file lies on disk. Pure: bytes in, bytes out.

    [segment header][table of record headers    ][block 0      ][block 1      ] ...
    0               4096                          data_offset    + record_bytes

A row is the place of one block and of its header. The segment header says in JSON whose blocks these are. Record
headers are 128 bytes, 32 to a page and none across two sectors, and lie together, so that an index is rebuilt by one
short read a segment, and a run of blocks is one long read or write without gaps. A header is written after its block.
One of zeros is free, or was removed. A block's checksum is in its header and over its plain bytes; the header's own is
its last word.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from nodecache.disk.files import ALIGN_BYTES, aligned
from nodecache.store import StoredBlock

FORMAT_VERSION = 1
_PLAIN_CODEC = 0

_MAGIC = b"kvrayseg"
_PREFIX = struct.Struct("<8sIQ")  # magic, length of the JSON, its checksum

_RECORD_MAGIC = 0x6B767263
#: of one record header; V: bytes
RECORD = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("codec", "<u2"),  # of the stored bytes: 0, plain, is the only one
        ("model", "V16"),  # Model.digest
        ("name", "V16"),
        ("segment_id", "<u8"),
        ("row", "<u4"),
        ("num_tokens", "<u4"),
        ("block_bytes", "<u8"),
        ("stored_bytes", "<u8"),
        ("checksum", "<u8"),
        ("sequence", "<u8"),  # counts all records that the directory ever had
        ("tenant", "<u8"),  # 0: nobody's in particular
        ("unused", "V24"),
        ("header_checksum", "<u8"),
    ]
)
RECORD_BYTES = RECORD.itemsize
_SUMMED_BYTES = RECORD_BYTES - 8

NAME_BYTES = 16
_DIRECTORY_NAME = re.compile(r"([0-9a-f]+)-(\d+)-(\d+)")

Records: TypeAlias = npt.NDArray[np.void]
Flags: TypeAlias = npt.NDArray[np.bool_]


class Model(NamedTuple):
    """Whose blocks a directory holds."""

    fingerprint: bytes
    layout_version: int
    block_bytes: int

    @property
    def directory_name(self) -> str:
        """Name of the folder of this model's segments."""
        return f"{self.fingerprint.hex()}-{self.layout_version}-{self.block_bytes}"

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for it in every record header."""
        return blake2b(self.directory_name.encode(), digest_size=16).digest()

    @classmethod
    def of_directory(cls, name: str) -> Model | None:
        """Return the model that a folder's name tells; None where it is no such name."""
        found = _DIRECTORY_NAME.fullmatch(name)
        if found is None or len(found[1]) % 2:
            return None
        return cls(bytes.fromhex(found[1]), int(found[2]), int(found[3]))


class Geometry(NamedTuple):
    """Where things lie in a segment of `num_rows` blocks of `block_bytes` bytes."""

    block_bytes: int
    num_rows: int

    @property
    def record_bytes(self) -> int:
        """A block with its padding."""
        return aligned(self.block_bytes)

    @property
    def data_offset(self) -> int:
        """Where the first block begins: behind segment header and table."""
        return ALIGN_BYTES + aligned(self.num_rows * RECORD_BYTES)

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self.offset_of(self.num_rows)

    def offset_of(self, row: int) -> int:
        """Return where a row's block begins in the file."""
        return self.data_offset + row * self.record_bytes

    @classmethod
    def within(cls, block_bytes: int, num_bytes: int) -> Geometry:
        """Return that of a segment of about `num_bytes`, of four blocks at least."""
        return cls(block_bytes, max(4, (num_bytes - ALIGN_BYTES) // (aligned(block_bytes) + RECORD_BYTES)))


class _SegmentHeader(msgspec.Struct, frozen=True, kw_only=True):
    format_version: int
    fingerprint: str
    layout_version: int
    block_bytes: int
    segment_id: int
    num_rows: int


def pack_segment_header(model: Model, segment_id: int, num_rows: int) -> bytes:
    """Return the first ALIGN_BYTES of a segment file."""
    header = _SegmentHeader(
        format_version=FORMAT_VERSION,
        fingerprint=model.fingerprint.hex(),
        layout_version=model.layout_version,
        block_bytes=model.block_bytes,
        segment_id=segment_id,
        num_rows=num_rows,
    )
    body = msgspec.json.encode(header)
    return (_PREFIX.pack(_MAGIC, len(body), own_checksum(body)) + body).ljust(ALIGN_BYTES, b"\0")


def unpack_segment_header(page: bytes, model: Model, segment_id: int) -> Geometry | str:
    """Return where things lie in the segment that begins with `page`, or, in words, why it cannot be used."""
    magic, length, checksum = _PREFIX.unpack_from(page.ljust(ALIGN_BYTES, b"\0"))
    body = page[_PREFIX.size : _PREFIX.size + length]
    if magic != _MAGIC:
        return "it does not begin like a segment"
    if len(body) != length or own_checksum(body) != checksum:
        return "its header is damaged"
    try:
        version = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).get("format_version", b"none")
        if bytes(version) != str(FORMAT_VERSION).encode():
            return f"it is of format version {bytes(version).decode()}, wanted {FORMAT_VERSION}"
        header = msgspec.json.decode(body, type=_SegmentHeader)
        found = Model(bytes.fromhex(header.fingerprint), header.layout_version, header.block_bytes)
    except (msgspec.DecodeError, ValueError) as error:
        return f"its header cannot be read: {error}"
    if found != model:
        return f"it holds blocks of {found.directory_name}, wanted {model.directory_name}"
    if header.segment_id != segment_id or header.num_rows < 1:
        return f"it says of itself to be segment {header.segment_id} with {header.num_rows} blocks"
    return Geometry(header.block_bytes, header.num_rows)


def pack_records(
    model: Model, segment_id: int, first_row: int, first_sequence: int, blocks: Sequence[StoredBlock]
) -> bytes:
    """Return the headers of consecutive records."""
    records = np.zeros(len(blocks), RECORD)
    records["magic"] = _RECORD_MAGIC
    records["version"] = FORMAT_VERSION
    records["codec"] = _PLAIN_CODEC
    records["model"] = np.void(model.digest)
    records["segment_id"] = segment_id
    records["row"] = np.arange(first_row, first_row + len(blocks))
    records["block_bytes"] = records["stored_bytes"] = model.block_bytes
    records["sequence"] = np.arange(first_sequence, first_sequence + len(blocks))
    records["name"] = np.frombuffer(b"".join(block.name for block in blocks), "V16")
    records["num_tokens"] = [block.num_tokens for block in blocks]
    records["checksum"] = [block.checksum for block in blocks]
    records["tenant"] = [block.tenant for block in blocks]
    records["header_checksum"] = _header_checksums(records.tobytes())
    return records.tobytes()


def unpack_records(table: bytes, model: Model, segment_id: int, num_rows: int) -> tuple[Records, Flags, Flags]:
    """Read a segment's table: all its records, which of them are whole, and which are damaged; the others are free."""
    table = table[: num_rows * RECORD_BYTES].ljust(num_rows * RECORD_BYTES, b"\0")
    records = np.frombuffer(table, RECORD)
    is_used = np.frombuffer(table, "u1").reshape(num_rows, RECORD_BYTES).any(axis=1)
    is_whole = (
        is_used
        & (records["magic"] == _RECORD_MAGIC)
        & (records["version"] == FORMAT_VERSION)
        & (records["codec"] == _PLAIN_CODEC)
        & (records["model"] == np.void(model.digest))
        & (records["segment_id"] == segment_id)
        & (records["row"] == np.arange(num_rows))
        & (records["block_bytes"] == model.block_bytes)
        & (records["stored_bytes"] == model.block_bytes)
    )
    rows = np.flatnonzero(is_whole)
    is_whole[rows] = records["header_checksum"][rows] == _header_checksums(records[rows].tobytes())
    return records, is_whole, is_used & ~is_whole


def own_checksum(content: bytes | memoryview) -> int:
    """Return 64 bits over what a header or a checkpoint says; blocks have another one, of their bytes."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _header_checksums(headers: bytes) -> npt.NDArray[np.uint64]:
    starts = range(0, len(headers), RECORD_BYTES)
    sums = (own_checksum(headers[start : start + _SUMMED_BYTES]) for start in starts)
    return np.fromiter(sums, np.uint64, len(starts))
