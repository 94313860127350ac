"""Everything that can be written to the ledger, each with the statements that write it.

A change looks before it writes: one that is refused has written nothing. Commits nothing: the
writer does.
"""

import dataclasses
from dataclasses import dataclass
from typing import Final

import apsw

from edge_agent.core import Event, Run, RunSpec, StepFinished
from edge_agent.errors import LedgerFailed
from edge_agent.ledger import rows
from edge_agent.records import CallRecord, LoggedText, StepRecord

_KNOWN_RUNS: Final = 4096
"""Marks kept; more than any daemon has runs at work."""


@dataclass(frozen=True, slots=True)
class Existing:
    """The run that this request has made before; `same_body` as whether it asked for the same."""

    run_id: str
    same_body: bool


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run as the ledger has it; `run` is without its transcript, which follows from `events`.

    `running_step` began and has not finished, for the `attempts`th time; `deaths` as in
    `RunRecovered`.
    """

    run: Run
    spec: RunSpec
    events: tuple[Event | LoggedText, ...]
    running_step: int | None
    attempts: int
    deaths: int
    calls: tuple[CallRecord, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """What the next change of a run needs to know of its rows.

    `tail` is the number of the last row of its events, `last` the sequence that it starts at.
    """

    number: int
    tail: int = 0
    last: int = 0
    running_step: int | None = None
    attempts: int = 0
    deaths: int = 0


class Book:
    """The open file as changes see it: the connection, and the marks of the runs at work."""

    def __init__(self, connection: apsw.Connection) -> None:
        """Nothing is known yet."""
        self.execute = connection.execute
        self._connection = connection
        self._marks: dict[str, Mark] = {}

    def forget(self) -> None:
        """What was written has been rolled back."""
        self._marks.clear()

    def inserted(self) -> int:
        """The rowid of the last insert."""
        return self._connection.last_insert_rowid()

    def mark(self, run_id: str) -> Mark | None:
        """Where the run stands; None if it is not in the ledger.

        Raises:
            LedgerRowCorrupt: its head can't be read.
        """
        mark = self._marks.get(run_id)
        if mark is None:
            found = self.execute("SELECT number FROM runs WHERE id = ?", (run_id,)).fetchone()
            if found is None:
                return None
            row = self.execute("SELECT * FROM heads WHERE run = ?", found).fetchone()
            if row is None:
                raise rows.row_corrupt("heads", found[0], "it is missing")
            number, _, _, tail, last, step, attempts, deaths, _ = rows.checked("heads", row[:10])
            mark = Mark(number, tail, last, step, attempts, deaths)
            self.keep(run_id, mark)
        return mark

    def keep(self, run_id: str, mark: Mark | None) -> None:
        """Where the run stands now; None once nothing more comes of it."""
        if mark is None:
            self._marks.pop(run_id, None)
            return
        if len(self._marks) >= _KNOWN_RUNS:
            self._marks.clear()
        self._marks[run_id] = mark


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run that is accepted. Its value is None, or what this client's request has made before."""

    run: Run
    spec: RunSpec

    def apply(self, book: Book) -> Existing | None:
        """Write it, unless it is there."""
        run, spec = self.run, rows.value(self.spec)
        digest = rows.digest(spec)
        if run.request_id:
            found = book.execute(
                "SELECT id, digest FROM runs WHERE client = ? AND request_id = ?"
                " AND request_id != ''",
                (run.client, run.request_id),
            ).fetchone()
            if found is not None:
                return Existing(found[0], found[1] == digest)
        number = _next_number(book)
        columns = (number, run.id, run.client, run.request_id, digest, run.created_at_s, spec)
        book.execute(
            "INSERT INTO runs (number, id, client, request_id, digest, created_at_s, spec, crc)"
            " VALUES (?,?,?,?,?,?,?,?)",
            (*columns, rows.crc(columns)),
        )
        mark = Mark(number)
        _insert_head(book, run, mark)
        book.keep(run.id, mark)
        return None


