"""What the servicers need of the rest of the daemon, as Protocols.

Owns no behaviour. The owners of runs and engines and the daemon satisfy these; so do the small
in-memory implementations that the API's tests bring along. Everything speaks `core` values and
raises `errors`, never gRPC's.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_agent.core import (
    EngineInfo,
    Halt,
    HaltOutcome,
    HaltScope,
    Message,
    Run,
    RunError,
    RunSpec,
    RunState,
    Session,
    Tool,
    ToolResult,
)
from edge_agent.events import Event, ToolUpdated
from edge_agent.heartbeat import Heartbeat
from edge_agent.records import CallRecord, StepRecord
from edge_agent.status import DaemonStatus, StepWait
from edge_agent.telemetry.snapshot import TelemetrySnapshot


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the configuration allows a request to ask for.

    `max_steps` and `max_tool_calls` are both the default and the most that a run may have;
    `timeout_s` is the default and `max_timeout_s` the most. `default_engine` is asked only when a
    request names none. `daemon_tools` are those of the allow-list, by name.
    """

    default_engine: Callable[[], str | None]
    timeout_s: float
    max_timeout_s: float
    max_steps: int
    max_tool_calls: int
    max_same_calls: int
    durable: bool
    max_request_bytes: int
    max_tools: int
    max_tool_result_bytes: int
    slow_reader_s: float
    daemon_tools: Mapping[str, Tool] = field(default_factory=dict)


class RunsPort(Protocol):
    """The owner of runs. What it answers is on disk, where the run is durable."""

    async def create(self, spec: RunSpec, *, client: str, request_id: str) -> Run:
        """Accept a run, or return the one that `request_id` made before.

        Raises:
            AlreadyExists: the same `request_id` with another body.
            FailedPrecondition: its session is busy, full, or can't be used so.
            Halted, Unavailable, Overloaded, LedgerFull: no new runs now.
            NotFound: no such engine.
        """
        ...

    async def get(self, run_id: str) -> Run:
        """The run as it stands. Raises NotFound."""
        ...

    async def list(
        self, *, states: frozenset[RunState], page_size: int, page_token: str
    ) -> tuple[tuple[Run, ...], str]:
        """A page, newest first, and the token of the next one; no states means all of them.

        Raises:
            InvalidRequest: a page token that this daemon did not give out.
        """
        ...

    async def cancel(self, run_id: str, reason: RunError) -> Run:
        """End a run; one that has ended stays as it is. Raises NotFound."""
        ...

    def abandon(self, run_id: str, reason: RunError) -> None:
        """The stream that made the run has broken, and the run was to end with it."""
        ...

    async def submit(self, run_id: str, results: Sequence[ToolResult]) -> Run:
        """Hand in results that open calls wait for.

        Raises:
            NotFound: no such run, or it never made such a call.
            FailedPrecondition: the call does not wait any more.
        """
        ...

    async def resume(self, run_id: str, messages: tuple[Message, ...], client: str) -> Run:
        """Let a suspended run go on.

        Raises:
            NotFound: no such run.
            FailedPrecondition: it is not suspended, or calls that act are open.
            Halted, Unavailable, Overloaded: nothing goes on now.
        """
        ...

    async def append(self, run_id: str, messages: tuple[Message, ...]) -> Run:
        """Say something to a run that goes on.

        Raises:
            NotFound: no such run.
            FailedPrecondition: it has ended, or waits for something else than its next step.
        """
        ...

    async def update_tool(self, run_id: str, update: ToolUpdated) -> Run:
        """Take news of a call of a BACKGROUND tool.

        Raises:
            NotFound: no such run or call.
            FailedPrecondition: the call does not go on.
        """
        ...

    async def resolve(
        self, run_id: str, call_id: str, *, acted: bool, client: str, evidence: str
    ) -> CallRecord:
        """Keep what really came of a call of which nobody knew.

        Raises:
            NotFound: no such run or call.
            FailedPrecondition: it is known what came of it.
        """
        ...

    async def decide(
        self, run_id: str, call_id: str, *, approved: bool, client: str, reason: str
    ) -> Run:
        """Approve or deny a call that waits for it.

        Raises:
            NotFound: no such run or call.
            FailedPrecondition: it does not wait for approval.
        """
        ...

    def watch(self, run_id: str, after_sequence: int | None) -> AsyncIterator[Event]:
        """A snapshot, then the events after `after_sequence`, until the run has ended.

        Neighbouring text deltas are merged while the reader is busy. Raises NotFound.
        """
        ...

    async def trace(self, run_id: str) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
        """The records of a run's steps and tool calls. Raises NotFound."""
        ...

    async def wait_results(
        self, client: str, after_number: int, limit: int, wait_s: float
    ) -> tuple[Run, ...]:
        """Ended durable runs of a client that it has not acknowledged, oldest end first."""
        ...

    async def ack_results(self, client: str, up_to_number: int) -> None:
        """Deliver no more what this client has up to this number."""
        ...

    async def halt(self, scope: HaltScope, target: str, reason: str, client: str) -> HaltOutcome:
        """Act, then record."""
        ...

    async def clear_halt(self, halt_id: str) -> None:
        """Lift a Halt. Raises NotFound."""
        ...

    def halts(self) -> tuple[Halt, ...]:
        """Every latched Halt."""
        ...

    async def session(self, client: str, session_id: str) -> Session:
        """A session of a client, with its history. Raises NotFound."""
        ...

    async def list_sessions(self, client: str | None) -> tuple[Session, ...]:
        """Sessions of a client, or of all, without histories; the one used last first."""
        ...

    async def delete_session(self, client: str, session_id: str) -> None:
        """Delete a session with its history.

        Raises:
            NotFound: there is none.
            FailedPrecondition: a run of it goes on.
        """
        ...

    def beat(
        self, client: str, session: str, nonce: int, heartbeat: Heartbeat | None, *, stop: bool
    ) -> int:
        """Take a client's beat; returns the nonce of the next one, 0 where the watch ends.

        It is for a session's runs, or for all of the client's where `session` is empty.

        `heartbeat` is what a beat with nonce 0 asks for, and None with any other, and with `stop`.

        Raises:
            FailedPrecondition: another nonce was expected.
            Overloaded: too many clients are watched.
            Unavailable: the daemon is stopping.
        """
        ...


