"""The sessions in memory: their histories, and which run goes on in each.

Keeps what is in use, what is not on disk yet, and a few more; the ledger has them all. Reads and
writes no ledger itself. All methods on the daemon's loop, at once.
"""

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge_agent.core import Message, Overflow, Role, Run, RunSpec, Session, SessionUse
from edge_agent.errors import FailedPrecondition, InvalidRequest, NotFound, Overloaded
from edge_agent.runs import turns
from edge_agent.runs.settings import RunSettings

_IDLE_KEPT: Final = 32
"""Sessions that nobody uses and that need not be read again for their next run."""
_RETRY_AFTER_S: Final = 60.0

Key = tuple[str, str]
"""A client and its name for the session."""


@dataclass(eq=False, slots=True)
class _Known:
    """A session in memory; `said` is what the caller of its run has said."""

    session: Session
    is_new: bool
    said: tuple[Message, ...] = ()
    changed: bool = False
    writing: int = 0

    @property
    def idle(self) -> bool:
        return not self.session.run_id and not self.writing


def _nowhere(_session: Session) -> None:
    """Kept in memory alone."""


class Sessions:
    """Who is in which session."""

    def __init__(
        self, keep: Callable[[Session], None] = _nowhere, *, clock: Callable[[], float] = time.time
    ) -> None:
        """None yet. `keep` writes one whose run has no events on disk; `clock` is Unix time."""
        self._keep = keep
        self._clock = clock
        self._known: OrderedDict[Key, _Known] = OrderedDict()
        self._deleting: set[Key] = set()
        self._stored = 0
        self.deletions = 0
        """How many were deleted: what was read of the ledger before may be gone."""

    # --- what the ledger says ---

    def knows(self, client: str, session_id: str) -> bool:
        """Whether it need not be read."""
        return (client, session_id) in self._known

    def learn(self, client: str, session_id: str, found: Session | None, stored: int) -> None:
        """What is stored of a session, and how many are stored in all."""
        self._stored = stored
        if found is not None and not self.knows(client, session_id):
            self._known[client, session_id] = _Known(found, is_new=False)
            self._drop_idle()

    def written(self, session: Session) -> None:
        """What `end` or `changed` returned is on disk, or could not be written."""
        known = self._known.get((session.client, session.id))
        if known is not None:
            known.writing -= 1
            self._stored += known.is_new
            known.is_new = False
            self._drop_idle()

    # --- runs ---

    def check(self, client: str, spec: RunSpec, settings: RunSettings) -> None:
        """Refuse a run that can't go on in its session.

        Raises:
            FailedPrecondition: reason SESSION_BUSY, a run of it goes on; SESSION_OVERFLOW_DIFFERS;
                SESSION_FULL, it has more history than it may, and none is to be dropped.
            InvalidRequest: a system message, and the session has one or needs none any more.
            Overloaded: reason TOO_MANY_SESSIONS.
        """
        if spec.session is None:
            return
        key = client, spec.session.id
        self._refuse_busy(key)
        known = self._known.get(key)
        if known is None:
            self._refuse_more(settings.max_sessions)
            return
        _check_use(known.session, spec.session)
        if not known.session.messages:
            return
        if spec.messages[0].role is Role.SYSTEM:
            problem = f"is system, but only the first run of session {key[1]!r} may have one"
            raise InvalidRequest.field("spec.messages[0].role", problem)
        _check_size(known.session, settings.max_history_bytes)

    def begin(self, run: Run, spec: RunSpec) -> None:
        """A run goes on in its session, if it has one: nobody else does, until it has ended."""
        if spec.session is None:
            return
        known = self._known.get((run.client, run.session))
        if known is None:
            now_s = self._clock()
            overflow = spec.session.overflow or Overflow.REFUSE
            known = _Known(Session(run.session, run.client, overflow, now_s, now_s), is_new=True)
            self._known[run.client, run.session] = known
        known.said = spec.messages
        known.session = dataclasses.replace(known.session, run_id=run.id)

    def forget(self, run: Run) -> None:
        """A run never began after all."""
        known = self._of(run)
        if known is not None:
            known.session = dataclasses.replace(known.session, run_id="")
            if known.is_new and not known.writing:
                del self._known[run.client, run.session]

    def session(self, run: Run) -> Session | None:
        """The session that a run goes on in."""
        known = self._of(run)
        return known.session if known else None

    def shorten(self, run: Run, messages: tuple[Message, ...]) -> None:
        """The session of a run has this history from now on."""
        known = self._of(run)
        if known is not None:
            known.session = dataclasses.replace(known.session, messages=messages)
            known.changed = True

    def changed(self, run: Run) -> Session | None:
        """The session of a run, where it is to be written with what happened to the run."""
        known = self._of(run)
        if known is None or not known.changed:
            return None
        known.changed = False
        known.writing += 1
        return known.session

    def end(self, run: Run) -> Session | None:
        """A run has ended: what it said is history. Returns what is to be written, once only."""
        known = self._of(run)
        if known is None:
            return None
        session = known.session
        left = turns.left_by(known.said, run.transcript, session.runs + 1)
        known.session = dataclasses.replace(
            session,
            messages=(*session.messages, *left),
            runs=session.runs + 1,
            used_at_s=self._clock(),
            run_id="",
        )
        known.said, known.changed = (), False
        known.writing += 1
        self._known.move_to_end((run.client, run.session))
        return known.session

    def ended(self, run: Run) -> None:
        """A run has ended: have its session written, unless that is done with its last event."""
        session = self.end(run)
        if session is not None:
            self._keep(session)

    # --- what callers ask for ---

    def get(self, client: str, session_id: str) -> Session:
        """A session in memory. Raises NotFound."""
        known = self._known.get((client, session_id))
        if known is None:
            raise NotFound(
                f"session_id: no session {session_id!r} of client {client!r}",
                reason="SESSION_NOT_FOUND",
                metadata={"session_id": session_id, "client": client},
            )
        return known.session

    def all(self, client: str | None) -> tuple[Session, ...]:
        """Those in memory, of a client or of all."""
        return tuple(
            known.session for key, known in self._known.items() if client in (None, key[0])
        )

    def begin_deleting(self, client: str, session_id: str) -> None:
        """Have no run begin in a session. Raises FailedPrecondition as `check` does."""
        self._refuse_busy((client, session_id))
        self._deleting.add((client, session_id))

    def end_deleting(self, client: str, session_id: str, *, deleted: bool) -> None:
        """It is gone, or it stays after all."""
        self._deleting.discard((client, session_id))
        if deleted:
            self.deletions += 1
            self._known.pop((client, session_id), None)

    # --- inside ---

    def _of(self, run: Run) -> _Known | None:
        known = self._known.get((run.client, run.session)) if run.session else None
        return known if known is not None and known.session.run_id == run.id else None

    def _refuse_busy(self, key: Key) -> None:
        known = self._known.get(key)
        run_id = known.session.run_id if known else ""
        if not run_id and key not in self._deleting:
            return
        doing = f"run {run_id} goes on in it" if run_id else "it is being deleted"
        raise FailedPrecondition(
            f"session {key[1]!r} is busy: {doing}",
            reason="SESSION_BUSY",
            metadata={"session_id": key[1], "run_id": run_id},
        )

    def _refuse_more(self, most: int) -> None:
        there = self._stored + sum(known.is_new for known in self._known.values())
        if there >= most:
            raise Overloaded(
                f"there are {there} sessions, at most {most} (sessions.max_sessions)",
                reason="TOO_MANY_SESSIONS",
                metadata={"sessions": there, "limit": most},
                retry_after_s=_RETRY_AFTER_S,
            )

    def _drop_idle(self) -> None:
        idle = [key for key, known in self._known.items() if known.idle]
        for key in idle[:-_IDLE_KEPT]:
            del self._known[key]


def _check_use(session: Session, use: SessionUse) -> None:
    if use.overflow not in (None, session.overflow):
        raise FailedPrecondition(
            f"session.overflow: {use.overflow}, but session {use.id!r} was made with"
            f" {session.overflow}",
            reason="SESSION_OVERFLOW_DIFFERS",
            metadata={"session_id": use.id, "overflow": session.overflow},
        )


def _check_size(session: Session, most: int) -> None:
    size = turns.size_bytes(session.messages)
    if session.overflow is Overflow.REFUSE and size > most:
        raise FailedPrecondition(
            f"the history of session {session.id!r} has {size} bytes, at most {most}"
            " (sessions.max_history_size), and it drops nothing",
            reason="SESSION_FULL",
            metadata={"session_id": session.id, "size_bytes": size, "limit_bytes": most},
        )
