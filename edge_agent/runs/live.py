"""One run in memory: its snapshot, its events, and who follows them.

Changed by the run's own loop and by the owner (`runs.Runs`) only; a follower only reads. Of a
durable run nobody is shown what is not on disk yet: events count at once and are seen when their
write is done, so that a run goes on meanwhile and never takes back what it has said.
"""

import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Protocol

from edge_agent.core import Run, RunSpec, RunState
from edge_agent.errors import InvalidRequest
from edge_agent.events import Event, EventBody, RunFinished, Snapshot, StateChanged
from edge_agent.records import LoggedText
from edge_agent.runs import history
from edge_agent.runs.log import EventLog
from edge_agent.wakeup import Wakeup


class Journal(Protocol):
    """Where the events of a durable run are written."""

    def write(
        self,
        run: Run,
        events: tuple[Event | LoggedText, ...],
        done: Callable[[Exception | None], None],
    ) -> None:
        """Write events, and the run after them; `done` on the loop, in the order of the calls."""
        ...


class LiveRun:
    """A run from acceptance to the end of its retention."""

    def __init__(
        self,
        run: Run,
        spec: RunSpec,
        journal: Journal | None = None,
        earlier: Iterable[Event | LoggedText] = (),
    ) -> None:
        """Start with what was accepted, or with what was read of it."""
        self.spec = spec
        self.on_lost: Callable[[Exception], None] = _nobody
        self._run = self._shown = run
        self._journal = journal
        self._log = EventLog(run.id, earlier)
        self._log.sequence = max(self._log.sequence, run.sequence)
        self._written = self._log.sequence
        self._unwritten: deque[tuple[int, Run]] = deque()
        self._changed = Wakeup()
        self._lost: Exception | None = None

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

    @property
    def head(self) -> Run:
        """The run as everybody may see it, without the text that is being written."""
        return dataclasses.replace(self._shown, sequence=self._visible)

    def snapshot(self) -> Run:
        """The run as everybody may see it."""
        sequence = self._visible
        text = "" if self._shown.state.ended else self._log.text_at(sequence)
        if sequence == self._shown.sequence and not text:  # nothing changes any more, mostly
            return self._shown
        return dataclasses.replace(self._shown, partial_text=text, sequence=sequence)

    def emit(self, body: EventBody) -> None:
        """Number an event, and change the snapshot by it."""
        self._log.add(body)
        self._run = history.apply(self._run, body)
        if self._journal is None:
            self._shown = self._run
        else:
            self._write(self._journal)
        self._changed.notify()

    def update(self, **changes: Any) -> None:
        """Change the snapshot by what the next event will be written with."""
        self._run = dataclasses.replace(self._run, **changes)
        if self._journal is None:
            self._shown = self._run

    def add_text(self, step: int, text: str, tokens: int) -> None:
        """More of the answer being written."""
        self._log.add_text(step, text, tokens)
        self._changed.notify()

    def move_to(self, state: RunState, load_progress: float | None = None) -> None:
        """Enter another state, or report how far the load has come."""
        if state is not self.state or load_progress is not None:
            self.emit(StateChanged(state, load_progress))

    def finish(self, **changes: Any) -> None:
        """The last event."""
        sequence = self._log.sequence + 1
        self.emit(RunFinished(dataclasses.replace(self._run, **changes, sequence=sequence)))

    @property
    def is_settled(self) -> bool:
        """Whether all that has happened up to now may be seen."""
        return not self._unwritten

    async def settled(self) -> None:
        """Wait until all that has happened up to now may be seen.

        Raises:
            EdgeAgentError: it could not be written, as the ledger says; it is seen all the same.
        """
        last = self._log.sequence
        while self._unwritten and self._unwritten[0][0] <= last:
            await self._changed.next()
        if self._lost is not None:
            raise self._lost

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
            for event in self._log.since(after, self._visible):
                after = event.sequence
                yield event
            if self._shown.state.ended and after >= self._visible:
                return
            if not changed.done():
                await changed

    @property
    def _visible(self) -> int:
        """The last event that everybody may see."""
        return self._unwritten[0][0] - 1 if self._unwritten else self._log.sequence

    def _write(self, journal: Journal) -> None:
        sequence = self._log.sequence
        events, self._written = self._log.written(self._written), sequence
        self._unwritten.append((sequence, self._run))
        run = dataclasses.replace(self._run, sequence=sequence)
        journal.write(run, events, self._wrote)

    def _wrote(self, error: Exception | None) -> None:
        """The oldest write is done.

        After one that failed nothing is written any more, and everything is shown: to hide the
        rest would hang whoever waits for it.
        """
        if self._journal is None:
            return
        if error is None:
            _sequence, self._shown = self._unwritten.popleft()
        else:
            self._journal, self._lost = None, error
            self._unwritten.clear()
            self._shown = self._run
            self.on_lost(error)
        self._changed.notify()


def _nobody(_error: Exception) -> None:
    """Of a run that nothing drives."""
