"""The owner of all runs: accepts, finds, follows, cancels and halts them.

Knows nothing of gRPC. All methods on the daemon's loop; the plain ones act at once.
"""

import asyncio
import dataclasses
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Protocol

import structlog

from edge_agent.core import (
    EngineInfo,
    Event,
    Halt,
    HaltOutcome,
    HaltScope,
    Run,
    RunError,
    RunSpec,
    RunState,
    ToolResult,
)
from edge_agent.errors import (
    AlreadyExists,
    FailedPrecondition,
    Halted,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from edge_agent.runs.halts import HaltLatch, covers_run
from edge_agent.runs.live import LiveRun
from edge_agent.runs.loop import Recording, RunLoop, Steps
from edge_agent.runs.settings import RunSettings
from edge_agent.runs.store import MemoryRunStore, RunStore

_RETRY_AFTER_S = 1.0
_RECORD_TIMEOUT_S = 1.0
_STOP_MARGIN_S = 1.0

log = structlog.get_logger()


class Engines(Steps, Protocol):
    """Who decides steps, and knows which engines there are."""

    def engine(self, name: str) -> EngineInfo:
        """An installed engine. Raises NotFound."""
        ...


class Recorder(Protocol):
    """Who watches the machine."""

    def begin(self) -> Recording:
        """Watch it for one run, from now on."""
        ...


class Runs:
    """All runs and the Halt latch."""

    def __init__(
        self,
        engines: Engines,
        latch: HaltLatch,
        settings: RunSettings,
        store: RunStore | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """No runs yet."""
        self.settings = settings
        self._engines = engines
        self._latch = latch
        self._recorder = recorder
        self._store: RunStore = store or MemoryRunStore(
            retention_s=lambda: self.settings.retention_s,
            max_retained=lambda: self.settings.max_retained,
        )
        self._active: dict[str, tuple[RunLoop, asyncio.Task[None]]] = {}
        self._recording = asyncio.Lock()
        self._going_on: set[asyncio.Task[None]] = set()
        self._accepting = True

    def create(self, spec: RunSpec, *, client: str, request_id: str) -> Run:
        """Accept a run, or return the one that `request_id` made before.

        Raises:
            AlreadyExists: reason REQUEST_ID_REUSED, the same `request_id` with another body.
            Halted, Unavailable, Overloaded: no new runs now.
            NotFound: no such engine.
        """
        earlier = self._store.find_request(client, request_id) if request_id else None
        if earlier is not None:
            return self._same_request(earlier, spec, request_id)
        self._check_acceptable(spec, client)
        run = Run(
            id=uuid.uuid4().hex,
            request_id=request_id,
            client=client,
            agent=spec.agent,
            engine=spec.engine,
            state=RunState.QUEUED,
            created_at_s=time.time(),
            priority=spec.priority,
        )
        recording = self._recorder.begin() if self._recorder else None
        live = LiveRun(run, spec)
        loop = RunLoop(live, self._engines, self._latch, self.settings, recording)
        self._store.add(loop)
        task = loop.start()
        self._active[run.id] = (loop, task)
        task.add_done_callback(lambda _task: self._ended(run.id))
        return loop.live.snapshot()

    def get(self, run_id: str) -> Run:
        """The run as it stands.

        Raises:
            NotFound: never there, or its retention is over.
        """
        return self._find(run_id).live.snapshot()

    def list(
        self, *, states: frozenset[RunState], page_size: int, page_token: str
    ) -> tuple[tuple[Run, ...], str]:
        """A page without transcripts, newest first, and the token of the next one.

        Raises:
            InvalidRequest: a page token whose run is not kept any more, or never was.
        """
        runs: list[Run] = []
        skipping = bool(page_token)
        for loop in self._store.newest_first():
            if skipping:
                skipping = loop.live.id != page_token
                continue
            if states and loop.live.state not in states:
                continue
            if len(runs) == page_size:
                return tuple(runs), runs[-1].id
            runs.append(dataclasses.replace(loop.live.run, transcript=()))
        if skipping:
            raise InvalidRequest.field("page_token", f"{page_token!r} is not a token of this list")
        return tuple(runs), ""

    def cancel(self, run_id: str, reason: RunError) -> Run:
        """End a run; one that has ended stays as it is.

        Raises:
            NotFound: never there, or its retention is over.
        """
        loop = self._find(run_id)
        loop.stop(RunState.CANCELLED, reason)
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
        """Latch a Halt: first stop what it covers, then write it to disk.

        It is never refused; what is latched may cover more than was asked (`HaltLatch.latch`).
        """
        asked = Halt(uuid.uuid4().hex, scope, target, reason, client, time.time())
        halt = self._latch.latch(asked)
        stopped = 0
        for loop in self._covered(halt):
            error = RunError(
                "HALTED",
                f"halted: {halt.reason or halt.scope}",
                metadata={"halt_id": halt.id, "scope": halt.scope},
            )
            loop.stop(RunState.CANCELLED, error)
            stopped += 1
        log.warning(
            "halt_latched",
            halt=halt.id,
            scope=halt.scope.value,
            target=halt.target,
            asked=f"{scope} {target}".rstrip(),
            stopped=stopped,
        )
        try:
            await asyncio.wait_for(self._whatever_happens(self._record(halt)), _RECORD_TIMEOUT_S)
        except TimeoutError:
            log.error("halt_record_late", halt=halt.id, waited_s=_RECORD_TIMEOUT_S)
            return HaltOutcome(halt, stopped, recorded=False)
        except OSError:
            return HaltOutcome(halt, stopped, recorded=False)
        return HaltOutcome(halt, stopped, recorded=True)

    async def clear_halt(self, halt_id: str) -> None:
        """Lift a Halt once that is on disk.

        Raises:
            NotFound: none has this id.
            FailedPrecondition: reason HALT_NOT_RECORDED, the disk refused; it stays latched.
        """
        halt = self._latch.get(halt_id)
        try:
            await self._whatever_happens(self._record(halt, lift=True))
        except OSError as error:
            message = f"halt {halt_id} stays latched: {error.strerror}"
            raise FailedPrecondition(
                message, reason="HALT_NOT_RECORDED", metadata={"halt_id": halt_id}
            ) from error
        log.warning("halt_cleared", halt=halt_id)

    def _covered(self, halt: Halt) -> Iterator[RunLoop]:
        for loop, _task in tuple(self._active.values()):
            run = loop.live.run
            if covers_run(halt, run.client, run.agent) or (
                halt.scope is HaltScope.TOOL and loop.has_open_call(halt.target)
            ):
                yield loop

    async def _record(self, halt: Halt, *, lift: bool = False) -> None:
        """Write the latch to disk, without this Halt if it is lifted; then it is."""
        async with self._recording:
            halts = tuple(each for each in self._latch.halts() if not lift or each is not halt)
            try:
                await asyncio.to_thread(self._latch.record, halts)
            except OSError as error:
                log.error("halt_not_recorded", halt=halt.id, error=str(error))
                raise
            if lift:
                self._latch.lift(halt)

    async def _whatever_happens(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for something that goes on when its caller is gone or waits no longer."""
        task = asyncio.create_task(work)
        self._going_on.add(task)
        task.add_done_callback(self._went_on)
        await asyncio.shield(task)

    def _went_on(self, task: "asyncio.Task[None]") -> None:
        self._going_on.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here: nobody may wait for it any more

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
        left = tuple(self._active.values())
        error = RunError("DAEMON_STOPPING", "the daemon is stopping", retryable=True)
        for loop, _task in left:
            loop.stop(RunState.FAILED, error)
        if left:
            limit_s = self.settings.cancel_confirm_s + _STOP_MARGIN_S
            await asyncio.wait([task for _loop, task in left], timeout=limit_s)

    # --- inside ---

    def _ended(self, run_id: str) -> None:
        del self._active[run_id]
        self._store.ended(run_id)

    def _find(self, run_id: str) -> RunLoop:
        loop = self._store.get(run_id)
        if loop is None:
            raise NotFound(
                f"run_id: no run {run_id!r}", reason="RUN_NOT_FOUND", metadata={"run_id": run_id}
            )
        return loop

    def _same_request(self, earlier: RunLoop, spec: RunSpec, request_id: str) -> Run:
        if earlier.live.spec == spec:
            return earlier.live.snapshot()
        run_id = earlier.live.id
        raise AlreadyExists(
            f"request_id: {request_id!r} made run {run_id} with another body",
            reason="REQUEST_ID_REUSED",
            metadata={"request_id": request_id, "run_id": run_id},
        )

    def _check_acceptable(self, spec: RunSpec, client: str) -> None:
        if not self._accepting:
            raise Unavailable("the daemon is stopping", reason="DAEMON_DRAINING")
        halt = self._latch.covering_run(client, spec.agent)
        if halt is not None:
            raise Halted(
                f"halted ({halt.scope}): {halt.reason or 'no reason given'}",
                metadata={"halt_id": halt.id, "scope": halt.scope, "target": halt.target},
            )
        if len(self._active) >= self.settings.max_active:
            raise Overloaded(
                f"{len(self._active)} runs are active, at most {self.settings.max_active}",
                reason="TOO_MANY_RUNS",
                metadata={"active": len(self._active), "limit": self.settings.max_active},
                retry_after_s=_RETRY_AFTER_S,
            )
        self._engines.engine(spec.engine)
