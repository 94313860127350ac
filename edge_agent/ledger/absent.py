"""What stands in for a ledger that can't be opened: the daemon comes up, and says so.

Runs that are not durable go on without it; nothing durable is accepted, and nothing is found.
"""

from collections.abc import Callable

from edge_agent.core import Run, RunSpec, RunState, Session
from edge_agent.errors import LedgerFailed
from edge_agent.ledger.changes import Change, Existing, StoredRun
from edge_agent.records import CallRecord, StepRecord


class AbsentLedger:
    """No ledger, and why."""

    def __init__(self, error: LedgerFailed) -> None:
        """`error` is what everything durable is refused with."""
        self._error = error

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why the daemon is degraded."""
        return (f"no durable runs: {self._error.message}",)

    async def commit(self, *changes: Change) -> tuple[object, ...]:
        """Write nothing, where nothing is to be written. Raises LedgerFailed."""
        if changes:
            raise self._error
        return ()

    def enqueue(self, *_changes: Change, done: Callable[[Exception | None], None]) -> None:  # noqa: ARG002
        """Raises LedgerFailed."""
        raise self._error

    def note(self, *changes: Change) -> None:
        """Nobody is told of a note: it is lost."""

    def accepts_new_runs(self) -> None:
        """Raises LedgerFailed."""
        raise self._error

    async def unfinished(self) -> tuple[StoredRun, ...]:
        """None are known."""
        return ()

    async def find(self, _run_id: str) -> StoredRun | None:
        """It is not known."""
        return None

    async def requested(self, _client: str, _request_id: str, _spec: RunSpec) -> Existing | None:
        """It is not known."""
        return None

    async def session(self, _client: str, _session_id: str) -> tuple[Session | None, int]:
        """Whether there is one is not known. Raises LedgerFailed."""
        raise self._error

    async def sessions(self, _client: str | None) -> tuple[Session, ...]:
        """Which there are is not known. Raises LedgerFailed."""
        raise self._error

    async def trace(self, _run_id: str) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
        """Nothing is on record."""
        return (), ()

    async def page(
        self, _states: frozenset[RunState], _before: tuple[float, str] | None, _limit: int
    ) -> tuple[Run, ...]:
        """None are known."""
        return ()

    async def results(self, _client: str, _after_number: int, _limit: int) -> tuple[Run, ...]:
        """What has ended is not known. Raises LedgerFailed."""
        raise self._error

    async def close(self) -> None:
        """Nothing is open."""
