"""Opens the file of the ledger, whatever it finds there.

Blocks. What it sets aside is renamed, whole, and never removed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import apsw

from edge_agent import durable
from edge_agent.ledger import salvage, schema

FILE_NAME: Final = "ledger.db"
PAGE_BYTES: Final = 4096
_WAIT_FOR_LOCKS_MS: Final = 5000
_LOG_FILE_BYTES: Final = 8 << 20
"""What the write-ahead log's file is cut back to after it has grown beyond."""
BROKEN: Final = (apsw.CorruptError, apsw.NotADBError)


@dataclass(frozen=True, slots=True)
class Opened:
    """The connection that writes, and what went wrong on the way to it, for people."""

    connection: apsw.Connection
    problems: tuple[str, ...] = ()


class _Broken(Exception):
    """The file is not a ledger, or not one any more."""


class _Newer(Exception):
    """The file is of a release that this one can't read."""

    def __init__(self, version: int, last_result: int) -> None:
        super().__init__(f"version {version}")
        self.version = version
        self.last_result = last_result


def open_file(
    directory: Path,
    max_bytes: int,
    *,
    vfs: str | None = None,
    clock: Callable[[], float] = time.time,
) -> Opened:
    """The ledger in this directory, made if there is none.

    One that is newer is set aside, one that is broken is set aside and salvaged.

    Raises:
        apsw.Error, OSError: it can be neither opened nor made anew.
    """
    path = directory / FILE_NAME
    problems: tuple[str, ...] = ()
    if _salvaged(path).exists():
        problems += (_swap(path, "an earlier start was cut off"),)
    try:
        connection = _open(path, vfs)
    except _Newer as newer:
        aside = _set_aside(path, f"newer-{newer.version}")
        problem = (
            f"the ledger was of a newer release (version {newer.version}, this release reads"
            f" {schema.VERSION}): it is set aside as {aside}, and a new one is begun"
        )
        problems += (problem,)
        connection = _open(path, vfs)
        _number_results_from(connection, newer.last_result)
    except _Broken as broken:
        problems += (_salvage(path, str(broken), clock),)
        connection = _open(path, vfs)
    connection.pragma("max_page_count", max_bytes // PAGE_BYTES)
    durable.sync(directory)
    return Opened(connection, problems)


def connect_reader(path: Path) -> apsw.Connection:
    """A connection that only reads.

    Raises:
        apsw.Error: it can't be opened.
    """
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(_WAIT_FOR_LOCKS_MS)
    connection.pragma("trusted_schema", "off")
    return connection


def _open(path: Path, vfs: str | None) -> apsw.Connection:
    if not path.exists():
        path.touch(mode=0o600)
    connection = apsw.Connection(str(path), vfs=vfs)
    try:
        _prepare(connection, path, exclusive=vfs is not None)
    except BaseException as error:
        # As it was found: closing the last connection writes the log into the file otherwise.
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.close()
        if isinstance(error, BROKEN):
            raise _Broken(str(error)) from error
        raise
    return connection


def _prepare(connection: apsw.Connection, path: Path, *, exclusive: bool) -> None:
    connection.set_busy_timeout(_WAIT_FOR_LOCKS_MS)
    if exclusive:  # a VFS of one's own has no shared memory
        connection.pragma("locking_mode", "exclusive")
    version = connection.pragma("user_version")
    if version:
        _check(connection, version)
    elif connection.pragma("page_count"):
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables != (0,):
            raise _Broken("it has tables, but not those of a ledger")
    connection.pragma("page_size", PAGE_BYTES)
    connection.pragma("auto_vacuum", "incremental")
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    connection.pragma("wal_autocheckpoint", 0)
    connection.pragma("journal_size_limit", _LOG_FILE_BYTES)
    connection.pragma("trusted_schema", "off")
    if version < schema.VERSION:
        if version:
            _back_up(connection, path.with_name(f"{path.name}.before-{schema.VERSION}"))
        migrate(connection, version)


def _check(connection: apsw.Connection, version: int) -> None:
    """Raises _Newer or _Broken, or as SQLite does."""
    try:
        found = connection.execute("SELECT value FROM meta WHERE key = 'min_reader'").fetchone()
        if found is not None and found[0] > schema.VERSION:
            last = connection.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
            raise _Newer(version, (last[0] if last else None) or 0)
        problem = connection.pragma("integrity_check", 1)
    except apsw.SQLError as error:  # a table that is not there
        raise (_Broken(str(error)) if version <= schema.VERSION else _Newer(version, 0)) from error
    if problem != "ok":
        raise _Broken(str(problem).splitlines()[-1])


def migrate(connection: apsw.Connection, version: int) -> None:
    """Make a file of this release out of one of an older version, or out of an empty one, whole."""
    with connection:
        for statements in schema.MIGRATIONS[version:]:
            connection.execute(statements)
        connection.pragma("user_version", schema.VERSION)


def _back_up(connection: apsw.Connection, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    connection.execute("VACUUM INTO ?", (str(partial),))
    durable.settle(partial, path)


def _salvage(path: Path, problem: str, clock: Callable[[], float]) -> str:
    """Put what can be read of a broken file in its place, and it aside; says what was lost."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    into = apsw.Connection(str(partial))
    into.pragma("page_size", PAGE_BYTES)
    into.pragma("auto_vacuum", "incremental")
    into.pragma("journal_mode", "memory")
    migrate(into, 0)
    lost = salvage.copy(path, into)
    floor = int(clock()) << 10 if lost.last_result is None else lost.last_result
    _number_results_from(into, floor)
    into.close()
    durable.settle(partial, _salvaged(path))
    return _swap(path, f"{problem}; {lost}")


def _swap(path: Path, problem: str) -> str:
    """The second half of a salvage: may be cut off anywhere, and begun again."""
    aside = _set_aside(path, "corrupt")
    durable.settle(_salvaged(path), path)
    return f"the ledger was broken ({problem}): it is set aside as {aside}"


def _salvaged(path: Path) -> Path:
    return path.with_name(f"{path.name}.salvaged")


def _set_aside(path: Path, why: str) -> Path:
    """Rename the file, after what belongs to it, so that it keeps its log also when cut off."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}.{number}")).exists():
        number += 1
    if not path.exists():  # it is set aside already
        return path.with_name(f"{path.name}.{why}.{number - 1}")
    for suffix in ("-wal", "-shm", ""):
        old = path.with_name(path.name + suffix)
        if old.exists():
            old.replace(aside.with_name(aside.name + suffix))
    durable.sync(path.parent)
    return aside


def _number_results_from(connection: apsw.Connection, last: int) -> None:
    """Clients ask for what is above the last number they have had: go on above it."""
    with connection:
        connection.execute("DELETE FROM sqlite_sequence WHERE name = 'outcomes'")
        connection.execute(
            "INSERT INTO sqlite_sequence (name, seq) VALUES ('outcomes', ?)", (last,)
        )
