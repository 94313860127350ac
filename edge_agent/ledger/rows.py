"""What the columns of the ledger hold: values as MessagePack, and a CRC32 of each row. Pure.

Fields that a later release added are ignored on reading; fields that it does not find have their
defaults.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from typing import Any, Final, TypeVar, get_args

import msgspec

from edge_agent.core import Run, RunSpec, Session
from edge_agent.errors import LedgerRowCorrupt
from edge_agent.events import Event, EventBody, RunFinished
from edge_agent.records import CallRecord, LoggedText, StepRecord

Value = int | float | str | bytes | None
Row = Sequence[Any]
"""As SQLite returns it; the schema says what is in it."""
T = TypeVar("T")

_encode = msgspec.msgpack.Encoder().encode
_bodies: Final = {
    kind.__name__: msgspec.msgpack.Decoder(kind) for kind in (*get_args(EventBody), LoggedText)
}
_heads: Final = msgspec.msgpack.Decoder(Run)
_specs: Final = msgspec.msgpack.Decoder(RunSpec)
_steps: Final = msgspec.msgpack.Decoder(StepRecord)
_calls: Final = msgspec.msgpack.Decoder(CallRecord)
_sessions: Final = msgspec.msgpack.Decoder(Session)


def crc(columns: Sequence[Value]) -> int:
    """CRC32 of a row, all its columns but the CRC itself in their order."""
    return zlib.crc32(_encode(columns))


def checked(table: str, row: Row) -> Row:
    """The row without its CRC, which is its last column.

    Raises:
        LedgerRowCorrupt: the CRC is that of another row.
    """
    columns = row[:-1]
    if crc(columns) != row[-1]:
        raise row_corrupt(table, row[0], "its checksum is wrong")
    return columns


def row_corrupt(table: str, key: Value, problem: str) -> LedgerRowCorrupt:
    """The error that names a row by its key."""
    return LedgerRowCorrupt(
        f"row {key!r} of {table} in the ledger can't be read: {problem}",
        metadata={"table": table, "row": key, "problem": problem},
    )


def head(run: Run) -> bytes:
    """All of a run but its transcript, which follows from its events."""
    return _encode(dataclasses.replace(run, transcript=()) if run.transcript else run)


def value(item: RunSpec | StepRecord | CallRecord | Session) -> bytes:
    """Any other value as it is stored."""
    return _encode(item)


def digest(body: bytes) -> bytes:
    """SHA-256 of a stored spec, by which two requests are compared."""
    return hashlib.sha256(body).digest()


def event(item: Event | LoggedText, result_number: int | None) -> tuple[int, str, bytes]:
    """The sequence that an event starts at, its kind and its body.

    The run that RunFinished holds has no transcript there, and its result number.
    """
    if isinstance(item, LoggedText):
        return item.first, "LoggedText", _encode(item)
    body = item.body
    if isinstance(body, RunFinished):
        ended = dataclasses.replace(body.run, transcript=(), result_number=result_number)
        body = RunFinished(ended)
    return item.sequence, type(body).__name__, _encode(body)


def read_event(run_id: str, sequence: int, kind: str, body: bytes) -> Event | LoggedText:
    """An event as it was written.

    Raises:
        LedgerRowCorrupt: no kind or value of this release.
    """
    decoder = _bodies.get(kind)
    if decoder is None:
        raise row_corrupt("events", run_id, f"no event has the kind {kind!r}")
    decoded = _decoded("events", run_id, decoder, body)
    if isinstance(decoded, LoggedText):
        return decoded
    return Event(run_id, sequence, decoded)


def read_head(number: int, body: bytes) -> Run:
    """A run without its transcript."""
    return _decoded("heads", number, _heads, body)


def read_spec(number: int, body: bytes) -> RunSpec:
    """What the run's caller asked for."""
    return _decoded("runs", number, _specs, body)


def read_step(number: int, body: bytes) -> StepRecord:
    """The record of a step."""
    return _decoded("steps", number, _steps, body)


def read_call(number: int, body: bytes) -> CallRecord:
    """The record of a tool call."""
    return _decoded("tool_calls", number, _calls, body)


def read_session(number: int, body: bytes) -> Session:
    """A session with its history."""
    return _decoded("sessions", number, _sessions, body)


def _decoded(table: str, key: int | str, decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise row_corrupt(table, key, str(error)) from error
