"""How blocks lie in a bucket or directory. Pure: values in, bytes out.

    URI/
      <fingerprint>-<layout version>-<block bytes>-<digest of the kernel path>/
        description.json         what this folder is for, in words
        manifests/<digest of its bytes>.arrow
        objects/<digest of what it holds>

An object is a run of blocks of one chain, each behind a header, and nothing else; it is written once and never changed:

    [header 0][block 0][header 1][block 1] ...          headers of 128 bytes, blocks of block_bytes or, encoded, fewer

A header follows from the block, where and how it lies there, and the model, so that a reader who knows these compares
it whole. It tells the same to one who knows nothing; its last word is the checksum of what is before. A block's
checksum is of the bytes that it is served as, also where it is encoded (`nodecache.codec`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvcache.region import BlockNumbers
from nodecache.codec import INT8, LOSSLESS, PLAIN, decode, encode
from nodecache.store import StoredBlock, StoreError
from transport.checksum import checksum, copy_checked

FORMAT = "kvray remote store"
FORMAT_VERSION = 1
DESCRIPTION_NAME = "description.json"
MANIFESTS = "manifests"
OBJECTS = "objects"

DIGEST_BYTES = 16
#: Of an object, if one block is not longer: up to here pyarrow puts it in one request (measured with pyarrow 26).
MAX_OBJECT_BYTES = 8 << 20

_HEADER_MAGIC = 0x6B767272
_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("codec", "<u2"),  # of the stored bytes (nodecache.codec)
        ("model", "V16"),  # Model.digest
        ("name", "V16"),
        ("num_tokens", "<u4"),
        ("position", "<u4"),  # of the block in the object
        ("block_bytes", "<u8"),
        ("checksum", "<u8"),
        ("stored_bytes", "<u8"),  # 0: plain, as many as block_bytes
        ("tenant", "<u8"),  # 0: nobody's in particular
        ("unused", "V40"),
        ("header_checksum", "<u8"),
    ]
)
HEADER_BYTES = _HEADER.itemsize
_SUMMED_BYTES = HEADER_BYTES - 8

_FOLDER_NAME = re.compile(r"([0-9a-f]+)-(\d+)-(\d+)-([0-9a-f]{16})")

Bytes: TypeAlias = npt.NDArray[np.uint8]


class Model(NamedTuple):
    """Whose blocks a folder holds, and what computed them."""

    fingerprint: bytes
    layout_version: int
    block_bytes: int
    kernel_path: str
    numbers: BlockNumbers | None = None  #: None: what is kept with a loss is not for this model

    @property
    def codecs(self) -> tuple[int, ...]:
        """Those of nodecache.codec that its blocks are read in."""
        return LOSSLESS if self.numbers is None else (*LOSSLESS, INT8)

    @property
    def folder_name(self) -> str:
        """Name of this model's folder."""
        path = blake3(self.kernel_path.encode()).hexdigest(length=8)
        return f"{self.fingerprint.hex()}-{self.layout_version}-{self.block_bytes}-{path}"

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for it in every header."""
        return blake3(self.folder_name.encode()).digest(length=DIGEST_BYTES)

    @property
    def record_bytes(self) -> int:
        """A plain block with its header."""
        return HEADER_BYTES + self.block_bytes

    @property
    def blocks_per_object(self) -> int:
        """How many blocks an object has at most."""
        return max(1, MAX_OBJECT_BYTES // self.record_bytes)


class Record(NamedTuple):
    """A block with its header, in an object."""

    block: StoredBlock
    position: int  #: among the blocks of the object
    offset: int  #: in the object
    codec: int
    stored_bytes: int  #: of the block, behind its header

    @property
    def num_bytes(self) -> int:
        """How long it is."""
        return HEADER_BYTES + self.stored_bytes

    @property
    def end(self) -> int:
        """Offset of what is behind it."""
        return self.offset + self.num_bytes


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What description.json says."""

    format: str
    format_version: int
    fingerprint: str
    layout_version: int
    block_bytes: int
    kernel_path: str


def pack_description(model: Model) -> bytes:
    """Return the content of a model's description.json."""
    description = Description(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        fingerprint=model.fingerprint.hex(),
        layout_version=model.layout_version,
        block_bytes=model.block_bytes,
        kernel_path=model.kernel_path,
    )
    return msgspec.json.format(msgspec.json.encode(description), indent=2)


