"""What can be read from the ledger: each function takes a connection and reads within one snapshot.

Writes nothing. A row whose checksum is wrong is an error of its run.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import apsw

from edge_agent.core import Run, RunSpec, RunState, Session
from edge_agent.errors import LedgerRowCorrupt
from edge_agent.ledger import rows
from edge_agent.ledger.changes import Existing, StoredRun
from edge_agent.records import CallRecord, StepRecord
from edge_agent.runs import history

_RUN = "number, id, client, request_id, digest, created_at_s, spec, crc"
_EVENT = "run, sequence, previous, kind, body, crc"
_SESSION = "SELECT number, client, id, used_at_s, body, crc FROM sessions"
_HEAD = "run, state, ended_at_s, tail, last, running_step, attempts, deaths, head, crc"


def unfinished(connection: apsw.Connection) -> tuple[list[StoredRun], list[LedgerRowCorrupt]]:
    """The runs that have not ended, oldest first, and why others of them can't be read."""
    found: list[StoredRun] = []
    broken: list[LedgerRowCorrupt] = []
    numbers: Sequence[rows.Row] = connection.execute(
        "SELECT run FROM heads WHERE ended_at_s IS NULL ORDER BY run"
    ).fetchall()
    for (number,) in numbers:
        try:
            found.append(_stored(connection, number))
        except LedgerRowCorrupt as error:
            broken.append(error)
    return found, broken


def find(connection: apsw.Connection, run_id: str) -> StoredRun | None:
    """One run.

    Raises:
        LedgerRowCorrupt: a row of it can't be read.
    """
    row = connection.execute("SELECT number FROM runs WHERE id = ?", (run_id,)).fetchone()
    return None if row is None else _stored(connection, row[0])


def requested(
    connection: apsw.Connection, client: str, request_id: str, spec: RunSpec
) -> Existing | None:
    """The run that a client's request has made, and whether it asked for the same."""
    found = connection.execute(
        "SELECT id, digest FROM runs WHERE client = ? AND request_id = ? AND request_id != ''",
        (client, request_id),
    ).fetchone()
    if found is None:
        return None
    return Existing(found[0], found[1] == rows.digest(rows.value(spec)))


def session(
    connection: apsw.Connection, client: str, session_id: str
) -> tuple[Session | None, int]:
    """A session with its history, and how many there are of all clients.

    Raises:
        LedgerRowCorrupt: it can't be read.
    """
    count: rows.Row = connection.execute("SELECT count(*) FROM sessions").fetchone() or (0,)
    found = connection.execute(f"{_SESSION} WHERE client = ? AND id = ?", (client, session_id))
    for row in _fetched("sessions", found):
        return _session(row), count[0]
    return None, count[0]


def sessions(connection: apsw.Connection, client: str | None) -> tuple[Session, ...]:
    """Sessions of a client, or of all, without their histories; the one used last first.

    One that can't be read is left out: the others are of use without it.
    """
    found = connection.execute(
        f"{_SESSION} WHERE ? IS NULL OR client = ? ORDER BY used_at_s DESC, number DESC",
        (client, client),
    )
    read = []
    for row in _fetched("sessions", found):
        with contextlib.suppress(LedgerRowCorrupt):
            read.append(dataclasses.replace(_session(row), messages=()))
    return tuple(read)


def trace(
    connection: apsw.Connection, run_id: str
) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
    """The records of a run's steps and of its tool calls, in their order.

    Raises:
        LedgerRowCorrupt: one of them can't be read.
    """
    return tuple(_steps(connection, run_id)), tuple(_calls(connection, run_id))


def page(
    connection: apsw.Connection,
    states: frozenset[RunState],
    before: tuple[float, str] | None,
    limit: int,
) -> tuple[Run, ...]:
    """Runs without transcripts, newest first; any state where `states` is empty.

    A head that can't be read is left out: the others are of use without it.
    """
    where, values = "", list[rows.Value]()
    if before is not None:
        where, values = " AND (created_at_s, id) < (?, ?)", [*before]
    if states:
        where += f" AND state IN ({','.join('?' * len(states))})"
        values += [state.value for state in states]
    numbers: Sequence[rows.Row] = connection.execute(
        "SELECT number FROM runs JOIN heads ON heads.run = runs.number WHERE true"  # noqa: S608 - marks
        f"{where} ORDER BY created_at_s DESC, id DESC LIMIT ?",
        (*values, limit),
    ).fetchall()
    heads = []
    for (number,) in numbers:
        with contextlib.suppress(LedgerRowCorrupt):
            head = _head(connection, number)
            heads.append(rows.read_head(number, head[8]))
    return tuple(heads)


