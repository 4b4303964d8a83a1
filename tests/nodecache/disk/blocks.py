"""Small blocks whose bytes follow from their number, and stores of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

from nodecache.disk.files import Files
from nodecache.disk.layout import Geometry, Model
from nodecache.disk.store import DiskStore
from nodecache.quotas import Accounts
from nodecache.store import StoredBlock
from transport.checksum import checksum

BLOCK_BYTES = 5000  #: not a multiple of anything
MODEL = Model(b"\xab" * 32, 1, BLOCK_BYTES)
GEOMETRY = Geometry.within(BLOCK_BYTES, 0)
ROWS = GEOMETRY.num_rows
DEADLINE_S = 30.0


def capacity_of(num_segments: int) -> int:
    """Of the smallest segments; a checkpoint of all their blocks fits beside them, twice."""
    return num_segments * GEOMETRY.num_bytes + 2 * 8192


def name_of(number: int) -> bytes:
    return blake2b(b"name" + number.to_bytes(8, "little"), digest_size=16).digest()


def bytes_of(number: int) -> bytes:
    seed = number.to_bytes(8, "little")
    return (seed + blake2b(seed, digest_size=16).digest()) * (BLOCK_BYTES // 24 + 1)


def content_of(number: int) -> memoryview:
    return memoryview(bytes_of(number))[:BLOCK_BYTES]


def block_of(number: int) -> StoredBlock:
    return StoredBlock(name_of(number), 16 + number % 3, checksum(content_of(number)))


def open_store(
    root: Path,
    num_segments: int = 16,
    *,
    model: Model = MODEL,
    files: Files | None = None,
    keep_value: Callable[[bytes], float] | None = None,
    accounts: Accounts | None = None,
) -> DiskStore:
    capacity_bytes = capacity_of(num_segments)
    return DiskStore(root, model, capacity_bytes, checksum, keep_value=keep_value, accounts=accounts, files=files)


def write(store: DiskStore, numbers: Iterable[int], deadline_s: float = DEADLINE_S) -> list[bytes]:
    numbers = list(numbers)
    return store.write([block_of(n) for n in numbers], [content_of(n) for n in numbers], deadline_s)


def read(store: DiskStore, numbers: Sequence[int], deadline_s: float = DEADLINE_S) -> list[bool]:
    """Read blocks; those that came have their bytes, the targets of the others are as they were."""
    targets = [bytearray(BLOCK_BYTES) for _ in numbers]
    came = store.read([name_of(n) for n in numbers], [memoryview(target) for target in targets], deadline_s)
    for number, target, is_whole in zip(numbers, targets, came, strict=True):
        assert target == (content_of(number) if is_whole else bytes(BLOCK_BYTES))
    return came


def held(store: DiskStore, numbers: Iterable[int]) -> list[int]:
    names = set(store.names())
    return [number for number in numbers if name_of(number) in names]


def folder(root: Path) -> Path:
    return root / MODEL.directory_name


def segment_files(root: Path) -> list[Path]:
    return sorted(folder(root).glob("*.segment"))


def used_bytes(root: Path) -> int:
    """What all files of the model take on disk."""
    return sum(path.stat().st_blocks * 512 for path in folder(root).iterdir() if path.suffix != "")
