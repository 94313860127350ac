"""Made-up runs for the ledger: what a daemon would write of them, and no more."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import apsw

from edge_agent.core import (
    Executor,
    FinishReason,
    Limits,
    Message,
    Role,
    Run,
    RunSpec,
    RunState,
    SideEffect,
    TextPart,
    Usage,
)
from edge_agent.events import Event, RunFinished, StateChanged, StepFinished
from edge_agent.ledger.changes import EventsAdded, NewRun
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.opening import FILE_NAME
from edge_agent.ledger.settings import LedgerSettings
from edge_agent.records import CallRecord, Effect, LoggedText, StepRecord

SETTINGS = LedgerSettings(max_bytes=64 << 20, retention_s=3600.0, ballast_bytes=0)
CREATED_AT_S = 1_000.0


def spec(text: str = "look around") -> RunSpec:
    message = Message(Role.USER, (TextPart(text),))
    return RunSpec((message,), "an-engine", Limits(4, 4), 60.0, durable=True)


def run(name: str, *, request_id: str = "", client: str = "arm", at_s: float = CREATED_AT_S) -> Run:
    return Run(name, request_id, client, "picker", "an-engine", RunState.QUEUED, at_s, durable=True)


def new(
    name: str, *, request_id: str = "", client: str = "arm", at_s: float = CREATED_AT_S
) -> NewRun:
    return NewRun(run(name, request_id=request_id, client=client, at_s=at_s), spec())


def turn(text: str) -> Message:
    return Message(Role.ASSISTANT, (TextPart(text),))


def went_on(before: Run, text: str = "on the table") -> EventsAdded:
    """A step of the run: its state, its text, its end."""
    first, step = before.sequence + 1, before.steps + 1
    after = dataclasses.replace(
        before, state=RunState.RUNNING, sequence=first + 3, steps=step, transcript=(turn(text),)
    )
    events = (
        Event(before.id, first, StateChanged(RunState.RUNNING)),
        LoggedText(step, first + 1, text, (2, len(text)), (1, 3)),
        Event(before.id, first + 3, StepFinished(step, turn(text), Usage(5), FinishReason.STOP)),
    )
    return EventsAdded(after, events)


def ended(before: Run, state: RunState = RunState.SUCCEEDED, at_s: float = 2_000.0) -> EventsAdded:
    """The end of the run."""
    sequence = before.sequence + 1
    after = dataclasses.replace(
        before, state=state, sequence=sequence, ended_at_s=at_s, answer="on the table"
    )
    return EventsAdded(after, (Event(before.id, sequence, RunFinished(after)),))


def step_record(run_id: str, step: int = 1, attempt: int = 1, at_s: float = 1_500.0) -> StepRecord:
    return StepRecord(
        run_id=run_id,
        step=step,
        attempt=attempt,
        parent=None,
        started_at_s=at_s,
        duration_s=0.25,
        route="LOCAL",
        engine="an-engine",
        engine_digest="0123456789abcdef",
        template_hash="0123456789abcdef",
        tools_hash="0123456789abcdef",
        seed=7,
        usage=Usage(40, 10, 12, 0.001, 0.0, 0.2, 31.5),
        finish="STOP",
        available_before_bytes=3 << 30,
        available_after_bytes=3 << 30,
        power_mode="15W",
    )


def call_record(
    run_id: str, call_id: str = "call-1", effect: Effect = Effect.DONE, at_s: float = 1_500.0
) -> CallRecord:
    return CallRecord(
        run_id=run_id,
        step=1,
        call_id=call_id,
        tool="move_to",
        executor=Executor.DAEMON,
        side_effect=SideEffect.NON_IDEMPOTENT,
        arguments_hash="0123456789abcdef",
        effect=effect,
        issued_at_s=at_s,
    )


@contextlib.asynccontextmanager
async def opened(
    directory: Path,
    settings: LedgerSettings = SETTINGS,
    *,
    vfs: str | None = None,
    clock: Callable[[], float] = lambda: 2_000.0,
) -> AsyncIterator[Ledger]:
    """The ledger in this directory, closed at the end."""
    ledger = Ledger.open(directory, settings, vfs=vfs, clock=clock)
    try:
        yield ledger
    finally:
        await ledger.close()


def changed(directory: Path, *statements: str) -> None:
    """Do this to a ledger that nobody has open."""
    connection = apsw.Connection(str(directory / FILE_NAME))
    for statement in statements:
        connection.execute(statement)
    connection.close()
