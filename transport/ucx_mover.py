"""The thread of the ucx road: it alone tells UCX anything, and it looks after all pulls.

    waiting  --- both endpoints made --->  asked  --- last message landed --->  done
       |                                     |  stalled, cancelled, refused, lost
       `------------> failed                 `--> settling  --- every receive is over --->  failed

A pull has not ended before UCX is done with its target. To end receives early the endpoint is closed, which also ends
all other pulls between the two processes. Receives that do not end even then never will: `quarantine_s` is infinite.
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from transport.protocol import Link, RegionError, RegionMemory, TransferError
from transport.ucx_pull import Pull, gather
from transport.ucx_wire import (
    NUM_TAGS,
    Body,
    Closed,
    Hello,
    PullRefused,
    PullRequest,
    Range,
    Reset,
    encode,
    pack_ranges,
    unpack_ranges,
)
from transport.ucx_worker import Endpoint, Transfer, UcxError, UcxWorker

log = logging.getLogger(__name__)

_PULL_STEP_S = 0.0002  #: between two looks at receives; UCX's own thread moves the bytes
_SEND_STEP_S = 0.005  #: between two looks at what nobody waits for
_SETTLE_S = 2.0  #: receives are over 1-60 ms after the endpoint was closed
_GRACE_S = 0.5  #: for a cancelled pull to run to its end, where closing would hit others
_WINDOW = 16  #: receives looked at in one step: messages arrive in the order in which they were sent
_EXIT_S = 5.0


@dataclass(slots=True, eq=False)
class _Peer:
    """The other end of a link."""

    link: Link
    loop: asyncio.AbstractEventLoop
    address: bytes = b""  #: of its worker, once it said so
    number: int = -1  #: of the last endpoint made for it
    endpoint: Endpoint | None = None  #: the open one
    is_ready: bool = False  #: its partner is made, too
    has_asked: bool = False  #: we have, for its address
    heard_s: float = -math.inf  #: when a message from it landed last
    carriers: str = ""
    last_tag: int | None = None  #: of its requests


class Mover:
    """See the module. Commands are its public methods, handed over by `post`; the other methods are the thread's."""

    def __init__(
        self,
        worker: UcxWorker,
        registered: Mapping[bytes, RegionMemory],
        prepare_thread: Callable[[], None] | None,
    ) -> None:
        self.num_unsettled = 0
        self.has_ended = False
        self._worker = worker
        self._registered = registered
        self._prepare_thread = prepare_thread
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._peers: dict[Link, _Peer] = {}
        self._pulls: list[tuple[_Peer, Pull]] = []
        self._sends: list[tuple[_Peer, Transfer]] = []
        self._leftovers: list[Transfer] = []  # nobody waits for them, but UCX may still use their buffers
        self._next_tag = secrets.randbelow(NUM_TAGS)
        self._close_by_s = math.inf
        # A daemon, so that a process can exit without `close`; `end` sees to it that UCX's thread is stopped before.
        self._thread = threading.Thread(target=self._run, name="ucx", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    def post(self, command: Callable[..., None], *arguments: object) -> None:
        """Let the thread call it. From any thread."""
        self._commands.put(partial(command, *arguments))

    def end(self) -> None:
        """Close and wait for the thread, at the process's exit."""
        self.post(self.close)
        self._thread.join(_EXIT_S)

    def carriers(self, link: Link) -> str:
        """What UCX uses for that peer. From any thread."""
        peer = self._peers.get(link)
        return "" if peer is None else peer.carriers

    # Commands

    def begin(self, pull: Pull) -> None:
        """Take it on."""
        if self._close_by_s < math.inf:
            pull.tell(TransferError("ucx: the transport was closed"))
            return
        peer = self._peer_of(pull.link, pull.loop)
        self._pulls.append((peer, pull))
        if peer.endpoint is not None and not peer.endpoint.is_alive:
            self._disconnect(peer, peer.endpoint.error(), spare=pull)
        self._go_on(peer)

    def cancel(self, pull: Pull) -> None:
        """End it soon, as failed."""
        peer = next((peer for peer, each in self._pulls if each is pull), None)
        if peer is None or pull.failure is not None:
            return
        pull.failure = TransferError("ucx: cancelled")
        if pull.endpoint is None:
            self._finish(peer, pull)
            return
        others = [each for each, other in self._pulls if other is not pull] + [each for each, _ in self._sends]
        pull.settle_by_s = time.monotonic() + (_GRACE_S if peer in others else 0)

    def hear(self, loop: asyncio.AbstractEventLoop, link: Link, message: Body) -> None:
        """The peer said something."""
        if self._close_by_s < math.inf:
            return
        peer = self._peer_of(link, loop)
        match message:
            case Hello():
                self._meet(peer, message)
            case Reset(number, reason):
                # Of our last number and closed here, too: crossed our own. Of a higher one: it could not be made there.
                if number > peer.number or (number == peer.number and peer.endpoint is not None):
                    self._disconnect(peer, f"by the peer: {reason}", is_told=True)
            case PullRequest():
                self._serve(peer, message)
            case PullRefused():
                self._take_refusal(peer, message)
            case Closed(last_tag):
                for pull in self._pulls_of(peer):
                    if not _was_heard(pull, last_tag):
                        pull.failure = pull.failure or RegionError("ucx: the peer closed its transport")
                self._disconnect(peer, "the peer closed its transport", is_told=True)
            case _:
                assert_never(message)

    def lose(self, link: Link) -> None:
        """The peer is gone."""
        peer = self._peers.pop(link, None)
        if peer is not None:
            self._disconnect(peer, "the peer was lost", is_told=True)

    def close(self) -> None:
        """End everything."""
        if self._close_by_s == math.inf:
            self._close_by_s = time.monotonic() + _SETTLE_S
            for link in list(self._peers):
                peer = self._peers.pop(link)
                self._say(peer, Closed(peer.last_tag))
                self._disconnect(peer, "the transport was closed", is_told=True)

    # The thread

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
            for peer, pull in list(self._pulls):
                self._give_up(peer, pull)
            _for_ever.extend(self._leftovers)
            self._sends.clear()
            self._worker.close()
            atexit.unregister(self.end)

    def _can_end(self) -> bool:
        is_idle = not self._pulls and not self._sends and not self._leftovers
        return self._close_by_s < math.inf and (is_idle or time.monotonic() > self._close_by_s)

    def _take_commands(self) -> None:
        wait_s: float | None = None
        if any(pull.endpoint is not None for _, pull in self._pulls):
            wait_s = _PULL_STEP_S
        elif self._pulls or self._sends or self._leftovers:
            wait_s = _SEND_STEP_S
        with suppress(queue.Empty):
            self._commands.get(timeout=wait_s)()
            while True:
                self._commands.get_nowait()()

    def _step(self, now_s: float) -> None:
        for peer, pull in list(self._pulls):
            if pull.failure is not None:
                self._settle(peer, pull, now_s)
            else:
                self._advance(peer, pull, now_s)
        self._sends = [(peer, send) for peer, send in self._sends if not send.is_over]
        self._leftovers = [transfer for transfer in self._leftovers if not transfer.is_over]

    def _advance(self, peer: _Peer, pull: Pull, now_s: float) -> None:
        for receive in pull.take_over(_WINDOW):
            error = receive.transfer.error()
            if error is not None:
                self._disconnect(peer, error)
                return
            peer.heard_s = now_s
            pull.land(receive)
        if pull.endpoint is not None and not pull.pending:
            peer.carriers = pull.endpoint.carriers() or peer.carriers
            self._finish(peer, pull)
        elif pull.endpoint is not None and not pull.endpoint.is_alive:
            self._disconnect(peer, pull.endpoint.error())
        elif now_s > max(pull.begun_s, peer.heard_s) + pull.stall_s:
            if pull.endpoint is None:
                pull.failure = TransferError(f"ucx: the peer did not answer for {pull.stall_s:g} s")
                self._finish(peer, pull)
            else:
                self._disconnect(peer, f"nothing arrived for {pull.stall_s:g} s")

    def _settle(self, peer: _Peer, pull: Pull, now_s: float) -> None:
        pull.take_over(len(pull.pending))
        if not pull.pending:
            self._finish(peer, pull)
        elif now_s > pull.settle_by_s:
            if pull.endpoint is peer.endpoint:
                self._disconnect(peer, "a pull was given up")
            else:
                self._give_up(peer, pull)

    def _finish(self, peer: _Peer, pull: Pull) -> None:
        self._pulls.remove((peer, pull))
        pull.tell(pull.failure)

    def _give_up(self, peer: _Peer, pull: Pull) -> None:
        failure = pull.failure or TransferError("ucx: the transport was closed")
        self._leftovers.extend(receive.transfer for receive in pull.pending)
        if any(len(receive.message.copies) == 1 for receive in pull.pending):  # gathered ones land in a buffer of ours
            failure.quarantine_s = math.inf
            self.num_unsettled += 1
            log.error("ucx: %d receives did not end with the connection; their targets are lost", len(pull.pending))
        pull.failure = failure
        self._finish(peer, pull)

    # Connections

    def _peer_of(self, link: Link, loop: asyncio.AbstractEventLoop) -> _Peer:
        return self._peers.setdefault(link, _Peer(link, loop))

    def _pulls_of(self, peer: _Peer) -> list[Pull]:
        return [pull for each, pull in self._pulls if each is peer]

    def _say(self, peer: _Peer, message: Body) -> None:
        call_soon(peer.loop, self._send_now, peer.link, encode(message))

    def _send_now(self, link: Link, body: bytes) -> None:
        if not link.send("ucx", body):
            self.post(self.lose, link)

    def _meet(self, peer: _Peer, hello: Hello) -> None:
        if peer.endpoint is not None and hello.address != peer.address:
            self._disconnect(peer, "the peer has another worker now", is_told=True)
        peer.address = hello.address
        own = self._worker.address
        next_number = self._worker.next_number(peer.address)
        if peer.endpoint is not None and hello.number == peer.number:
            peer.is_ready = True
        elif own == peer.address:  # an endpoint to oneself is its own partner, the number means nothing
            peer.is_ready = peer.endpoint is not None or self._connect(peer, 0)
        elif own < peer.address:
            # A question that we have answered, or word of an endpoint that we have closed since, needs nothing.
            is_used_up = peer.endpoint is None or hello.next_number > peer.number
            if hello.number is None and is_used_up:
                self._connect(peer, max(next_number, hello.next_number))
        elif hello.number is not None and hello.number >= next_number:
            peer.is_ready = self._connect(peer, hello.number)
        elif peer.endpoint is None:
            self._say_hello(peer)
        if peer.is_ready:
            self._go_on(peer)

    def _connect(self, peer: _Peer, number: int) -> bool:
        """Make endpoint `number`, and say so."""
        if peer.endpoint is not None:
            self._disconnect(peer, "the peer began anew", is_told=True)
        peer.number = number
        try:
            self._leftovers += self._worker.take_strays()
            peer.endpoint = self._worker.connect(peer.address, number)
        except UcxError as error:
            log.warning("ucx: no connection to a peer: %s", error)
            self._say(peer, Reset(number, f"no connection: {error}"))
            self._disconnect(peer, f"no connection: {error}")
            return False
        peer.carriers = peer.endpoint.carriers()
        self._say_hello(peer)
        return True

    def _say_hello(self, peer: _Peer) -> None:
        number = None if peer.endpoint is None else peer.number
        self._say(peer, Hello(self._worker.address, self._worker.next_number(peer.address), number))

    def _go_on(self, peer: _Peer) -> None:
        """Ask for what waits, or for the peer's endpoint."""
        waiting = [pull for pull in self._pulls_of(peer) if pull.endpoint is None]
        if peer.endpoint is None and waiting and not peer.has_asked:
            peer.has_asked = True
            self._say_hello(peer)
        for pull in waiting if peer.is_ready else ():
            self._ask(peer, pull)

    def _disconnect(self, peer: _Peer, reason: str, *, is_told: bool = False, spare: Pull | None = None) -> None:
        """Close the endpoint, if any: the peer's pulls fail, or settle until then."""
        endpoint, peer.endpoint = peer.endpoint, None
        peer.is_ready = peer.has_asked = False
        if endpoint is not None:
            log.info("ucx: a connection is closed: %s", reason)
            endpoint.close()
            if not is_told:
                self._say(peer, Reset(peer.number, reason))
        for pull in self._pulls_of(peer):
            if pull is spare:
                continue
            pull.failure = pull.failure or TransferError(f"ucx: {reason}")
            if pull.endpoint is None:
                self._finish(peer, pull)
            elif pull.endpoint is endpoint:
                pull.settle_by_s = time.monotonic() + _SETTLE_S

    # Pulls of ours

    def _ask(self, peer: _Peer, pull: Pull) -> None:
        assert peer.endpoint is not None
        first_tag = self._next_tag
        self._next_tag = (first_tag + len(pull.messages)) % NUM_TAGS
        try:
            pull.post(peer.endpoint, first_tag)
        except UcxError as error:
            self._disconnect(peer, str(error))
            return
        ranges, counts = pack_ranges(pull.messages)
        source = pull.source
        self._say(peer, PullRequest(first_tag, peer.number, source.nonce, source.num_bytes, ranges, counts))

    def _take_refusal(self, peer: _Peer, refusal: PullRefused) -> None:
        for pull in self._pulls_of(peer):
            if pull.endpoint is None or pull.first_tag != refusal.first_tag or pull.endpoint is not peer.endpoint:
                continue
            kind = RegionError if refusal.is_region else TransferError
            pull.failure = pull.failure or kind(f"ucx: refused: {refusal.reason}")
            pull.settle_by_s = time.monotonic() + _SETTLE_S
            try:
                self._leftovers += self._worker.complete_with_nothing([receive.tag for receive in pull.pending])
            except UcxError as error:
                self._disconnect(peer, str(error))

    # Pulls of peers

    def _serve(self, peer: _Peer, request: PullRequest) -> None:
        peer.last_tag = request.first_tag
        if peer.endpoint is not None and not peer.endpoint.is_alive:
            self._disconnect(peer, peer.endpoint.error())
        endpoint = peer.endpoint
        if endpoint is None or request.number != peer.number:
            reason = f"endpoint {request.number} is closed, {peer.number} was the last"
            self._say(peer, PullRefused(request.first_tag, reason, is_region=False))
            return
        try:
            memory, messages = self._check(request)
        except (RegionError, ValueError) as error:
            self._say(peer, PullRefused(request.first_tag, str(error), is_region=True))
            return
        try:
            for index, ranges in enumerate(messages):
                buffer = memory.slice(*ranges[0]) if len(ranges) == 1 else gather(memory, ranges)
                self._sends.append((peer, endpoint.send(buffer, (request.first_tag + index) % NUM_TAGS)))
        except UcxError as error:
            self._disconnect(peer, str(error))

    def _check(self, request: PullRequest) -> tuple[RegionMemory, list[list[Range]]]:
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


def _was_heard(pull: Pull, last_tag: int | None) -> bool:
    """Whether a peer that heard requests up to `last_tag` has begun to answer this one. They are sent in order."""
    return pull.endpoint is not None and last_tag is not None and (last_tag - pull.first_tag) % NUM_TAGS < NUM_TAGS // 2


def call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> None:
    """Let the event loop call it; a loop that is closed has nobody left who waits."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)
