"""Copies what can still be read of a broken ledger, row by row; each row's checksum decides.

Changes nothing of the broken file.
"""

import collections
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import apsw

from edge_agent.errors import LedgerRowCorrupt
from edge_agent.ledger import rows

_MAX_KEY: Final = (1 << 63) - 1
_MAX_RANGES: Final = 10_000
"""Looked at in one table: the largest first, so that what is left out is small."""
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
    ("state", "ended_at_s", "events", "last", "running_step", "attempts", "deaths", "head", "crc"),
)
_EVENTS: Final = Table("events", "key", ("kind", "body", "crc"))
_STEPS: Final = Table(
    "steps", "number", ("run_id", "step", "attempt", "at_s", "body", "crc"), key_is_covered=False
)
_CALLS: Final = Table(
    "tool_calls", "number", ("run_id", "call_id", "at_s", "body", "crc"), key_is_covered=False
)
_OUTCOMES: Final = Table("outcomes", "number", ("run", "client", "acked", "crc"))
TABLES: Final = (_RUNS, _HEADS, _EVENTS, _STEPS, _CALLS, _OUTCOMES)


@dataclass(slots=True)
class Lost:
    """What a salvage did not find.

    `rows` are those seen with a wrong checksum, `holes` the ranges of keys that could not be read,
    by table. `last_result` is the highest result number that was given; None if nothing says so.
    """

    rows: dict[str, int] = field(default_factory=dict)
    holes: dict[str, int] = field(default_factory=dict)
    kept: int = 0
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
        return ", ".join(parts)


def copy(path: Path, into: apsw.Connection) -> Lost:
    """Copy the readable rows of the file into a new ledger that is empty."""
    lost = Lost()
    broken = apsw.Connection(str(path))
    broken.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    try:
        with into:
            for table in TABLES:
                _copy_table(broken, into, table, lost)
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


class _Reader:
    """Reads a table from both ends to where it breaks, then halves what is left between them."""

    def __init__(self, connection: apsw.Connection, table: Table) -> None:
        self.wrong: set[int] = set()
        """Keys of rows with a wrong checksum."""
        self.holes = 0
        """Ranges of keys that can't be read."""
        self._connection = connection
        self._table = table
        self._waiting: collections.deque[tuple[int, int]] = collections.deque()

    def read(self) -> Iterator[rows.Row]:
        """All rows that can be reached and are as they were written."""
        self._waiting.append((0, _MAX_KEY))
        for _ in range(_MAX_RANGES):
            if not self._waiting:
                return
            yield from self._range(*self._waiting.popleft())
        self.holes += len(self._waiting)

    def _range(self, first: int, last: int) -> Iterator[rows.Row]:
        for order in ("ASC", "DESC"):
            try:
                for row in self._scan(first, last, order):
                    yield row
                    if order == "ASC":
                        first = row[0] + 1
                    else:
                        last = row[0] - 1
            except (apsw.Error, UnicodeDecodeError):
                continue
            return
        if first < last:
            middle = (first + last) // 2
            self._waiting += ((first, middle), (middle + 1, last))
        elif first == last:
            self.holes += 1

    def _scan(self, first: int, last: int, order: str) -> Iterator[rows.Row]:
        table = self._table
        query = f"{table.select} WHERE {table.key} BETWEEN ? AND ? ORDER BY {table.key} {order}"
        for row in self._connection.execute(query, (first, last)):
            try:
                rows.checked(table.name, row if table.key_is_covered else row[1:])
            except LedgerRowCorrupt:
                self.wrong.add(row[0])
            else:
                yield row


def _last_result(broken: apsw.Connection, into: apsw.Connection, lost: Lost) -> int | None:
    """The highest result number that was given, or one above it."""
    seen = into.execute("SELECT max(number) FROM outcomes").fetchone()
    highest = (seen[0] if seen else None) or 0
    try:
        given = broken.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outcomes'").fetchone()
        return max(highest, given[0] if given else 0)
    except apsw.Error:
        return highest + _SKIPPED_RESULTS if lost.kept else None
