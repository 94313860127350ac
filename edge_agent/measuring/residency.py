"""Which engines are in memory for a measurement, and how what was there before comes back.

Loads and unloads through admin.sock where we may; elsewhere the first run loads, and nothing is put
back. Never takes an engine that somebody else loaded out of memory by itself; the daemon may, to
make room.
"""

import asyncio
from typing import Final

from edge_agent.client import AsyncClient
from edge_agent.core import EngineState
from edge_agent.errors import EdgeAgentError, FailedPrecondition, PermissionDenied, Unavailable

_IDLE_S: Final = 10.0
_IDLE_POLL_S: Final = 0.1
_GONE: Final = frozenset({EngineState.INSTALLED, EngineState.FAILED})


def admin_address(address: str) -> str | None:
    """The admin socket beside an API socket; None where the address is no path."""
    path = address.removeprefix("unix:")
    return f"{path.rpartition('/')[0]}/admin.sock" if path.startswith(("/", "./", "../")) else None


class Residency:
    """The engines in memory while we measure. `close` puts back what was there."""

    def __init__(self, api: AsyncClient, admin: AsyncClient | None) -> None:
        self._api = api
        self._admin = admin
        self._before: frozenset[str] = frozenset()
        self._ours: set[str] = set()

    async def open(self) -> None:
        """Note what is in memory."""
        self._before = await self.resident()

    async def resident(self) -> frozenset[str]:
        """The engines that are in memory, or on their way."""
        engines = await self._api.engines()
        return frozenset(engine.name for engine in engines if engine.state not in _GONE)

    @property
    def may_load(self) -> bool:
        """Whether admin.sock is there and lets us, as far as we know by now."""
        return self._admin is not None

    async def bring(self, name: str) -> None:
        """Load an engine unless it is in memory; where we may not, its first run does it.

        Raises:
            LoadFailed: it could not be loaded.
        """
        if self._admin is None or name in await self.resident():
            return
        self._ours.add(name)
        try:
            await self._admin.load(name)
        except (PermissionDenied, Unavailable) as error:
            if error.reason not in ("DAEMON_UNREACHABLE", "ADMIN_SOCKET_REQUIRED"):
                raise
            self._ours.discard(name)
            self._admin = None

    async def leave(self, name: str) -> None:
        """Unload an engine if we loaded it and nobody uses it."""
        if self._admin is None or name not in self._ours:
            return
        self._ours.discard(name)
        for _ in range(int(_IDLE_S / _IDLE_POLL_S)):
            try:
                await self._admin.unload(name)
            except FailedPrecondition as error:  # our own last step may not have let go yet
                if error.reason != "ENGINE_BUSY":
                    raise
                await asyncio.sleep(_IDLE_POLL_S)
            else:
                return

    async def close(self) -> tuple[str, ...]:
        """Unload what we loaded and load what had to leave; returns what could not be put back."""
        try:
            for name in tuple(self._ours):
                await self.leave(name)
            missing = self._before - await self.resident()
            for name in sorted(missing):
                if self._admin is not None:
                    await self._admin.load(name)
            return tuple(sorted(self._before - await self.resident()))
        except EdgeAgentError:  # the daemon stops, or there is no room any more
            return tuple(sorted(self._before))
