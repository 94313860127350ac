"""`Client`: the daemon for ordinary, blocking code."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from queue import SimpleQueue
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
    known,
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


class Client:
    """A connection to the daemon, for ordinary code. Safe to share between threads."""

    def __init__(self, address: str | None = None, *, name: str = "anonymous") -> None:
        self.address = address or default_address()
        self._metadata = (("edge-agent-client", name),)
        self._channel = grpc.insecure_channel(target(self.address), options=CHANNEL_OPTIONS)
        self._runs = RunServiceStub(self._channel)
        self._engines = EngineServiceStub(self._channel)
        self._system = SystemServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def run(
        self,
        goal: Goal,
        tools: Tools | None = None,
        on_event: Callable[[Event], object] | None = None,
        **options: Unpack[RunOptions],
    ) -> Run:
        """Carry a run to its end, executing its tool calls in this thread; returns the ended run.

        What a tool returns becomes its result (text as it is, anything else as JSON), what it
        raises becomes an error result. `on_event` sees every event first.
        """
        box = Toolbox(tools)
        requests: SimpleQueue[run_pb.ConverseRequest | None] = SimpleQueue()
        requests.put(start(goal, box.tools, options))
        events: SimpleQueue[Event | BaseException | None] = SimpleQueue()
        call = self._runs.Converse(iter(requests.get, None), metadata=self._metadata)
        reader = threading.Thread(target=_pump, args=(call, events), daemon=True)
        reader.start()
        try:
            with self._typed():
                while True:
                    if box.waiting and events.empty():
                        requests.put(convert.results_request([box.execute_next()]))
                        continue
                    if (run := box.see(_event(events.get()), on_event)) is not None:
                        return run
        finally:
            requests.put(None)
            call.cancel()

    def execute(
        self, goal: Goal, tools: Sequence[Tool] = (), **options: Unpack[RunOptions]
    ) -> Iterator[Event]:
        """Start a run and follow it; to stop reading cancels it."""
        request = run_pb.ExecuteRunRequest(spec=convert.run_spec(goal, tools, options))
        return self._events(self._runs.ExecuteRun, request)

    def create(
        self,
        goal: Goal,
        tools: Sequence[Tool] = (),
        request_id: str = "",
        **options: Unpack[RunOptions],
    ) -> Run:
        """Start a run that goes on without us; the same `request_id` starts it once only."""
        spec = convert.run_spec(goal, tools, options)
        request = run_pb.CreateRunRequest(spec=spec, request_id=request_id)
        return convert.run(self._call(self._runs.CreateRun, request).run)

    def watch(self, run_id: str, after_sequence: int | None = None) -> Iterator[Event]:
        """Follow a run to its end; to stop reading changes nothing for it."""
        request = run_pb.WatchRunRequest(run_id=run_id, after_sequence=after_sequence)
        return self._events(self._runs.WatchRun, request)

    def get(self, run_id: str) -> Run:
        """The run as it stands."""
        return convert.run(self._call(self._runs.GetRun, run_pb.GetRunRequest(run_id=run_id)).run)

    def list(self, states: Iterable[RunState] = ()) -> Iterator[Run]:
        """Every run in one of `states` (none: all), newest first, without transcripts."""
        states, token = tuple(states), ""
        while True:
            page = self._call(self._runs.ListRuns, convert.list_request(states, token))
            yield from map(convert.run, page.runs)
            token = page.next_page_token
            if not token:
                return

    def cancel(self, run_id: str) -> Run:
        """End a run."""
        request = run_pb.CancelRunRequest(run_id=run_id)
        return convert.run(self._call(self._runs.CancelRun, request).run)

    def submit_tool_results(self, run_id: str, results: Iterable[ToolResult]) -> Run:
        """Return results that a run waits for."""
        request = run_pb.SubmitToolResultsRequest(
            run_id=run_id, results=map(convert_response.tool_result, results)
        )
        return convert.run(self._call(self._runs.SubmitToolResults, request).run)

    def resume(self, run_id: str, messages: Sequence[Message] = ()) -> Run:
        """Let a suspended run go on, with what has changed meanwhile."""
        request = convert.resume_request(run_id, messages)
        return convert.run(self._call(self._runs.ResumeRun, request).run)

    def append(self, run_id: str, messages: Sequence[Message]) -> Run:
        """Say something to a run that goes on: its next step reads it."""
        request = convert.append_request(run_id, messages)
        return convert.run(self._call(self._runs.AppendMessages, request).run)

    def update_tool(
        self, run_id: str, tool_call_id: str, text: str = "", *, done: bool, is_error: bool = False
    ) -> Run:
        """Tell what a BACKGROUND tool's call has found, or that it is `done`."""
        update = ToolUpdated(tool_call_id, (TextPart(text),) if text else (), is_error, done)
        request = convert.update_request(run_id, update)
        return convert.run(self._call(self._runs.ToolUpdate, request).run)

    def resolve(self, run_id: str, tool_call_id: str, *, acted: bool, evidence: str) -> CallRecord:
        """Say what really came of a call; of another client's run on admin.sock only."""
        request = convert.resolve_request(run_id, tool_call_id, evidence, acted=acted)
        return convert_trace.read_call(
            run_id, self._call(self._runs.ResolveOutcome, request).tool_call
        )

    def decide_tool_call(
        self, run_id: str, tool_call_id: str, *, approved: bool, reason: str = ""
    ) -> Run:
        """Approve or deny a tool call that waits for it; another client's on admin.sock only."""
        request = run_pb.DecideToolCallRequest(
            run_id=run_id, tool_call_id=tool_call_id, approved=approved, reason=reason
        )
        return convert.run(self._call(self._runs.DecideToolCall, request).run)

    def wait_results(
        self, cursor: int = 0, max_results: int = 0, wait_s: float | None = None
    ) -> tuple[tuple[Run, ...], int]:
        """Ended durable runs of this client that it has not acknowledged, and the next cursor."""
        request = convert.results_wanted(cursor, max_results, wait_s)
        response = self._call(self._runs.WaitResults, request)
        return tuple(map(convert.run, response.runs)), response.cursor

    def ack_results(self, cursor: int) -> None:
        """Have what was delivered up to this cursor delivered no more."""
        self._call(self._runs.AckResults, run_pb.AckResultsRequest(cursor=cursor))

    def trace(self, run_id: str) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
        """What is on record of a run's steps and tool calls."""
        response = self._call(self._runs.GetTrace, run_pb.GetTraceRequest(run_id=run_id))
        return convert_trace.read(run_id, response)

    def halt(
        self, scope: HaltScope = HaltScope.ALL, target: str = "", reason: str = ""
    ) -> HaltOutcome:
        """Stop what runs may do, until cleared."""
        request = convert.halt_request(scope, target, reason)
        return convert.halt_outcome(self._call(self._runs.Halt, request))

    def clear_halt(self, halt_id: str) -> None:
        """Lift a Halt."""
        self._call(self._runs.ClearHalt, run_pb.ClearHaltRequest(halt_id=halt_id))

    def session(self, session_id: str, *, client: str = "") -> Session:
        """A session with its history; another client's on admin.sock only."""
        request = run_pb.GetSessionRequest(session_id=session_id, client=client)
        return convert_session.read((self._call(self._runs.GetSession, request)).session)

    def sessions(self) -> tuple[Session, ...]:
        """This client's sessions without their histories; on admin.sock everybody's."""
        response = self._call(self._runs.ListSessions, run_pb.ListSessionsRequest())
        return tuple(map(convert_session.read, response.sessions))

    def delete_session(self, session_id: str, *, client: str = "") -> None:
        """Delete a session with its history; another client's on admin.sock only."""
        request = run_pb.DeleteSessionRequest(session_id=session_id, client=client)
        self._call(self._runs.DeleteSession, request)

    def beat(
        self,
        nonce: int = 0,
        heartbeat: Heartbeat | None = None,
        *,
        session: str = "",
        stop: bool = False,
        timeout_s: float | None = None,
    ) -> int:
        """Say that this client is alive; returns the nonce of the next beat.

        The first one has nonce 0 and says what happens when it falls silent. To beat from the loop
        that does the work shows that the work gets on, which `heartbeat` does not.
        """
        request = convert.beat_request(nonce, heartbeat, session, stop=stop)
        return self._call(self._runs.Beat, request, timeout_s).nonce

    @contextmanager
    def heartbeat(
        self,
        window_s: float,
        *,
        suspend_after_s: float | None = None,
        cancel_after_s: float | None = None,
        session: str = "",
    ) -> Iterator[None]:
        """Beat in a thread, at a third of the window: shows that this process lives, and no more.

        With a `session` a lapse acts on its runs only. What fails is tried again, so that it
        outlives a restart of the daemon. Raises what the first beat raises.
        """
        asked = Heartbeat(window_s, suspend_after_s, cancel_after_s)
        timeout_s = min(window_s, BEAT_TIMEOUT_S)
        nonce, left = self.beat(0, asked, session=session), threading.Event()

        def go_on() -> None:
            nonlocal nonce
            while not left.wait(window_s / 3):
                try:
                    nonce = self.beat(
                        nonce, None if nonce else asked, session=session, timeout_s=timeout_s
                    )
                except EdgeAgentError:  # no answer, or not to this beat: begin anew
                    nonce = 0

        beating = threading.Thread(target=go_on, name="heartbeat", daemon=True)
        beating.start()
        try:
            yield
        finally:
            left.set()
            beating.join()
            with suppress(EdgeAgentError):  # the daemon is gone, or another program beats
                self.beat(nonce, session=session, stop=True, timeout_s=timeout_s)

    def engines(self) -> tuple[EngineInfo, ...]:
        """All installed engines."""
        response = self._call(self._engines.ListEngines, engine_pb.ListEnginesRequest())
        return tuple(map(convert_engine.engine_info, response.engines))

    def engine(self, name: str) -> EngineInfo:
        """One installed engine."""
        request = engine_pb.GetEngineRequest(name=name)
        return convert_engine.engine_info(self._call(self._engines.GetEngine, request).engine)

    def load(self, name: str) -> EngineInfo:
        """Bring an engine into memory; admin.sock only."""
        request = engine_pb.LoadEngineRequest(name=name)
        return convert_engine.engine_info(self._call(self._engines.LoadEngine, request).engine)

    def unload(self, name: str) -> EngineInfo:
        """Take an engine out of memory; admin.sock only."""
        request = engine_pb.UnloadEngineRequest(name=name)
        return convert_engine.engine_info(self._call(self._engines.UnloadEngine, request).engine)

    def pin(self, name: str, *, pinned: bool = True) -> EngineInfo:
        """Keep an engine in memory once it is loaded, or let it go again; admin.sock only."""
        request = engine_pb.PinEngineRequest(name=name, pinned=pinned)
        return convert_engine.engine_info(self._call(self._engines.PinEngine, request).engine)

    def release(self, name: str) -> EngineInfo:
        """Forget what is held against an engine: its quarantine, a leak; admin.sock only."""
        request = engine_pb.ReleaseEngineRequest(name=name)
        return convert_engine.engine_info(self._call(self._engines.ReleaseEngine, request).engine)

    def explain(self, run_id: str = "") -> tuple[StepWait, ...]:
        """Why each waiting step waits, of one run or of all; the first to go first."""
        request = convert_engine.explain_request(run_id)
        return tuple(
            map(convert_engine.step_wait, self._call(self._engines.Explain, request).waits)
        )

    def status(self) -> DaemonStatus:
        """The daemon as a whole."""
        return convert.status(self._call(self._system.GetStatus, system_pb.GetStatusRequest()))

    def watch_telemetry(self, interval_s: float = 1.0) -> Iterator[TelemetrySnapshot]:
        """The machine now and every `interval_s` (0.1 to 3600), until the reader stops."""
        request = convert_telemetry.watch_request(interval_s)
        call = self._system.WatchTelemetry(request, metadata=self._metadata)
        try:
            with self._typed():
                for response in call:
                    yield convert_telemetry.snapshot(response.telemetry, time.monotonic())
        finally:
            call.cancel()

    def _call(self, method: Callable[..., T], request: object, timeout_s: float | None = None) -> T:
        with self._typed():
            return method(request, metadata=self._metadata, timeout=timeout_s)

    def _events(self, method: Callable[..., Any], request: object) -> Iterator[Event]:
        call = method(request, metadata=self._metadata)
        try:
            with self._typed():
                yield from known(response.event for response in call)
        finally:
            call.cancel()

    def _typed(self) -> AbstractContextManager[None]:
        return typed_errors(self.address)


def _pump(call: Any, events: "SimpleQueue[Event | BaseException | None]") -> None:
    """Read a sync stream in a thread, so that news arrives while a tool is being executed."""
    try:
        for event in known(response.event for response in call):
            events.put(event)
        events.put(None)
    except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
        events.put(error)


def _event(item: Event | BaseException | None) -> Event:
    if isinstance(item, BaseException):
        raise item
    if item is None:
        raise cut_short()
    return item
