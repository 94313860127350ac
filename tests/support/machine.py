"""A machine whose memory its test sets."""

import contextlib
import dataclasses
from contextlib import AbstractContextManager

from edge_agent.scheduling.machine import ProcessBytes
from edge_agent.scheduling.values import Heat, MachineView, Memory

GIB = 1 << 30


class SetMachine:
    """Implements `Machine`: as it was set, until it is set otherwise."""

    def __init__(self, total_bytes: int = 64 * GIB, available_bytes: int | None = 60 * GIB) -> None:
        self._view = MachineView(Memory(total_bytes, available_bytes))
        self.processes: dict[int, ProcessBytes] = {}
        self.driver: int | None = None
        self.frees_with_process = False

    def view(self) -> MachineView:
        """As it was set."""
        return self._view

    def watch_closely(self) -> AbstractContextManager[None]:
        """Nothing to be read faster."""
        return contextlib.nullcontext()

    def process_bytes(self, pid: int) -> ProcessBytes | None:
        """As it was set."""
        return self.processes.get(pid)

    def driver_bytes(self) -> int | None:
        """As it was set."""
        return self.driver

    def set(self, *, available_bytes: int | None = None, heat: Heat | None = None) -> MachineView:
        """Change what is given; returns the view, for whoever must be told."""
        memory = self._view.memory
        if available_bytes is not None:
            memory = Memory(memory.total_bytes, available_bytes)
        self._view = dataclasses.replace(self._view, memory=memory, heat=heat or self._view.heat)
        return self._view
