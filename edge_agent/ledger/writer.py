"""The one thread that writes the ledger: it commits what waits, together, and then says so.

Owns the writing connection: nobody else writes or checkpoints. Decides nothing about runs.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import apsw
import structlog

from edge_agent.errors import EdgeAgentError, LedgerFailed, LedgerFull
from edge_agent.ledger import rows
from edge_agent.ledger.ballast import Ballast
from edge_agent.ledger.book import Book
from edge_agent.ledger.changes import Change
from edge_agent.ledger.opening import BROKEN, Opened
from edge_agent.ledger.settings import LedgerSettings
from edge_agent.ledger.upkeep import Upkeep

RETRY_AFTER_FULL_S: Final = 60.0
_GROUP: Final = 512
"""Entries in one transaction: bounds how long the first of them waits."""
_NOTE_WAIT_S: Final = 0.5
_FIRST_IDLE_S: Final = 1.0
"""After a group, until what can wait is done."""
_ALL_FAIL = (apsw.BusyError, apsw.LockedError, apsw.IOError, apsw.CantOpenError, *BROKEN)
"""Errors of the file and not of what was to be written: to try each by itself is of no use."""

log = structlog.get_logger()

Done = Callable[[tuple[object, ...], Exception | None], None]


@dataclass(slots=True)
class Entry:
    """Changes that are written together or not at all, and whom to tell; nobody for a note."""

    changes: tuple[Change, ...]
    loop: asyncio.AbstractEventLoop | None = None
    done: Done | None = None
    values: tuple[object, ...] = ()
    error: Exception | None = None


class Writer:
    """Takes entries from the event loop and writes them in their order."""

    def __init__(
        self,
        directory: Path,
        settings: LedgerSettings,
        open_file: Callable[[], Opened],
        clock: Callable[[], float],
    ) -> None:
        """Open the file and start the thread. Blocks; raises as `opening.open_file` does."""
        self._settings = settings
        self._ballast = Ballast(directory, settings.ballast_bytes)
        self._open_file = open_file
        self._clock = clock
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._closing = False
        self._log_pages = 0
        self._suspected = False
        self.problems: tuple[str, ...] = ()
        self.trouble: str | None = None
        """Why the last transaction failed; None once one has succeeded."""
        self.opened = 0
        """How many times the file was opened: readers of an earlier one read what was set aside."""
        self.notes_taken = 0
        """Entries of which nobody waits that have left the queue."""
        self._open()
        self._thread = threading.Thread(target=self._work, name="ledger-writer", daemon=True)
        self._thread.start()

    @property
    def used_bytes(self) -> int:
        """Of the file, without what is free in it."""
        return self._upkeep.used_bytes

    @property
    def disk_full(self) -> bool:
        """Whether what room there is on disk is kept for the runs that are there."""
        return self._upkeep.disk_full

    def put(self, entry: Entry) -> None:
        """Write it with the next group. Never blocks."""
        self._entries.put(entry)

    def suspect(self) -> None:
        """A reader has found the file broken: check it, and salvage it if it is. Never blocks."""
        self._suspected = True
        self._entries.put(Entry(()))

    def close(self, within_s: float) -> bool:
        """Write what was put, and end; False if that took longer. Blocks."""
        self._entries.put(None)
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _open(self) -> None:
        try:
            opened = self._open_file()
        except (apsw.FullError, apsw.IOError, OSError):
            if not self._ballast.give_up():
                raise
            opened = self._open_file()
        self._connection = opened.connection
        self._connection.set_wal_hook(self._committed)
        self._book = Book(self._connection)
        self._upkeep = Upkeep(
            self._connection,
            self._settings,
            self._ballast,
            forget=self._book.forget,
            clock=self._clock,
        )
        self.problems += opened.problems
        self.opened += 1

    def _work(self) -> None:
        wait_s = 0.0
        while not self._closing:
            group = self._next_group(wait_s)
            if group:
                self._write(group)
                self._settle(group)
            wait_s = self._look_after(busy=bool(group))
        self._connection.close()

    # --- what waits ---

    def _next_group(self, idle_s: float) -> list[Entry]:
        """All that waits; a note waits a moment for company. Nothing after `idle_s`."""
        group: list[Entry] = []
        until_s = time.monotonic() + idle_s
        noted = False
        while len(group) < _GROUP:
            left_s = until_s - time.monotonic()
            try:
                entry = (
                    self._entries.get(timeout=left_s) if left_s > 0 else self._entries.get_nowait()
                )
            except queue.Empty:
                break
            if entry is None:
                self._closing = True
                break
            group.append(entry)
            if entry.done is not None or not entry.changes:
                until_s = 0.0
            elif not noted:
                noted = True
                until_s = time.monotonic() + _NOTE_WAIT_S
        return group

    def _settle(self, group: list[Entry]) -> None:
        """Tell all that wait, with one wake-up of their loop."""
        self.notes_taken += sum(entry.done is None and bool(entry.changes) for entry in group)
        waiting = [entry for entry in group if entry.loop is not None]
        for loop in {entry.loop for entry in waiting if entry.loop is not None}:
            theirs = [entry for entry in waiting if entry.loop is loop]
            try:
                loop.call_soon_threadsafe(_tell, theirs)
            except RuntimeError:  # the loop is closed, and with it whoever waited
                continue

    # --- transactions ---

    def _write(self, group: list[Entry]) -> None:
        """One transaction; where something in it fails, one for each, so that it fails alone."""
        error = self._try(group)
        if error is None:
            return
        if isinstance(error, _ALL_FAIL):
            for entry in group:
                _fail(entry, error)
            self._suspected = self._suspected or isinstance(error, BROKEN)
            return
        made_room = False
        for entry in group:
            error = self._try([entry])
            if isinstance(error, apsw.FullError) and not made_room:
                made_room = True
                if self._upkeep.make_room():
                    error = self._try([entry])
            if error is not None:
                _fail(entry, error)

    def _try(self, group: Sequence[Entry]) -> Exception | None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for entry in group:
                entry.values = tuple([change.apply(self._book) for change in entry.changes])
            self._book.flush()
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - an entry's, or the file's: the thread goes on
            self._roll_back()
            if not isinstance(error, EdgeAgentError):
                self.trouble = f"writing to the ledger fails: {error}"
            return error
        self.trouble = None
        return None

    def _roll_back(self) -> None:
        self._book.forget()
        try:
            if not self._connection.get_autocommit():
                self._connection.execute("ROLLBACK")
        except apsw.Error as error:
            log.error("ledger_rollback_failed", error=str(error))
            self._suspected = True

    # --- between them ---

    def _look_after(self, *, busy: bool) -> float:
        """Keep the file in order; how long nothing more need be done for it."""
        try:
            if self._suspected:
                self._reopen()
            if busy:
                self._upkeep.after_group(self._log_pages)
                return _FIRST_IDLE_S
            return self._upkeep.when_idle()
        except (apsw.Error, OSError, EdgeAgentError) as error:
            self.trouble = f"the ledger can't be kept in order: {error}"
            log.error("ledger_upkeep_failed", error=str(error))
            return _FIRST_IDLE_S

    def _reopen(self) -> None:
        self._suspected = False
        try:
            self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            self._connection.close()
            self._open()
        except (apsw.Error, OSError):
            self._suspected = True
            raise

    def _committed(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK


def _tell(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.done is not None:
            entry.done(entry.values, entry.error)


def _fail(entry: Entry, error: Exception) -> None:
    entry.values, entry.error = (), _as_ours(error)
    log.warning("ledger_write_failed", error=str(error), awaited=entry.done is not None)


def _as_ours(error: Exception) -> Exception:
    match error:
        case EdgeAgentError():
            return error
        case apsw.FullError():
            return LedgerFull("the ledger has no more room", retry_after_s=RETRY_AFTER_FULL_S)
        case UnicodeDecodeError():
            return rows.row_corrupt("heads", None, "a text in it is not UTF-8")
        case _:
            return LedgerFailed(
                f"writing to the ledger failed: {error}", metadata={"problem": error}
            )
