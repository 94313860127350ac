"""What one run's steps read of its session, and how that is made shorter where it does not fit.

Asks for summaries; how a step is decided and recorded is `loop`'s.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from edge_agent.core import (
    EngineInfo,
    Message,
    Overflow,
    RunError,
    Session,
    StepRequest,
    StepResult,
)
from edge_agent.errors import StepFailed
from edge_agent.events import HistoryShortened
from edge_agent.runs import turns
from edge_agent.runs.live import LiveRun
from edge_agent.runs.sessions import Sessions

Ask = Callable[[StepRequest], Awaitable[StepResult]]
"""Has a summary decided, as a step that is recorded and counted."""

_CHARACTERS_PER_TOKEN: Final = 4
_FREE_PART: Final = 4
"""One in so many tokens of the context is free afterwards: each shortening costs the prefix."""
_MAX_SUMMARY_TOKENS: Final = 256
_SUMMARY_PART: Final = 8
"""A summary takes one in so many tokens of the context at most."""

log = structlog.get_logger()


class PastTurns:
    """The history of the session that a run belongs to; empty if it belongs to none."""

    def __init__(self, live: LiveRun, sessions: Sessions, engine: EngineInfo | None) -> None:
        """`engine` None: it is not there."""
        self._live = live
        self._sessions = sessions
        self._engine = engine

    @property
    def messages(self) -> tuple[Message, ...]:
        """What comes before the run's own messages, as its next step is to read it."""
        session = self._session
        return session.messages if session else ()

    async def bound(self, step: int, most_bytes: int, ask: Ask) -> None:
        """Shorten a history that is larger than the configuration allows."""
        session = self._session
        if session is None or session.overflow is Overflow.REFUSE:
            return
        excess = turns.size_bytes(session.messages) - most_bytes
        if excess > 0:
            await self._shorten(session, step, excess + most_bytes // _FREE_PART, ask)

    async def make_room(self, step: int, failed: StepFailed, ask: Ask) -> None:
        """Shorten the history for a step that has failed because its prompt is too long.

        Raises:
            StepFailed: as it failed, where the session drops nothing or nothing is left to drop.
        """
        session = self._session
        if session is None or failed.reason != "PROMPT_TOO_LONG":
            raise failed
        if session.overflow is Overflow.REFUSE:
            raise StepFailed(_refused(session, failed)) from failed
        wanted = self._live.spec.limits.max_output_tokens
        if not await self._shorten(session, step, _excess_characters(failed, wanted), ask):
            raise failed

    @property
    def _session(self) -> Session | None:
        return self._sessions.session(self._live.run)

    async def _shorten(self, session: Session, step: int, too_long: int, ask: Ask) -> bool:
        """Whether anything made room."""
        split = turns.split(session.messages, too_long)
        if not split.oldest:
            return False
        part: tuple[Message, ...] = ()
        summary = None
        if session.overflow is Overflow.SUMMARISE:
            part, summary = await self._summarise(split.oldest, ask)
        self._sessions.shorten(
            self._live.run, (*split.head, *((summary,) if summary else ()), *split.newest)
        )
        shortened = HistoryShortened(
            step=step,
            dropped_messages=len(split.oldest) - len(part),
            summarised_messages=len(part),
            kept_messages=len(split.head) + len(split.newest),
            summary=summary.text if summary else "",
        )
        self._live.emit(shortened)
        log.info(
            "history_shortened",
            run=self._live.id,
            session=session.id,
            dropped=shortened.dropped_messages,
            summarised=shortened.summarised_messages,
            kept=shortened.kept_messages,
        )
        return True

    async def _summarise(
        self, messages: tuple[Message, ...], ask: Ask
    ) -> tuple[tuple[Message, ...], Message | None]:
        """A summary of the messages, and which of them it is of: as many of the newest as fit."""
        part = messages
        while part and not all(message.is_summary for message in part):
            request = StepRequest(turns.to_summarise(part), max_output_tokens=self._summary_tokens)
            try:
                result = await ask(request)
            except StepFailed as failed:
                if failed.reason != "PROMPT_TOO_LONG":
                    raise
                part = turns.split(part, _excess_characters(failed, self._summary_tokens)).newest
                continue
            summary = turns.summary(result.text)
            if not result.text.strip() or turns.characters((summary,)) >= turns.characters(part):
                break
            return part, summary
        return (), None

    @property
    def _summary_tokens(self) -> int:
        if self._engine is None:
            return _MAX_SUMMARY_TOKENS
        most = min(self._engine.max_output_tokens, self._engine.context_tokens // _SUMMARY_PART)
        return min(_MAX_SUMMARY_TOKENS, most)


def _excess_characters(failed: StepFailed, wanted: int | None) -> int:
    """About how many characters are too many, by the figures of the failure."""
    prompt, context = (
        int(failed.metadata.get(f"{name}_tokens", 0)) for name in ("prompt", "context")
    )
    room = max(wanted or 0, context // _FREE_PART)
    return max(1, prompt + room - context) * _CHARACTERS_PER_TOKEN


def _refused(session: Session, failed: StepFailed) -> RunError:
    message = (
        f"{failed.message}; session {session.id!r} keeps its whole history"
        f" ({len(session.messages)} messages, overflow REFUSE)"
    )
    return RunError(failed.reason, message, False, {**failed.metadata, "session_id": session.id})