@dataclass(frozen=True, slots=True)
class EventsAdded:
    """What has happened to a run; `run` is as it stands after them.

    The text that was last may be written again, because more of it has come: it takes its old row's
    place. Its value is the run's result number once it has ended.
    """

    run: Run
    events: tuple[Event | LoggedText, ...]

    def apply(self, book: Book) -> int | None:
        """Write the events and the head.

        Raises:
            LedgerFailed: the run is not in the ledger, or has later events.
        """
        run = self.run
        mark = _known(book, run.id)
        number = _result_number(book, run, mark) if run.state.ended else None
        tail, last = mark.tail, mark.last
        for item in self.events:
            sequence, kind, body = rows.event(item, number)
            if sequence > last:
                tail = _append(book, (mark.number, sequence, tail, kind, body))
                last = sequence
            elif sequence == last and isinstance(item, LoggedText):
                _rewrite(book, tail, body)
            else:
                raise _refused(run.id, f"event {sequence} comes after event {last}")
        running = None if _finishes(self.events, mark.running_step) else mark.running_step
        attempts = mark.attempts if running is not None else 0
        deaths = mark.deaths if running is not None else 0
        mark = Mark(mark.number, tail, last, running, attempts, deaths)
        if number is None:
            _update_head(book, run, mark)
        else:
            _end_head(book, dataclasses.replace(run, result_number=number), mark)
        book.keep(run.id, mark if number is None else None)
        return number


@dataclass(frozen=True, slots=True)
class StepStarted:
    """A step of a durable run begins, once more if it is the one that was running."""

    run_id: str
    step: int

    def apply(self, book: Book) -> None:
        """Count the attempt; nothing for a run that is not in the ledger."""
        mark = book.mark(self.run_id)
        if mark is None:
            return
        again = mark.running_step == self.step
        mark = dataclasses.replace(
            mark,
            running_step=self.step,
            attempts=mark.attempts + 1 if again else 1,
            deaths=mark.deaths if again else 0,
        )
        _update_mark(book, mark)
        book.keep(self.run_id, mark)


@dataclass(frozen=True, slots=True)
class StepRecorded:
    """The record of a step of any run; a second one of the same attempt takes its place."""

    record: StepRecord

    def apply(self, book: Book) -> None:
        """Write it."""
        record = self.record
        columns = (
            record.run_id,
            record.step,
            record.attempt,
            record.started_at_s,
            rows.value(record),
        )
        book.execute(
            "INSERT OR REPLACE INTO steps (run_id, step, attempt, at_s, body, crc)"
            " VALUES (?,?,?,?,?,?)",
            (*columns, rows.crc(columns)),
        )


@dataclass(frozen=True, slots=True)
class CallRecorded:
    """The record of a tool call of any run; a later one takes its place."""

    record: CallRecord

    def apply(self, book: Book) -> None:
        """Write it."""
        record = self.record
        columns = (record.run_id, record.call_id, record.issued_at_s, rows.value(record))
        book.execute(
            "INSERT INTO tool_calls (run_id, call_id, at_s, body, crc) VALUES (?,?,?,?,?)"
            " ON CONFLICT (run_id, call_id) DO UPDATE"
            " SET at_s = excluded.at_s, body = excluded.body, crc = excluded.crc",
            (*columns, rows.crc(columns)),
        )


@dataclass(frozen=True, slots=True)
class RunRecovered:
    """A daemon takes over an unfinished run; `deaths` ended while its running step ran."""

    run_id: str
    deaths: int

    def apply(self, book: Book) -> None:
        """Write it.

        Raises:
            LedgerFailed: the run is not in the ledger.
        """
        mark = dataclasses.replace(_known(book, self.run_id), deaths=self.deaths)
        _update_mark(book, mark)
        book.keep(self.run_id, mark)


@dataclass(frozen=True, slots=True)
class ResultsAcked:
    """A client has its results up to this number."""

    client: str
    up_to_number: int

    def apply(self, book: Book) -> None:
        """Write it."""
        found = book.execute(
            "SELECT number, run FROM outcomes WHERE client = ? AND number <= ? AND acked = 0",
            (self.client, self.up_to_number),
        ).fetchall()
        for number, run in found:
            columns = (number, run, self.client, 1)
            book.execute(
                "UPDATE outcomes SET acked = 1, crc = ? WHERE number = ?",
                (rows.crc(columns), number),
            )


Change = (
    NewRun | EventsAdded | StepStarted | StepRecorded | CallRecorded | RunRecovered | ResultsAcked
)


def _known(book: Book, run_id: str) -> Mark:
    mark = book.mark(run_id)
    if mark is None:
        raise _refused(run_id, "it is not in the ledger")
    return mark


