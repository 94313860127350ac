"""The owner of all runs: accepts, finds, follows, cancels and halts them.

Knows nothing of gRPC. All methods on the daemon's loop; the plain ones act at once.
"""

import asyncio
import dataclasses
import itertools
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import structlog

from edge_agent.core import (
    EngineInfo,
    Executor,
    Halt,
    HaltOutcome,
    HaltScope,
    Message,
    Run,
    RunError,
    RunSpec,
    RunState,
    SideEffect,
    ToolResult,
)
from edge_agent.errors import (
    AlreadyExists,
    FailedPrecondition,
    Halted,
    NotFound,
    Overloaded,
    Unavailable,
)
from edge_agent.events import Event, ToolUpdated
from edge_agent.heartbeat import Heartbeat
from edge_agent.records import CallRecord, Effect
from edge_agent.runs.calls import DaemonTools
from edge_agent.runs.halting import Halting, halted_by
from edge_agent.runs.halts import HaltLatch, covers_run
from edge_agent.runs.heartbeats import Heartbeats
from edge_agent.runs.holding import Resources
from edge_agent.runs.holds import Holder, Holding
from edge_agent.runs.live import Journal, LiveRun
from edge_agent.runs.loop import Recording, RunLoop, Steps, Surroundings
from edge_agent.runs.recording import Machine, NoRecords, Records
from edge_agent.runs.sessions import Sessions
from edge_agent.runs.settings import RunSettings
from edge_agent.runs.store import MemoryRunStore

_RETRY_AFTER_S = 1.0
_STOP_MARGIN_S = 1.0

log = structlog.get_logger()


class Engines(Steps, Protocol):
    """Who decides steps, and knows which engines there are."""

    def engine(self, name: str) -> EngineInfo:
        """An installed engine. Raises NotFound."""
        ...


class Recorder(Machine, Protocol):
    """Who watches the machine."""

    def begin(self) -> Recording:
        """Watch it for one run, from now on."""
        ...


