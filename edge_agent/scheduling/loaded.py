"""One engine that is in memory or on its way: its state, and the places in it.

Changed by the scheduler only.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.core import EngineState, RunError, WorkerInfo
from edge_agent.engines.host import EngineHost
from edge_agent.wakeup import Wakeup


@dataclass(slots=True)
class LoadedEngine:
    """`active` counts the steps that hold a place.

    `arriving` are those that waited for the load and have not looked yet: it was for them, so it is
    not unloaded before they have.
    `on_change` is told whatever a watcher of engines sees.
    """

    host: EngineHost
    on_change: Callable[[], None]
    state: EngineState = EngineState.LOADING
    progress: float | None = None
    error: RunError | None = None
    active: int = 0
    last_used_s: float = field(default_factory=time.monotonic)
    _changed: Wakeup = field(default_factory=Wakeup)
    arriving: set[object] = field(default_factory=set)
    _queue: list[object] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Steps that want a place."""
        return len(self._queue) + len(self.arriving)

    async def take_place(self) -> bool:
        """Wait for a place, first come first served; False when the engine takes no more steps."""
        ticket = object()
        self._queue.append(ticket)
        self.on_change()
        try:
            while self.state is EngineState.READY and not self._may_enter(ticket):
                await self._changed.next()
            if self.state is not EngineState.READY:
                return False
            self.active += 1
            return True
        finally:
            self._queue.remove(ticket)
            self._tell()  # the next one may be first now

    def _may_enter(self, ticket: object) -> bool:
        return self._queue[0] is ticket and self.active < self.host.slots

    def arrived(self, step: object) -> None:
        """A step that waited for the load takes its place in this turn of the loop, or never."""
        if step in self.arriving:
            self.arriving.remove(step)
            self._tell()

    def give_place(self) -> None:
        """A step's place is free again."""
        self.active -= 1
        self.last_used_s = time.monotonic()
        self._tell()

    def become(self, state: EngineState, error: RunError | None = None) -> None:
        """Change the state; everybody who waits looks again."""
        self.state, self.error = state, error
        self._tell()

    def _tell(self) -> None:
        self._changed.notify()
        self.on_change()

    async def all_arrived(self) -> None:
        """Return once nobody is on the way to a place."""
        while self.arriving:
            await self._changed.next()

    async def drained(self) -> None:
        """Return once no step holds a place."""
        while self.active:
            await self._changed.next()

    def worker_info(self) -> WorkerInfo | None:
        """The process behind it, while there is one."""
        if self.state is EngineState.FAILED:
            return None
        host = self.host
        return WorkerInfo(host.pid, host.slots, self.active, self.waiting, host.load_s)
