"""How much memory an engine's process takes: while it loads, and at its largest step.

The process's own figure where there is one, else by how much MemAvailable fell. Asks in threads and
decides nothing.
"""

import asyncio
import time
from typing import Final

from edge_agent.core import MeasuredLoad
from edge_agent.engines.host import EngineHost
from edge_agent.scheduling.machine import Machine, ProcessBytes

_MEASURE_S: Final = 0.1
_SPARING: Final = 20
"""The kernel counts a process page by page, 20 ms for 4 GiB: a twentieth of the time is enough."""


class Footfall:
    """What one load of an engine is seen to take, over the life of its process.

    With so many slots, each of so many tokens.
    """

    def __init__(self, machine: Machine, slots: int, context_tokens: int) -> None:
        """Remember how the machine is before the process begins."""
        self.slots = slots
        self.context_tokens = context_tokens
        self._machine = machine
        self._measured_at_s = time.time()
        self._available_before = machine.view().memory.available_bytes
        self._driver_before: int | None = None
        self._driver_bytes = 0
        self._own: ProcessBytes | None = None
        self._peak = 0
        self._fallen = 0
        self._peak_fallen = 0

    @property
    def of_process(self) -> bool:
        """Whether the process's own figure is known."""
        return self._own is not None

    @property
    def held_bytes(self) -> int:
        """What the process has taken of MemAvailable."""
        return self._fallen if self._own is None else self._own.held_bytes

    async def follow(self, host: EngineHost) -> None:
        """Look again and again; to be cancelled."""
        self._driver_before = await asyncio.to_thread(self._machine.driver_bytes)
        loop, pause_s = asyncio.get_running_loop(), _MEASURE_S
        while True:
            await asyncio.sleep(pause_s)
            begun_s = loop.time()
            await self.look(host)
            pause_s = max(_MEASURE_S, _SPARING * (loop.time() - begun_s))

    async def look(self, host: EngineHost) -> None:
        """Measure while it loads."""
        if host.pid:
            own = await asyncio.to_thread(self._machine.process_bytes, host.pid)
            if own is not None:
                self._driver_bytes = await asyncio.to_thread(self._driver_rise)
                self._took(own)
        available = self._machine.view().memory.available_bytes
        if available is not None and self._available_before is not None:
            self._fallen = max(0, self._available_before - available)
            self._peak_fallen = max(self._peak_fallen, self._fallen)

    async def look_again(self, host: EngineHost) -> bool:
        """Measure the process after a large step; True when it takes more than was known.

        What the driver holds for all processes together is no measure any more: others have come
        and gone since. So its part stays what it was when the load had ended.
        """
        own = await asyncio.to_thread(self._machine.process_bytes, host.pid)
        before = self._own
        if (
            own is None
            or before is None
            or own.plus(self._driver_bytes).all_bytes <= before.all_bytes
        ):
            return False
        self._took(own)
        return True

    def measurement(self) -> MeasuredLoad | None:
        """This load's figures; None when nothing was seen. Of one load, always the same time."""
        at_s = self._measured_at_s
        if self._own is not None:
            return MeasuredLoad(self._peak, self._own.all_bytes, "process", at_s)
        if self._peak_fallen:
            return MeasuredLoad(self._peak_fallen, self._fallen, "available", at_s)
        return None

    def _took(self, own: ProcessBytes) -> None:
        self._own = own.plus(self._driver_bytes)
        self._peak = max(self._peak, self._own.all_bytes)

    def _driver_rise(self) -> int:
        """Only one engine loads at a time, so what the driver holds more is this one's."""
        before, now = self._driver_before, self._machine.driver_bytes()
        return 0 if before is None or now is None else max(0, now - before)
