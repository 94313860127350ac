"""Copies what can still be read of a broken ledger, row by row; each row's checksum decides.

Changes nothing of the broken file.
"""

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import apsw

from edge_agent.errors import LedgerRowCorrupt
from edge_agent.ledger import reading, rows

_MAX_KEY: Final = (1 << 63) - 1
_ONE_BY_ONE: Final = 2_000
"""More than the keys of a leaf: beyond it, it is an inner page that is broken."""
_MAX_HOLES: Final = 10_000
_SKIPPED_RESULTS: Final = 1 << 20
"""Result numbers that an unreadable row may have had."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table by its key, its other columns, and whether the checksum covers the key."""

    name: str
    key: str
    columns: tuple[str, ...]
    key_is_covered: bool = True

    @property
    def select(self) -> str:
        """All of its columns, the key first."""
        return f"SELECT {self.key}, {', '.join(self.columns)} FROM {self.name}"  # noqa: S608 - constants


_RUNS: Final = Table(
    "runs",
    "number",
    ("id", "client", "request_id", "digest", "created_at_s", "spec", "crc"),
)
_HEADS: Final = Table(
    "heads",
    "run",
    ("state", "ended_at_s", "tail", "last", "running_step", "attempts", "deaths", "head", "crc"),
)
_EVENTS: Final = Table(
    "events",
    "number",
    ("run", "sequence", "previous", "kind", "body", "crc"),
    key_is_covered=False,
)
_STEPS: Final = Table(
    "steps", "number", ("run_id", "step", "attempt", "at_s", "body", "crc"), key_is_covered=False
)
_CALLS: Final = Table(
    "tool_calls", "number", ("run_id", "call_id", "at_s", "body", "crc"), key_is_covered=False
)
_OUTCOMES: Final = Table("outcomes", "number", ("run", "client", "acked", "crc"))
_SESSIONS: Final = Table(
    "sessions", "number", ("client", "id", "used_at_s", "body", "crc"), key_is_covered=False
)
TABLES: Final = (_RUNS, _HEADS, _EVENTS, _STEPS, _CALLS, _OUTCOMES, _SESSIONS)


@dataclass(slots=True)
class Lost:
    """What a salvage did not find.

    `rows` are those seen with a wrong checksum, `holes` the ranges of keys that could not be read,
    by table. Of `runs` runs not all rows are there. `last_result` is the highest result number that
    was given; None if nothing says so.
    """

    rows: dict[str, int] = field(default_factory=dict)
    holes: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    runs: int = 0
    last_result: int | None = None

    def __str__(self) -> str:
        """For people."""
        if not self.kept and self.last_result is None:
            return "nothing of it could be read"
        wrong = [f"{count} of {table}" for table, count in self.rows.items() if count]
        holes = [f"{count} in {table}" for table, count in self.holes.items() if count]
        parts = [f"{self.kept} rows are kept"]
        parts += [f"rows with a wrong checksum: {', '.join(wrong)}"] if wrong else []
        parts += [f"places that can't be read: {', '.join(holes)}"] if holes else []
        parts += [f"runs that are not whole: {self.runs}"] if self.runs else []
        return ", ".join(parts)


def copy(path: Path, into: apsw.Connection) -> Lost:
    """Copy the readable rows of the file into a new ledger that is empty."""
    lost = Lost()
    broken = apsw.Connection(str(path))
    broken.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    try:
        with into:
            for table in _tables(broken):
                _copy_table(broken, into, table, lost)
            lost.runs = _not_whole(into)
            _drop_orphans(into)
        lost.last_result = _last_result(broken, into, lost)
    finally:
        broken.close()
    return lost


def _copy_table(broken: apsw.Connection, into: apsw.Connection, table: Table, lost: Lost) -> None:
    marks = ",".join("?" * (len(table.columns) + 1))
    insert = (
        f"INSERT OR IGNORE INTO {table.name} ({table.key}, {', '.join(table.columns)})"  # noqa: S608 - constants
        f" VALUES ({marks})"
    )
    reader = _Reader(broken, table)
    for row in reader.read():
        into.execute(insert, row)
        lost.kept += into.changes()
    lost.rows[table.name] = len(reader.wrong)
    lost.holes[table.name] = reader.holes


