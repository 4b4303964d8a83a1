"""Small blocks whose bytes follow from their number, and remote stores of them. A codec shortens every second one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3

from nodecache.codec import PLAIN
from nodecache.remote.layout import Model, Record
from nodecache.remote.store import RemoteStore
from nodecache.store import StoredBlock
from transport.checksum import checksum

BLOCK_BYTES = 5000  #: not a multiple of anything
MODEL = Model(b"\xab" * 32, 1, BLOCK_BYTES, "cpu/plain")
DEADLINE_S = 30.0


def name_of(number: int) -> bytes:
    return blake3(b"name" + number.to_bytes(8, "little")).digest(length=16)


def content_of(number: int, block_bytes: int = BLOCK_BYTES) -> memoryview:
    return like_kv(number, block_bytes) if number % 2 else noise(number, block_bytes)


def noise(number: int, block_bytes: int = BLOCK_BYTES) -> memoryview:
    """Bytes that no codec makes fewer."""
    return memoryview(blake3(number.to_bytes(8, "little")).digest(length=block_bytes))


def block_of(number: int, block_bytes: int = BLOCK_BYTES) -> StoredBlock:
    return StoredBlock(name_of(number), 16 + number % 3, checksum(content_of(number, block_bytes)))


def like_kv(number: int, block_bytes: int = BLOCK_BYTES) -> memoryview:
    """Bytes as of bfloat16 numbers around zero, which a codec makes fewer."""
    numbers = np.random.default_rng(number).standard_normal(block_bytes // 2, np.float32)
    return memoryview((numbers.view(np.uint32) >> np.uint32(16)).astype("<u2").view(np.uint8))


def records_of(numbers: Iterable[int], first_position: int = 0) -> list[Record]:
    """Plain blocks one behind the other."""
    return [
        Record(block_of(number), position, position * MODEL.record_bytes, PLAIN, BLOCK_BYTES)
        for position, number in enumerate(numbers, first_position)
    ]


def open_store(root: Path | str, model: Model = MODEL, codec: int = PLAIN) -> RemoteStore:
    return RemoteStore(str(root), model, codec=codec)


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
