"""What leaves the ledger again: ended runs, records of other runs, sessions; oldest first.

Works in pieces. Removes no unfinished run and no session, and no result that nobody has
acknowledged, unless its retention is over.
Begins and ends no transaction.
"""

from typing import Any, Final

import apsw

from edge_agent.ledger import rows

RUNS_IN_A_PIECE: Final = 32
RECORDS_IN_A_PIECE: Final = 512


class Retention:
    """Removes a piece at a time. Remembers how far it has looked through the records.

    It need not go back: a record that was kept for its run is removed with the run.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        """Of the writing connection."""
        self._execute = connection.execute
        self._changes = connection.changes
        self._looked_at = {"steps": 0, "tool_calls": 0}

    def remove_aged(self, before_s: float, sessions_before_s: float) -> int:
        """Runs that ended, and records that were made, before this Unix time; how many went.

        And sessions that were used last before a time of their own.
        """
        runs = self._runs("SELECT run FROM heads WHERE ended_at_s < ?", before_s)
        return runs + self._records(before_s) + self._sessions(sessions_before_s)

    def remove_for_room(self) -> int:
        """Records of runs that are not in the ledger, else ended runs with acknowledged results."""
        return self._records(None) or self._runs(
            "SELECT heads.run FROM heads JOIN outcomes ON outcomes.run = heads.run"
            " WHERE ended_at_s IS NOT NULL AND acked = 1"
        )

    def _runs(self, which: str, *values: rows.Value) -> int:
        query = f"{which} ORDER BY ended_at_s LIMIT {RUNS_IN_A_PIECE}"
        numbers: list[Any] = self._execute(query, values).fetchall()
        for (number,) in numbers:
            self._remove(number)
        return len(numbers)

    def _remove(self, number: int) -> None:
        execute = self._execute
        found = execute("SELECT id FROM runs WHERE number = ?", (number,)).fetchone()
        if found is not None:
            execute("DELETE FROM steps WHERE run_id = ?", found)
            execute("DELETE FROM tool_calls WHERE run_id = ?", found)
        event = execute("SELECT tail FROM heads WHERE run = ?", (number,)).fetchone()
        while event is not None and event != (0,):
            before = execute("SELECT previous FROM events WHERE number = ?", event).fetchone()
            execute("DELETE FROM events WHERE number = ?", event)
            event = before
        execute("DELETE FROM outcomes WHERE run = ?", (number,))
        execute("DELETE FROM heads WHERE run = ?", (number,))
        execute("DELETE FROM runs WHERE number = ?", (number,))

    def _sessions(self, before_s: float) -> int:
        self._execute(
            "DELETE FROM sessions WHERE number IN (SELECT number FROM sessions"
            " WHERE used_at_s < ? ORDER BY used_at_s LIMIT ?)",
            (before_s, RUNS_IN_A_PIECE),
        )
        return self._changes()

    def _records(self, before_s: float | None) -> int:
        return sum(self._records_of(table, before_s) for table in self._looked_at)

    def _records_of(self, table: str, before_s: float | None) -> int:
        """Of a table's oldest that were not looked at; those of a run in the ledger go with it."""
        while True:
            found: list[Any] = self._execute(
                f"SELECT number, at_s, EXISTS (SELECT 1 FROM runs WHERE id = run_id) FROM {table}"  # noqa: S608 - constants
                f" WHERE number > ? ORDER BY number LIMIT {RECORDS_IN_A_PIECE}",
                (self._looked_at[table],),
            ).fetchall()
            removed = 0
            for number, at_s, is_kept in found:
                if not is_kept and before_s is not None and at_s >= before_s:
                    return removed
                if not is_kept:
                    self._execute(f"DELETE FROM {table} WHERE number = ?", (number,))  # noqa: S608 - constants
                    removed += 1
                self._looked_at[table] = number
            if removed or not found:
                return removed
