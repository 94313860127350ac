"""Opens the file of the ledger, whatever it finds there.

Blocks. What it sets aside is renamed, never removed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import apsw

from edge_agent import durable
from edge_agent.ledger import schema

FILE_NAME: Final = "ledger.db"
PAGE_BYTES: Final = 4096
_WAIT_FOR_LOCKS_MS: Final = 5000
_LOG_FILE_BYTES: Final = 8 << 20
"""What the write-ahead log's file is cut back to after it has grown beyond."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The connection that writes, and what went wrong on the way to it, for people."""

    connection: apsw.Connection
    problems: tuple[str, ...] = ()


def open_file(directory: Path, max_bytes: int, vfs: str | None = None) -> Opened:
    """The ledger in this directory, made if there is none.

    Raises:
        apsw.Error, OSError: it can be neither opened nor made anew.
    """
    path = directory / FILE_NAME
    if not path.exists():
        path.touch(mode=0o600)
    connection = _connect(path, vfs)
    _migrate(connection)
    connection.pragma("max_page_count", max_bytes // PAGE_BYTES)
    durable.sync(directory)
    return Opened(connection)


def connect_reader(path: Path) -> apsw.Connection:
    """A connection that only reads.

    Raises:
        apsw.Error: it can't be opened.
    """
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(_WAIT_FOR_LOCKS_MS)
    connection.pragma("trusted_schema", "off")
    return connection


def _connect(path: Path, vfs: str | None) -> apsw.Connection:
    connection = apsw.Connection(str(path), vfs=vfs)
    connection.set_busy_timeout(_WAIT_FOR_LOCKS_MS)
    if vfs is not None:  # one of our own has no shared memory
        connection.pragma("locking_mode", "exclusive")
    connection.pragma("page_size", PAGE_BYTES)
    connection.pragma("auto_vacuum", "incremental")
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    connection.pragma("wal_autocheckpoint", 0)
    connection.pragma("journal_size_limit", _LOG_FILE_BYTES)
    connection.pragma("trusted_schema", "off")
    return connection


def _migrate(connection: apsw.Connection) -> None:
    version = connection.pragma("user_version")
    if version >= schema.VERSION:
        return
    with connection:
        for statements in schema.MIGRATIONS[version:]:
            connection.execute(statements)
        connection.execute(f"PRAGMA user_version = {schema.VERSION}")
