"""The thread of the ucx road: it alone tells UCX anything, and it looks after all pulls.

    waiting  --- connected --->  asked  --- last message landed --->  done
       |                           |  stalled, cancelled, refused, lost
       `------> failed             `--> settling  --- every receive is over --->  failed

A pull has not ended before UCX is done with its target. To end receives early the connection is closed, which also
ends the other pulls over it. Receives that do not end even then never will: `quarantine_s` is infinite.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import assert_never

from transport.protocol import Link, RegionError, RegionMemory, TransferError
from transport.ucx.library import SocketAddress
from transport.ucx.pull import Pull, gather
from transport.ucx.wire import (
    NUM_TAGS,
    Accepted,
    Body,
    Connect,
    Disconnect,
    PullRefused,
    PullRequest,
    Range,
    Refused,
    encode,
    pack_ranges,
    unpack_ranges,
)
from transport.ucx.worker import Connection, Transfer, UcxError, Worker

log = logging.getLogger(__name__)

_QUICK_STEP_S = 0.0002  #: between two looks at receives while messages land; UCX's own thread moves the bytes
_SLOW_STEP_S = 0.005  #: and at what is less urgent
_SETTLE_S = 2.0  #: receives are over 1-60 ms after the connection was closed
_GRACE_S = 0.5  #: for a cancelled pull to run to its end, where closing would hit others
_KNOCK_S = 10.0  #: between a client's arrival and the word, over the link, that it would come
_WINDOW = 16  #: receives looked at in one step: messages arrive in the order in which they were sent
_EXIT_S = 5.0


@dataclass(slots=True)
class _Way:
    """The way from a peer's region to here: the connection that its blocks come over."""

    number: int
    address: SocketAddress  #: of its listener
    connection: Connection
    is_announced: bool = False
    is_ready: bool = False


@dataclass(slots=True)
class _Guest:
    """A peer that pulls from this process, or will."""

    number: int
    address: SocketAddress
    announced_s: float
    connection: Connection | None = None  #: None: the client has not arrived


@dataclass(slots=True, eq=False)
class _LinkState:
    """The connections that UCX has for one link, both ways."""

    link: Link
    loop: asyncio.AbstractEventLoop
    way: _Way | None = None
    guest: _Guest | None = None
    heard_s: float = -math.inf  #: when a message of it landed last
    carriers: str = ""