def _refused(run_id: str, problem: str) -> LedgerFailed:
    return LedgerFailed(
        f"run {run_id} can't be written: {problem}",
        metadata={"run_id": run_id, "problem": problem},
    )


def _append(book: Book, columns: rows.Row) -> int:
    """One more event; the number of its row."""
    book.execute(
        "INSERT INTO events (run, sequence, previous, kind, body, crc) VALUES (?,?,?,?,?,?)",
        (*columns, rows.crc(columns)),
    )
    return book.inserted()


def _rewrite(book: Book, number: int, body: bytes) -> None:
    """Another body for this event."""
    row = book.execute(
        "SELECT run, sequence, previous, kind, body, crc FROM events WHERE number = ?", (number,)
    ).fetchone()
    if row is None:
        raise rows.row_corrupt("events", number, "it is missing")
    columns = (*rows.checked("events", row)[:4], body)
    book.execute(
        "UPDATE events SET body = ?, crc = ? WHERE number = ?", (body, rows.crc(columns), number)
    )


def _next_number(book: Book) -> int:
    found = book.execute("SELECT max(number) FROM runs").fetchone()
    return 1 if found is None or found[0] is None else int(found[0]) + 1


def _result_number(book: Book, run: Run, mark: Mark) -> int:
    found = book.execute("SELECT number FROM outcomes WHERE run = ?", (mark.number,)).fetchone()
    if found is not None:
        return int(found[0])
    book.execute(
        "INSERT INTO outcomes (run, client, acked, crc) VALUES (?,?,0,0)", (mark.number, run.client)
    )
    number = book.inserted()
    columns = (number, mark.number, run.client, 0)
    book.execute("UPDATE outcomes SET crc = ? WHERE number = ?", (rows.crc(columns), number))
    return number


def _finishes(events: tuple[Event | LoggedText, ...], step: int | None) -> bool:
    return any(
        isinstance(item, Event) and isinstance(item.body, StepFinished) and item.body.step == step
        for item in events
    )


def _head_columns(run: Run, mark: Mark) -> tuple[rows.Value, ...]:
    ended_at_s = run.created_at_s if run.ended_at_s is None else run.ended_at_s
    return (
        mark.number,
        run.state.value,
        ended_at_s if run.state.ended else None,
        mark.tail,
        mark.last,
        mark.running_step,
        mark.attempts,
        mark.deaths,
        rows.head(run),
    )


def _insert_head(book: Book, run: Run, mark: Mark) -> None:
    columns = _head_columns(run, mark)
    book.execute(
        "INSERT INTO heads (run, state, ended_at_s, tail, last, running_step, attempts, deaths,"
        " head, crc) VALUES (?,?,?,?,?,?,?,?,?,?)",
        (*columns, rows.crc(columns)),
    )


def _update_head(book: Book, run: Run, mark: Mark) -> None:
    """Leave `ended_at_s` alone, so that no index is touched."""
    columns = _head_columns(run, mark)
    number, state, _, *others = columns
    book.execute(
        "UPDATE heads SET state = ?, tail = ?, last = ?, running_step = ?, attempts = ?,"
        " deaths = ?, head = ?, crc = ? WHERE run = ?",
        (state, *others, rows.crc(columns), number),
    )


def _end_head(book: Book, run: Run, mark: Mark) -> None:
    number, *columns = _head_columns(run, mark)
    book.execute(
        "UPDATE heads SET state = ?, ended_at_s = ?, tail = ?, last = ?, running_step = ?,"
        " attempts = ?, deaths = ?, head = ?, crc = ? WHERE run = ?",
        (*columns, rows.crc((number, *columns)), number),
    )


def _update_mark(book: Book, mark: Mark) -> None:
    """The same head, with another mark."""
    row = book.execute("SELECT * FROM heads WHERE run = ?", (mark.number,)).fetchone()
    if row is None:
        raise rows.row_corrupt("heads", mark.number, "it is missing")
    kept = rows.checked("heads", row[:10])
    columns = (
        *kept[:5],
        mark.running_step,
        mark.attempts,
        mark.deaths,
        kept[8],
    )
    book.execute(
        "UPDATE heads SET running_step = ?, attempts = ?, deaths = ?, crc = ? WHERE run = ?",
        (*columns[5:8], rows.crc(columns), mark.number),
    )
