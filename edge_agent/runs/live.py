"""One run in memory: its snapshot, its events, and who follows them.

Changed by the run's own loop and by the owner (`runs.Runs`) only; a follower only reads.
"""

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from edge_agent.core import (
    Event,
    EventBody,
    Run,
    RunFinished,
    RunSpec,
    RunState,
    Snapshot,
    StateChanged,
)
from edge_agent.errors import InvalidRequest
from edge_agent.runs.log import EventLog
from edge_agent.wakeup import Wakeup


class LiveRun:
    """A run from acceptance to the end of its retention."""

    def __init__(self, run: Run, spec: RunSpec) -> None:
        """Start with what was accepted."""
        self.spec = spec
        self._run = run
        self._log = EventLog(run.id)
        self._changed = Wakeup()

    @property
    def id(self) -> str:
        """The run's id."""
        return self._run.id

    @property
    def state(self) -> RunState:
        """Where the run is."""
        return self._run.state

    @property
    def run(self) -> Run:
        """The run as it stands, without the text that is being written."""
        return dataclasses.replace(self._run, sequence=self._log.sequence)

    def snapshot(self) -> Run:
        """The run as it stands."""
        text, sequence = self._log.open_text(), self._log.sequence
        if sequence == self._run.sequence and not text:  # it has ended: nothing changes any more
            return self._run
        return dataclasses.replace(self._run, partial_text=text, sequence=sequence)

    def emit(self, body: EventBody, **changes: Any) -> None:
        """Number an event, and change the snapshot with it."""
        if changes:
            self._run = dataclasses.replace(self._run, **changes)
        self._log.add(body)
        self._changed.notify()

    def update(self, **changes: Any) -> None:
        """Change the snapshot by what earlier events have said, or the next one will."""
        self._run = dataclasses.replace(self._run, **changes)

    def add_text(self, step: int, text: str, tokens: int) -> None:
        """More of the answer being written."""
        self._log.add_text(step, text, tokens)
        self._changed.notify()

    def move_to(self, state: RunState, load_progress: float | None = None) -> None:
        """Enter another state, or report how far the load has come."""
        if state is not self.state or load_progress is not None:
            self.emit(StateChanged(state, load_progress), state=state)

    def finish(self, **changes: Any) -> None:
        """The last event."""
        self._run = dataclasses.replace(self._run, **changes, sequence=self._log.sequence + 1)
        self.emit(RunFinished(self._run))

    async def follow(self, after_sequence: int | None) -> AsyncIterator[Event]:
        """A snapshot, then every event after `after_sequence` (None: after the snapshot).

        Text that gathered while the reader was busy comes as one delta.

        Raises:
            InvalidRequest: `after_sequence` is above the last event, so nobody can know it.
        """
        snapshot = self.snapshot()
        if after_sequence is not None and after_sequence > snapshot.sequence:
            last = snapshot.sequence
            raise InvalidRequest.field(
                "after_sequence", f"{after_sequence} is above {last}, the run's last event"
            )
        yield Event(snapshot.id, snapshot.sequence, Snapshot(snapshot))
        after = snapshot.sequence if after_sequence is None else after_sequence
        while True:
            changed = self._changed.next()
            for event in self._log.since(after):
                after = event.sequence
                yield event
            if self.state.ended and after >= self._log.sequence:
                return
            if not changed.done():
                await changed
