"""The folder of one model in a bucket or directory: what it is for, and its manifests. One thread at a time."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import wait
from functools import partial
from typing import NamedTuple

import numpy as np

from nodecache.remote import layout, manifests
from nodecache.remote.filesystem import DeniedError, Listed, MissingError, RemoteFilesystem
from nodecache.remote.layout import DESCRIPTION_NAME, MANIFESTS, OBJECTS, Model
from nodecache.remote.manifests import MAX_MANIFEST_BYTES, SUFFIX, KnownManifest, Rows
from nodecache.remote.stats import RemoteStats
from nodecache.remote.threads import RemoteThreads
from nodecache.store import StoreError

logger = logging.getLogger(__name__)

_READ_S = 20.0  #: all new manifests are to be read by then; others are read in the next round
_MAX_DESCRIPTION_BYTES = 1 << 16


class Unusable(NamedTuple):
    """A folder that is left alone, and why."""

    name: str
    reason: str


class Catalog:
    """What says which blocks a folder has. Does IO that may hang; all of it raises StoreError."""

    def __init__(self, filesystem: RemoteFilesystem, model: Model, threads: RemoteThreads, stats: RemoteStats) -> None:
        """`threads` read manifests, several at a time."""
        self._fs = filesystem
        self._model = model
        self._threads = threads
        self._stats = stats
        self._known: dict[str, KnownManifest] = {}
        self._unread: set[str] = set()
        self._draw_min_merged()

    @property
    def num_manifests(self) -> int:
        """Manifests that were read and are still there."""
        return len(self._known)

    def path(self, *names: str) -> str:
        """Return a path in the model's folder."""
        return "/".join((self._model.folder_name, *names))

    def open(self) -> DeniedError | None:
        """Make the folder and say what it is for, where that is not so yet. Where it cannot be written, how that shows.

        Raises:
            StoreError: the store does not answer, or the folder is for other blocks.
        """
        try:
            is_described = self._is_described()
        except MissingError:
            is_described = False
        try:
            self._fs.make_folders(self._model.folder_name, [MANIFESTS, OBJECTS])
            if not is_described:
                self.describe()
        except DeniedError as error:
            return error
        return None

    def describe(self) -> None:
        """Say in the folder what it is for. As it says the same each time, this tells whether it can be written."""
        self._fs.write(self.path(DESCRIPTION_NAME), memoryview(layout.pack_description(self._model)))

    def check(self) -> None:
        """Tell a missing object from a missing bucket, which are answered alike.

        Raises:
            StoreError: the folder is not there, or is for other blocks.
        """
        try:
            self._is_described()
        except MissingError as error:
            raise StoreError(f"{self._fs.uri}: the bucket or directory is gone, or was emptied") from error

    def strangers(self) -> list[Unusable]:
        """Name the other folders beside the model's, and why they are not used."""
        found = []
        for name in self._fs.folders(""):
            if name == self._model.folder_name:
                continue
            reason = layout.why_unusable(name, self._model)
            if reason == layout.OTHER_KERNEL_PATH:
                reason += f", {self._kernel_path_of(name)}, wanted {self._model.kernel_path}"
            found.append(Unusable(name, reason))
        return found

    def publish(self, rows: Rows) -> None:
        """Write manifests of these rows."""
        for some in manifests.split_rows(rows):
            name, data = manifests.pack_manifest(self._model, some)
            self._fs.write(self.path(MANIFESTS, name), data)
            self._known[name] = _known(Listed(name, len(data), 0), some)

    def read_new(self) -> list[Rows]:
        """Read the manifests that came since the last call; those that are not whole are dropped and told, once.

        So are blocks that are encoded in a way that is not known here; others may know it, so that their rows stay.
        What cannot be read now is left for the next call, and is in `num_unread`.
        """
        listed = {each.name: each for each in self._fs.objects(self.path(MANIFESTS)) if each.name.endswith(SUFFIX)}
        self._known = {name: each for name, each in self._known.items() if name in listed}
        self._unread &= set(listed)
        new = [each for each in listed.values() if _is_new(each, self._known.get(each.name))]
        found = []
        for name, rows in self._read(new).items():
            are_readable = manifests.are_readable(self._model, rows)
            num_unreadable = len(rows) - int(are_readable.sum())
            if num_unreadable:
                self._stats.count("unknown_codec_blocks", num_unreadable)
                logger.warning("manifest %s: %d blocks of an unknown codec are not used", name, num_unreadable)
            found.append(rows[are_readable])
        return found

    @property
    def num_unread(self) -> int:
        """Manifests that are listed and could not be read."""
        return len(self._unread)

    def merge(self) -> None:
        """Merge manifests into fewer, if there are many.

        Each is read anew: what it says may not be all in the index. Others may do the same at the same time: the merged
        ones then have the same name, or say the same again.
        """
        names = manifests.to_merge(self._known, self._min_merged)
        if not names:
            return
        self._draw_min_merged()
        parts = self._read([Listed(name, self._known[name].num_bytes, 0) for name in names])
        if parts:
            merged = manifests.latest(np.concatenate(list(parts.values())))
            if len(parts) == len(self._known):
                merged = merged[~manifests.are_forgotten(merged, now_us())]
            self._known = {name: each for name, each in self._known.items() if name not in parts}
            self.publish(merged)
            for name in sorted(set(parts) - set(self._known)):
                self._fs.delete(self.path(MANIFESTS, name))

    def _read(self, listed: Sequence[Listed]) -> dict[str, Rows]:
        """Read and validate manifests, and note what they are; the rows of those that are whole."""
        end_s = time.monotonic() + _READ_S
        reads = [(each, self._threads.submit(partial(self._read_one, each), end_s)) for each in listed]
        wait([future for _, future in reads], _READ_S)
        rows_by_name: dict[str, Rows] = {}
        for each, future in reads:
            if future.cancel() or not future.done():
                self._unread.add(each.name)
                continue
            error = future.exception()
            if isinstance(error, MissingError):
                continue  # merged by others meanwhile
            if isinstance(error, StoreError):
                if each.name not in self._unread:
                    logger.warning("manifest %s cannot be read for now: %s", each.name, error)
                self._unread.add(each.name)
                continue
            self._unread.discard(each.name)
            rows = future.result()
            if isinstance(rows, str):
                self._stats.count("damaged_manifests")
                logger.warning("%s: manifest %s is not used: %s", self._fs.uri, each.name, rows)
                self._known[each.name] = KnownManifest(each.num_bytes, each.changed_ns, 0, 0, is_whole=False)
                continue
            self._known[each.name] = _known(each, rows)
            rows_by_name[each.name] = rows
        return rows_by_name

    def _read_one(self, listed: Listed) -> Rows | str:
        if listed.num_bytes > MAX_MANIFEST_BYTES:
            return f"it has {listed.num_bytes:,} bytes, at most {MAX_MANIFEST_BYTES:,} are wanted"
        data = self._fs.read(self.path(MANIFESTS, listed.name), 0, MAX_MANIFEST_BYTES)
        return manifests.unpack_manifest(self._model, listed.name, data)

    def _is_described(self) -> bool:
        """Whether the folder says that it is ours. False where what it says is not whole: that may be mended.

        Raises:
            MissingError: it says nothing.
            StoreError: it is for other blocks.
        """
        data = self._fs.read(self.path(DESCRIPTION_NAME), 0, _MAX_DESCRIPTION_BYTES)
        if data == layout.pack_description(self._model):
            return True
        description = layout.unpack_description(data)
        if description is not None and description != layout.unpack_description(layout.pack_description(self._model)):
            raise StoreError(f"{self._fs.uri}: folder {self._model.folder_name} says to be for {description}")
        return description is not None

    def _kernel_path_of(self, folder_name: str) -> str:
        try:
            data = self._fs.read(f"{folder_name}/{DESCRIPTION_NAME}", 0, _MAX_DESCRIPTION_BYTES)
        except MissingError:
            data = b""
        description = layout.unpack_description(data)
        return "which it does not tell" if description is None else description.kernel_path

    def _draw_min_merged(self) -> None:
        self._min_merged = random.randint(manifests.MIN_MERGED, manifests.MAX_MERGED)


def _is_new(listed: Listed, known: KnownManifest | None) -> bool:
    if known is None:
        return True
    is_same = (known.num_bytes, known.changed_ns) == (listed.num_bytes, listed.changed_ns)
    return not known.is_whole and not is_same


def _known(listed: Listed, rows: Rows) -> KnownManifest:
    return KnownManifest(
        listed.num_bytes, listed.changed_ns, len(rows), int(manifests.are_forgotten(rows, now_us()).sum())
    )


def now_us() -> int:
    """Return the time since 1970, of the rows of manifests."""
    return time.time_ns() // 1000
