"""Small working owners of runs and engines, in memory, for tests of the API's edge.

A run here does what its test says: `emit` adds an event, and nothing happens by itself. Sequence
numbers, watching, idempotency and cancellation are real.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from edge_agent.api.ports import RequestLimits
from edge_agent.api.server import ApiServers
from edge_agent.core import (
    EngineInfo,
    EngineState,
    Executor,
    Halt,
    HaltOutcome,
    HaltScope,
    Message,
    Run,
    RunError,
    RunSpec,
    RunState,
    Session,
    SideEffect,
    ToolCall,
    ToolResult,
    Usage,
    WorkerInfo,
)
from edge_agent.errors import (
    AlreadyExists,
    ConfigError,
    FailedPrecondition,
    FieldViolation,
    NotFound,
    Unavailable,
)
from edge_agent.events import (
    ApprovalDecided,
    Event,
    EventBody,
    MessagesAdded,
    RunFinished,
    Snapshot,
    StateChanged,
    ToolCallsIssued,
    ToolResultAccepted,
    ToolUpdated,
)
from edge_agent.heartbeat import Heartbeat
from edge_agent.records import CallRecord, Effect, Resolution, StepRecord
from edge_agent.status import DaemonState, DaemonStatus, MemoryStatus, StepWait
from edge_agent.telemetry.sampler import Sampler
from edge_agent.telemetry.snapshot import TelemetrySnapshot

LIMITS = RequestLimits(
    default_engine=lambda: "small",
    timeout_s=60.0,
    max_timeout_s=3600.0,
    max_steps=8,
    max_tool_calls=16,
    max_same_calls=3,
    durable=False,
    max_request_bytes=200_000,
    max_tools=64,
    max_tool_result_bytes=10_000,
    slow_reader_s=10.0,
)

GIB = 1 << 30
MEMORY = MemoryStatus(
    total_bytes=8 * GIB,
    available_bytes=5 * GIB,
    reserve_bytes=2 * GIB,
    budget_bytes=None,
    soft_floor_bytes=GIB,
    hard_floor_bytes=GIB // 2,
    kept_bytes=3 * GIB,
    committed_bytes=GIB,
    held_bytes=GIB,
    leaked_bytes=0,
    room_bytes=4 * GIB,
    level="NORMAL",
)


class MemoryRuns:
    """A RunsPort. `script(runs, run_id)` is run for each new run, if there is one."""

    def __init__(self, script=None) -> None:
        self._script = script
        self.specs: dict[str, RunSpec] = {}
        self.results: list[ToolResult] = []
        self.sessions: list[Session] = []
        self.beats: list[tuple[str, str, int, Heartbeat | None, bool]] = []
        self.watchers = 0
        self._runs: dict[str, Run] = {}
        self._events: dict[str, list[Event]] = {}
        self._by_request: dict[str, str] = {}
        self._halts: dict[str, Halt] = {}
        self.changed = asyncio.Condition()

    async def until(self, predicate) -> None:
        """Wait until something that happened here makes `predicate()` true."""
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(predicate), 20)

    def _tell(self) -> None:
        async def notify() -> None:
            async with self.changed:
                self.changed.notify_all()

        self._notifying = asyncio.get_running_loop().create_task(notify())

    def emit(self, run_id: str, body: EventBody) -> None:
        run = self._runs[run_id]
        if isinstance(body, RunFinished):
            run = body.run
        elif isinstance(body, StateChanged):
            run = replace(run, state=body.state)
        elif isinstance(body, ToolCallsIssued):
            run = replace(run, state=RunState.WAITING_TOOL, open_tool_calls=body.tool_calls)
        run = replace(run, sequence=run.sequence + 1)
        if isinstance(body, RunFinished):
            body = RunFinished(run)
        self._runs[run_id] = run
        self._events[run_id].append(Event(run_id, run.sequence, body))
        self._tell()

    def issue(self, run_id: str, *calls: ToolCall) -> None:
        self.emit(run_id, ToolCallsIssued(1, calls))

    def finish(
        self,
        run_id: str,
        answer: str,
        usage: Usage | None = None,
        transcript: tuple[Message, ...] = (),
    ) -> None:
        run = replace(self._runs[run_id], state=RunState.SUCCEEDED, answer=answer)
        run = replace(run, transcript=transcript)
        run = replace(run, usage=usage or run.usage)
        self.emit(run_id, RunFinished(replace(run, open_tool_calls=())))

    async def create(self, spec: RunSpec, *, client: str, request_id: str) -> Run:
        if spec.engine == "explodes":
            raise RuntimeError("secret detail")
        if spec.engine == "leaves":
            raise Unavailable("draining", reason="DRAINING")
        if spec.engine != "small":
            raise NotFound(f"no engine {spec.engine}", metadata={"engine": spec.engine})
        known = self._by_request.get(request_id)
        if known:
            if self.specs[known] != spec:
                raise AlreadyExists("another body", metadata={"request_id": request_id})
            return self._runs[known]
        run_id = f"run-{len(self._runs) + 1}"
        run = Run(run_id, request_id, client, spec.agent, spec.engine, RunState.QUEUED, 1.5)
        run = replace(run, priority=spec.priority, durable=spec.durable)
        self._runs[run_id], self._events[run_id], self.specs[run_id] = run, [], spec
        if request_id:
            self._by_request[request_id] = run_id
        self._tell()
        if self._script is not None:
            self._acting = asyncio.get_running_loop().create_task(self._script(self, run_id))
        return run

    async def get(self, run_id: str) -> Run:
        return self.run(run_id)

    def run(self, run_id: str) -> Run:
        try:
            return self._runs[run_id]
        except KeyError:
            raise NotFound(f"no run {run_id}", metadata={"run_id": run_id}) from None

    async def list(
        self, *, states: frozenset[RunState], page_size: int, page_token: str
    ) -> tuple[tuple[Run, ...], str]:
        runs = [run for run in self._runs.values() if not states or run.state in states]
        start = int(page_token or 0)
        end = start + page_size
        return tuple(runs[::-1][start:end]), str(end) if end < len(runs) else ""

    async def cancel(self, run_id: str, reason: RunError) -> Run:
        self.abandon(run_id, reason)
        return self._runs[run_id]

    def abandon(self, run_id: str, reason: RunError) -> None:
        run = self.run(run_id)
        if not run.state.ended:
            ended = replace(run, state=RunState.CANCELLED, error=reason)
            self.emit(run_id, RunFinished(ended))

    async def submit(self, run_id: str, results: Sequence[ToolResult]) -> Run:
        run = self.run(run_id)
        open_ids = {call.id for call in run.open_tool_calls}
        for result in results:
            if result.tool_call_id.startswith("never"):
                raise NotFound(
                    f"no call {result.tool_call_id}", metadata={"id": result.tool_call_id}
                )
            if result.tool_call_id not in open_ids:
                raise FailedPrecondition("not open", reason="TOOL_CALL_NOT_OPEN")
            open_ids.discard(result.tool_call_id)
            self.results.append(result)
            run = self._runs[run_id]
            left = tuple(call for call in run.open_tool_calls if call.id in open_ids)
            self._runs[run_id] = replace(run, open_tool_calls=left)
            self.emit(run_id, ToolResultAccepted(result))
        return self._runs[run_id]

    async def resume(self, run_id: str, messages: tuple[Message, ...], client: str) -> Run:  # noqa: ARG002
        run = self.run(run_id)
        if run.state is not RunState.SUSPENDED:
            raise FailedPrecondition(f"{run_id} is {run.state}", reason="RUN_NOT_SUSPENDED")
        self.emit(run_id, MessagesAdded(messages))
        self.emit(run_id, StateChanged(RunState.QUEUED))
        return self._runs[run_id]

    async def append(self, run_id: str, messages: tuple[Message, ...]) -> Run:
        self.run(run_id)
        self.emit(run_id, MessagesAdded(messages, pending=True))
        return await self.get(run_id)

    async def update_tool(self, run_id: str, update: ToolUpdated) -> Run:
        self.run(run_id)
        self.emit(run_id, update)
        return await self.get(run_id)

    async def resolve(
        self, run_id: str, call_id: str, *, acted: bool, client: str, evidence: str
    ) -> CallRecord:
        self.run(run_id)
        effect = Effect.DONE if acted else Effect.FAILED
        return CallRecord(
            run_id=run_id,
            step=1,
            call_id=call_id,
            tool="lamp",
            executor=Executor.CALLER,
            side_effect=SideEffect.NON_IDEMPOTENT,
            arguments_hash="",
            effect=effect,
            issued_at_s=1.0,
            resolution=Resolution(client, evidence, 2.0),
        )

    async def decide(
        self, run_id: str, call_id: str, *, approved: bool, client: str, reason: str
    ) -> Run:
        self.emit(run_id, ApprovalDecided(call_id, approved, client, reason))
        return self._runs[run_id]

    async def trace(self, run_id: str) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
        self.run(run_id)
        return (), ()

    async def wait_results(
        self,
        client: str,  # noqa: ARG002
        after_number: int,
        limit: int,
        wait_s: float,  # noqa: ARG002
    ) -> tuple[Run, ...]:
        runs = [run for run in self._runs.values() if run.durable and run.state.ended]
        numbered = [(n, replace(run, result_number=n)) for n, run in enumerate(runs, 1)]
        return tuple(run for n, run in numbered if n > after_number)[:limit]

    async def session(self, client: str, session_id: str) -> Session:
        return next(
            each for each in self.sessions if (each.client, each.id) == (client, session_id)
        )

    async def list_sessions(self, client: str | None) -> tuple[Session, ...]:
        return tuple(each for each in self.sessions if client in (None, each.client))

    async def delete_session(self, client: str, session_id: str) -> None:
        self.sessions.remove(await self.session(client, session_id))

    def beat(
        self, client: str, session: str, nonce: int, heartbeat: Heartbeat | None, *, stop: bool
    ) -> int:
        if nonce not in (0, len(self.beats)):
            raise FailedPrecondition("out of turn", reason="BEAT_OUT_OF_TURN")
        self.beats.append((client, session, nonce, heartbeat, stop))
        self._tell()
        return 0 if stop else len(self.beats)

    async def ack_results(self, client: str, up_to_number: int) -> None:
        self.acked = (client, up_to_number)

    async def watch(self, run_id: str, after_sequence: int | None) -> AsyncIterator[Event]:
        run = self.run(run_id)
        yield Event(run_id, run.sequence, Snapshot(run))
        position = run.sequence if after_sequence is None else after_sequence
        self.watchers += 1
        self._tell()
        try:
            while not (run.state.ended and position >= self._runs[run_id].sequence):
                async with self.changed:
                    await self.changed.wait_for(
                        lambda: len(self._events[run_id]) > position  # noqa: B023 - awaited here
                    )
                event = self._events[run_id][position]
                position += 1
                yield event
                if isinstance(event.body, RunFinished):
                    return
        finally:
            self.watchers -= 1
            self._tell()

    async def halt(self, scope: HaltScope, target: str, reason: str, client: str) -> HaltOutcome:
        halt = Halt(f"halt-{len(self._halts) + 1}", scope, target, reason, client, 2.25)
        self._halts[halt.id] = halt
        return HaltOutcome(halt, runs_stopped=0, recorded=True)

    async def clear_halt(self, halt_id: str) -> None:
        if self._halts.pop(halt_id, None) is None:
            raise NotFound(f"no Halt {halt_id}", metadata={"halt_id": halt_id})

    def halts(self) -> tuple[Halt, ...]:
        return tuple(self._halts.values())


class EdgeThread:
    """An API with a scripted agent behind it, in a thread, for clients that block."""

    def __init__(self, runtime_dir, script=None, runs=MemoryRuns) -> None:
        self._runtime_dir = runtime_dir
        self._make_runs = lambda: runs(script)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def api(self) -> str:
        return str(self._runtime_dir / "api.sock")

    @property
    def admin(self) -> str:
        return str(self._runtime_dir / "admin.sock")

    def until(self, predicate) -> None:
        """Wait until something that happened in the runs makes `predicate()` true."""
        asyncio.run_coroutine_threadsafe(self.runs.until(predicate), self._loop).result(20)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.runs = self._make_runs()
        self.engines = MemoryEngines()
        self.daemon = MemoryDaemon(self.runs)
        servers = ApiServers(
            self._runtime_dir,
            runs=self.runs,
            engines=self.engines,
            daemon=self.daemon,
            limits=lambda: LIMITS,
        )
        await servers.start()
        self._started.set()
        await self._stop.wait()
        await servers.stop(0)


class MemoryEngines:
    """An EnginesPort with one engine, `small`. `waits` is what its test says."""

    def __init__(self) -> None:
        self.waits: tuple[StepWait, ...] = ()
        self._info = EngineInfo(
            name="small",
            digest="d" * 64,
            backend="embedded",
            state=EngineState.INSTALLED,
            context_tokens=2048,
            max_output_tokens=256,
            load_peak_bytes=3 << 20,
            steady_bytes=2 << 20,
            capabilities=("tools",),
            licence="Apache-2.0",
        )
        self._changes: asyncio.Queue[EngineInfo] = asyncio.Queue()

    def engines(self) -> tuple[EngineInfo, ...]:
        return (self._info,)

    def engine(self, name: str) -> EngineInfo:
        if name != "small":
            raise NotFound(f"no engine {name}", metadata={"engine": name})
        return self._info

    async def load(self, name: str) -> EngineInfo:
        self._info = replace(
            self.engine(name), state=EngineState.READY, worker=WorkerInfo(4242, 4, 0, 0, 0.5)
        )
        self._changes.put_nowait(self._info)
        return self._info

    async def unload(self, name: str) -> EngineInfo:
        self._info = replace(self.engine(name), state=EngineState.INSTALLED, worker=None)
        self._changes.put_nowait(self._info)
        return self._info

    def pin(self, name: str, *, pinned: bool) -> EngineInfo:
        self._info = replace(self.engine(name), pinned=pinned)
        return self._info

    async def release(self, name: str) -> EngineInfo:
        self._info = replace(self.engine(name), quarantined=False, leaked_bytes=0)
        return self._info

    def explain(self, run_id: str = "") -> tuple[StepWait, ...]:
        return tuple(each for each in self.waits if run_id in ("", each.run_id))

    async def watch(self) -> AsyncIterator[EngineInfo]:
        yield self._info
        while True:
            yield await self._changes.get()


class MemoryDaemon:
    """A DaemonPort whose configuration is broken."""

    def __init__(self, runs: MemoryRuns) -> None:
        self._runs = runs
        self.draining = False
        self.sampler = Sampler(Path("/nowhere"))  # its test chooses another, and drives it

    def status(self) -> DaemonStatus:
        return DaemonStatus(
            version="9.8.7",
            state=DaemonState.DRAINING if self.draining else DaemonState.READY,
            degraded_reasons=(),
            pid=4711,
            started_at_s=1000.5,
            uptime_s=12.25,
            runs={RunState.QUEUED: 1},
            engines_installed=1,
            engines_loaded=0,
            max_resident_engines=1,
            halts=self._runs.halts(),
            config_path="",
            memory=MEMORY,
            waiting_steps=2,
            running_steps=3,
        )

    def telemetry(self) -> TelemetrySnapshot:
        return self.sampler.latest

    def reload(self) -> tuple[str, ...]:
        violations = [FieldViolation(f"runs.key_{i}", "x" * 100) for i in range(200)]
        raise ConfigError("200 errors in the configuration", violations=violations)

    def drain(self) -> None:
        self.draining = True
