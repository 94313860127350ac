"""The ledger as the daemon sees it: what is committed is on disk, and stays there.

Owns the writer thread and the reading connections. Everything here is called from the event loop,
and blocks it nowhere but in `open`.
"""

import asyncio
import functools
import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

import apsw

from edge_agent.core import Run, RunSpec, RunState, Session
from edge_agent.errors import LedgerFailed, LedgerFull
from edge_agent.ledger import opening, reading
from edge_agent.ledger.changes import Change, Existing, StoredRun
from edge_agent.ledger.settings import LedgerSettings
from edge_agent.ledger.writer import RETRY_AFTER_FULL_S, Entry, Writer
from edge_agent.records import CallRecord, StepRecord

_READERS: Final = 2
_MAX_NOTES: Final = 4096
_CLOSE_WITHIN_S: Final = 10.0
_RESERVE: Final = 0.1
"""The part of the file that is kept for the runs that are there."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Reader:
    """A connection that reads, and which opening of the file it is of."""

    connection: apsw.Connection
    opened: int


class Ledger:
    """One SQLite file: written by one thread, read by a few."""

    def __init__(self, path: Path, settings: LedgerSettings, writer: Writer) -> None:
        """Of an opened file; see `open`."""
        self._path = path
        self._settings = settings
        self._writer = writer
        self._unreadable: tuple[str, ...] = ()
        self._closed = False
        self._notes = 0
        self._notes_dropped = 0
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="ledger-reader")
        self._idle: queue.SimpleQueue[_Reader] = queue.SimpleQueue()

    @classmethod
    def open(
        cls,
        directory: Path,
        settings: LedgerSettings,
        *,
        vfs: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> "Ledger":
        """The ledger in this directory, recovered as far as it can be. Blocks.

        What was lost or set aside on the way is in `problems`. `clock` is Unix time. With a `vfs`
        of its own, which tests bring, the file can't be read while it is written.

        Raises:
            LedgerFailed: no file can be opened or made there.
        """
        open_file = functools.partial(
            opening.open_file, directory, settings.max_bytes, vfs=vfs, clock=clock
        )
        try:
            writer = Writer(directory, settings, open_file, clock)
        except (apsw.Error, OSError) as error:
            raise _failed("opening", error) from error
        return cls(directory / opening.FILE_NAME, settings, writer)

    @property
    def problems(self) -> tuple[str, ...]:
        """What was lost or set aside when the file was opened."""
        return self._writer.problems

    @property
    def degraded(self) -> tuple[str, ...]:
        """`problems`, and what is wrong now."""
        now = [*self.problems, *self._unreadable]
        if self._writer.trouble is not None:
            now.append(self._writer.trouble)
        if self._writer.disk_full:
            now.append("the disk is full: no more durable runs are accepted")
        if self._notes_dropped:
            now.append(f"{self._notes_dropped} records were dropped, because too many waited")
        return tuple(now)

    # --- writing ---

    async def commit(self, *changes: Change) -> tuple[object, ...]:
        """Write these together; they are on disk when it returns. The values of each.

        They are written also where whoever waits for it is cancelled.

        Raises:
            LedgerFull: there is no room; nothing was written.
            LedgerFailed, LedgerRowCorrupt: nothing was written.
        """
        loop = asyncio.get_running_loop()
        written: asyncio.Future[tuple[object, ...]] = loop.create_future()

        def done(values: tuple[object, ...], error: Exception | None) -> None:
            if written.cancelled():
                return
            if error is not None:
                written.set_exception(error)
            else:
                written.set_result(values)

        self._refuse_when_closed()
        self._writer.put(Entry(changes, loop, done))
        return await written

    def enqueue(self, *changes: Change, done: Callable[[Exception | None], None]) -> None:
        """Write these together; `done` is called in the event loop, in order, as `commit` raises.

        Raises:
            LedgerFailed: it is closed.
        """
        self._refuse_when_closed()
        loop = asyncio.get_running_loop()
        self._writer.put(Entry(changes, loop, lambda _values, error: done(error)))

    def note(self, *changes: Change) -> None:
        """Write these within a second; nobody is told. Dropped when too many wait already."""
        if self._closed or self._notes - self._writer.notes_taken >= _MAX_NOTES:
            self._notes_dropped += 1
            return
        self._notes += 1
        self._writer.put(Entry(changes))

    def accepts_new_runs(self) -> None:
        """Whether there is room for more runs beside those that are there.

        Raises:
            LedgerFull: what is left is kept for them.
        """
        used, most = self._writer.used_bytes, self._settings.max_bytes
        if used > most * (1 - _RESERVE):
            raise LedgerFull(
                f"the ledger has {used} of {most} bytes, and keeps the rest for the runs in it",
                metadata={"used_bytes": used, "max_bytes": most},
                retry_after_s=RETRY_AFTER_FULL_S,
            )
        if self._writer.disk_full:
            raise LedgerFull(
                "the disk is full, and what is left of it is kept for the runs that are there",
                retry_after_s=RETRY_AFTER_FULL_S,
            )

    # --- reading ---

    async def unfinished(self) -> tuple[StoredRun, ...]:
        """The runs that have not ended, oldest first; `degraded` names those that can't be read."""
        found, broken = await self._read(reading.unfinished)
        self._unreadable = tuple(error.message for error in broken)
        return tuple(found)

    async def find(self, run_id: str) -> StoredRun | None:
        """One run; None if it is not there. Raises LedgerRowCorrupt, LedgerFailed."""
        return await self._read(reading.find, run_id)

    async def requested(self, client: str, request_id: str, spec: RunSpec) -> Existing | None:
        """The run that a client's request has made; None if none."""
        return await self._read(reading.requested, client, request_id, spec)

    async def session(self, client: str, session_id: str) -> tuple[Session | None, int]:
        """A session with its history, and how many there are of all clients."""
        return await self._read(reading.session, client, session_id)

    async def sessions(self, client: str | None) -> tuple[Session, ...]:
        """Sessions of a client, or of all, without their histories; the one used last first."""
        return await self._read(reading.sessions, client)

    async def trace(self, run_id: str) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
        """The records of a run's steps and calls. Raises LedgerRowCorrupt, LedgerFailed."""
        return await self._read(reading.trace, run_id)

    async def page(
        self, states: frozenset[RunState], before: tuple[float, str] | None, limit: int
    ) -> tuple[Run, ...]:
        """Runs without transcripts, newest first, after the one that `before` names."""
        return await self._read(reading.page, states, before, limit)

    async def counts(self) -> Mapping[RunState, int]:
        """How many runs in the ledger have ended in each state."""
        return await self._read(reading.counts)

    async def results(self, client: str, after_number: int, limit: int) -> tuple[Run, ...]:
        """Ended runs that the client has not acknowledged, by their result number."""
        return await self._read(reading.results, client, after_number, limit)

    async def close(self) -> None:
        """Write what waits, and end."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._close)

    # --- inside ---

    async def _read(
        self,
        function: Callable[Concatenate[apsw.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        self._refuse_when_closed()
        call = functools.partial(self._read_now, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def _read_now(
        self,
        function: Callable[Concatenate[apsw.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        try:
            reader = self._reader()
            try:
                reader.connection.execute("BEGIN")
                return function(reader.connection, *args, **kwargs)
            finally:
                reader.connection.execute("ROLLBACK")
                self._idle.put(reader)
        except apsw.Error as error:
            if isinstance(error, opening.BROKEN):
                self._writer.suspect()
            raise _failed("reading", error) from error

    def _reader(self) -> _Reader:
        """A connection to the file as it was opened last."""
        opened = self._writer.opened
        while True:
            try:
                reader = self._idle.get_nowait()
            except queue.Empty:
                return _Reader(opening.connect_reader(self._path), opened)
            if reader.opened == opened:
                return reader
            reader.connection.close()

    def _close(self) -> None:
        self._pool.shutdown()
        while not self._idle.empty():
            self._idle.get_nowait().connection.close()
        if not self._writer.close(_CLOSE_WITHIN_S):
            raise _failed("closing", TimeoutError("it still writes"))

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise _failed("using", RuntimeError("it is closed"))


def _failed(doing: str, error: Exception) -> LedgerFailed:
    problem = f"{type(error).__name__}: {error}"
    return LedgerFailed(
        f"{doing} the ledger failed: {problem}", metadata={"doing": doing, "problem": problem}
    )
