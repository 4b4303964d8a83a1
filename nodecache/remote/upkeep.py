"""What is done beside reads and writes: the folder is opened, manifests are written, found, read and merged.

One thread, in rounds: every few seconds, when much was written, or when somebody waits for one. While the store is out
of the plan a round is no more than a try to open the folder again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from messages.errors import KvrayError
from nodecache.remote.breaker import Breaker
from nodecache.remote.catalog import Catalog, Unusable, now_us
from nodecache.remote.filesystem import DeniedError, RemoteFilesystem
from nodecache.remote.index import Changes, RemoteIndex
from nodecache.remote.layout import OBJECTS
from nodecache.remote.manifests import Rows, removed_rows
from nodecache.store import StoreError

logger = logging.getLogger(__name__)

#: Between rounds; what others wrote is found as late.
ROUND_S = 5.0
#: What was written is listed for others, and for the next start, so late, or once it is so many objects.
LIST_S = 2.0
LIST_OBJECTS = 64
_MAX_DELETED = 100  #: objects in a round
_MAX_UNUSABLE_TOLD = 20


class Upkeep:
    """The thread that keeps a store's index and its manifests in step. Any thread may call."""

    def __init__(
        self,
        filesystem: RemoteFilesystem,
        catalog: Catalog,
        index: RemoteIndex,
        reading: Breaker,
        writing: Breaker,
        on_changes: Callable[[Changes], None] | None,
    ) -> None:
        """`on_changes` is told, by this thread, which blocks others wrote and removed."""
        self._fs = filesystem
        self._catalog = catalog
        self._index = index
        self._reading = reading
        self._writing = writing
        self._on_changes = on_changes
        self.unusable: list[Unusable] | None = None  #: folders beside ours; None: not looked at yet
        self._is_opened = False

        self._lock = threading.Condition()
        self._unlisted: list[Rows] = []
        self._num_unlisted_objects = 0
        self._list_by_s = float("inf")
        self._doomed: deque[bytes] = deque()  # objects without blocks, to be deleted once that is listed
        self._deleting: bytes | None = None
        self.num_deleted = 0  #: objects, since the start
        self._num_wanted = self._num_done = 0  # rounds that somebody waits for
        self._error: KvrayError | None = None  # of the last round
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="remote-upkeep", daemon=True)
        self._thread.start()

    @property
    def num_doomed(self) -> int:
        """Objects that are to be deleted."""
        return len(self._doomed)

    def sync(self, deadline_s: float) -> None:
        """Return when a whole round was done since the call: all is listed, and what others listed is known.

        Raises:
            StoreError: the round failed, or is not done by then.
        """
        with self._lock:
            self._num_wanted += 1
            wanted = self._num_wanted
            self._lock.notify_all()
            if not self._lock.wait_for(lambda: self._num_done >= wanted or self._is_stopped, deadline_s):
                raise StoreError(f"{self._fs.uri} has not answered within {deadline_s:g} s")
            if self._num_done < wanted:
                raise StoreError("the remote store is closed")
            if self._error is not None:
                raise StoreError(self._error.message)

    def add(self, rows: Rows) -> None:
        """Note the blocks of an object that was written: the next manifest has them."""
        with self._lock:
            self._unlisted.append(rows)
            self._num_unlisted_objects += 1
            is_enough = self._num_unlisted_objects >= LIST_OBJECTS
            self._list_by(0.0 if is_enough else time.monotonic() + LIST_S)

    def remove(self, names: Sequence[bytes], digests: set[bytes]) -> None:
        """Forget blocks, and delete those of the objects that they lay in which are empty then, by and by."""
        rows = removed_rows(names, self._index.times(names, now_us()))
        with self._lock:
            self._index.apply(rows)
            self._unlisted.append(rows)
            self._doomed.extend(digest for digest in sorted(digests) if self._index.is_empty(digest))
            self._list_by(time.monotonic() + LIST_S)

    def spare(self, digest: bytes, end_s: float) -> None:
        """See to it that an object is not deleted: it is about to be written anew.

        Raises:
            StoreError: it is being deleted still at `end_s`.
        """
        with self._lock:
            if not self._lock.wait_for(lambda: self._deleting != digest, max(0.0, end_s - time.monotonic())):
                raise StoreError(f"{self._fs.uri} has not answered in time: an object is being deleted")
            if digest in self._doomed:
                self._doomed.remove(digest)

    def reopen(self) -> None:
        """Look after the folder in the next round: something is wrong with it."""
        self._is_opened = False

    def stop(self, timeout_s: float) -> bool:
        """Do a last round, and end the thread; False where it hangs."""
        with self._lock:
            self._is_stopped = True
            self._lock.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _list_by(self, time_s: float) -> None:
        self._list_by_s = min(self._list_by_s, time_s)
        self._lock.notify_all()

    # ------------------------------------------------------------------------------------------------------- the rounds

    def _run(self) -> None:
        next_s = 0.0
        is_last = False
        while not is_last:
            with self._lock:
                while not (self._is_stopped or self._num_wanted > self._num_done):
                    wait_s = min(next_s, self._list_by_s) - time.monotonic()
                    if wait_s <= 0:
                        break
                    self._lock.wait(wait_s)
                wanted, is_last = self._num_wanted, self._is_stopped
                is_waited_for = wanted > self._num_done
                self._list_by_s = float("inf")
            error: KvrayError | None = None
            try:
                self._round(is_waited_for=is_waited_for)
            except KvrayError as failed:
                error = failed
            with self._lock:
                self._num_done, self._error = wanted, error
                self._lock.notify_all()
            rest_s = ROUND_S * random.uniform(0.8, 1.2)
            next_s = self._reading.due_s if self._reading.reason is not None else time.monotonic() + rest_s

    def _round(self, *, is_waited_for: bool) -> None:
        if self._reading.reason is not None and not is_waited_for and not self._reading.takes_trial(time.monotonic()):
            self._reading.check()
        if self._reading.reason is not None or not self._is_opened:
            self._open()
        self._find_new()
        self._list_own(is_waited_for=is_waited_for)
        if self._catalog.num_unread:
            raise StoreError(f"{self._fs.uri}: {self._catalog.num_unread} manifests cannot be read")

    def _open(self) -> None:
        try:
            denied = self._catalog.open()
            unusable = self._catalog.strangers() if self.unusable is None else self.unusable
        except StoreError as error:
            self._reading.on_failed(error.message, time.monotonic(), is_lasting=True)
            raise
        if denied is not None:
            self._writing.on_failed(denied.message, time.monotonic(), is_lasting=True)
        if self.unusable is None:
            for folder in unusable[:_MAX_UNUSABLE_TOLD]:
                logger.warning("%s: folder %s is not used: %s", self._fs.uri, folder.name, folder.reason)
            if len(unusable) > _MAX_UNUSABLE_TOLD:
                logger.warning("%s: %d more folders are not used", self._fs.uri, len(unusable) - _MAX_UNUSABLE_TOLD)
            self.unusable = unusable
        self._is_opened = True
        self._reading.on_worked(was_trial=True)

    def _find_new(self) -> None:
        try:
            parts = self._catalog.read_new()
        except StoreError as error:
            self._reading.on_failed(error.message, time.monotonic(), is_lasting=isinstance(error, DeniedError))
            raise
        for rows in parts:
            changes = self._index.apply(rows)
            if self._on_changes is not None and (changes.stored or changes.removed):
                self._on_changes(changes)

    def _list_own(self, *, is_waited_for: bool) -> None:
        """Write the manifest of what was written and removed, merge manifests, delete objects."""
        with self._lock:
            has_work = bool(self._unlisted or self._doomed)
        if self._writing.reason is not None:
            if is_waited_for:
                if not self._can_write(is_needed=has_work):
                    return
            elif not has_work or not self._writing.takes_trial(time.monotonic()):
                return
        with self._lock:
            unlisted, self._unlisted = self._unlisted, []
            num_doomed = min(len(self._doomed), _MAX_DELETED)
            self._num_unlisted_objects = 0
        try:
            if unlisted:
                rows = np.concatenate(unlisted)
                self._catalog.publish(rows)
                unlisted = []
                self._writing.on_worked(was_trial=True)
            self._delete(num_doomed)
            self._catalog.merge()
        except StoreError as error:
            is_denied = isinstance(error, DeniedError)
            self._writing.on_failed(error.message, time.monotonic(), is_lasting=is_denied)
            with self._lock:
                if is_denied:  # who may not write cannot tell others what is removed
                    unlisted = [rows[~rows["is_removed"]] for rows in unlisted]
                    self._doomed.clear()
                self._unlisted = [rows for rows in unlisted if len(rows)] + self._unlisted
            raise

    def _can_write(self, *, is_needed: bool) -> bool:
        """Try whether the store can be written again; denied access is no error where nothing is to be written."""
        try:
            self._catalog.describe()
        except StoreError as error:
            self._writing.on_failed(error.message, time.monotonic())
            if is_needed or not isinstance(error, DeniedError):
                raise
            return False
        self._writing.on_worked(was_trial=True)
        return True

    def _delete(self, num_objects: int) -> None:
        for _ in range(num_objects):
            with self._lock:
                if not self._doomed:
                    return
                digest = self._doomed.popleft()
                if not self._index.is_empty(digest):  # written anew
                    continue
                self._deleting = digest
            try:
                self._fs.delete(self._catalog.path(OBJECTS, digest.hex()))
                self.num_deleted += 1
            except StoreError:
                with self._lock:
                    self._doomed.append(digest)
                raise
            finally:
                with self._lock:
                    self._deleting = None
                    self._lock.notify_all()
