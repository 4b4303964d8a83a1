"""Responses as requests find them: those that this process keeps, and through others those that they keep."""

from __future__ import annotations

import time
from collections.abc import Callable
from secrets import token_hex
from typing import Final, Protocol

from cluster.openai.errors import shown
from cluster.openai.responses.store import ResponseStore, StoredResponse
from messages.errors import RequestError

_PREFIX: Final = "resp_"
_RANDOM_CHARS: Final = 32  #: of an id, behind the name of the process that has the response
_NUMBER_CHARS: Final = 4  #: of an item's id, behind that of its response


class OtherStores(Protocol):
    """The stores of other processes that answer requests."""

    async def ask(self, holder: str, owner: str, response_id: str, *, drops: bool) -> StoredResponse | None:
        """Ask one of them for a response, which it forgets where it `drops` it. None: it, or the process, is not there.

        Raises:
            CapacityError: nobody can be asked now.
            WorkerError: it does not answer in time.
        """
        ...


class KeptResponses:
    """All responses that can be found. Their ids name the process that keeps them, and cannot be guessed."""

    def __init__(
        self,
        store: ResponseStore,
        holder: str = "",
        others: OtherStores | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make it.

        Args:
            store: of this process.
            holder: the name of this process, letters and digits.
            others: who asks the other processes; None: there are none.
            clock: seconds, for the age of responses.
        """
        self.store = store
        self._holder = holder
        self._others = others
        self._clock = clock

    def new_key(self) -> str:
        """Return what the id of a new response, and those of its items, are made of."""
        return self._holder + token_hex(_RANDOM_CHARS // 2)

    def keep(self, owner: str, response_id: str, stored: StoredResponse) -> None:
        """Keep a response that was made here."""
        self.store.put(owner, response_id, stored, self._clock())

    async def find(self, param: str, owner: str, response_id: str) -> StoredResponse:
        """Return the response that the field `param` names.

        Raises:
            RequestError: the owner has none of that id (404).
            CapacityError, WorkerError: whoever may have it cannot be asked.
        """
        found = self.store.find(owner, response_id, self._clock())
        holder = _holder(response_id)
        if found is None and self._others is not None and holder not in ("", self._holder):
            found = await self._others.ask(holder, owner, response_id, drops=False)
        if found is None:
            raise _not_found(param, response_id)
        return found

    async def find_of_item(self, param: str, owner: str, item_id: str) -> StoredResponse:
        """Return the response that the item is of whose id the field `param` is. Raises as `find` does."""
        key = item_id.partition("_")[2][:-_NUMBER_CHARS]
        if not key:
            raise _not_found(param, item_id)
        return await self.find(param, owner, _PREFIX + key)

    async def drop(self, owner: str, response_id: str) -> None:
        """Forget a response.

        Raises:
            RequestError: the owner has none of that id (404).
            CapacityError, WorkerError: whoever may have it cannot be asked.
        """
        if self.store.drop(owner, response_id, self._clock()):
            return
        holder = _holder(response_id)
        if self._others is None or holder in ("", self._holder):
            raise _not_found("response_id", response_id)
        if await self._others.ask(holder, owner, response_id, drops=True) is None:
            raise _not_found("response_id", response_id)

    def answer(self, owner: str, response_id: str, *, drops: bool) -> StoredResponse | None:
        """Answer another process's `OtherStores.ask`."""
        found = self.store.find(owner, response_id, self._clock())
        if drops:
            self.store.drop(owner, response_id, self._clock())
        return found


def id_of(key: str) -> str:
    """Return the id of the response with this key."""
    return _PREFIX + key


def item_id(prefix: str, key: str, number: int) -> str:
    """Return the id of item `number` of the response with this key; its input comes before its output."""
    return f"{prefix}_{key}{number:0{_NUMBER_CHARS}x}"


def _holder(asked: str) -> str:
    return asked.removeprefix(_PREFIX)[:-_RANDOM_CHARS]


def _not_found(param: str, asked: str) -> RequestError:
    return RequestError(
        f"{param}: got {shown(asked)}, want one of a response that is still kept: they are kept in memory, for a while"
        " and as far as there is room (settings responses.*), not with store: false, and lost with the process that"
        " made them",
        param=param,
        code="previous_response_not_found" if param == "previous_response_id" else "not_found",
        status=404,
    )
