"""The remote tier: whole blocks in a bucket or a shared directory, found by name, verified at every read.

How they lie there is in `nodecache.remote.layout`. What `write` returned survives the end of the process once a
manifest lists it: within some two seconds, when `sync` returns, and at `close`; other stores of the same bucket find it
some five seconds after that. What a bucket may hold is its operator's to say, by its rules for the life of objects: an
object that is gone is dropped when it is missed. In a directory nothing is synced: what a loss of power tears is
noticed, as is every byte that is not as it was written.

Faults: reading and writing are given up each for itself, after some failures in a row or while all calls hang, at once
where access is denied; then calls raise at once, and it is tried again by and by. A store that may only be read is
read. A bucket that is not there yet is waited for.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from functools import partial
from typing import TypeVar

from nodecache.codec import PLAIN
from nodecache.quotas import Accounts
from nodecache.remote.breaker import Breaker
from nodecache.remote.catalog import Catalog, Unusable, now_us
from nodecache.remote.filesystem import DeniedError, MissingError, RemoteFilesystem
from nodecache.remote.index import Changes, Place, RemoteIndex
from nodecache.remote.layout import OBJECTS, Bytes, Model, Record, object_digest, pack_object
from nodecache.remote.manifests import kept_rows
from nodecache.remote.reader import Part, copy_part, parts_of, unpack_part
from nodecache.remote.stats import RemoteStats
from nodecache.remote.threads import RemoteThreads
from nodecache.remote.upkeep import Upkeep
from nodecache.store import Collected, StoredBlock, StoreError, StorePage

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NUM_READERS = 8
_NUM_WRITERS = 4  #: apart: a write that hangs does so for long
_OPEN_S = 10.0  #: how long a start waits for the store
_CLOSE_S = 5.0  #: how long a stop waits for it


class RemoteStore:
    """A `nodecache.store.BlockStore` in a bucket or a shared directory. Any thread."""

    def __init__(
        self,
        uri: str,
        model: Model,
        *,
        codec: int = PLAIN,
        on_changes: Callable[[Changes], None] | None = None,
        accounts: Accounts | None = None,
    ) -> None:
        """Open `model`'s folder below `uri`, or make it; what is there already is found when this returns.

        A store that does not answer within ten seconds, or refuses, is out of the plan, and is tried again later.

        Args:
            uri: a path, file:///DIR, s3://BUCKET/PREFIX?endpoint_override=...&scheme=...&region=..., gs://BUCKET/PREFIX,
                or what else pyarrow.fs.FileSystem.from_uri takes. Keys for S3 are in it or where AWS's tools find them.
            model: whose blocks, and what computed them; other folders below `uri` are left alone.
            codec: of nodecache.codec, how blocks are written; those of others are read, whatever it is.
            on_changes: called, by a thread of the store, with the names that others wrote and removed, also with those
                that are found at first.
            accounts: of the tenants that are counted: all that is found, whoever wrote it.

        Raises:
            ConfigError: the URI is none.
        """
        self._is_closed = False
        self._model = model
        self._codec = codec
        self._fs = RemoteFilesystem(uri)
        self._stats = RemoteStats()
        self._index = RemoteIndex(accounts)
        self._reading = Breaker(f"reading {self._fs.uri}")
        self._writing = Breaker(f"writing {self._fs.uri}")
        self._readers = RemoteThreads("remote-read", _NUM_READERS)
        self._writers = RemoteThreads("remote-write", _NUM_WRITERS)
        self._catalog = Catalog(self._fs, model, self._readers, self._stats)
        self._upkeep = Upkeep(self._fs, self._catalog, self._index, self._reading, self._writing, on_changes)
        try:
            self._upkeep.sync(_OPEN_S)
        except StoreError as error:
            if self._upkeep.unusable is None and self._reading.reason is None:
                self._reading.on_failed(error.message, time.monotonic(), is_lasting=True)

    @property
    def unusable(self) -> list[Unusable]:
        """The folders beside the model's, which are left alone, and why."""
        return self._upkeep.unusable or []

    def find(self, name: bytes) -> StoredBlock | None:
        """As `BlockStore.find`."""
        return self._index.find(name)

    @property
    def accounts(self) -> Accounts:
        """As `BlockStore.accounts`."""
        return self._index.accounts

    def names(self) -> list[bytes]:
        """As `BlockStore.names`."""
        return self._index.names()

    def page(self, cursor: int, max_blocks: int) -> StorePage:
        """As `BlockStore.page`. A place is a number of this process."""
        return self._index.page(cursor, max_blocks)

    def read(self, names: Sequence[bytes], targets: Sequence[memoryview], deadline_s: float) -> list[bool]:
        """As `BlockStore.read`. Once it has returned or raised, nothing writes to the targets any more."""
        end_s = time.monotonic() + deadline_s
        self._check_open()
        self._reading.check()
        places = self._index.places(names)
        came = [False] * len(names)
        missing: list[Part] = []
        futures: dict[Future[list[memoryview | None]], Part] = {}
        try:
            for part in parts_of(places):
                futures[self._readers.submit(partial(self._read_part, part), end_s)] = part
            for future in as_completed(list(futures), max(0.0, end_s - time.monotonic())):
                part = futures.pop(future)
                try:
                    plain = future.result()
                except MissingError:
                    missing.append(part)
                    continue
                for (index, _), is_whole in zip(part.wanted, copy_part(part, plain, targets), strict=True):
                    came[index] = is_whole
            if missing:
                self._wait(self._readers.submit(self._catalog.check, end_s), end_s)
        except (StoreError, TimeoutError) as error:
            raise self._failed(self._reading, error, list(futures), deadline_s) from error
        num_whole = sum(came)
        if num_whole:
            self._reading.on_worked()
        self._stats.count("read_blocks", num_whole)
        self._stats.count("read_bytes", num_whole * self._model.block_bytes)
        whole = [place.record for place, is_whole in zip(places, came, strict=True) if place is not None and is_whole]
        self._stats.count("read_stored_bytes", sum(record.stored_bytes for record in whole))
        num_missing = sum(len(part.wanted) for part in missing)
        lost = [place for place, is_whole in zip(places, came, strict=True) if place is not None and not is_whole]
        self._stats.count("missing_blocks", num_missing)
        self._stats.count("damaged_blocks", len(lost) - num_missing)
        self._drop(lost)
        return came

    def write(self, blocks: Sequence[StoredBlock], sources: Sequence[memoryview], deadline_s: float) -> list[bytes]:
        """As `BlockStore.write`; see above for what survives. Only for a quota anything is dropped: the oldest blocks.

        Blocks that are held already are not written again.
        """
        end_s = time.monotonic() + deadline_s
        wrong = {len(source) for source in sources} - {self._model.block_bytes}
        if wrong:
            raise StoreError(f"blocks of {sorted(wrong)} bytes; {self._model.block_bytes} are wanted")
        self._check_open()
        if self._writing.reason is not None and not self._writing.takes_trial(time.monotonic()):
            self._writing.check()
        new = {
            block.name: (block, source)
            for block, source in zip(blocks, sources, strict=True)
            if self._index.find(block.name) is None
        }
        pairs = self._within_quotas(list(new.values()))
        size = self._model.blocks_per_object
        objects = [self._packed(pairs[begin : begin + size]) for begin in range(0, len(pairs), size)]
        futures: list[Future[None]] = []
        try:
            for digest, _, data in objects:
                self._upkeep.spare(digest, end_s)
                futures.append(self._writers.submit(partial(self._write_object, digest, data), end_s))
            for future in futures:
                self._wait(future, end_s)
        except (StoreError, TimeoutError) as error:
            raise self._failed(self._writing, error, futures, deadline_s) from error
        for digest, records, _ in objects:
            rows = kept_rows(digest, records, self._index.times([record.block.name for record in records], now_us()))
            self._index.apply(rows)
            self._upkeep.add(rows)
        if objects:
            self._writing.on_worked()
        self._stats.count("written_blocks", len(pairs))
        self._stats.count("written_bytes", len(pairs) * self._model.block_bytes)
        stored_bytes = sum(record.stored_bytes for _, records, _ in objects for record in records)
        self._stats.count("written_stored_bytes", stored_bytes)
        return self._keep_quotas([block for block, _ in pairs])

    def remove(self, names: Sequence[bytes]) -> None:
        """As `BlockStore.remove`. Others learn of it as of blocks; where nothing can be written, they never do."""
        places = [place for place in self._index.places(list(dict.fromkeys(names))) if place is not None]
        self._stats.count("removed_blocks", len(places))
        self._forget(places)

    def collect(self, deadline_s: float) -> Collected:
        """As `BlockStore.collect`: objects without blocks, in one round of upkeep. How long they are is not known."""
        num_deleted = self._upkeep.num_deleted
        self._upkeep.sync(deadline_s)
        return Collected(self._upkeep.num_deleted - num_deleted, 0, has_more=self._upkeep.num_doomed > 0)

    def sync(self, deadline_s: float) -> None:
        """As `BlockStore.sync`: others can find it, and all that others listed before is found here.

        Tries a store again that is out of the plan.
        """
        self._upkeep.sync(deadline_s)

    def stats(self) -> dict[str, float]:
        """As `BlockStore.stats`."""
        counted = self._stats.values()
        num_for_quota = counted.pop("kvray_remote_quota_evicted_blocks_total")
        return {
            **counted,
            'kvray_evictions_total{tier="remote",reason="quota"}': num_for_quota,
            "kvray_remote_blocks": float(len(self._index)),
            "kvray_remote_plain_bytes": float(len(self._index) * self._model.block_bytes),
            "kvray_remote_bytes": float(self._index.stored_bytes),
            "kvray_remote_objects": float(self._index.num_objects),
            "kvray_remote_manifests": float(self._catalog.num_manifests),
            "kvray_remote_unusable_folders": float(len(self.unusable)),
            "kvray_remote_is_readable": float(self._reading.reason is None),
            "kvray_remote_is_writable": float(self._writing.reason is None),
        }

    def close(self) -> None:
        """As `BlockStore.close`. What hangs is left behind."""
        self._is_closed = True
        end_s = time.monotonic() + _CLOSE_S
        stops = (self._upkeep.stop, self._readers.stop, self._writers.stop)  # the first still needs the others
        have_ended = [stop(max(0.0, end_s - time.monotonic())) for stop in stops]
        if not all(have_ended):
            logger.warning("%s does not answer: what was written last may not be listed", self._fs.uri)

    def check_invariants(self) -> None:
        """Raise InvariantError where the books do not agree."""
        self._index.check_invariants()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError("the remote store is closed")

    def _within_quotas(self, pairs: list[tuple[StoredBlock, memoryview]]) -> list[tuple[StoredBlock, memoryview]]:
        """Leave out what is more than all of a tenant's quota."""
        num_taken: Counter[int] = Counter()
        taken = []
        for block, source in pairs:
            limit = self.accounts.max_blocks.get(block.tenant)
            if limit is None or num_taken[block.tenant] < limit:
                num_taken[block.tenant] += 1
                taken.append((block, source))
        return taken

    def _keep_quotas(self, blocks: Sequence[StoredBlock]) -> list[bytes]:
        """Remove, of whom these blocks are that were just written, the oldest others above the quota; their names."""
        names = {block.name for block in blocks}
        removed: list[bytes] = []
        for tenant in sorted({block.tenant for block in blocks}):
            num_over = self.accounts.num_over(tenant)
            if num_over:
                places = self._index.oldest(tenant, num_over, names)
                self._stats.count("removed_blocks", len(places))
                self._stats.count("quota_evicted_blocks", len(places))
                self._forget(places)
                removed += [place.record.block.name for place in places]
        return removed

    def _read_part(self, part: Part) -> list[memoryview | None]:
        """Read and decode: of what was encoded several threads decode at once."""
        path = self._catalog.path(OBJECTS, part.object.hex())
        return unpack_part(part, self._fs.read(path, part.offset, part.num_bytes), self._model)

    def _packed(self, pairs: Sequence[tuple[StoredBlock, memoryview]]) -> tuple[bytes, list[Record], Bytes]:
        """Return the digest, the records and the bytes of an object."""
        blocks, sources = zip(*pairs, strict=True)
        records, data = pack_object(self._model, blocks, sources, self._codec)
        return object_digest(records, data), records, data

    def _write_object(self, digest: bytes, data: Bytes) -> None:
        self._fs.write(self._catalog.path(OBJECTS, digest.hex()), data.data)

    def _wait(self, future: Future[T], end_s: float) -> T:
        return future.result(max(0.0, end_s - time.monotonic()))

    def _failed(
        self, breaker: Breaker, error: BaseException, futures: Sequence[Future[T]], deadline_s: float
    ) -> StoreError:
        """Give up what is under way, and note why."""
        for future in futures:
            future.cancel()
        is_late = isinstance(error, TimeoutError)
        reason = f"{self._fs.uri} has not answered within {deadline_s:g} s" if is_late else str(error)
        self._stats.count("timeouts" if is_late else "errors")
        are_hanging = self._readers.are_hanging if breaker is self._reading else self._writers.are_hanging
        is_lasting = isinstance(error, DeniedError) or are_hanging
        breaker.on_failed(reason, time.monotonic(), is_lasting=is_lasting)
        self._upkeep.reopen()
        return StoreError(reason)

    def _drop(self, places: Sequence[Place]) -> None:
        """Forget blocks that did not come whole, unless they were written anew meanwhile."""
        self._forget([place for place in places if self._index.drop(place.record.block.name, place.object)])

    def _forget(self, places: Sequence[Place]) -> None:
        if places:
            names = [place.record.block.name for place in places]
            self._upkeep.remove(names, {place.object for place in places})
