"""What stands beside a daemon under pressure: a timed caller, and a process that takes memory.

Both are roles of `_children.py`, each in a process of its own: neither waits for the benchmark.
"""

import asyncio
import itertools
import mmap
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from edge_agent.client import AsyncClient
from edge_agent.core import Priority
from edge_agent.errors import EdgeAgentError

CALL_TIMEOUT_S = 10.0
_TICK_S = 0.025
_PIECE_BYTES = 64 << 20
_CANCEL_AFTER_S = (0.0, 0.02, 0.1, 0.5)
"""From the answer to CreateRun to CancelRun: the run waits, is loading or is running by then."""

Timing = tuple[str, float, float]
"""A call, when it was made (monotonic) and how many milliseconds it took."""


class Memory:
    """So much memory, really held, and never more than it was told."""

    def __init__(self) -> None:
        """None; and the kernel's first choice when memory runs out."""
        Path("/proc/self/oom_score_adj").write_text("1000")
        self._pieces: list[mmap.mmap] = []

    def hold(self, size_bytes: int) -> int:
        """Take or give back until it is `size_bytes`, rounded up to whole pieces."""
        wanted = -(-size_bytes // _PIECE_BYTES)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        while len(self._pieces) < wanted:
            self._pieces.append(mmap.mmap(-1, _PIECE_BYTES, flags=flags))
        while len(self._pieces) > wanted:
            self._pieces.pop().close()
        return len(self._pieces) * _PIECE_BYTES


class Caller:
    """Calls the daemon at a fixed pace, whether or not earlier calls have been answered.

    A tick is one GetStatus, GetEngine, Explain, or CreateRun with its CancelRun, in turn: five
    calls in four ticks, 50 a second.
    """

    def __init__(self, client: AsyncClient, engines: Sequence[str]) -> None:
        self.timings: list[Timing] = []
        self.failed: list[str] = []
        self._client = client
        self._engines = itertools.cycle(engines)
        self._pauses_s = itertools.cycle(_CANCEL_AFTER_S)

    async def call_for(self, seconds: float) -> None:
        """Make calls for so long, and wait for the last answers."""
        await self._client.status()  # the first connects
        acts = itertools.cycle(
            (
                lambda: self._timed("GetStatus", self._client.status),
                self._get_engine,
                lambda: self._timed("Explain", self._client.explain),
                self._create_and_cancel,
            )
        )
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for tick in range(round(seconds / _TICK_S)):
                await asyncio.sleep(began_s + tick * _TICK_S - time.monotonic())
                group.create_task(next(acts)())

    async def _get_engine(self) -> None:
        name = next(self._engines)
        await self._timed("GetEngine", lambda: self._client.engine(name))

    async def _create_and_cancel(self) -> None:
        engine, pause_s = next(self._engines), next(self._pauses_s)

        def create() -> Awaitable[object]:
            return self._client.create(
                "Say hello.", engine=engine, max_output_tokens=8, priority=Priority.BATCH
            )

        run = await self._timed("CreateRun", create)
        if run is not None:
            await asyncio.sleep(pause_s)
            await self._timed("CancelRun", lambda: self._client.cancel(run.id))

    async def _timed(self, name: str, call: Callable[[], Awaitable[object]]) -> Any:
        """Its answer; None where it failed, which is noted."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answer = await call()
        except TimeoutError:
            self.failed.append(f"{name}: no answer within {CALL_TIMEOUT_S:g} s")
            return None
        except EdgeAgentError as error:
            self.failed.append(f"{name}: {error.reason}: {error}")
            return None
        self.timings.append((name, began_s, (time.monotonic() - began_s) * 1000))
        return answer


async def call_for(socket: str, engines: Sequence[str], seconds: float) -> dict[str, object]:
    """The timings and the failures of a caller of its own."""
    async with AsyncClient(socket, name="caller") as client:
        caller = Caller(client, engines)
        await caller.call_for(seconds)
    return {"timings": caller.timings, "failed": caller.failed}
