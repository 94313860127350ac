"""What the writer does between transactions: checkpoints, retention, room, giving pages back.

Called by the writer's thread alone, with no transaction open.
"""

import time
from collections.abc import Callable
from typing import Final

import apsw
import structlog

from edge_agent.ledger.ballast import Ballast
from edge_agent.ledger.opening import PAGE_BYTES
from edge_agent.ledger.retention import Retention
from edge_agent.ledger.settings import LedgerSettings

CHECKPOINT_PAGES: Final = 1000
_CROWDED: Final = 0.85
"""Above this part of the file, what can go does; new runs are refused a little further up."""
_ROOMY: Final = 0.8
_PIECES_FOR_ROOM: Final = 64
"""At most, when something waits for the room."""
_SWEEP_S: Final = 600.0
_NEXT_PIECE_S: Final = 0.05
_LOOK_AT_DISK_S: Final = 5.0
_GROUPS_BETWEEN_LOOKS: Final = 8
"""While there is plenty of room: it takes time from the groups to ask how much is used."""
_FREE_PAGES: Final = 1024
"""Kept in the file for what comes: giving pages back and asking for them again costs more."""
_VACUUM_PAGES: Final = 64

log = structlog.get_logger()


class Upkeep:
    """Keeps the file in its bounds."""

    def __init__(
        self,
        connection: apsw.Connection,
        settings: LedgerSettings,
        ballast: Ballast,
        *,
        forget: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """`forget` is called when rows were removed; `clock` is Unix time."""
        self._connection = connection
        self._settings = settings
        self._ballast = ballast
        self._forget = forget
        self._clock = clock
        self._retention = Retention(connection)
        self._groups = 0
        self._next_sweep_s = 0.0
        self._next_look_s = 0.0
        self.disk_full = not ballast.take()
        self.used_bytes = self._used_bytes()

    def after_group(self, log_pages: int) -> None:
        """What can't wait until nothing else is to be done."""
        if log_pages >= CHECKPOINT_PAGES:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        self._groups += 1
        is_roomy = self.used_bytes < _ROOMY * self._settings.max_bytes
        if is_roomy and not self.disk_full and self._groups % _GROUPS_BETWEEN_LOOKS:
            return
        self.used_bytes = self._used_bytes()
        if self.used_bytes > _CROWDED * self._settings.max_bytes:
            self._piece(self._retention.remove_for_room)
        if self.disk_full:
            self._look_at_disk()

    def when_idle(self) -> float:
        """One piece of what can wait; how long until the next one."""
        self.used_bytes = self._used_bytes()
        if self.disk_full:
            self._look_at_disk()
        now_s = time.monotonic()
        if now_s >= self._next_sweep_s:
            clock_s = self._clock()
            before_s = clock_s - self._settings.retention_s
            sessions_before_s = clock_s - self._settings.session_retention_s
            if self._piece(lambda: self._retention.remove_aged(before_s, sessions_before_s)):
                return _NEXT_PIECE_S
            self._next_sweep_s = now_s + min(_SWEEP_S, max(1.0, self._settings.retention_s / 10))
        free_pages = self._connection.pragma("freelist_count")
        if free_pages > _FREE_PAGES:
            self._give_back(min(_VACUUM_PAGES, free_pages - _FREE_PAGES))
            return _NEXT_PIECE_S
        return _LOOK_AT_DISK_S if self.disk_full else self._next_sweep_s - now_s

    def make_room(self) -> bool:
        """Something does not fit: whether there is more room now than there was."""
        if self._ballast.disk_is_full():
            return self._make_room_on_disk()
        removed = 0
        for _ in range(_PIECES_FOR_ROOM):
            piece = self._piece(self._retention.remove_for_room)
            removed += piece
            if not piece or self._used_bytes() < _ROOMY * self._settings.max_bytes:
                break
        log.warning("ledger_full", rows_removed=removed)
        return removed > 0

    def _make_room_on_disk(self) -> bool:
        self.disk_full = True
        had_ballast = self._ballast.give_up()
        self._truncate_log()
        removed = 0
        for _ in range(_PIECES_FOR_ROOM):
            piece = self._piece(self._retention.remove_for_room)
            removed += piece
            if not piece:
                break
        if removed:
            self._give_back(self._connection.pragma("freelist_count"))
            self._truncate_log()
        log.warning("ledger_disk_full", ballast=had_ballast, rows_removed=removed)
        return had_ballast or removed > 0

    def _look_at_disk(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _LOOK_AT_DISK_S
        self.disk_full = not (self._ballast.has_room() and self._ballast.take())

    def _piece(self, remove: Callable[[], int]) -> int:
        """One transaction; 0 also where it fails, so that nobody goes on with it."""
        try:
            with self._connection:
                removed = remove()
        except apsw.Error as error:
            log.warning("ledger_retention_failed", error=str(error))
            self._retention = Retention(self._connection)  # it had gone further than the file has
            return 0
        if removed:
            self._forget()
        return removed

    def _give_back(self, pages: int) -> None:
        try:
            self._connection.pragma("incremental_vacuum", pages)
        except apsw.Error as error:
            log.warning("ledger_vacuum_failed", error=str(error))

    def _truncate_log(self) -> None:
        try:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.Error as error:
            log.warning("ledger_checkpoint_failed", error=str(error))

    def _used_bytes(self) -> int:
        pages = self._connection.pragma("page_count") - self._connection.pragma("freelist_count")
        return int(pages) * PAGE_BYTES
