"""A daemon's runs and ledger, whose clock its test turns and whose process it may kill.

The owners of runs and the ledger are the real ones, on real files; engines and the daemon's own
tools are played. The ledger's writer can be held: what is written waits, until it is let go or the
process is killed. Nothing else depends on real time, so that the same history always runs alike.
"""

import asyncio
import json
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from edge_agent.core import Executor, RunSpec, RunState, SideEffect, Tool, ToolCall, ToolResult
from edge_agent.events import Event
from edge_agent.ledger import opening
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.writer import Entry
from edge_agent.runs.acknowledged import AcknowledgedRuns, LedgerJournal, LedgerRecords
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.live import LiveRun
from edge_agent.runs.runs import Runs
from edge_agent.runs.settings import RunSettings
from edge_agent.runs.stored_sessions import StoredSessions
from tests.support.ledger import SETTINGS as LEDGER
from tests.support.scripted_engine import ScriptedEngines, Step, spec
from tests.support.virtual_time import AtOnce, VirtualTimeLoop

RUN_TIMEOUT_S = 100.0
TOOL_TIMEOUT_S = 40.0
CONFIRM_S = 10.0
SUSPENDED_S = 1000.0
SETTINGS = RunSettings(
    tool_timeout_s=TOOL_TIMEOUT_S,
    tool_call_valid_for_s=5.0,
    cancel_confirm_s=CONFIRM_S,
    max_active=50,
    retention_s=3600.0,
    max_retained=2,
    suspended_retention_s=SUSPENDED_S,
    halt_settle_s=0.0,
)
HALTS_FILE = "halts.json"
WRITER_TIMEOUT_S = 30.0
"""A writer that never gets there fails the test."""

_OPEN = '{"type":"object"}'
_NONE, _OFTEN, _ONCE = SideEffect.NONE, SideEffect.IDEMPOTENT, SideEffect.NON_IDEMPOTENT
_OWN = Executor.DAEMON
HARMLESS = (
    Tool("look", "Look.", _OPEN, side_effect=_NONE),
    Tool("clock", "Tell.", _OPEN, side_effect=_NONE, executor=_OWN),
    Tool("peek", "Look inside.", _OPEN, side_effect=_NONE, needs_approval=True),
)
ACTING = (
    Tool("move", "Move.", _OPEN, side_effect=_OFTEN),
    Tool("grip", "Grip.", _OPEN, side_effect=_ONCE),
    Tool("lamp", "Switch.", _OPEN, side_effect=_OFTEN, executor=_OWN),
    Tool("mail", "Send.", _OPEN, side_effect=_ONCE, executor=_OWN),
    Tool("door", "Open.", _OPEN, side_effect=_ONCE, needs_approval=True),
    Tool("post", "Pay.", _OPEN, side_effect=_ONCE, executor=_OWN, needs_approval=True),
)
TOOLS_OF_AGENT = {"watcher": HARMLESS, "worker": HARMLESS + ACTING}
TOOLS = {tool.name: tool for tool in HARMLESS + ACTING}


def wanted(text: str, agent: str, *, durable: bool) -> RunSpec:
    """What a caller asks for; the agent says which tools it has."""
    return spec(
        text,
        TOOLS_OF_AGENT[agent],
        agent=agent,
        durable=durable,
        timeout_s=RUN_TIMEOUT_S,
        max_steps=3,
        max_tool_calls=6,
    )


def arguments(run_id: str, number: int) -> str:
    """Of a call that tells the world which one it is."""
    return json.dumps({"run": run_id, "number": number})


class PlayedTools:
    """`DaemonTools`: each call waits until its test says what came of it."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._calls: list[tuple[ToolCall, asyncio.Future[ToolResult]]] = []

    async def call(self, call: ToolCall, *, timeout_s: float) -> ToolResult:  # noqa: ARG002
        """Begin to act in the world."""
        self._world.started[call.name, call.arguments_json] += 1
        self._calls.append((call, asyncio.get_running_loop().create_future()))
        return await self._calls[-1][1]

    def open(self) -> list[tuple[ToolCall, "asyncio.Future[ToolResult]"]]:
        """All that act still."""
        return [(call, outcome) for call, outcome in self._calls if not outcome.done()]


@dataclass(frozen=True)
class World:
    """What no kill takes back: how often each call of the daemon's own has begun."""

    started: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Parts:
    """What a daemon is made of; a test puts others in, to see that they are noticed."""

    runs: type[Runs] = Runs
    journal: type[LedgerJournal] = LedgerJournal
    records: type[LedgerRecords] = LedgerRecords


@dataclass(frozen=True)
class _Stop:
    """A change that writes nothing and lets the writer wait."""

    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)

    def apply(self, _book: object) -> None:
        self.reached.set()
        self.go.wait(WRITER_TIMEOUT_S)