def unpack_description(data: bytes) -> Description | None:
    """Read a description.json; None where it is none, or not whole."""
    try:
        return msgspec.json.decode(data, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def why_unusable(folder_name: str, model: Model) -> str:
    """Say why a folder beside the model's own is not used. Of another kernel path it is if nothing else differs."""
    found = _FOLDER_NAME.fullmatch(folder_name)
    if found is None:
        return "it is no folder of a remote store"
    if found[1] != model.fingerprint.hex():
        return f"it is of another model, fingerprint {found[1][:16]}..., wanted {model.fingerprint.hex()[:16]}..."
    if (int(found[2]), int(found[3])) != (model.layout_version, model.block_bytes):
        return (
            f"it is of layout {found[2]} with blocks of {found[3]} bytes, "
            f"wanted layout {model.layout_version} with blocks of {model.block_bytes} bytes"
        )
    return OTHER_KERNEL_PATH


#: What `why_unusable` says of a folder whose description tells more.
OTHER_KERNEL_PATH = "it is of another kernel path"


def pack_object(
    model: Model, blocks: Sequence[StoredBlock], sources: Sequence[memoryview], codec: int = PLAIN
) -> tuple[list[Record], Bytes]:
    """Return where blocks lie in their object, and its bytes: copied and verified in one pass, then encoded.

    A block that would not be shorter is plain. One that is kept with a loss has another checksum from then on.

    Raises:
        StoreError: a source has not the checksum that its block is said to have.
    """
    data = np.empty(len(blocks) * model.record_bytes, np.uint8)
    records: list[Record] = []
    offset = 0
    for position, (block, source) in enumerate(zip(blocks, sources, strict=True)):
        plain = data[offset + HEADER_BYTES : offset + model.record_bytes]
        found = copy_checked(plain, source)
        if found != block.checksum:
            raise StoreError(
                f"block {block.name.hex()} to be written has checksum {found:x}, wanted {block.checksum:x}"
            )
        encoded = encode(codec, plain, model.numbers)
        if encoded is None:
            records.append(Record(block, position, offset, PLAIN, model.block_bytes))
        else:
            if codec not in LOSSLESS:
                decoded = decode(codec, encoded.data, model.block_bytes, model.numbers)
                assert decoded is not None
                block = block._replace(checksum=checksum(decoded))
            records.append(Record(block, position, offset, codec, len(encoded)))
            plain[: len(encoded)] = encoded
        offset = records[-1].end
    for record, header in zip(records, pack_headers(model, records), strict=True):
        data[record.offset : record.offset + HEADER_BYTES] = header
    return records, data[:offset]


def object_digest(records: Sequence[Record], data: Bytes) -> bytes:
    """Return the name of the object of these bytes: the same blocks, stored as the same bytes, have the same name.

    Encoded they may be others elsewhere: by another version of the codec, for instance.
    """
    digest = blake3()
    for record in records:
        digest.update(record.block.name)
        digest.update(record.block.num_tokens.to_bytes(8, "little"))
        digest.update(record.block.checksum.to_bytes(8, "little"))
        if record.block.tenant:
            digest.update(record.block.tenant.to_bytes(8, "little"))
        if record.codec != PLAIN:
            digest.update(record.codec.to_bytes(8, "little"))
            digest.update(checksum(data[record.offset + HEADER_BYTES : record.end]).to_bytes(8, "little"))
    return digest.digest(length=DIGEST_BYTES)


def pack_headers(model: Model, records: Sequence[Record]) -> Bytes:
    """Return what is before blocks, `[num_blocks, HEADER_BYTES]`."""
    headers = np.zeros(len(records), _HEADER)
    headers["magic"] = _HEADER_MAGIC
    headers["version"] = FORMAT_VERSION
    headers["codec"] = [record.codec for record in records]
    headers["model"] = np.void(model.digest)
    headers["name"] = np.frombuffer(b"".join(record.block.name for record in records), "V16")
    headers["num_tokens"] = [record.block.num_tokens for record in records]
    headers["position"] = [record.position for record in records]
    headers["block_bytes"] = model.block_bytes
    headers["checksum"] = np.array([record.block.checksum for record in records], np.uint64)
    headers["tenant"] = np.array([record.block.tenant for record in records], np.uint64)
    headers["stored_bytes"] = [0 if record.codec == PLAIN else record.stored_bytes for record in records]
    lines = headers.view(np.uint8).reshape(len(records), HEADER_BYTES)
    headers["header_checksum"] = np.array([checksum(line[:_SUMMED_BYTES]) for line in lines], np.uint64)
    return lines


def unpack_records(model: Model, records: Sequence[Record], parts: Sequence[memoryview]) -> list[memoryview | None]:
    """Return the plain bytes of blocks from the bytes of their records; None where these are not as wanted.

    They are block_bytes each, and their checksum is still to be compared.
    """
    headers = pack_headers(model, records)
    return [
        decode(record.codec, part[HEADER_BYTES:], model.block_bytes, model.numbers)
        if len(part) == record.num_bytes and part[:HEADER_BYTES] == header.data
        else None
        for record, header, part in zip(records, headers, parts, strict=True)
    ]
