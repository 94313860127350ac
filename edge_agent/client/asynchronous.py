"""`AsyncClient`: the daemon for asyncio."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from typing import Any, Self, TypeVar, Unpack

import grpc

from edge_agent.api import convert_client as convert
from edge_agent.api import (
    convert_engine,
    convert_response,
    convert_session,
    convert_telemetry,
    convert_trace,
)
from edge_agent.api.convert_client import RunOptions
from edge_agent.client.toolbox import Toolbox, Tools
from edge_agent.client.wire import (
    BEAT_TIMEOUT_S,
    CHANNEL_OPTIONS,
    Goal,
    cut_short,
    default_address,
    start,
    target,
    typed_errors,
)
from edge_agent.core import (
    EngineInfo,
    HaltOutcome,
    HaltScope,
    Message,
    Run,
    RunState,
    Session,
    TextPart,
    Tool,
    ToolResult,
)
from edge_agent.errors import EdgeAgentError
from edge_agent.events import Event, ToolUpdated
from edge_agent.heartbeat import Heartbeat
from edge_agent.records import CallRecord, StepRecord
from edge_agent.status import DaemonStatus, StepWait
from edge_agent.telemetry.snapshot import TelemetrySnapshot
from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from edge_agent.v1.engine_service_pb2_grpc import EngineServiceStub
from edge_agent.v1.run_service_pb2_grpc import RunServiceStub
from edge_agent.v1.system_service_pb2_grpc import SystemServiceStub

T = TypeVar("T")


class AsyncClient:
    """A connection to the daemon, for asyncio. Made and used in one event loop."""

    def __init__(self, address: str | None = None, *, name: str = "anonymous") -> None:
        self.address = address or default_address()
        self._metadata = (("edge-agent-client", name),)
        self._channel = grpc.aio.insecure_channel(target(self.address), options=CHANNEL_OPTIONS)
        self._runs = RunServiceStub(self._channel)
        self._engines = EngineServiceStub(self._channel)
        self._system = SystemServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close()

    async def run(
        self,
        goal: Goal,
        tools: Tools | None = None,
        on_event: Callable[[Event], object] | None = None,
        **options: Unpack[RunOptions],
    ) -> Run:
        """Carry a run to its end, as `Client.run` does.

        A coroutine function is cancelled when its call is; any other runs in a thread, and what it
        has begun it finishes.
        """
        box = Toolbox(tools)
        call = self._runs.Converse(metadata=self._metadata)
        worker = asyncio.create_task(_work(box, call))
        try:
            with self._typed():
                await call.write(start(goal, box.tools, options))
                async for response in call:
                    event = convert.event(response.event)
                    if event and (run := box.see(event, on_event)) is not None:
                        return run
            raise cut_short()
        finally:
            worker.cancel()
            call.cancel()
            await asyncio.gather(worker, return_exceptions=True)

    def execute(
        self, goal: Goal, tools: Sequence[Tool] = (), **options: Unpack[RunOptions]
    ) -> AsyncIterator[Event]:
        """Start a run and follow it; to close the iterator cancels it."""
        request = run_pb.ExecuteRunRequest(spec=convert.run_spec(goal, tools, options))
        return self._events(self._runs.ExecuteRun, request)

    async def create(
        self,
        goal: Goal,
        tools: Sequence[Tool] = (),
        request_id: str = "",
        **options: Unpack[RunOptions],
    ) -> Run:
        """Start a run that goes on without us; the same `request_id` starts it once only."""
        spec = convert.run_spec(goal, tools, options)
        request = run_pb.CreateRunRequest(spec=spec, request_id=request_id)
        return convert.run((await self._call(self._runs.CreateRun, request)).run)

    def watch(self, run_id: str, after_sequence: int | None = None) -> AsyncIterator[Event]:
        """Follow a run to its end; to stop reading changes nothing for it."""
        request = run_pb.WatchRunRequest(run_id=run_id, after_sequence=after_sequence)
        return self._events(self._runs.WatchRun, request)

    async def get(self, run_id: str) -> Run:
        """The run as it stands."""
        request = run_pb.GetRunRequest(run_id=run_id)
        return convert.run((await self._call(self._runs.GetRun, request)).run)

    async def list(self, states: Iterable[RunState] = ()) -> AsyncIterator[Run]:
        """Every run in one of `states` (none: all), newest first, without transcripts."""
        states, token = tuple(states), ""
        while True:
            page = await self._call(self._runs.ListRuns, convert.list_request(states, token))
            for run in page.runs:
                yield convert.run(run)
            token = page.next_page_token
            if not token:
                return

    async def cancel(self, run_id: str) -> Run:
        """End a run."""
        request = run_pb.CancelRunRequest(run_id=run_id)
        return convert.run((await self._call(self._runs.CancelRun, request)).run)

    async def submit_tool_results(self, run_id: str, results: Iterable[ToolResult]) -> Run:
        """Return results that a run waits for."""
        request = run_pb.SubmitToolResultsRequest(
            run_id=run_id, results=map(convert_response.tool_result, results)
        )
        return convert.run((await self._call(self._runs.SubmitToolResults, request)).run)

    async def resume(self, run_id: str, messages: Sequence[Message] = ()) -> Run:
        """Let a suspended run go on, with what has changed meanwhile."""
        request = convert.resume_request(run_id, messages)
        return convert.run((await self._call(self._runs.ResumeRun, request)).run)

    async def append(self, run_id: str, messages: Sequence[Message]) -> Run:
        """Say something to a run that goes on: its next step reads it."""
        request = convert.append_request(run_id, messages)
        return convert.run((await self._call(self._runs.AppendMessages, request)).run)

    async def update_tool(
        self, run_id: str, tool_call_id: str, text: str = "", *, done: bool, is_error: bool = False
    ) -> Run:
        """Tell what a BACKGROUND tool's call has found, or that it is `done`."""
        update = ToolUpdated(tool_call_id, (TextPart(text),) if text else (), is_error, done)
        request = convert.update_request(run_id, update)
        return convert.run((await self._call(self._runs.ToolUpdate, request)).run)

    async def resolve(
        self, run_id: str, tool_call_id: str, *, acted: bool, evidence: str
    ) -> CallRecord:
        """Say what really came of a call; of another client's run on admin.sock only."""
        request = convert.resolve_request(run_id, tool_call_id, evidence, acted=acted)
        return convert_trace.read_call(
            run_id, (await self._call(self._runs.ResolveOutcome, request)).tool_call
        )

    async def decide_tool_call(
        self, run_id: str, tool_call_id: str, *, approved: bool, reason: str = ""
    ) -> Run:
        """Approve or deny a tool call that waits for it; another client's on admin.sock only."""
        request = run_pb.DecideToolCallRequest(
            run_id=run_id, tool_call_id=tool_call_id, approved=approved, reason=reason
        )
        return convert.run((await self._call(self._runs.DecideToolCall, request)).run)

    async def wait_results(
        self, cursor: int = 0, max_results: int = 0, wait_s: float | None = None
    ) -> tuple[tuple[Run, ...], int]:
        """Ended durable runs of this client that it has not acknowledged, and the next cursor."""
        request = convert.results_wanted(cursor, max_results, wait_s)
        response = await self._call(self._runs.WaitResults, request)
        return tuple(map(convert.run, response.runs)), response.cursor

    async def ack_results(self, cursor: int) -> None:
        """Have what was delivered up to this cursor delivered no more."""
        await self._call(self._runs.AckResults, run_pb.AckResultsRequest(cursor=cursor))

    async def trace(self, run_id: str) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
        """What is on record of a run's steps and tool calls."""
        response = await self._call(self._runs.GetTrace, run_pb.GetTraceRequest(run_id=run_id))
        return convert_trace.read(run_id, response)

    async def halt(
        self, scope: HaltScope = HaltScope.ALL, target: str = "", reason: str = ""
    ) -> HaltOutcome:
        """Stop what runs may do, until cleared."""
        request = convert.halt_request(scope, target, reason)
        return convert.halt_outcome(await self._call(self._runs.Halt, request))

    async def clear_halt(self, halt_id: str) -> None:
        """Lift a Halt."""
        await self._call(self._runs.ClearHalt, run_pb.ClearHaltRequest(halt_id=halt_id))

    async def session(self, session_id: str, *, client: str = "") -> Session:
        """A session with its history; another client's on admin.sock only."""
        request = run_pb.GetSessionRequest(session_id=session_id, client=client)
        return convert_session.read((await self._call(self._runs.GetSession, request)).session)

    async def sessions(self) -> tuple[Session, ...]:
        """This client's sessions without their histories; on admin.sock everybody's."""
        response = await self._call(self._runs.ListSessions, run_pb.ListSessionsRequest())
        return tuple(map(convert_session.read, response.sessions))

    async def delete_session(self, session_id: str, *, client: str = "") -> None:
        """Delete a session with its history; another client's on admin.sock only."""
        request = run_pb.DeleteSessionRequest(session_id=session_id, client=client)
        await self._call(self._runs.DeleteSession, request)

    async def beat(
        self,
        nonce: int = 0,
        heartbeat: Heartbeat | None = None,
        *,
        session: str = "",
        stop: bool = False,
        timeout_s: float | None = None,
    ) -> int:
        """Say that this client is alive, as `Client.beat` does."""
        request = convert.beat_request(nonce, heartbeat, session, stop=stop)
        return (await self._call(self._runs.Beat, request, timeout_s)).nonce

    @asynccontextmanager
    async def heartbeat(
        self,
        window_s: float,
        *,
        suspend_after_s: float | None = None,
        cancel_after_s: float | None = None,
        session: str = "",
    ) -> AsyncIterator[None]:
        """Beat in a task, at a third of the window: shows that this event loop gets on.

        Otherwise as `Client.heartbeat` does.
        """
        asked = Heartbeat(window_s, suspend_after_s, cancel_after_s)
        timeout_s = min(window_s, BEAT_TIMEOUT_S)
        nonce, left = await self.beat(0, asked, session=session), asyncio.Event()

        async def go_on() -> None:
            nonlocal nonce
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(left.wait(), window_s / 3)
                    return
                try:
                    nonce = await self.beat(
                        nonce, None if nonce else asked, session=session, timeout_s=timeout_s
                    )
                except EdgeAgentError:  # no answer, or not to this beat: begin anew
                    nonce = 0

        beating = asyncio.create_task(go_on(), name="heartbeat")
        try:
            yield
        finally:
            left.set()  # not cut off: a beat on its way might begin the watch anew behind the stop
            await beating
            with suppress(EdgeAgentError):  # the daemon is gone, or another program beats
                await self.beat(nonce, session=session, stop=True, timeout_s=timeout_s)

    async def engines(self) -> tuple[EngineInfo, ...]:
        """All installed engines."""
        response = await self._call(self._engines.ListEngines, engine_pb.ListEnginesRequest())
        return tuple(map(convert_engine.engine_info, response.engines))

    async def engine(self, name: str) -> EngineInfo:
        """One installed engine."""
        request = engine_pb.GetEngineRequest(name=name)
        return convert_engine.engine_info(
            (await self._call(self._engines.GetEngine, request)).engine
        )

    async def load(self, name: str) -> EngineInfo:
        """Bring an engine into memory; admin.sock only."""
        request = engine_pb.LoadEngineRequest(name=name)
        return convert_engine.engine_info(
            (await self._call(self._engines.LoadEngine, request)).engine
        )

    async def unload(self, name: str) -> EngineInfo:
        """Take an engine out of memory; admin.sock only."""
        request = engine_pb.UnloadEngineRequest(name=name)
        return convert_engine.engine_info(
            (await self._call(self._engines.UnloadEngine, request)).engine
        )

    async def pin(self, name: str, *, pinned: bool = True) -> EngineInfo:
        """Keep an engine in memory once it is loaded, or let it go again; admin.sock only."""
        request = engine_pb.PinEngineRequest(name=name, pinned=pinned)
        return convert_engine.engine_info(
            (await self._call(self._engines.PinEngine, request)).engine
        )

    async def release(self, name: str) -> EngineInfo:
        """Forget what is held against an engine: its quarantine, a leak; admin.sock only."""
        request = engine_pb.ReleaseEngineRequest(name=name)
        return convert_engine.engine_info(
            (await self._call(self._engines.ReleaseEngine, request)).engine
        )

    async def explain(self, run_id: str = "") -> tuple[StepWait, ...]:
        """Why each waiting step waits, of one run or of all; the first to go first."""
        request = convert_engine.explain_request(run_id)
        return tuple(
            map(convert_engine.step_wait, (await self._call(self._engines.Explain, request)).waits)
        )

    async def status(self) -> DaemonStatus:
        """The daemon as a whole."""
        request = system_pb.GetStatusRequest()
        return convert.status(await self._call(self._system.GetStatus, request))

    async def watch_telemetry(self, interval_s: float = 1.0) -> AsyncIterator[TelemetrySnapshot]:
        """The machine now and every `interval_s` (0.1 to 3600), until the reader stops."""
        request = convert_telemetry.watch_request(interval_s)
        call = self._system.WatchTelemetry(request, metadata=self._metadata)
        try:
            with self._typed():
                async for response in call:
                    yield convert_telemetry.snapshot(response.telemetry, time.monotonic())
        finally:
            call.cancel()

    async def _call(
        self,
        method: Callable[..., Awaitable[T]],
        request: object,
        timeout_s: float | None = None,
    ) -> T:
        with self._typed():
            return await method(request, metadata=self._metadata, timeout=timeout_s)

    async def _events(self, method: Callable[..., Any], request: object) -> AsyncIterator[Event]:
        call = method(request, metadata=self._metadata)
        try:
            with self._typed():
                async for response in call:
                    event = convert.event(response.event)
                    if event is not None:
                        yield event
        finally:
            call.cancel()

    def _typed(self) -> AbstractContextManager[None]:
        return typed_errors(self.address)


async def _work(box: Toolbox, call: Any) -> None:
    while True:
        await box.arrived.wait()
        box.arrived.clear()
        while box.waiting:
            result = await box.execute_next_async()
            await call.write(convert.results_request([result]))
