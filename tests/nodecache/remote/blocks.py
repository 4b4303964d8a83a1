"""Small blocks whose bytes follow from their number, and remote stores of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from blake3 import blake3

from nodecache.remote.layout import Model
from nodecache.remote.store import RemoteStore
from nodecache.store import StoredBlock
from transport.checksum import checksum

BLOCK_BYTES = 5000  #: not a multiple of anything
MODEL = Model(b"\xab" * 32, 1, BLOCK_BYTES, "cpu/plain")
DEADLINE_S = 30.0


def name_of(number: int) -> bytes:
    return blake3(b"name" + number.to_bytes(8, "little")).digest(length=16)


def content_of(number: int, block_bytes: int = BLOCK_BYTES) -> memoryview:
    return memoryview(blake3(number.to_bytes(8, "little")).digest(length=block_bytes))


def block_of(number: int, block_bytes: int = BLOCK_BYTES) -> StoredBlock:
    return StoredBlock(name_of(number), 16 + number % 3, checksum(content_of(number, block_bytes)))


def open_store(root: Path | str, model: Model = MODEL) -> RemoteStore:
    return RemoteStore(str(root), model)


def write(
    store: RemoteStore, numbers: Iterable[int], deadline_s: float = DEADLINE_S, block_bytes: int = BLOCK_BYTES
) -> None:
    numbers = list(numbers)
    blocks = [block_of(n, block_bytes) for n in numbers]
    assert store.write(blocks, [content_of(n, block_bytes) for n in numbers], deadline_s) == []


def read(
    store: RemoteStore, numbers: Sequence[int], deadline_s: float = DEADLINE_S, block_bytes: int = BLOCK_BYTES
) -> list[bool]:
    """Read blocks; those that came have their bytes."""
    targets = [bytearray(block_bytes) for _ in numbers]
    came = store.read([name_of(n) for n in numbers], [memoryview(target) for target in targets], deadline_s)
    for number, target, is_whole in zip(numbers, targets, came, strict=True):
        assert not is_whole or target == content_of(number, block_bytes)
    return came


def held(store: RemoteStore, numbers: Iterable[int]) -> list[int]:
    return [number for number in numbers if store.find(name_of(number)) is not None]


def folder(root: Path) -> Path:
    return root / MODEL.folder_name


def object_files(root: Path) -> list[Path]:
    return sorted((folder(root) / "objects").iterdir())


def manifest_files(root: Path) -> list[Path]:
    return sorted((folder(root) / "manifests").iterdir())
