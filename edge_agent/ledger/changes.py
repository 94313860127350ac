"""Everything that can be written to the ledger, each with the statements that write it.

Commits nothing: the writer does, and rolls back what a refused one has written.
"""

import dataclasses
from dataclasses import dataclass

from edge_agent.core import Run, RunSpec, Session
from edge_agent.errors import LedgerFailed
from edge_agent.events import Event, StepFinished
from edge_agent.ledger import rows
from edge_agent.ledger.book import Book, Mark
from edge_agent.records import CallRecord, LoggedText, StepRecord


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
        book.begin(run, number)
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
        for item in self.events:
            sequence, kind, body = rows.event(item, number)
            if sequence > mark.last:
                mark.tail = book.append(mark.number, sequence, mark.tail, kind, body)
                mark.last = sequence
            elif sequence == mark.last and isinstance(item, LoggedText):
                book.rewrite(mark.tail, body)
            else:
                raise _refused(run.id, f"event {sequence} comes after event {mark.last}")
        if mark.running_step is None or _finishes(self.events, mark.running_step):
            mark.running_step, mark.attempts, mark.deaths = None, 0, 0
        if number is None:
            book.set_head(run, mark)
        else:
            book.set_head(dataclasses.replace(run, result_number=number), mark)
            book.drop(run.id)
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
        mark.running_step = self.step
        mark.attempts = mark.attempts + 1 if again else 1
        mark.deaths = mark.deaths if again else 0
        book.set_mark(mark)


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
        mark = _known(book, self.run_id)
        mark.deaths = self.deaths
        book.set_mark(mark)


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


@dataclass(frozen=True, slots=True)
class SessionKept:
    """A session as it stands, with its whole history; a later one takes its place."""

    session: Session

    def apply(self, book: Book) -> None:
        """Write it."""
        session = dataclasses.replace(self.session, run_id="")
        columns = (session.client, session.id, session.used_at_s, rows.value(session))
        book.execute(
            "INSERT INTO sessions (client, id, used_at_s, body, crc) VALUES (?,?,?,?,?)"
            " ON CONFLICT (client, id) DO UPDATE SET used_at_s = excluded.used_at_s,"
            " body = excluded.body, crc = excluded.crc",
            (*columns, rows.crc(columns)),
        )


@dataclass(frozen=True, slots=True)
class SessionDeleted:
    """A session with its history is to go."""

    client: str
    session_id: str

    def apply(self, book: Book) -> None:
        """Delete it."""
        book.execute(
            "DELETE FROM sessions WHERE client = ? AND id = ?", (self.client, self.session_id)
        )


Change = (
    NewRun
    | EventsAdded
    | StepStarted
    | StepRecorded
    | CallRecorded
    | RunRecovered
    | ResultsAcked
    | SessionKept
    | SessionDeleted
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


def _finishes(events: tuple[Event | LoggedText, ...], step: int) -> bool:
    return any(
        isinstance(item, Event) and isinstance(item.body, StepFinished) and item.body.step == step
        for item in events
    )
