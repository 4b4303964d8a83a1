"""The messages of a ZeroMQ socket, on an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import zmq

_MAX_MESSAGES_PER_TURN = 256  #: then others on the loop have their turn
_TURN_S = 0.005  #: the same, for messages that take long


class Inbox:
    """Calls `on_frames` on the loop for each message of a ZeroMQ socket.

    A ZeroMQ socket's file descriptor says "something may have changed", once; any call on the socket may swallow that.
    Hence: read until nothing is left, and look again after each send (`poke`).
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], on_frames: Callable[[list[bytes]], None]
    ) -> None:
        """Begin to read."""
        self._loop = loop
        self._socket = socket
        self._on_frames = on_frames
        self._fd: int = socket.FD
        self._is_poked = False
        self._is_closed = False
        self._when_empty: list[Callable[[], None]] = []
        loop.add_reader(self._fd, self._drain)
        self.poke()

    def poke(self) -> None:
        """Look at the socket in the loop's next turn."""
        if not self._is_poked and not self._is_closed:
            self._is_poked = True
            self._loop.call_soon(self._look)

    def when_empty(self, then: Callable[[], None]) -> None:
        """Call `then` once nothing is left of what came, unless this is closed before."""
        self._when_empty.append(then)
        self.poke()

    def _drain(self) -> None:
        """Handle the messages that are there; after 256 of them, or 5 ms, go on in the loop's next turn."""
        is_empty = False
        end_s = time.monotonic() + _TURN_S
        try:
            for _ in range(_MAX_MESSAGES_PER_TURN):
                if self._is_closed:
                    return
                try:
                    frames = self._socket.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    is_empty = True
                    self._tell_empty()
                    return
                self._on_frames(frames)
                if time.monotonic() >= end_s:
                    return
        finally:
            # Also when `on_frames` raised: that is its owner's bug to report, and must not silence the channel.
            if not is_empty:
                self.poke()

    def _tell_empty(self) -> None:
        waiting, self._when_empty = self._when_empty, []
        for then in waiting:
            if not self._is_closed:
                then()

    def close(self) -> None:
        """Stop reading; the socket stays its owner's to close."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._fd)

    def _look(self) -> None:
        self._is_poked = False
        if not self._is_closed:
            self._drain()
