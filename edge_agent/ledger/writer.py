"""The one thread that writes the ledger: it commits what waits, together, and then says so.

Owns the writing connection: nobody else writes or checkpoints. Decides nothing about runs.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import apsw
import structlog

from edge_agent.errors import EdgeAgentError, LedgerFailed, LedgerFull
from edge_agent.ledger.changes import Book, Change

_GROUP: Final = 512
"""Entries in one transaction: bounds how long the first of them waits."""
_NOTE_WAIT_S: Final = 0.5
_CHECKPOINT_PAGES: Final = 1000

log = structlog.get_logger()

Done = Callable[[tuple[object, ...] | None, Exception | None], None]


@dataclass(slots=True)
class Entry:
    """Changes that are written together or not at all, and whom to tell; nobody for a note."""

    changes: tuple[Change, ...]
    loop: asyncio.AbstractEventLoop | None = None
    done: Done | None = None
    values: tuple[object, ...] | None = None
    error: Exception | None = field(default=None)


class Writer:
    """Takes entries from the event loop and writes them in their order."""

    def __init__(self, connection: apsw.Connection) -> None:
        """Start the thread; the connection is its own from now on."""
        self._connection = connection
        self._book = Book(connection)
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._log_pages = 0
        self._closing = False
        self.trouble: str | None = None
        """Why the last transaction failed; None once one has succeeded."""
        self.used_bytes = 0
        """Of the file, without what is free in it."""
        self.notes_taken = 0
        """Entries of which nobody waits that have left the queue."""
        connection.set_wal_hook(self._committed)
        self._thread = threading.Thread(target=self._work, name="ledger-writer", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Write it with the next group. Never blocks."""
        self._entries.put(entry)

    def close(self, within_s: float) -> bool:
        """Write what was put, and end; False if that took longer. Blocks."""
        self._entries.put(None)
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while not self._closing:
            group = self._next_group()
            if group:
                self._write(group)
                self._settle(group)
                self._look_after()
        self._connection.close()

    def _next_group(self) -> list[Entry]:
        """All that waits; a note waits a moment for company."""
        group: list[Entry] = []
        until_s: float | None = None
        while len(group) < _GROUP:
            try:
                entry = self._next_entry(until_s)
            except queue.Empty:
                break
            if entry is None:
                self._closing = True
                break
            group.append(entry)
            if entry.done is not None:
                until_s = 0.0
            elif until_s is None:
                until_s = time.monotonic() + _NOTE_WAIT_S
        return group

    def _next_entry(self, until_s: float | None) -> Entry | None:
        if until_s is None:
            return self._entries.get()
        left_s = until_s - time.monotonic()
        return self._entries.get(timeout=left_s) if left_s > 0 else self._entries.get_nowait()

    def _write(self, group: list[Entry]) -> None:
        """One transaction; where something in it fails, one for each, so that it fails alone."""
        if self._try(group) is None:
            return
        for entry in group:
            error = self._try([entry])
            if error is not None:
                entry.values, entry.error = None, _as_ours(error)
                log.warning("ledger_write_failed", error=str(error))

    def _try(self, group: Sequence[Entry]) -> Exception | None:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for entry in group:
                entry.values = tuple(change.apply(self._book) for change in entry.changes)
            self._connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the entry's and not the thread's
            self._roll_back()
            if not isinstance(error, EdgeAgentError):
                self.trouble = f"writing to the ledger fails: {error}"
            return error
        self.trouble = None
        return None

    def _roll_back(self) -> None:
        self._book.forget()
        if not self._connection.get_autocommit():
            self._connection.execute("ROLLBACK")

    def _settle(self, group: list[Entry]) -> None:
        """Tell all that wait, with one wake-up of their loop."""
        self.notes_taken += sum(entry.done is None for entry in group)
        waiting = [entry for entry in group if entry.loop is not None]
        for loop in {entry.loop for entry in waiting if entry.loop is not None}:
            theirs = [entry for entry in waiting if entry.loop is loop]
            try:
                loop.call_soon_threadsafe(_tell, theirs)
            except RuntimeError:  # the loop is closed, and with it whoever waited
                continue

    def _look_after(self) -> None:
        if self._log_pages >= _CHECKPOINT_PAGES:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            self._log_pages = 0

    def _committed(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK


def _tell(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.done is not None:
            entry.done(entry.values, entry.error)


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, EdgeAgentError):
        return error
    if isinstance(error, apsw.FullError):
        return LedgerFull("the ledger is full", retry_after_s=60.0)
    return LedgerFailed(f"writing to the ledger failed: {error}", metadata={"problem": error})
