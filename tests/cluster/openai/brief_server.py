"""Uvicorn for tests: it ends as soon as it is told to and nothing runs any more."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp

_GRACE_S = 1.0


class BriefServer(uvicorn.Server):
    """Uvicorn's own looks ten times a second whether it should end, and as often whether it may."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", ws="none", lifespan="off"))

    def end(self) -> None:
        """Have it end. From any thread."""
        self._loop.call_soon_threadsafe(self._told_to_end.set)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop, self._told_to_end = asyncio.get_running_loop(), asyncio.Event()
        await super().startup(sockets)

    async def main_loop(self) -> None:
        await self.on_tick(0)  # writes the headers of all answers
        await self._told_to_end.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        end_s = self._loop.time() + _GRACE_S
        while (state.connections or state.tasks) and self._loop.time() < end_s:  # noqa: ASYNC110 - both are sets of uvicorn
            await asyncio.sleep(0.001)
        for task in state.tasks:
            task.cancel()