def _tables(broken: apsw.Connection) -> tuple[Table, ...]:
    """Those that the file has: one of an older release lacks some."""
    try:
        found = broken.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
    except (apsw.Error, UnicodeDecodeError):  # nobody knows: what can't be read is lost
        return TABLES
    names = {name for (name,) in found}
    return tuple(table for table in TABLES if table.name in names)


class _Reader:
    """Reads a table around the places where it is broken."""

    def __init__(self, connection: apsw.Connection, table: Table) -> None:
        self.wrong: set[int] = set()
        """Keys of rows with a wrong checksum."""
        self.holes = 0
        """Places that can't be read."""
        self._connection = connection
        self._table = table

    def read(self) -> Iterator[rows.Row]:
        """All rows that can be reached and are as they were written."""
        first = 0
        while self.holes < _MAX_HOLES:
            broke_at = yield from self._scan(first, _MAX_KEY, "ASC")
            if broke_at is None:
                return
            self.holes += 1
            beyond = self._beyond(broke_at + 1)
            if beyond - broke_at > _ONE_BY_ONE:  # so some that can be read may lie before it
                yield from self._scan(broke_at + 1, beyond, "DESC")
            if beyond == _MAX_KEY:
                return
            first = beyond

    def _beyond(self, key: int) -> int:
        """Where the table can be read again: looked for one by one, then in ever longer steps."""
        step = 1
        for tried in itertools.count():
            if key >= _MAX_KEY or self._reaches(key):
                break
            step = step if tried < _ONE_BY_ONE else step * 2
            key += step
        return min(key, _MAX_KEY)

    def _reaches(self, key: int) -> bool:
        table = self._table
        try:
            self._connection.execute(f"{table.select} WHERE {table.key} = ?", (key,)).fetchone()
        except (apsw.Error, UnicodeDecodeError):
            return False
        return True

    def _scan(self, first: int, last: int, order: str) -> Generator[rows.Row, None, int | None]:
        """Yields what is as it was written; returns the key of the last one before it broke."""
        table = self._table
        query = f"{table.select} WHERE {table.key} BETWEEN ? AND ? ORDER BY {table.key} {order}"
        key = first - 1 if order == "ASC" else last + 1
        try:
            for row in self._connection.execute(query, (first, last)):
                try:
                    rows.checked(table.name, row if table.key_is_covered else row[1:])
                except LedgerRowCorrupt:
                    self.wrong.add(row[0])
                else:
                    key = row[0]
                    yield row
        except (apsw.Error, UnicodeDecodeError):
            return key
        return None


def _not_whole(into: apsw.Connection) -> int:
    """How many runs have not all of their rows."""
    parted: Any = into.execute(
        "SELECT count(*) FROM runs FULL JOIN heads ON heads.run = runs.number"
        " WHERE number IS NULL OR run IS NULL"
    ).fetchone()
    heads: Any = into.execute("SELECT run, tail FROM heads JOIN runs ON number = run").fetchall()
    return int(parted[0]) + sum(not _has_all_events(into, run, tail) for run, tail in heads)


def _has_all_events(into: apsw.Connection, run: int, tail: int) -> bool:
    try:
        for _ in reading.chain(into, run, tail):
            pass
    except LedgerRowCorrupt:
        return False
    return True


def _drop_orphans(into: apsw.Connection) -> None:
    """Nothing can be made of what a run left without what its caller had asked for."""
    for table in ("heads", "outcomes", "events"):
        into.execute(f"DELETE FROM {table} WHERE run NOT IN (SELECT number FROM runs)")  # noqa: S608 - constants


def _last_result(broken: apsw.Connection, into: apsw.Connection, lost: Lost) -> int | None:
    """The highest result number that was given, or one above it."""
    seen = into.execute("SELECT max(number) FROM outcomes").fetchone()
    highest = (seen[0] if seen else None) or 0
    try:
        given = broken.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outcomes'").fetchone()
        return max(highest, given[0] if given else 0)
    except apsw.Error:
        return highest + _SKIPPED_RESULTS if lost.kept else None