class Life:
    """One life of the daemon on a directory, from its start to its stop or its death."""

    def __init__(self, directory: Path, world: World, parts: Parts) -> None:
        """Open the files; `recover` comes after."""
        self.directory = directory
        self.loop = VirtualTimeLoop()
        self.loop.set_default_executor(AtOnce())
        self.ledger = Ledger.open(directory, LEDGER)
        self.ledger._pool = AtOnce()  # reads are done when they are asked for
        self._held: _Stop | None = None
        self._parts = parts
        self.tools = PlayedTools(world)
        self.loop.do(self._start())

    async def _start(self) -> None:
        self.engines = ScriptedEngines()
        sessions = StoredSessions(self.ledger)
        journal = self._parts.journal(self.ledger, sessions.memory)
        latch = HaltLatch(self.directory / HALTS_FILE)
        self.runs = self._parts.runs(
            self.engines,
            latch,
            SETTINGS,
            daemon_tools=self.tools,
            records=self._parts.records(self.ledger),
            journal=journal,
            sessions=sessions.memory,
        )
        self.owner = AcknowledgedRuns(self.runs, self.ledger, journal, sessions)
        strangers = Runs(self.engines, latch, SETTINGS)
        others = StoredSessions(self.ledger)
        unused = LedgerJournal(self.ledger, others.memory)
        self.reader = AcknowledgedRuns(strangers, self.ledger, unused, others)
        """Knows what is on disk, and nothing else."""

    def recover(self) -> None:
        """Take over what an earlier life has left."""
        self.loop.do(self.owner.recover())

    # --- what there is ---

    def steps(self) -> list[Step]:
        """Those that wait for a decision."""
        return self.engines.open()

    def begin(self, step: Step) -> None:
        """Let the engine begin with a step."""
        self.loop.do(_run(step))

    def in_memory(self) -> Iterator[LiveRun]:
        """All runs in memory."""
        return (loop.live for loop in self.runs._store.newest_first())

    def driven(self) -> Iterator[LiveRun]:
        """The runs that may go on by themselves."""
        return (loop.live for loop, _task in self.runs._active.values())

    def emitted(self, run_id: str, after: int) -> list[Event]:
        """What has happened to a run in memory, whether anybody was shown it or not."""
        loop = self.runs._store.get(run_id)
        return [] if loop is None else list(loop.live._log.since(after))

    # --- time and the disk ---

    @property
    def held(self) -> bool:
        """Whether the writer waits."""
        return self._held is not None

    def settle(self, seconds: float = 0.0) -> None:
        """Let this much time pass, and everything happen that then can."""
        self.loop.settle(seconds)
        if self._held is None:
            self.loop.do(self._quiesce())

    async def _quiesce(self) -> None:
        before, now = None, self._standing()
        while before != now:
            await self.ledger.commit()
            await _turns()
            before, now = now, self._standing()

    def _standing(self) -> list[Any]:
        runs = [(live.id, live._log.sequence, len(live._unwritten)) for live in self.in_memory()]
        return [*runs, len(self.steps()), len(self.tools.open()), len(self.owner._accepting)]

    def hold(self) -> None:
        """Let nothing more be written."""
        self._held = _Stop()
        self._put(self._held)
        assert self._held.reached.wait(WRITER_TIMEOUT_S)

    def let_go(self) -> None:
        """Let it be written."""
        if self._held is not None:
            self._held.go.set()
        self._held = None

    def _put(self, stop: _Stop) -> None:
        self.ledger._writer.put(Entry((cast("Any", stop),), done=_nobody))

    # --- the end ---

    def drain(self) -> None:
        """Begin to end as a daemon does that is told to."""
        self._draining = self.loop.create_task(self.runs.drain(0))

    def close(self) -> Path:
        """The end of a life that has drained; returns where its files are."""
        assert self._draining.done()
        self._draining.result()
        self.loop.do(self.ledger.close())
        self._bury()
        return self.directory

    def die(self, *, written: bool) -> Path:
        """Be killed: returns where the files are that this leaves.

        `written`: with what waited to be written, of which nobody was told yet; else without.
        """
        found = Path(tempfile.mkdtemp(dir="/dev/shm"))
        if written:
            self.let_go()
            barrier = _Stop()
            barrier.go.set()
            self._put(barrier)
            assert barrier.reached.wait(WRITER_TIMEOUT_S)
        instant = _Stop()  # in a transaction with what waits before it, or after that one
        self._put(instant)
        self.let_go()
        assert instant.reached.wait(WRITER_TIMEOUT_S)
        for path in sorted(self.directory.iterdir()):
            if path.name in (opening.FILE_NAME, f"{opening.FILE_NAME}-wal", HALTS_FILE):
                shutil.copy(path, found / path.name)
        instant.go.set()
        self._bury()
        shutil.rmtree(self.directory)
        return found

    def _bury(self) -> None:
        self.loop.do(_end_all())
        self.ledger._close()
        self.loop.do(self.loop.shutdown_default_executor())
        self.loop.close()


async def _run(step: Step) -> None:
    step.on_state(RunState.RUNNING, None)


async def _turns() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


async def _end_all() -> None:
    """All that is left ends, and nobody asks how."""
    while left := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in left:
            task.cancel()
        await _turns()
        for task in left:
            if task.done() and not task.cancelled():
                task.exception()


def _nobody(_values: tuple[object, ...], _error: Exception | None) -> None:
    """Of a change that no loop waits for."""
