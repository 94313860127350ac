"""A daemon's runs and ledger without its engines, in a process that is to be killed.

    python -m tests.support.crash_child DIRECTORY RUNS [CRASH_AT [BUG]]

Plays engine, tools and caller on the real owner of runs and the real ledger: takes over what an
earlier process left, makes RUNS durable runs (the same requests each time) and carries each to its
end, submitting and resuming where it has to. Each tool appends what it does to `effects`, synced.
What was acknowledged is printed, a line each. CRASH_AT kills the process with that statement of the
ledger's writer (0: never). BUG is one that a test plants, to see that it would be noticed.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent.core import (
    EngineInfo,
    EngineState,
    Executor,
    FinishReason,
    Limits,
    Message,
    Role,
    RunSpec,
    RunState,
    SideEffect,
    StepOrigin,
    StepRequest,
    StepResult,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
)
from edge_agent.events import RunFinished, StateChanged, ToolCallsIssued
from edge_agent.ledger.book import Book
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.settings import LedgerSettings
from edge_agent.records import CallRecord
from edge_agent.runs.acknowledged import AcknowledgedRuns, LedgerJournal, LedgerRecords
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.runs import Runs
from edge_agent.runs.settings import RunSettings
from edge_agent.runs.stored_sessions import StoredSessions

OPEN = '{"type":"object"}'
MAIL = Tool("mail", "Send.", OPEN, executor=Executor.DAEMON)
CLOCK = Tool("clock", "Tell.", OPEN, executor=Executor.DAEMON, side_effect=SideEffect.NONE)
GRIP = Tool("grip", "Grip.", OPEN)
SETTINGS = RunSettings(
    tool_timeout_s=30.0,
    tool_call_valid_for_s=30.0,
    cancel_confirm_s=1.0,
    max_active=1000,
    retention_s=3600.0,
    max_retained=10_000,
)
LEDGER = LedgerSettings(max_bytes=64 << 20, retention_s=3600.0, ballast_bytes=0)


class Effects:
    """What the tools have done in the world, on disk before anybody is told."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def act(self, tool: str, arguments_json: str) -> None:
        """Do it."""
        os.write(self._file, f"{tool} {json.loads(arguments_json)['of']}\n".encode())
        os.fsync(self._file)


class Engine:
    """Decides by how many steps there have been: mail, then clock and grip, then the answer."""

    def engine(self, name: str) -> EngineInfo:
        return EngineInfo(name, "0" * 64, "played", EngineState.READY, 1, 1, 1, 1, (), "none")

    async def decide(
        self,
        engine: str,  # noqa: ARG002
        request: StepRequest,
        origin: StepOrigin,
        *,
        on_text: Callable[[str, int], None],
        on_state: Callable[[RunState, float | None], None],
    ) -> StepResult:
        on_state(RunState.RUNNING, None)
        await asyncio.sleep(0.0005)
        decided = sum(bool(turn.tool_calls) for turn in request.messages)
        of = f'{{"of":"{origin.run_id}"}}'
        calls: tuple[ToolCall, ...] = ()
        if decided == 0:
            calls = (ToolCall("", "mail", of),)
        elif decided == 1:
            calls = (ToolCall("", "clock", of), ToolCall("", "grip", of))
        else:
            on_text("Do", 1)
            on_text("ne", 1)
        finish = FinishReason.TOOL_CALLS if calls else FinishReason.STOP
        return StepResult("" if calls else "Done", calls, finish, Usage(1, 0, 2))


class DaemonTools:
    """Executes `mail` and `clock`."""

    def __init__(self, effects: Effects) -> None:
        self._effects = effects

    async def call(self, call: ToolCall, *, timeout_s: float) -> ToolResult:  # noqa: ARG002
        self._effects.act(call.name, call.arguments_json)
        await asyncio.sleep(0.0005)
        return ToolResult(call.id, (TextPart("ok"),))


