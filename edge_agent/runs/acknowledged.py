"""Runs as callers see them: nothing is acknowledged before it is on disk, where it is durable.

Owns the way between the runs in memory (`Runs`) and those in the ledger: creation that is
idempotent over restarts, what was left by an earlier daemon, ended runs that memory has dropped,
and the delivery of results. Decides nothing about steps.
"""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

import structlog

from edge_agent.core import (
    Halt,
    HaltOutcome,
    HaltScope,
    Message,
    Run,
    RunError,
    RunSpec,
    RunState,
    Session,
    ToolResult,
)
from edge_agent.errors import (
    FailedPrecondition,
    InvalidRequest,
    LedgerFailed,
    LedgerFull,
    LedgerRowCorrupt,
    NotFound,
)
from edge_agent.events import Event, RunFinished, ToolUpdated
from edge_agent.heartbeat import Heartbeat
from edge_agent.ledger.changes import (
    CallRecorded,
    Change,
    EventsAdded,
    Existing,
    NewRun,
    ResultsAcked,
    RunRecovered,
    SessionKept,
    StepRecorded,
    StepStarted,
    StoredRun,
)
from edge_agent.records import CallRecord, Effect, LoggedText, Resolution, StepRecord
from edge_agent.runs import history, recovery
from edge_agent.runs.live import LiveRun
from edge_agent.runs.runs import Runs, request_reused
from edge_agent.runs.sessions import Sessions
from edge_agent.runs.stored_sessions import StoredSessions
from edge_agent.wakeup import Wakeup

_PAGE_RUNS = 100

log = structlog.get_logger()


class Ledger(Protocol):
    """What is kept over restarts; `ledger.ledger.Ledger` says what each does."""

    # ruff: noqa: D102

    async def commit(self, *changes: Change) -> tuple[object, ...]: ...
    def enqueue(self, *changes: Change, done: Callable[[Exception | None], None]) -> None: ...
    def note(self, *changes: Change) -> None: ...
    def accepts_new_runs(self) -> None: ...
    async def unfinished(self) -> tuple[StoredRun, ...]: ...
    async def find(self, run_id: str) -> StoredRun | None: ...
    async def requested(self, client: str, request_id: str, spec: RunSpec) -> Existing | None: ...
    async def trace(self, run_id: str) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]: ...
    async def page(
        self, states: frozenset[RunState], before: tuple[float, str] | None, limit: int
    ) -> tuple[Run, ...]: ...
    async def results(self, client: str, after_number: int, limit: int) -> tuple[Run, ...]: ...


class LedgerJournal:
    """Implements `live.Journal`."""

    def __init__(self, ledger: Ledger, sessions: Sessions) -> None:
        """Nothing is written yet."""
        self._ledger = ledger
        self._sessions = sessions
        self.ended = Wakeup()

    def write(
        self,
        run: Run,
        events: tuple[Event | LoggedText, ...],
        done: Callable[[Exception | None], None],
    ) -> None:
        """Write events, the run after them, and its session where they have changed it."""
        session = self._sessions.end(run) if run.state.ended else self._sessions.changed(run)

        def written(error: Exception | None) -> None:
            if session is not None:
                self._sessions.written(session)
            done(error)
            if run.state.ended:
                self.ended.notify()

        kept = () if session is None else (SessionKept(session),)
        self._ledger.enqueue(EventsAdded(run, events), *kept, done=written)


class LedgerRecords:
    """Implements `recording.Records`."""

    def __init__(self, ledger: Ledger) -> None:
        """Nothing is kept yet."""
        self._ledger = ledger

    def step_started(self, run_id: str, step: int) -> None:
        """This step of a durable run begins."""
        # At once: a step that ends the daemon must have been counted by then.
        self._ledger.enqueue(StepStarted(run_id, step), done=_whatever_came_of_it)

    def step(self, record: StepRecord) -> None:
        """Keep the record of a step."""
        self._ledger.note(StepRecorded(record))

    def call(self, record: CallRecord) -> None:
        """Keep the record of a call."""
        self._ledger.note(CallRecorded(record))

    async def intend(self, record: CallRecord) -> None:
        """Keep the record of a call that is about to start."""
        await self._ledger.commit(CallRecorded(record))


def _whatever_came_of_it(_error: Exception | None) -> None:
    """The run's next event fails likewise, and ends it."""


