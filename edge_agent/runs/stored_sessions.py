"""Sessions between memory and the ledger: read for a run, kept when it has ended, listed, deleted.

Decides nothing about who may use a session: `sessions` does.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import structlog

from edge_agent.core import Session
from edge_agent.errors import LedgerFailed, LedgerRowCorrupt
from edge_agent.ledger.changes import Change, SessionDeleted, SessionKept
from edge_agent.runs.sessions import Sessions

log = structlog.get_logger()


class SessionLedger(Protocol):
    """Where sessions are kept; `ledger.ledger.Ledger` says what each does."""

    # ruff: noqa: D102

    async def commit(self, *changes: Change) -> tuple[object, ...]: ...
    def enqueue(self, *changes: Change, done: Callable[[Exception | None], None]) -> None: ...
    async def session(self, client: str, session_id: str) -> tuple[Session | None, int]: ...
    async def sessions(self, client: str | None) -> tuple[Session, ...]: ...


class StoredSessions:
    """All sessions; `memory` has those in use."""

    def __init__(self, ledger: SessionLedger) -> None:
        """Nothing is read yet."""
        self.memory = Sessions(self._keep)
        self._ledger = ledger

    async def load(self, client: str, session_id: str) -> None:
        """Have memory know a session, if there is one.

        Raises:
            LedgerRowCorrupt: it can't be read.
            LedgerFailed: the ledger can't.
        """
        while not self.memory.knows(client, session_id):
            deletions = self.memory.deletions
            found, stored = await self._ledger.session(client, session_id)
            if deletions == self.memory.deletions:
                self.memory.learn(client, session_id, found, stored)
                return

    async def recover(self, client: str, session_id: str) -> None:
        """As `load`; the session of an unfinished run begins anew where it can't be read."""
        try:
            await self.load(client, session_id)
        except LedgerRowCorrupt as error:
            log.warning("session_lost", client=client, session=session_id, error=error.message)

    async def get(self, client: str, session_id: str) -> Session:
        """A session with its history. Raises NotFound, LedgerRowCorrupt, LedgerFailed."""
        await self.load(client, session_id)
        return self.memory.get(client, session_id)

    async def list(self, client: str | None) -> tuple[Session, ...]:
        """Sessions of a client, or of all, without histories; the one used last first."""
        stored = await self._ledger.sessions(client)
        found = {(each.client, each.id): each for each in stored}
        found |= {(each.client, each.id): each for each in self.memory.all(client)}
        sessions = sorted(found.values(), key=lambda each: each.used_at_s, reverse=True)
        return tuple(dataclasses.replace(each, messages=()) for each in sessions)

    async def delete(self, client: str, session_id: str) -> None:
        """Delete a session with its history.

        Raises:
            NotFound: there is none.
            FailedPrecondition: reason SESSION_BUSY.
            LedgerFull, LedgerFailed: it is still there.
        """
        try:
            await self.get(client, session_id)
        except LedgerRowCorrupt as error:
            log.warning("unreadable_session_deleted", client=client, error=error.message)
        self.memory.begin_deleting(client, session_id)
        deleted = False
        try:
            await self._ledger.commit(SessionDeleted(client, session_id))
            deleted = True
        finally:
            self.memory.end_deleting(client, session_id, deleted=deleted)
        log.info("session_deleted", client=client, session=session_id)

    def _keep(self, session: Session) -> None:
        """Have the session of a run that is not durable written; nobody waits for it."""

        def done(error: Exception | None) -> None:
            self.memory.written(session)
            if error is not None:
                log.warning("session_not_kept", session=session.id, error=str(error))

        try:
            self._ledger.enqueue(SessionKept(session), done=done)
        except LedgerFailed as error:
            done(error)