class Mover:
    """The ucx road's thread. Any thread may call `post`, `end` and `carriers`; the other methods go through `post`."""

    def __init__(
        self,
        make_worker: Callable[[Callable[[], None]], Worker],
        registered: Mapping[bytes, RegionMemory],
        prepare_thread: Callable[[], None] | None,
    ) -> None:
        """Start the thread. `make_worker(on_arrival)` makes its UCX worker; a ConfigError of it is passed on."""
        self.num_unsettled = 0
        self.has_ended = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.worker = make_worker(partial(self.post, lambda: None))  # the step after it looks who has arrived
        self._registered = registered
        self._prepare_thread = prepare_thread
        self._states: dict[Link, _LinkState] = {}
        self._pulls: list[tuple[_LinkState, Pull]] = []
        self._sends: list[Transfer] = []
        self._leftovers: list[Transfer] = []  # nobody waits for them, but UCX may still use their buffers
        self._landed_s = 0.0  # when a message did, or was asked for
        self._next_tag = secrets.randbelow(NUM_TAGS)
        self._numbers = count()
        self._close_by_s = math.inf
        # A daemon, so that a process can exit without `close`; `end` sees to it that UCX's thread is stopped before.
        self._thread = threading.Thread(target=self._run, name="ucx", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    def post(self, command: Callable[..., None], *arguments: object) -> None:
        """Let the road's thread call `command` with `arguments`. From any thread."""
        self._commands.put(partial(command, *arguments))

    def end(self) -> None:
        """Close, and wait for the road's thread, at the process's exit."""
        self.post(self.close)
        self._thread.join(_EXIT_S)

    def carriers(self, link: Link) -> str:
        """Return UCX's transports to that peer; "" while there is no connection. From any thread."""
        state = self._states.get(link)
        return "" if state is None else state.carriers

    # ------------------------------------------------------------------------------------------------------- commands

    def begin(self, pull: Pull) -> None:
        """Take on a pull, whose `tell` will be called once."""
        if self._is_closing:
            pull.tell(TransferError("ucx: the transport was closed"))
            return
        state = self._state_of(pull.link, pull.loop)
        if state.way is not None and (state.way.connection.error is not None or state.way.address != pull.address):
            self._disconnect(state, state.way.connection.error or "the peer listens elsewhere now")
        self._pulls.append((state, pull))
        if state.way is None:
            self._connect(state, pull.address)
        elif state.way.is_ready:
            self._ask(state, state.way, pull)

    def keep_registered(self, memory: RegionMemory) -> None:
        """Have UCX register memory once, not by message; where it does not, messages go all the same."""
        if self._is_closing:
            return
        try:
            self.worker.keep_registered(memory.slice(0, memory.num_bytes), memory.num_bytes)
        except UcxError as error:
            log.info("ucx: %d bytes are registered as they are moved, not once: %s", memory.num_bytes, error)

    def cancel(self, pull: Pull) -> None:
        """End a pull soon, as failed; one that is over is left alone."""
        state = next((state for state, each in self._pulls if each is pull), None)
        if state is None or pull.failure is not None:
            return
        pull.failure = TransferError("ucx: cancelled")
        if pull.connection is None:
            self._finish(state, pull)
        else:
            has_others = any(other.connection is pull.connection for _, other in self._pulls if other is not pull)
            pull.settle_by_s = time.monotonic() + (_GRACE_S if has_others else 0)

    def hear(self, loop: asyncio.AbstractEventLoop, link: Link, message: Body) -> None:
        """Handle a message that the peer's end of the road sent over `link`."""
        if self._is_closing:
            return
        state = self._state_of(link, loop)
        match message:
            case Connect(number, host, port):
                self._drop_guest(state)
                state.guest = _Guest(number, (host, port), time.monotonic())
                self._receive_guest(state, state.guest)
            case Disconnect(number):
                if state.guest is not None and state.guest.number == number:
                    self._drop_guest(state)
            case Accepted(number):
                if state.way is not None and state.way.number == number:
                    self._go_on(state, state.way)
            case Refused(number, reason, is_gone):
                if state.way is not None and state.way.number == number:
                    kind = RegionError if is_gone else TransferError
                    self._disconnect(state, f"refused: {reason}", kind)
            case PullRequest():
                self._serve(state, message)
            case PullRefused():
                self._take_refusal(state, message)
            case _:
                assert_never(message)

    def lose(self, link: Link) -> None:
        """Forget a peer that is gone: its pulls fail, its connections are closed."""
        state = self._states.pop(link, None)
        if state is not None:
            self._disconnect(state, "the peer was lost")
            self._drop_guest(state)

    def close(self) -> None:
        """Stop taking pulls, end those under way, close all connections, and let the thread end."""
        if not self._is_closing:
            self._close_by_s = time.monotonic() + _SETTLE_S
            for link in list(self._states):
                state = self._states.pop(link)
                self._disconnect(state, "the transport was closed")
                self._drop_guest(state)

    # ----------------------------------------------------------------------------------------------------- the thread

    @property
    def _is_closing(self) -> bool:
        return self._close_by_s < math.inf

    def _run(self) -> None:
        try:
            if self._prepare_thread is not None:
                self._prepare_thread()
            while not self._can_end():
                self._take_commands()
                self._step(time.monotonic())
        finally:
            self.has_ended = True
            self.close()
            for state, pull in list(self._pulls):
                self._give_up(state, pull)
            _for_ever.extend(self._sends + self._leftovers)
            self.worker.close()
            atexit.unregister(self.end)

    def _can_end(self) -> bool:
        is_idle = not self._pulls and not self._sends and not self._leftovers
        return self._is_closing and (is_idle or time.monotonic() > self._close_by_s)

    def _take_commands(self) -> None:
        wait_s: float | None = None
        if any(pull.connection is not None for _, pull in self._pulls):
            # An eighth of the time since something landed: late by so much at most, and seldom awake for large ones.
            wait_s = min(max(_QUICK_STEP_S, (time.monotonic() - self._landed_s) / 8), _SLOW_STEP_S)
        elif self._pulls or self._sends or self._leftovers or self.worker.arrived:
            wait_s = _SLOW_STEP_S
        with suppress(queue.Empty):
            self._commands.get(timeout=wait_s)()
            while True:
                self._commands.get_nowait()()

    def _step(self, now_s: float) -> None:
        for state in list(self._states.values()):
            if state.way is not None and not state.way.is_announced:
                self._announce(state, state.way)
            if state.guest is not None and state.guest.connection is None:
                self._receive_guest(state, state.guest)
        self.worker.refuse_strangers(_KNOCK_S)
        for state, pull in list(self._pulls):
            if pull.has_ended:  # another's failure took it along
                continue
            if pull.failure is not None:
                self._settle(state, pull, now_s)
            else:
                self._advance(state, pull, now_s)
        self._sends = [send for send in self._sends if not send.is_over]
        self._leftovers = [transfer for transfer in self._leftovers if not transfer.is_over]

    def _advance(self, state: _LinkState, pull: Pull, now_s: float) -> None:
        for receive in pull.take_over(_WINDOW):
            error = receive.transfer.error
            if error is not None:
                self._disconnect(state, error)
                return
            state.heard_s = self._landed_s = now_s
            pull.land(receive)
        way = state.way
        if pull.connection is not None and not pull.pending:
            state.carriers = pull.connection.carriers() or state.carriers
            self._finish(state, pull)
        elif way is not None and way.connection.error is not None:
            self._disconnect(state, way.connection.error)
        elif now_s > max(pull.begun_s, state.heard_s) + pull.stall_s:
            what = "the peer did not answer" if pull.connection is None else "nothing arrived"
            self._disconnect(state, f"{what} for {pull.stall_s:g} s")

    def _settle(self, state: _LinkState, pull: Pull, now_s: float) -> None:
        pull.take_over(len(pull.pending))
        if not pull.pending:
            self._finish(state, pull)
        elif now_s > pull.settle_by_s:
            if state.way is not None and pull.connection is state.way.connection:
                self._disconnect(state, "a pull was given up")
            else:
                self._give_up(state, pull)

    def _finish(self, state: _LinkState, pull: Pull) -> None:
        self._pulls.remove((state, pull))
        pull.has_ended = True
        pull.tell(pull.failure)

    def _give_up(self, state: _LinkState, pull: Pull) -> None:
        failure = pull.failure or TransferError("ucx: the transport was closed")
        self._leftovers.extend(receive.transfer for receive in pull.pending)
        if any(len(receive.message.copies) == 1 for receive in pull.pending):  # gathered ones land in a buffer of ours
            failure.quarantine_s = math.inf
            self.num_unsettled += 1
            log.error("ucx: %d receives did not end with the connection; their targets are lost", len(pull.pending))
        pull.failure = failure
        self._finish(state, pull)

    def _state_of(self, link: Link, loop: asyncio.AbstractEventLoop) -> _LinkState:
        return self._states.setdefault(link, _LinkState(link, loop))

    def _say(self, state: _LinkState, message: Body) -> None:
        call_soon(state.loop, self._send_now, state.link, encode(message))

    def _send_now(self, link: Link, body: bytes) -> None:
        if not link.send("ucx", body):
            self.post(self.lose, link)

    # ----------------------------------------------------------------------------------------------------- as a puller

    def _connect(self, state: _LinkState, address: SocketAddress) -> None:
        self._leftovers += self.worker.take_strays()
        try:
            state.way = _Way(next(self._numbers), address, self.worker.connect(address))
        except UcxError as error:
            self._disconnect(state, f"no connection to {address}: {error}")
        else:
            self._announce(state, state.way)

    def _announce(self, state: _LinkState, way: _Way) -> None:
        with suppress(UcxError):  # that does not know its own address yet
            host, port = way.connection.local_address()
            way.is_announced = True
            self._say(state, Connect(way.number, host, port))

    def _go_on(self, state: _LinkState, way: _Way) -> None:
        way.is_ready = True
        state.carriers = way.connection.carriers()
        for each, pull in list(self._pulls):
            if each is state and pull.connection is None and pull.failure is None:
                self._ask(state, way, pull)

    def _ask(self, state: _LinkState, way: _Way, pull: Pull) -> None:
        first_tag = self._next_tag
        self._next_tag = (first_tag + len(pull.messages)) % NUM_TAGS
        pull.post(self.worker, way.connection, first_tag)
        self._landed_s = time.monotonic()
        ranges, counts = pack_ranges(pull.messages)
        source = pull.source
        self._say(state, PullRequest(first_tag, way.number, source.nonce, source.num_bytes, ranges, counts))

    def _take_refusal(self, state: _LinkState, refusal: PullRefused) -> None:
        for each, pull in self._pulls:
            if each is state and pull.connection is not None and pull.first_tag == refusal.first_tag:
                kind = RegionError if refusal.is_region else TransferError
                pull.failure = pull.failure or kind(f"ucx: refused: {refusal.reason}")
                pull.settle_by_s = time.monotonic() + _SETTLE_S
                self.worker.cancel([receive.transfer for receive in pull.pending])  # nothing was sent for them

    def _disconnect(self, state: _LinkState, reason: str, kind: type[TransferError] = TransferError) -> None:
        """Close the way to the peer, if any: its pulls settle; those that wait fail at once, with `kind`."""
        way, state.way = state.way, None
        pulls = [pull for each, pull in self._pulls if each is state]
        if way is not None:
            log.info("ucx: a connection is closed: %s", reason)
            for pull in pulls:
                self.worker.cancel([receive.transfer for receive in pull.pending])
            self._leftovers.append(way.connection.close())
            self._say(state, Disconnect(way.number))
        for pull in pulls:
            if pull.connection is None:
                pull.failure = pull.failure or kind(f"ucx: {reason}")
                self._finish(state, pull)
            elif way is not None and pull.connection is way.connection:
                pull.failure = pull.failure or TransferError(f"ucx: {reason}")
                pull.settle_by_s = time.monotonic() + _SETTLE_S

    # ----------------------------------------------------------------------------------------------------- as a source

    def _receive_guest(self, state: _LinkState, guest: _Guest) -> None:
        if guest.address in self.worker.arrived:
            try:
                guest.connection = self.worker.accept(guest.address)
            except UcxError as error:
                self._refuse_guest(state, guest, str(error))
            else:
                state.carriers = state.carriers or guest.connection.carriers()
                self._say(state, Accepted(guest.number))
        elif time.monotonic() > guest.announced_s + _KNOCK_S:
            self._refuse_guest(state, guest, f"no client came from {guest.address}")

    def _refuse_guest(self, state: _LinkState, guest: _Guest, reason: str) -> None:
        self._say(state, Refused(guest.number, reason, is_gone=False))
        state.guest = None

    def _drop_guest(self, state: _LinkState) -> None:
        guest, state.guest = state.guest, None
        if guest is not None and guest.connection is not None:
            self._leftovers.append(guest.connection.close())

    def _serve(self, state: _LinkState, request: PullRequest) -> None:
        guest = state.guest
        if guest is None or guest.connection is None or guest.number != request.number or guest.connection.error:
            reason = f"connection {request.number} is closed"
            self._say(state, PullRefused(request.first_tag, reason, is_region=False))
            return
        try:
            memory, messages = self._check(request)
        except (RegionError, ValueError) as error:
            self._say(state, PullRefused(request.first_tag, str(error), is_region=True))
            return
        for index, ranges in enumerate(messages):
            buffer = memory.slice(*ranges[0]) if len(ranges) == 1 else gather(memory, ranges)
            num_bytes = sum(each.num_bytes for each in ranges)
            self._sends.append(guest.connection.send(buffer, num_bytes, (request.first_tag + index) % NUM_TAGS))

    def _check(self, request: PullRequest) -> tuple[RegionMemory, Sequence[Sequence[Range]]]:
        memory = self._registered.get(request.nonce)
        if memory is None:
            raise RegionError("no region of that nonce is registered")
        if memory.num_bytes != request.num_bytes:
            raise RegionError(f"the region has {memory.num_bytes} bytes, {request.num_bytes} were described")
        messages = unpack_ranges(request, memory.num_bytes)
        if not memory.is_host and any(len(ranges) > 1 for ranges in messages):
            raise RegionError("ranges of device memory cannot be gathered")
        return memory, messages


#: What UCX may use until the process ends.
_for_ever: list[Transfer] = []


def call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> None:
    """Let the event loop call `callback`; nothing happens where it is closed, for nobody waits there any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)