class Runs:
    """All runs and the Halt latch."""

    def __init__(  # noqa: PLR0913 - the parts of a daemon, by name
        self,
        engines: Engines,
        latch: HaltLatch,
        settings: RunSettings,
        *,
        recorder: Recorder | None = None,
        daemon_tools: DaemonTools | None = None,
        records: Records | None = None,
        journal: Journal | None = None,
        resources: Resources | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        """No runs yet. `journal` is where durable runs are written; None: there are none."""
        self.settings = settings
        self._engines = engines
        self._latch = latch
        self._resources = resources or Resources()
        self._sessions = sessions or Sessions()
        self._around = Surroundings(
            engines,
            latch,
            daemon_tools,
            records or NoRecords(),
            recorder,
            self._resources,
            self._sessions,
        )
        self._journal = journal
        self._halting = Halting(latch, self._stop_covered)
        self._heartbeats = Heartbeats(self._stop_client)
        self._recorder = recorder
        self._store = MemoryRunStore(
            retention_s=lambda: self.settings.retention_s,
            max_retained=lambda: self.settings.max_retained,
        )
        self._active: dict[str, tuple[RunLoop, asyncio.Task[None]]] = {}
        self._accepted: set[str] = set()
        self._suspended: dict[str, asyncio.TimerHandle] = {}
        self._accepting = True

    def create(self, spec: RunSpec, *, client: str, request_id: str) -> Run:
        """Accept a run and begin it, or return the one that `request_id` made before.

        Raises: as `accept` does.
        """
        live, new = self.accept(spec, client=client, request_id=request_id)
        if new:
            self.begin(live.id)
        return live.snapshot()

    def accept(self, spec: RunSpec, *, client: str, request_id: str) -> tuple[LiveRun, bool]:
        """Accept a run that is still to `begin`, or find the one that `request_id` made before.

        Returns:
            The run, and whether it is new.

        Raises:
            AlreadyExists: reason REQUEST_ID_REUSED, the same `request_id` with another body.
            Halted, Unavailable, Overloaded: no new runs now.
            NotFound: no such engine.
            FailedPrecondition, InvalidRequest: its session can't be used so; see `Sessions.check`.
        """
        earlier = self._store.find_request(client, request_id) if request_id else None
        if earlier is not None:
            return self._same_request(earlier, spec, request_id), False
        engine = self._check_acceptable(spec, client)
        self._sessions.check(client, spec, self.settings)
        run = Run(
            id=uuid.uuid4().hex,
            request_id=request_id,
            client=client,
            agent=spec.agent,
            engine=spec.engine,
            state=RunState.QUEUED,
            created_at_s=time.time(),
            priority=spec.priority,
            durable=spec.durable,
            session=spec.session.id if spec.session else "",
        )
        live = LiveRun(run, spec, self._journal if spec.durable else None)
        self._sessions.begin(run, spec)
        self._accepted.add(run.id)
        self._keep(live, engine)
        return live, True

    def begin(self, run_id: str) -> None:
        """Let an accepted run begin."""
        loop = self._find(run_id)
        self._accepted.discard(run_id)
        run = loop.live.run
        halt = self._latch.covering_run(run.client, run.agent)
        if halt is not None:  # latched while the run was written to disk
            self._stop_halted(loop, halted_by(halt))
        elif not self._accepting:
            loop.park(_stopping())
        self._drive(loop)

    def forget(self, run_id: str) -> None:
        """Forget an accepted run that is not to begin after all."""
        self._accepted.discard(run_id)
        self._sessions.forget(self._find(run_id).live.run)
        self._store.forget(run_id)

    def adopt(
        self,
        live: LiveRun,
        state: RunState,
        error: RunError | None,
        *,
        attempt: int,
        calls: Iterable[CallRecord],
    ) -> None:
        """Keep a run that an earlier daemon has left, and let it go on, wait or end (`state`).

        `attempt` is the next one at its running step; `calls` are on record as begun.
        """
        try:
            engine = self._engines.engine(live.spec.engine)
        except NotFound:  # it may be installed by the time that somebody resumes the run
            engine = None
        self._sessions.begin(live.run, live.spec)
        loop = self._keep(live, engine)
        loop.take_over(attempt, calls)
        halt = self._latch.covering_run(live.run.client, live.run.agent)
        if state is RunState.QUEUED and halt is not None:
            state, error = RunState.SUSPENDED, halted_by(halt)
        if state is RunState.QUEUED:
            loop.say(())
            self._drive(loop)
        elif error is not None and state is not live.state:
            loop.settle_as(state, error)
        if state is RunState.SUSPENDED:
            self._wait_suspended(loop)
        elif state.ended:
            self._store.ended(live.id)

    def get(self, run_id: str) -> Run:
        """The run as it stands.

        Raises:
            NotFound: never there, or its retention is over.
        """
        return self._find(run_id).live.snapshot()

    def page(
        self, states: frozenset[RunState], before: tuple[float, str] | None, limit: int
    ) -> tuple[Run, ...]:
        """Runs without transcripts, newest first, that were made before one made then.

        No states means all of them.
        """
        heads = (loop.live.head for loop in self._store.newest_first())
        found = (
            dataclasses.replace(run, transcript=())
            for run in heads
            if (not states or run.state in states)
            and (before is None or (run.created_at_s, run.id) < before)
        )
        return tuple(itertools.islice(found, limit))

    def has(self, run_id: str) -> bool:
        """Whether the run is in memory."""
        return self._store.get(run_id) is not None

    def live(self, run_id: str) -> LiveRun:
        """The run in memory. Raises NotFound."""
        return self._find(run_id).live

    def abandon(self, run_id: str, reason: RunError) -> None:
        """End a run whose stream has broken; a stopping daemon, which breaks all, parks them."""
        loop = self._store.get(run_id)
        if loop is not None and (self._accepting or not loop.live.run.durable):
            self._stop(loop, RunState.CANCELLED, reason)

    def cancel(self, run_id: str, reason: RunError) -> Run:
        """End a run; one that has ended stays as it is.

        Raises:
            NotFound: never there, or its retention is over.
        """
        loop = self._find(run_id)
        self._stop(loop, RunState.CANCELLED, reason)
        return loop.live.snapshot()

    def resume(self, run_id: str, messages: tuple[Message, ...], client: str) -> Run:
        """Let a suspended run go on, with what is to be said first.

        Raises:
            NotFound: no such run.
            FailedPrecondition: reason RUN_NOT_SUSPENDED, or TOOL_CALLS_OPEN: calls that act are
                open, and their results come first.
            Halted, Unavailable, Overloaded: nothing goes on now.
        """
        loop = self._find(run_id)
        run = loop.live.run
        if run.state is not RunState.SUSPENDED:
            message = f"run {run_id} is {run.state}, not SUSPENDED"
            metadata = {"run_id": run_id, "state": run.state}
            raise FailedPrecondition(message, reason="RUN_NOT_SUSPENDED", metadata=metadata)
        self._check_acceptable(loop.live.spec, run.client)
        acting = {
            tool.name for tool in loop.live.spec.tools if tool.side_effect is not SideEffect.NONE
        }
        if names := [call.id for call in run.open_tool_calls if call.name in acting]:
            message = f"run {run_id} waits for the results of {', '.join(names)}: submit them first"
            metadata = {"run_id": run_id, "tool_call_ids": ", ".join(names)}
            raise FailedPrecondition(message, reason="TOOL_CALLS_OPEN", metadata=metadata)
        log.info("run_resumed", run=run_id, client=client, messages=len(messages))
        self._suspended.pop(run_id).cancel()
        loop.say(messages)
        self._drive(loop)
        return loop.live.snapshot()

    def append(self, run_id: str, messages: tuple[Message, ...]) -> Run:
        """Say something to a run that goes on; see `RunLoop.append`."""
        loop = self._find(run_id)
        loop.append(messages)
        return loop.live.snapshot()

    def update_tool(self, run_id: str, update: ToolUpdated) -> Run:
        """Take news of a background call; see `OpenCalls.update`."""
        loop = self._find(run_id)
        loop.update(update)
        return loop.live.snapshot()

    def resolved(self, run_id: str, call_id: str) -> None:
        """It is known what came of a call: what it used is free."""
        self._resources.release(run_id, call_id)

    def still_hold(self, run: Run, spec: RunSpec, calls: Iterable[CallRecord]) -> None:
        """A run that ended under an earlier daemon: its unknown calls have what they used."""
        tools = {tool.name: tool for tool in spec.tools}
        for call in calls:
            tool = tools.get(call.tool)
            if call.effect is Effect.UNKNOWN and tool is not None and tool.resources:
                holder = Holder(
                    run.id, call.call_id, call.tool, run.client, run.agent, Holding.UNKNOWN
                )
                self._resources.retake(holder, tool.resources)

    def doubtful(self, run_id: str, call_id: str) -> CallRecord | None:
        """A call that holds something since nobody knows of it, as far as it is known here."""
        for holder in self._resources.holders().values():
            if holder.key == (run_id, call_id) and holder.holding is Holding.UNKNOWN:
                return CallRecord(
                    run_id=run_id,
                    step=0,
                    call_id=call_id,
                    tool=holder.tool,
                    executor=Executor.CALLER,
                    side_effect=SideEffect.NON_IDEMPOTENT,
                    arguments_hash="",
                    effect=Effect.UNKNOWN,
                    issued_at_s=time.time(),
                )
        return None

    def holders(self) -> Mapping[str, Holder]:
        """Which call has what, by resource."""
        return self._resources.holders()

    def decide(self, run_id: str, call_id: str, *, approved: bool, client: str, reason: str) -> Run:
        """Approve or deny a call that waits for it; see `ToolCalls.decide`."""
        loop = self._find(run_id)
        loop.decide(call_id, approved=approved, client=client, reason=reason)
        return loop.live.snapshot()

    def submit(self, run_id: str, results: Sequence[ToolResult]) -> Run:
        """Hand in results that open calls wait for: all of them, or none.

        Raises:
            NotFound: no such run, or it never made such a call.
            FailedPrecondition: the run has ended, or the call has its result.
        """
        loop = self._find(run_id)
        loop.submit(results)
        return loop.live.snapshot()

    async def settled(self, run_id: str) -> None:
        """Wait until all that has happened to a run may be seen; see `LiveRun.settled`."""
        await self._find(run_id).live.settled()

    def watch(self, run_id: str, after_sequence: int | None) -> AsyncIterator[Event]:
        """A snapshot, then the events after `after_sequence`, until the run has ended.

        Raises:
            NotFound: never there, or its retention is over.
        """
        return self._find(run_id).live.follow(after_sequence)

    def counts(self) -> Mapping[RunState, int]:
        """Runs by state, ended ones within their retention."""
        return Counter(loop.live.state for loop in self._store.newest_first())

    # --- Halt ---

    def halts(self) -> tuple[Halt, ...]:
        """All that are latched, oldest first."""
        return self._latch.halts()

    async def halt(self, scope: HaltScope, target: str, reason: str, client: str) -> HaltOutcome:
        """Latch a Halt; see `Halting.halt`.

        Calls of durable runs are shown once they are on disk: those that were on their way by then
        are shown, with their CancelTool, before this returns.
        """
        outcome = await self._halting.halt(scope, target, reason, client)
        settling = [
            asyncio.ensure_future(loop.live.settled())
            for loop in self._store.newest_first()  # also what has just been stopped
            if not loop.live.is_settled
        ]
        if settling:
            await asyncio.wait(settling, timeout=self.settings.halt_settle_s)
        for each in settling:
            each.cancel()
        await asyncio.gather(*settling, return_exceptions=True)
        return outcome

    async def clear_halt(self, halt_id: str) -> None:
        """Lift a Halt; see `Halting.clear`."""
        await self._halting.clear(halt_id)

    def _stop_covered(self, halt: Halt, error: RunError) -> int:
        """A durable run is suspended: nothing of it moves until somebody resumes it."""
        covered = tuple(self._covered(halt))
        for loop in covered:
            self._stop_halted(loop, error)
        return len(covered)

    def _stop_halted(self, loop: RunLoop, error: RunError) -> None:
        durable = loop.live.run.durable
        loop.stop(RunState.SUSPENDED if durable else RunState.CANCELLED, error)

    def _covered(self, halt: Halt) -> Iterator[RunLoop]:
        for loop, _task in tuple(self._active.values()):
            run = loop.live.run
            if covers_run(halt, run.client, run.agent) or (
                halt.scope is HaltScope.TOOL and loop.has_open_call(halt.target)
            ):
                yield loop

    # --- heartbeats ---

    def beat(
        self, client: str, session: str, nonce: int, heartbeat: Heartbeat | None, *, stop: bool
    ) -> int:
        """Take a client's beat; see `Heartbeats.beat`."""
        return self._heartbeats.beat(client, session, nonce, heartbeat, stop=stop)

    def _stop_client(self, client: str, session: str, state: RunState, error: RunError) -> int:
        """Suspend or cancel a client's runs, or those of a session of its.

        What is not durable can only be cancelled.
        """
        left = [loop for loop in self._store.newest_first() if not loop.live.state.ended]
        runs = [loop for loop in left if loop.live.run.client == client]
        runs = [loop for loop in runs if session in ("", loop.live.run.session)]
        if state is RunState.SUSPENDED:
            runs = [loop for loop in runs if loop.live.state is not RunState.SUSPENDED]
        for loop in runs:
            if state is RunState.SUSPENDED:
                self._stop_halted(loop, error)
                continue
            self._stop(loop, state, error)
        return len(runs)

    # --- stopping ---

    def stop_accepting(self) -> None:
        """Refuse new runs from now on."""
        self._accepting = False

    async def drain(self, grace_s: float) -> None:
        """Let active runs finish within `grace_s`, then end the rest with a final event."""
        self.stop_accepting()
        tasks = [task for _loop, task in self._active.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        self._heartbeats.close()
        left = tuple(self._active.values())
        error = _stopping()
        for loop, _task in left:
            if loop.live.run.durable:
                loop.park(error)
            else:
                loop.stop(RunState.FAILED, error)
        if left:
            limit_s = self.settings.cancel_confirm_s + _STOP_MARGIN_S
            await asyncio.wait([task for _loop, task in left], timeout=limit_s)

    # --- inside ---

    def _keep(self, live: LiveRun, engine: EngineInfo | None) -> RunLoop:
        recording = self._recorder.begin() if self._recorder else None
        loop = RunLoop(live, self._around, self.settings, engine, recording)
        self._store.add(loop)
        return loop

    def _drive(self, loop: RunLoop) -> None:
        run_id, task = loop.live.id, loop.start()
        self._active[run_id] = (loop, task)
        task.add_done_callback(lambda _task: self._left(run_id))

    def _left(self, run_id: str) -> None:
        """Nothing drives the run any more: it has ended, or is suspended."""
        loop, _task = self._active.pop(run_id)
        if loop.live.state is RunState.SUSPENDED:
            self._wait_suspended(loop)
        else:
            self._store.ended(run_id)

    def _wait_suspended(self, loop: RunLoop) -> None:
        """Until somebody resumes it, or nobody has for too long."""
        limit_s = self.settings.suspended_retention_s

        def give_up() -> None:
            message = f"nobody resumed the run within {limit_s:g} s (runs.suspended_retention)"
            self._stop(loop, RunState.EXPIRED, RunError("SUSPENDED_TOO_LONG", message))

        timer = asyncio.get_running_loop().call_later(limit_s, give_up)
        self._suspended[loop.live.id] = timer

    def _stop(self, loop: RunLoop, state: RunState, reason: RunError) -> None:
        loop.stop(state, reason)
        timer = self._suspended.pop(loop.live.id, None)
        if timer is not None:  # nothing drives it: its end has to be
            timer.cancel()
            self._drive(loop)

    def _find(self, run_id: str) -> RunLoop:
        loop = self._store.get(run_id)
        if loop is None:
            raise NotFound(
                f"run_id: no run {run_id!r}", reason="RUN_NOT_FOUND", metadata={"run_id": run_id}
            )
        return loop

    def _same_request(self, earlier: RunLoop, spec: RunSpec, request_id: str) -> LiveRun:
        if earlier.live.spec == spec:
            return earlier.live
        raise request_reused(request_id, earlier.live.id)

    def _check_acceptable(self, spec: RunSpec, client: str) -> EngineInfo:
        if not self._accepting:
            raise Unavailable("the daemon is stopping", reason="DAEMON_DRAINING")
        halt = self._latch.covering_run(client, spec.agent)
        if halt is not None:
            raise Halted(
                f"halted ({halt.scope}): {halt.reason or 'no reason given'}",
                metadata={"halt_id": halt.id, "scope": halt.scope, "target": halt.target},
            )
        active = len(self._active) + len(self._accepted)
        if active >= self.settings.max_active:
            raise Overloaded(
                f"{active} runs are active, at most {self.settings.max_active}",
                reason="TOO_MANY_RUNS",
                metadata={"active": active, "limit": self.settings.max_active},
                retry_after_s=_RETRY_AFTER_S,
            )
        return self._engines.engine(spec.engine)


def _stopping() -> RunError:
    return RunError("DAEMON_STOPPING", "the daemon is stopping", retryable=True)


def request_reused(request_id: str, run_id: str) -> AlreadyExists:
    """The same `request_id` with another body."""
    return AlreadyExists(
        f"request_id: {request_id!r} made run {run_id} with another body",
        reason="REQUEST_ID_REUSED",
        metadata={"request_id": request_id, "run_id": run_id},
    )
