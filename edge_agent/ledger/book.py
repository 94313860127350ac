"""The open file as changes see it: what they have written, also where SQLite does not have it yet.

Events and heads go to SQLite once for all changes of a transaction, which costs half. Commits and
rolls back nothing: the writer does, and says so.
"""

import itertools
from dataclasses import dataclass
from typing import Final

import apsw

from edge_agent.core import Run
from edge_agent.ledger import rows

_KNOWN_RUNS: Final = 4096
"""Marks kept; more than any daemon has runs at work."""
_INSERT_EVENT: Final = (
    "INSERT INTO events (number, run, sequence, previous, kind, body, crc) VALUES (?,?,?,?,?,?,?)"
)
_INSERT_HEAD: Final = (
    "INSERT INTO heads (run, state, ended_at_s, tail, last, running_step, attempts, deaths, head,"
    " crc) VALUES (?,?,?,?,?,?,?,?,?,?)"
)
# Without `ended_at_s`, so that no index is touched.
_UPDATE_HEAD: Final = (
    "UPDATE heads SET state = ?, tail = ?, last = ?, running_step = ?, attempts = ?, deaths = ?,"
    " head = ?, crc = ? WHERE run = ?"
)
_END_HEAD: Final = (
    "UPDATE heads SET state = ?, ended_at_s = ?, tail = ?, last = ?, running_step = ?,"
    " attempts = ?, deaths = ?, head = ?, crc = ? WHERE run = ?"
)


@dataclass(slots=True)
class Mark:
    """What the next change of a run needs to know of its rows, and changes.

    `tail` is the number of the last row of its events, `last` the sequence that it starts at.
    """

    number: int
    tail: int = 0
    last: int = 0
    running_step: int | None = None
    attempts: int = 0
    deaths: int = 0


class Book:
    """The connection, the marks of the runs at work, and what waits to be handed to SQLite."""

    def __init__(self, connection: apsw.Connection) -> None:
        """Nothing is known yet."""
        self.execute = connection.execute
        self.execute_many = connection.executemany
        self._connection = connection
        self._marks: dict[str, Mark] = {}
        self._events: dict[int, tuple[rows.Value, ...]] = {}
        self._heads: dict[int, tuple[Run, Mark]] = {}
        self._numbers: itertools.count[int] | None = None

    def forget(self) -> None:
        """What was written has been rolled back, or others have written."""
        self._marks.clear()
        self._events.clear()
        self._heads.clear()
        self._numbers = None

    def flush(self) -> None:
        """Hand over what waits: before a commit, and before anybody reads what may wait."""
        if self._events:
            events = ((number, *row, rows.crc(row)) for number, row in self._events.items())
            self.execute_many(_INSERT_EVENT, events)
            self._events.clear()
        if self._heads:
            heads = [(mark.number, *_head(run, mark)) for run, mark in self._heads.values()]
            going_on = [each for each in heads if each[2] is None]
            self.execute_many(_UPDATE_HEAD, map(_going_on, going_on))
            if len(going_on) < len(heads):
                ended = (_ended(each) for each in heads if each[2] is not None)
                self.execute_many(_END_HEAD, ended)
            self._heads.clear()

    def inserted(self) -> int:
        """The rowid of the last insert that did not wait."""
        return self._connection.last_insert_rowid()

    # --- marks ---

    def mark(self, run_id: str) -> Mark | None:
        """Where the run stands; None if it is not in the ledger.

        Raises:
            LedgerRowCorrupt: its head can't be read.
        """
        mark = self._marks.get(run_id)
        if mark is None:
            self.flush()
            found = self.execute("SELECT number FROM runs WHERE id = ?", (run_id,)).fetchone()
            if found is None:
                return None
            head = self._read_head(found[0])
            number, _, _, tail, last, step, attempts, deaths, _ = head
            mark = Mark(number, tail, last, step, attempts, deaths)
            self._keep(run_id, mark)
        return mark

    def drop(self, run_id: str) -> None:
        """Nothing more is to come of this run."""
        self._marks.pop(run_id, None)

    def _keep(self, run_id: str, mark: Mark) -> None:
        if len(self._marks) >= _KNOWN_RUNS:
            self._marks.clear()
        self._marks[run_id] = mark

    # --- heads ---

    def begin(self, run: Run, number: int) -> None:
        """The head of a run that is new."""
        mark = Mark(number)
        self.execute(_INSERT_HEAD, (number, *_head(run, mark)))
        self._keep(run.id, mark)

    def set_head(self, run: Run, mark: Mark) -> None:
        """The head of a run from now on; `mark` may still change."""
        self._heads[mark.number] = run, mark

    def set_mark(self, mark: Mark) -> None:
        """The same head, with a mark that has changed."""
        if mark.number in self._heads:
            return
        _, state, ended_at_s, *_, head = self._read_head(mark.number)
        columns = (mark.number, state, ended_at_s, *_marked(mark), head)
        self.execute(
            "UPDATE heads SET running_step = ?, attempts = ?, deaths = ?, crc = ? WHERE run = ?",
            (mark.running_step, mark.attempts, mark.deaths, rows.crc(columns), mark.number),
        )

    def _read_head(self, number: int) -> rows.Row:
        row = self.execute("SELECT * FROM heads WHERE run = ?", (number,)).fetchone()
        if row is None:
            raise rows.row_corrupt("heads", number, "it is missing")
        return rows.checked("heads", row[:10])

    # --- events ---

    def append(self, run: int, sequence: int, previous: int, kind: str, body: bytes) -> int:
        """One more event; the number of its row."""
        if self._numbers is None:
            found = self.execute("SELECT max(number) FROM events").fetchone()
            self._numbers = itertools.count(((found[0] if found else None) or 0) + 1)
        number = next(self._numbers)
        self._events[number] = (run, sequence, previous, kind, body)
        return number

    def rewrite(self, number: int, body: bytes) -> None:
        """Another body for an event.

        Raises:
            LedgerRowCorrupt: it can't be read.
        """
        waiting = self._events.get(number)
        if waiting is not None:
            self._events[number] = (*waiting[:4], body)
            return
        row = self.execute(
            "SELECT run, sequence, previous, kind, body, crc FROM events WHERE number = ?",
            (number,),
        ).fetchone()
        if row is None:
            raise rows.row_corrupt("events", number, "it is missing")
        columns = (*rows.checked("events", row)[:4], body)
        self.execute(
            "UPDATE events SET body = ?, crc = ? WHERE number = ?",
            (body, rows.crc(columns), number),
        )


def _head(run: Run, mark: Mark) -> tuple[rows.Value, ...]:
    """The columns of a head after the run's number, with the checksum of all."""
    ended_at_s = run.created_at_s if run.ended_at_s is None else run.ended_at_s
    columns = (
        run.state.value,
        ended_at_s if run.state.ended else None,
        *_marked(mark),
        rows.head(run),
    )
    return (*columns, rows.crc((mark.number, *columns)))


def _marked(mark: Mark) -> tuple[rows.Value, ...]:
    return mark.tail, mark.last, mark.running_step, mark.attempts, mark.deaths


def _going_on(head: tuple[rows.Value, ...]) -> tuple[rows.Value, ...]:
    return (head[1], *head[3:], head[0])


def _ended(head: tuple[rows.Value, ...]) -> tuple[rows.Value, ...]:
    return (*head[1:], head[0])