class Caller:
    """Carries one request to its end, over any number of processes."""

    def __init__(self, runs: AcknowledgedRuns, effects: Effects, done: set[str]) -> None:
        self._runs = runs
        self._effects = effects
        self._done = done
        """What this caller knows that its own tool has done, also from earlier lives."""

    async def carry(self, request_id: str) -> None:
        """Make the run, or find it, and see it end."""
        spec = RunSpec(
            (Message(Role.USER, (TextPart(request_id),)),),
            "played",
            Limits(8, 16),
            60.0,
            tools=(MAIL, CLOCK, GRIP),
            durable=True,
        )
        run = await self._runs.create(spec, client="caller", request_id=request_id)
        say("created", request_id, run.id)
        async for event in self._runs.watch(run.id, 0):
            match event.body:
                case ToolCallsIssued(tool_calls=calls):
                    for call in calls:
                        await self._grip(run.id, call)
                case StateChanged(state=RunState.SUSPENDED):
                    await self._resume(run.id)
                case RunFinished(run=ended):
                    say("ended", run.id, ended.state.value)

    async def _resume(self, run_id: str) -> None:
        run = await self._runs.get(run_id)
        if run.state is not RunState.SUSPENDED:  # of an earlier life
            return
        for call in run.open_tool_calls:
            await self._grip(run_id, call)
        await self._runs.resume(run_id, (), "caller")

    async def _grip(self, run_id: str, call: ToolCall) -> None:
        run = await self._runs.get(run_id)
        if call.id not in {each.id for each in run.open_tool_calls}:
            return  # an event of an earlier life: it has its result
        if run_id not in self._done:
            self._effects.act("grip", call.arguments_json)
            self._done.add(run_id)
        await self._runs.submit(run_id, [ToolResult(call.id, (TextPart("ok"),))])
        say("submitted", run_id, call.id)


def say(*words: str) -> None:
    """Tell the one who kills."""
    os.write(1, (" ".join(words) + "\n").encode())


def crash_at(statement: int) -> None:
    """Die with this statement of the writer, before it is executed."""
    counted = 0
    made = Book.__init__

    def init(self: Book, connection: Any) -> None:
        made(self, connection)
        self.execute = dying(self.execute)
        self.execute_many = dying(self.execute_many)

    def dying(execute: Callable[..., Any]) -> Any:
        def counting(*arguments: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == statement:
                os.kill(os.getpid(), signal.SIGKILL)
            return execute(*arguments)

        return counting

    setattr(Book, "__init__", init)  # noqa: B010 - mypy knows no other way


class IntendsNothing(LedgerRecords):
    """A planted bug: a call that acts starts, and that is on record only when it has ended."""

    async def intend(self, record: CallRecord) -> None:
        pass


class SaysItFirst(LedgerJournal):
    """A planted bug: what happens to a run is shown before it is on disk."""

    def write(self, run: Any, events: Any, done: Callable[[Exception | None], None]) -> None:
        super().write(run, events, lambda _error: None)
        done(None)


BUGS: dict[str, type] = {bug.__name__: bug for bug in (IntendsNothing, SaysItFirst)}


async def live(directory: Path, count: int, bug: str) -> None:
    """One life of the process."""
    path = directory / "effects"
    known = path.read_text().split("\n") if path.exists() else []
    done = {line.split()[1] for line in known if line.startswith("grip ")}
    effects = Effects(path)
    ledger = Ledger.open(directory, LEDGER)
    planted = BUGS.get(bug, object)
    sessions = StoredSessions(ledger)
    journal = (planted if issubclass(planted, LedgerJournal) else LedgerJournal)(
        ledger, sessions.memory
    )
    records = (planted if issubclass(planted, LedgerRecords) else LedgerRecords)(ledger)
    runs = Runs(
        Engine(),
        HaltLatch(directory / "halts.json"),
        SETTINGS,
        daemon_tools=DaemonTools(effects),
        records=records,
        journal=journal,
        sessions=sessions.memory,
    )
    owner = AcknowledgedRuns(runs, ledger, journal, sessions)
    await owner.recover()
    say("recovered", str(len(ledger.degraded)))
    caller = Caller(owner, effects, done)
    await asyncio.gather(*(caller.carry(f"request-{number}") for number in range(count)))
    await ledger.close()


if __name__ == "__main__":
    directory, count, statement, bug, *_ = [*sys.argv[1:], "0", ""]
    crash_at(int(statement))
    asyncio.run(live(Path(directory), int(count), bug))
