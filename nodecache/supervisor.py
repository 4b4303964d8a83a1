"""Keeps the node cache of a node running: makes the arena's memory, starts the process, starts the next one.

The memory's descriptor stays open here, so that it outlives the process, and each process inherits it. One that ends is
followed by another at once, or after a pause that grows while none of them lives long; one that gives no byte of life
for 5 s is killed first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable
from typing import Final

import msgspec

from messages.errors import KvrayError, WorkerError, error_from_info, first_line
from messages.fleet import WorkerInfo
from nodecache.process import CacheOptions, Start, Started
from transport.memory import Memory
from transport.secret import ClusterSecret

logger = logging.getLogger(__name__)

_START_S: Final = 60.0  #: from the start of the process to its first line
# Looks in a row, not seconds by the clock, which runs on while this process is stopped.
_LOOK_S: Final = 0.5
_SILENT_LOOKS: Final = 10
_END_S: Final = 10.0  #: that the process has to end in order
_MIN_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 2.0
_LIVED_S: Final = 1.0  #: one that lived so long is followed at once


class Supervisor:
    """The supervisor of one node cache. Belongs to one event loop; `start` comes first, `close` last.

    `on_up(info)` is called for each process that serves, `on_down()` when it has ended by itself.
    """

    def __init__(
        self,
        options: CacheOptions,
        secret: ClusterSecret,
        on_up: Callable[[WorkerInfo], None] = lambda _: None,
        on_down: Callable[[], None] = lambda: None,
    ) -> None:
        self._options = options
        self._secret = secret
        self._on_up = on_up
        self._on_down = on_down
        self._memory: Memory | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self.info: WorkerInfo | None = None  #: of the process that serves, if one does
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """Id of the process, if there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> WorkerInfo:
        """Reserve the memory and start the first process; return what the rest of the fleet needs to know.

        Raises:
            ConfigError: there is not that much memory, or the process cannot start as configured.
            WorkerError: it ended at once, or did not begin to serve in time.
        """
        self._memory = await asyncio.to_thread(self._options.layout.allocate)
        try:
            info = await self._start_process()
        except BaseException:
            await self.close()
            raise
        self._watch = asyncio.get_running_loop().create_task(self._watch_forever())
        return info

    async def close(self) -> None:
        """End the process in order, and give the memory back."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
            self._watch = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_END_S):
                    await self._process.wait()
            except TimeoutError:
                await self._kill()
            self._process = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        self.info = None

    async def _start_process(self) -> WorkerInfo:
        assert self._memory is not None
        fd = self._memory.fd
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nodecache"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[fd],
            start_new_session=True,  # Ctrl-C is not for it
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        start = Start(options=self._options, secret=self._secret.hex(), arena_fd=fd)
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")
        line = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                line = await self._process.stdout.readline()
        started = msgspec.json.decode(line, type=Started) if line.endswith(b"\n") else Started()
        if started.info is None:
            await self._kill()
            if started.error is not None:
                raise error_from_info(started.error)
            raise WorkerError(f"the node cache ended with status {self._process.returncode} before it served")
        self.info = started.info
        self._on_up(started.info)
        return started.info

    async def _watch_forever(self) -> None:
        loop = asyncio.get_running_loop()
        pause_s = _MIN_PAUSE_S
        while True:
            began_s = loop.time()
            if self.info is not None:  # else it did not start
                await self._wait_until_ended()
                self.info = None
                self._on_down()
            pause_s = _MIN_PAUSE_S if loop.time() - began_s > _LIVED_S else min(2 * pause_s, _MAX_PAUSE_S)
            await asyncio.sleep(pause_s)
            self.num_restarts += 1
            try:
                await self._start_process()
            except (KvrayError, OSError) as error:
                logger.error("the node cache does not start: %s", first_line(error))  # noqa: TRY400 - no bug of ours

    async def _wait_until_ended(self) -> None:
        """Return when the process has ended; it is killed if it gives no sign of life."""
        assert self._process is not None
        assert self._process.stdout is not None
        num_silent = 0
        while num_silent < _SILENT_LOOKS:
            try:
                async with asyncio.timeout(_LOOK_S):
                    if not await self._process.stdout.read(4096):
                        break  # its end is closed
                num_silent = 0
            except TimeoutError:
                num_silent += 1
        if num_silent:
            logger.warning("the node cache, process %d, gives no sign of life: killed", self._process.pid)
        await self._kill()
        logger.warning("the node cache ended with status %s", self._process.returncode)

    async def _kill(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