class AcknowledgedRuns:
    """The owner of runs towards callers: `api.ports.RunsPort`."""

    def __init__(
        self, runs: Runs, ledger: Ledger, journal: LedgerJournal, sessions: StoredSessions
    ) -> None:
        """`journal` is the one that `runs` writes to, and `sessions` hold those of `runs`."""
        self._runs = runs
        self._sessions = sessions
        self._ledger = ledger
        self._journal = journal
        self._accepting: dict[str, asyncio.Task[LiveRun]] = {}

    # --- after a restart ---

    async def recover(self) -> int:
        """Take over what the last daemon has left unfinished; returns how many runs that is."""
        await self._hold_unknown()
        left = await self._ledger.unfinished()
        for stored in left:
            await self._take_over(stored)
        return len(left)

    async def _hold_unknown(self) -> None:
        """Calls of ended runs of which nobody knows have what they used until that is resolved."""
        states, before = frozenset({RunState.OUTCOME_UNKNOWN}), None
        while page := await self._ledger.page(states, before, _PAGE_RUNS):
            for run in page:
                before = run.created_at_s, run.id
                try:
                    stored = await self._ledger.find(run.id)
                    _steps, calls = await self._ledger.trace(run.id)
                except LedgerRowCorrupt as error:
                    log.error("holds_unreadable", run=run.id, error=error.message)
                    continue
                if stored is not None:
                    self._runs.still_hold(run, stored.spec, calls)

    async def _take_over(self, stored: StoredRun) -> None:
        run = history.with_transcript(stored.run, stored.events)
        verdict = recovery.judge(
            recovery.Unfinished(run, stored.spec, stored.running_step, stored.deaths, stored.calls)
        )
        ended = [call for call in verdict.calls if call.effect is not Effect.INTENDED]
        await self._ledger.commit(RunRecovered(run.id, verdict.deaths), *map(CallRecorded, ended))
        if run.state is not RunState.SUSPENDED:  # what its step had said by then was not written
            run = dataclasses.replace(run, sequence=run.sequence + recovery.SEQUENCE_GAP)
        live = LiveRun(run, stored.spec, self._journal, stored.events)
        if run.session:
            await self._sessions.recover(run.client, run.session)
        self._runs.adopt(
            live,
            verdict.state,
            verdict.error,
            attempt=stored.attempts + 1,
            calls=verdict.calls,
        )
        log.info(
            "run_recovered",
            run=run.id,
            was=run.state.value,
            state=verdict.state.value,
            reason=verdict.error.reason if verdict.error else None,
            deaths=verdict.deaths,
        )

    # --- what callers do ---

    async def create(self, spec: RunSpec, *, client: str, request_id: str) -> Run:
        """Accept a run, or return the one that `request_id` made before; see `Runs.accept`.

        Raises:
            LedgerFull, LedgerFailed: no durable runs now; others go on.
        """
        if spec.session is not None:
            earlier = await self._requested(spec, client, request_id)
            if earlier is not None:
                return earlier
            await self._sessions.load(client, spec.session.id)
        if not spec.durable:
            return self._runs.create(spec, client=client, request_id=request_id)
        live, new = self._runs.accept(spec, client=client, request_id=request_id)
        if new:
            # Whoever asks may be gone by the time that it is on disk: that changes nothing.
            task = asyncio.create_task(self._write_down(live), name=f"accept-{live.id}")
            self._accepting[live.id] = task
            task.add_done_callback(functools.partial(self._written_down, live.id))
        if (accepting := self._accepting.get(live.id)) is not None:
            live = await asyncio.shield(accepting)
        await live.settled()
        return live.snapshot()

    async def get(self, run_id: str) -> Run:
        """The run as it stands. Raises NotFound."""
        return (await self._find(run_id)).snapshot()

    async def list(
        self, *, states: frozenset[RunState], page_size: int, page_token: str
    ) -> tuple[tuple[Run, ...], str]:
        """A page without transcripts, newest first, and the token of the next one.

        Raises:
            InvalidRequest: a token that no page gave out.
        """
        before = _position(page_token)
        memory = self._runs.page(states, before, page_size + 1)
        kept = await self._ledger.page(states, before, page_size + 1)
        live = {run.id for run in memory}
        stored = [run for run in kept if run.id not in live and not self._runs.has(run.id)]
        runs = sorted([*memory, *stored], key=_order, reverse=True)
        page = tuple(runs[:page_size])
        return page, _token(page[-1]) if len(runs) > page_size else ""

    async def cancel(self, run_id: str, reason: RunError) -> Run:
        """End a run; one that has ended stays as it is. Raises NotFound."""
        if not self._runs.has(run_id):
            return await self.get(run_id)
        return await self._done(run_id, lambda: self._runs.cancel(run_id, reason))

    async def submit(self, run_id: str, results: Sequence[ToolResult]) -> Run:
        """Hand in results that open calls wait for; see `Runs.submit`."""
        return await self._done(run_id, lambda: self._runs.submit(run_id, results))

    async def resume(self, run_id: str, messages: tuple[Message, ...], client: str) -> Run:
        """Let a suspended run go on; see `Runs.resume`."""
        return await self._done(run_id, lambda: self._runs.resume(run_id, messages, client))

    async def append(self, run_id: str, messages: tuple[Message, ...]) -> Run:
        """Say something to a run that goes on; see `Runs.append`."""
        return await self._done(run_id, lambda: self._runs.append(run_id, messages))

    async def update_tool(self, run_id: str, update: ToolUpdated) -> Run:
        """Take news of a background call; see `Runs.update_tool`."""
        return await self._done(run_id, lambda: self._runs.update_tool(run_id, update))

    async def resolve(
        self, run_id: str, call_id: str, *, acted: bool, client: str, evidence: str
    ) -> CallRecord:
        """Keep what really came of a call; what it used of the robot is free then.

        Raises:
            NotFound: no such run, or it is not on record that it made such a call.
            FailedPrecondition: reason OUTCOME_KNOWN.
            LedgerFull, LedgerFailed: it could not be kept.
        """
        _steps, calls = await self.trace(run_id)
        metadata = {"run_id": run_id, "tool_call_id": call_id}
        kept = next((call for call in calls if call.call_id == call_id), None)
        record = kept or self._runs.doubtful(run_id, call_id)
        if record is None:
            message = f"tool_call_id: run {run_id} has no call {call_id!r} on record"
            raise NotFound(message, reason="TOOL_CALL_NOT_FOUND", metadata=metadata)
        if record.effect is not Effect.UNKNOWN:
            message = f"tool_call_id: what came of {call_id!r} is known: {record.effect}"
            raise FailedPrecondition(message, reason="OUTCOME_KNOWN", metadata=metadata)
        resolved = dataclasses.replace(
            record,
            effect=Effect.DONE if acted else Effect.FAILED,
            resolution=Resolution(client, evidence, time.time()),
        )
        try:
            await self._ledger.commit(CallRecorded(resolved))
        except (LedgerFull, LedgerFailed):
            if kept is not None:  # else nothing of the run is kept, and the robot is to go on
                raise
        self._runs.resolved(run_id, call_id)
        log.info("outcome_resolved", run=run_id, call=call_id, acted=acted, client=client)
        return resolved

    async def decide(
        self, run_id: str, call_id: str, *, approved: bool, client: str, reason: str
    ) -> Run:
        """Approve or deny a call that waits for it; see `Runs.decide`."""
        return await self._done(
            run_id,
            lambda: self._runs.decide(
                run_id, call_id, approved=approved, client=client, reason=reason
            ),
        )

    def abandon(self, run_id: str, reason: RunError) -> None:
        """The stream that made the run has broken, and the run was to end with it.

        A durable run outlives a stream that the daemon itself breaks by stopping.
        """
        self._runs.abandon(run_id, reason)

    async def watch(self, run_id: str, after_sequence: int | None) -> AsyncIterator[Event]:
        """A snapshot, then the events after `after_sequence`, until the run has ended.

        Raises:
            NotFound: never there, or its retention is over.
        """
        async for event in (await self._find(run_id)).follow(after_sequence):
            yield event

    async def trace(self, run_id: str) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
        """The records of a run's steps and tool calls. Raises NotFound."""
        await self._ledger.commit()  # with all that was noted before
        steps, calls = await self._ledger.trace(run_id)
        if not steps and not calls:
            await self._find(run_id)
        return steps, calls

    async def wait_results(
        self, client: str, after_number: int, limit: int, wait_s: float
    ) -> tuple[Run, ...]:
        """Ended durable runs of a client that it has not acknowledged, in the order of their end.

        Waits up to `wait_s` for the first one; an empty answer means that there is none.
        """
        end_s = time.monotonic() + wait_s
        while True:
            ended = self._journal.ended.next()
            found = await self._ledger.results(client, after_number, limit)
            left_s = end_s - time.monotonic()
            if found or left_s <= 0:
                return found
            await asyncio.wait([ended], timeout=left_s)

    async def ack_results(self, client: str, up_to_number: int) -> None:
        """Deliver no more what this client has up to this number."""
        await self._ledger.commit(ResultsAcked(client, up_to_number))

    # --- Halts, heartbeats and counts ---

    def halts(self) -> tuple[Halt, ...]:
        """All that are latched, oldest first."""
        return self._runs.halts()

    async def halt(self, scope: HaltScope, target: str, reason: str, client: str) -> HaltOutcome:
        """Latch a Halt; see `Halting.halt`."""
        return await self._runs.halt(scope, target, reason, client)

    async def clear_halt(self, halt_id: str) -> None:
        """Lift a Halt once it is on disk what it stopped; see `Halting.clear`.

        Else a run that it stopped might go on after a crash, without anybody's leave.
        """
        with contextlib.suppress(LedgerFull, LedgerFailed):  # which keeps nobody halted
            await self._ledger.commit()
        await self._runs.clear_halt(halt_id)

    def beat(
        self, client: str, session: str, nonce: int, heartbeat: Heartbeat | None, *, stop: bool
    ) -> int:
        """Take a client's beat; see `Heartbeats.beat`."""
        return self._runs.beat(client, session, nonce, heartbeat, stop=stop)

    # --- sessions ---

    async def session(self, client: str, session_id: str) -> Session:
        """A session of a client, with its history; see `StoredSessions.get`."""
        return await self._sessions.get(client, session_id)

    async def list_sessions(self, client: str | None) -> tuple[Session, ...]:
        """Sessions of a client, or of all; see `StoredSessions.list`."""
        return await self._sessions.list(client)

    async def delete_session(self, client: str, session_id: str) -> None:
        """Delete a session; see `StoredSessions.delete`."""
        await self._sessions.delete(client, session_id)

    def counts(self) -> Mapping[RunState, int]:
        """Runs in memory by state."""
        return self._runs.counts()

    # --- inside ---

    def _written_down(self, run_id: str, task: "asyncio.Task[LiveRun]") -> None:
        del self._accepting[run_id]
        if not task.cancelled():
            task.exception()  # retrieved here: nobody may wait for it any more

    async def _requested(self, spec: RunSpec, client: str, request_id: str) -> Run | None:
        """What the request has made before, also before a restart: it is not busy with itself."""
        if not spec.durable:
            return None
        existing = await self._ledger.requested(client, request_id, spec) if request_id else None
        if existing is None:
            return None
        if not existing.same_body:
            raise request_reused(request_id, existing.run_id)
        live = await self._find(existing.run_id)
        await live.settled()
        return live.snapshot()

    async def _write_down(self, live: LiveRun) -> LiveRun:
        """Let an accepted run begin once it is on disk; or find the one that is there already."""
        try:
            self._ledger.accepts_new_runs()
            (existing,) = await self._ledger.commit(NewRun(live.run, live.spec))
        except BaseException:
            self._runs.forget(live.id)
            raise
        if not isinstance(existing, Existing):
            self._runs.begin(live.id)
            return live
        self._runs.forget(live.id)
        if not existing.same_body:
            raise request_reused(live.run.request_id, existing.run_id)
        if not self._runs.has(existing.run_id):
            stored = await self._ledger.find(existing.run_id)
            if stored is not None and not stored.run.state.ended:
                await self._take_over(stored)  # nobody drives it: its creation was cut off
        return await self._find(existing.run_id)

    async def _done(self, run_id: str, act: Callable[[], Run]) -> Run:
        """Act on a run in memory, and answer once what that did is on disk."""
        if not self._runs.has(run_id):
            run = (await self._find(run_id)).snapshot()  # it has ended, and memory dropped it
            raise FailedPrecondition(
                f"run {run_id} has ended: {run.state}",
                reason="RUN_ENDED",
                metadata={"run_id": run_id, "state": run.state},
            )
        live = self._runs.live(run_id)  # held: memory may drop what ends while it is written
        act()
        await live.settled()
        return live.snapshot()

    async def _find(self, run_id: str) -> LiveRun:
        if self._runs.has(run_id):
            return self._runs.live(run_id)
        stored = await self._ledger.find(run_id)
        if stored is None:
            return self._runs.live(run_id)  # raises NotFound
        run = history.with_transcript(stored.run, stored.events)
        return LiveRun(run, stored.spec, None, _ending_with(run, stored.events))


def _ending_with(run: Run, events: Sequence[Event | LoggedText]) -> tuple[Event | LoggedText, ...]:
    """The events of an ended run; the last one is kept without the transcript."""
    if not run.state.ended or not events:
        return tuple(events)
    return *events[:-1], Event(run.id, run.sequence, RunFinished(run))


def _order(run: Run) -> tuple[float, str]:
    return run.created_at_s, run.id


def _token(run: Run) -> str:
    return f"{run.created_at_s!r}:{run.id}"


def _position(page_token: str) -> tuple[float, str] | None:
    """Where the page begins: below this run."""
    if not page_token:
        return None
    created, _, run_id = page_token.partition(":")
    try:
        return float(created), run_id
    except ValueError:
        problem = f"{page_token!r} is not a token of this list"
        raise InvalidRequest.field("page_token", problem) from None
