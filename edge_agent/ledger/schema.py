"""The tables of the ledger, and what makes an older file one of this release. SQL only.

Every table but `meta` has a rowid of its own, by which a broken file is salvaged, and ends in a
CRC32 of its columns (in `events`, `steps`, `tool_calls` and `sessions` without the rowid). A
release that adds a column keeps `crc` as it is: the new column is not among what it covers.

The events of a run are a chain, from the one that `heads.tail` names back over `previous` to 0: in
the order of their coming, so that those of many runs share pages, and a lost one is missed.
"""

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE runs (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL,
        client TEXT NOT NULL,
        request_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        created_at_s REAL NOT NULL,
        spec BLOB NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX runs_by_id ON runs (id);
    CREATE UNIQUE INDEX runs_by_request ON runs (client, request_id) WHERE request_id != '';
    CREATE INDEX runs_by_age ON runs (created_at_s, id);
    CREATE TABLE heads (
        run INTEGER PRIMARY KEY,
        state TEXT NOT NULL,
        ended_at_s REAL,
        tail INTEGER NOT NULL,
        last INTEGER NOT NULL,
        running_step INTEGER,
        attempts INTEGER NOT NULL,
        deaths INTEGER NOT NULL,
        head BLOB NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE INDEX heads_unfinished ON heads (run) WHERE ended_at_s IS NULL;
    CREATE INDEX heads_ended ON heads (ended_at_s, state) WHERE ended_at_s IS NOT NULL;
    CREATE TABLE events (
        number INTEGER PRIMARY KEY,
        run INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        previous INTEGER NOT NULL,
        kind TEXT NOT NULL,
        body BLOB NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE TABLE steps (
        number INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL,
        step INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        at_s REAL NOT NULL,
        body BLOB NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX steps_by_run ON steps (run_id, step, attempt);
    CREATE TABLE tool_calls (
        number INTEGER PRIMARY KEY,
        run_id TEXT NOT NULL,
        call_id TEXT NOT NULL,
        at_s REAL NOT NULL,
        body BLOB NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX tool_calls_by_run ON tool_calls (run_id, call_id);
    CREATE TABLE outcomes (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        run INTEGER NOT NULL,
        client TEXT NOT NULL,
        acked INTEGER NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX outcomes_by_run ON outcomes (run);
    CREATE INDEX outcomes_to_deliver ON outcomes (client, number) WHERE acked = 0;
    INSERT INTO meta VALUES ('min_reader', 1);
    """,
    """
    CREATE TABLE sessions (
        number INTEGER PRIMARY KEY,
        client TEXT NOT NULL,
        id TEXT NOT NULL,
        used_at_s REAL NOT NULL,
        body BLOB NOT NULL,
        crc INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX sessions_by_id ON sessions (client, id);
    CREATE INDEX sessions_by_use ON sessions (used_at_s);
    """,
)
"""The n-th makes version n out of version n - 1. Each sets `min_reader` to the oldest version whose
release may still open the file: it stays where it is while a migration only adds."""

VERSION: Final = len(MIGRATIONS)