class EnginesPort(Protocol):
    """The owner of engines."""

    def engines(self) -> tuple[EngineInfo, ...]:
        """All installed engines, by name."""
        ...

    def engine(self, name: str) -> EngineInfo:
        """One engine. Raises NotFound."""
        ...

    async def load(self, name: str) -> EngineInfo:
        """Bring an engine into memory; returns once it is READY. Raises NotFound, LoadFailed."""
        ...

    async def unload(self, name: str) -> EngineInfo:
        """End an engine's process; returns once it is gone.

        Raises:
            NotFound: no such engine.
            FailedPrecondition: runs use it.
        """
        ...

    def pin(self, name: str, *, pinned: bool) -> EngineInfo:
        """Keep an engine in memory once it is loaded, or let it go again. Raises NotFound."""
        ...

    async def release(self, name: str) -> EngineInfo:
        """Forget what is held against an engine.

        Raises:
            NotFound: no such engine.
            FailedPrecondition: the disk does not forget it.
        """
        ...

    def explain(self, run_id: str = "") -> tuple[StepWait, ...]:
        """Why each waiting step waits, of this run or of all; the first to go first."""
        ...

    def watch(self) -> AsyncIterator[EngineInfo]:
        """All engines at once, then each one that changes."""
        ...


class DaemonPort(Protocol):
    """The daemon as a whole."""

    def status(self) -> DaemonStatus:
        """How it is."""
        ...

    def telemetry(self) -> TelemetrySnapshot:
        """The machine as it was last seen, as old as that is by now."""
        ...

    def reload(self) -> tuple[str, ...]:
        """Read the configuration again; returns the options that need a restart.

        Raises:
            ConfigError: it is broken, and the old one stays in force.
        """
        ...

    def drain(self) -> None:
        """Accept no new runs from now on."""
        ...