def counts(connection: apsw.Connection) -> Mapping[RunState, int]:
    """How many runs have ended in each state."""
    found = connection.execute(
        "SELECT state, count(*) FROM heads WHERE ended_at_s IS NOT NULL GROUP BY state"
    )
    known = {state.value: state for state in RunState}
    return {known.get(state, RunState.UNSPECIFIED): count for state, count in found}


def results(
    connection: apsw.Connection, client: str, after_number: int, limit: int
) -> tuple[Run, ...]:
    """Ended runs that the client has not acknowledged, by their result number, with transcripts.

    Raises:
        LedgerRowCorrupt: one of them can't be read.
    """
    found = connection.execute(
        "SELECT number, run, client, acked, crc FROM outcomes"
        " WHERE client = ? AND number > ? AND acked = 0 ORDER BY number LIMIT ?",
        (client, after_number, limit),
    )
    ended = []
    for row in list(_fetched("outcomes", found)):
        _, run, _, _ = rows.checked("outcomes", row)
        stored = _stored(connection, run)
        ended.append(history.with_transcript(stored.run, stored.events))
    return tuple(ended)


def chain(connection: apsw.Connection, run: int, tail: int) -> Iterator[tuple[int, str, bytes]]:
    """The sequences, kinds and bodies of a run's events, the last one first.

    Raises:
        LedgerRowCorrupt: one is missing, or not as it was written.
    """
    number, before = tail, None
    while number:
        columns = _row(connection, "events", _EVENT, "number", number)
        its_run, sequence, previous, kind, body = columns
        if its_run != run or previous >= number or (before is not None and sequence >= before):
            raise rows.row_corrupt("events", number, f"it is not an event of run {run}")
        yield sequence, kind, body
        number, before = previous, sequence


def _stored(connection: apsw.Connection, number: int) -> StoredRun:
    row = _row(connection, "runs", _RUN, "number", number)
    head = _head(connection, number)
    run_id = row[1]
    _, _, _, tail, _, step, attempts, deaths, body = head
    events = [
        rows.read_event(run_id, sequence, kind, event)
        for sequence, kind, event in chain(connection, number, tail)
    ]
    return StoredRun(
        run=rows.read_head(number, body),
        spec=rows.read_spec(number, row[6]),
        events=tuple(reversed(events)),
        running_step=step,
        attempts=attempts,
        deaths=deaths,
        calls=tuple(_calls(connection, run_id)),
    )


def _session(row: rows.Row) -> Session:
    number, *columns = row
    rows.checked("sessions", columns)
    return rows.read_session(number, columns[3])


def _head(connection: apsw.Connection, number: int) -> rows.Row:
    return _row(connection, "heads", _HEAD, "run", number)


def _row(connection: apsw.Connection, table: str, columns: str, key: str, number: int) -> rows.Row:
    query = f"SELECT {columns} FROM {table} WHERE {key} = ?"  # noqa: S608 - constants
    for row in _fetched(table, connection.execute(query, (number,))):
        return rows.checked(table, row)
    raise rows.row_corrupt(table, number, "it is missing")


def _fetched(table: str, cursor: Iterable[rows.Row]) -> Iterator[rows.Row]:
    """What a query finds; SQLite does not look whether texts are UTF-8, but Python does."""
    try:
        yield from cursor
    except UnicodeDecodeError as error:
        raise rows.row_corrupt(table, None, "a text in it is not UTF-8") from error


def _steps(connection: apsw.Connection, run_id: str) -> Iterator[StepRecord]:
    found = connection.execute(
        "SELECT number, run_id, step, attempt, at_s, body, crc FROM steps WHERE run_id = ?"
        " ORDER BY step, attempt",
        (run_id,),
    )
    for number, *row in _fetched("steps", found):
        rows.checked("steps", row)
        yield rows.read_step(number, row[4])


def _calls(connection: apsw.Connection, run_id: str) -> Iterator[CallRecord]:
    found = connection.execute(
        "SELECT number, run_id, call_id, at_s, body, crc FROM tool_calls WHERE run_id = ?"
        " ORDER BY number",
        (run_id,),
    )
    for number, *row in _fetched("tool_calls", found):
        rows.checked("tool_calls", row)
        yield rows.read_call(number, row[3])
