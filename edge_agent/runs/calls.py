"""The tool calls of one run: approval, execution, results, and what is left when a run is stopped.

Enforces that only tools of the run are called, in the order that their side effects allow, and
never while a Halt covers them. Decides nothing about steps.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from edge_agent.core import Executor, RunError, SideEffect, TextPart, Tool, ToolCall, ToolResult
from edge_agent.errors import (
    DeadlineExceeded,
    EdgeAgentError,
    FailedPrecondition,
    Halted,
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    Overloaded,
    StepFailed,
    ToolNotReady,
)
from edge_agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    CancelTool,
    DaemonToolStarted,
    ToolCallsIssued,
    ToolResultAccepted,
)
from edge_agent.records import CallRecord, Effect, ResultClass
from edge_agent.runs import history
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.live import LiveRun
from edge_agent.runs.recording import Records, StepRecorder
from edge_agent.runs.settings import RunSettings

_NEVER_BEGAN = (FailedPrecondition, NotFound, Overloaded, ToolNotReady)
"""What a tool of the daemon's own refuses with before it does anything."""


class DaemonTools(Protocol):
    """Who executes the tools of the daemon's allow-list."""

    async def call(self, call: ToolCall, *, timeout_s: float) -> ToolResult:
        """Execute one; to cancel this cancels it.

        Raises:
            EdgeAgentError: it gave no result: in time, at this rate, or at all.
        """
        ...


class ToolCalls:
    """The open calls of one run. All methods on the daemon's loop."""

    def __init__(
        self,
        live: LiveRun,
        latch: HaltLatch,
        settings: RunSettings,
        daemon_tools: DaemonTools | None,
        records: Records,
        recorder: StepRecorder,
    ) -> None:
        """Nothing is open yet."""
        self._live = live
        self._latch = latch
        self._settings = settings
        self._daemon_tools = daemon_tools
        self._records = records
        self._recorder = recorder
        self._tools = {tool.name: tool for tool in live.spec.tools}
        self._open: dict[str, asyncio.Future[ToolResult]] = {}
        self._begun: dict[str, CallRecord] = {}
        self._approvals: dict[str, asyncio.Future[ApprovalDecided]] = {}
        self._unknown: set[str] = set()
        self._cancelling = False
        self.observed_s = time.monotonic()

    # --- what callers say ---

    def has_open(self, tool: str) -> bool:
        """Whether a call of this tool waits for its result, or for approval."""
        run = self._live.run
        calls = (*run.open_tool_calls, *run.daemon_tool_calls, *run.unapproved_tool_calls)
        return any(call.name == tool for call in calls)

    def submit(self, results: Sequence[ToolResult]) -> None:
        """Take results of open tool calls: all of them, or none.

        Raises:
            NotFound: reason TOOL_CALL_NOT_FOUND, the run never made such a call.
            FailedPrecondition: reason TOOL_CALL_CLOSED, TOOL_CALL_NOT_YOURS or RUN_ENDED.
            InvalidRequest: the same call twice.
        """
        seen: set[str] = set()
        for index, result in enumerate(results):
            self._check_result(f"results[{index}].tool_call_id", result.tool_call_id, seen)
        for result in results:
            self.observed_s = time.monotonic()
            self._accept(result)
            waiting = self._open.pop(result.tool_call_id, None)
            if waiting is not None:
                waiting.set_result(result)

    def decide(self, call_id: str, *, approved: bool, client: str, reason: str) -> None:
        """Approve or deny a call that waits for it.

        Raises:
            NotFound: reason TOOL_CALL_NOT_FOUND.
            FailedPrecondition: reason TOOL_CALL_NOT_WAITING, it does not wait for approval.
        """
        metadata = {"run_id": self._live.id, "tool_call_id": call_id}
        waiting = self._approvals.pop(call_id, None)
        if waiting is None:
            if call_id not in {call.id for call in history.calls_of(self._live.run)}:
                message = f"tool_call_id: run {self._live.id} made no call {call_id!r}"
                raise NotFound(message, reason="TOOL_CALL_NOT_FOUND", metadata=metadata)
            message = f"tool_call_id: {call_id!r} does not wait for approval"
            raise FailedPrecondition(message, reason="TOOL_CALL_NOT_WAITING", metadata=metadata)
        decided = ApprovalDecided(call_id, approved, client, reason)
        self._live.emit(decided)
        waiting.set_result(decided)

    def _check_result(self, field: str, call_id: str, seen: set[str]) -> None:
        run = self._live.run
        metadata = {"run_id": run.id, "tool_call_id": call_id}
        if call_id in seen:
            raise InvalidRequest.field(field, f"{call_id!r} twice in one request")
        seen.add(call_id)
        if run.state.ended:
            message = f"run {run.id} has ended: {run.state}"
            raise FailedPrecondition(message, reason="RUN_ENDED", metadata=metadata)
        if call_id in {call.id for call in run.open_tool_calls}:
            return
        if call_id in {call.id for call in history.unanswered(run)}:
            message = f"{field}: {call_id!r} is not the caller's to execute, or not yet"
            raise FailedPrecondition(message, reason="TOOL_CALL_NOT_YOURS", metadata=metadata)
        if call_id in {call.id for call in history.calls_of(run)}:
            message = f"{field}: {call_id!r} has its result already"
            raise FailedPrecondition(message, reason="TOOL_CALL_CLOSED", metadata=metadata)
        message = f"{field}: run {run.id} made no call {call_id!r}"
        raise NotFound(message, reason="TOOL_CALL_NOT_FOUND", metadata=metadata)

    # --- executing ---

    def take_over(self, records: Iterable[CallRecord]) -> None:
        """Those that an earlier daemon has begun, and whose results are still to come."""
        self._begun.update(
            (record.call_id, record) for record in records if record.effect is Effect.INTENDED
        )

    def tool(self, name: str) -> Tool:
        """A tool of this run. Raises StepFailed: reason TOOL_NOT_ALLOWED."""
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(sorted(self._tools)) or "it has none"
            message = f"tool {name!r} is not one of this run: {known}"
            raise StepFailed(RunError("TOOL_NOT_ALLOWED", message, metadata={"tool": name}))
        return tool

    async def execute(self, step: int, calls: tuple[ToolCall, ...]) -> None:
        """Have the calls approved and executed; every result is in the transcript afterwards.

        Raises:
            Halted: a Halt covers one of them.
            DeadlineExceeded: reason TOOL_TIMEOUT, the caller gave no result in time.
            OutcomeUnknown: nobody knows whether a call of the daemon's own acted.
            EdgeAgentError: the ledger could not keep that a call was about to be made.
        """
        self._check_halts(calls)
        calls = await self._approved(step, calls)
        for batch in self._batches(calls):
            self._check_halts(batch)
            await self._execute(step, batch)

    async def _approved(self, step: int, calls: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
        """Those that may be executed; the denied ones have a result that says so."""
        asked = tuple(call for call in calls if self.tool(call.name).needs_approval)
        if not asked:
            return calls
        futures = {call.id: asyncio.get_running_loop().create_future() for call in asked}
        self._approvals.update(futures)
        self._live.emit(ApprovalRequested(step, asked))
        try:
            decided = [await futures[call.id] for call in asked]
        finally:
            for call in asked:
                self._approvals.pop(call.id, None)
        denied = {each.tool_call_id: each for each in decided if not each.approved}
        for call in asked:
            if call.id in denied:
                self._deny(step, call, denied[call.id])
        return tuple(call for call in calls if call.id not in denied)

    def _deny(self, step: int, call: ToolCall, decided: ApprovalDecided) -> None:
        why = f": {decided.reason}" if decided.reason else ""
        result = ToolResult(call.id, (TextPart(f"denied{why}"),), is_error=True)
        record = self._recorder.intended(step, call)
        self._records.call(self._recorder.ended(record, call, result, ResultClass.DENIED))
        self._live.emit(ToolResultAccepted(result))

    def _batches(self, calls: tuple[ToolCall, ...]) -> Iterator[tuple[ToolCall, ...]]:
        """Neighbours that may run side by side; what acts once only runs by itself, in its turn."""
        together: list[ToolCall] = []
        for call in calls:
            if self.tool(call.name).side_effect is not SideEffect.NON_IDEMPOTENT:
                together.append(call)
                continue
            if together:
                yield tuple(together)
                together = []
            yield (call,)
        if together:
            yield tuple(together)

    async def _execute(self, step: int, calls: tuple[ToolCall, ...]) -> None:
        """Make these calls and wait for every result."""
        callers = tuple(c for c in calls if self.tool(c.name).executor is Executor.CALLER)
        futures = {call.id: asyncio.get_running_loop().create_future() for call in callers}
        issued_s = time.monotonic()
        if callers:
            for call in callers:
                self._begun[call.id] = self._recorder.intended(step, call)
                self._records.call(self._begun[call.id])
            self._open.update(futures)
            self._live.emit(ToolCallsIssued(step, callers))
        own = [
            asyncio.create_task(
                self._execute_own(step, call), name=f"tool-{self._live.id}-{call.id}"
            )
            for call in calls
            if call not in callers
        ]
        try:
            # Shortest first: no wait outlasts the time of a call that is looked at after it.
            for call in sorted(callers, key=self._timeout_s):
                await self._result(call, futures[call.id], issued_s)
            for task in own:
                await task
        finally:
            for task in own:
                task.cancel()
            await asyncio.gather(*own, return_exceptions=True)

    async def _result(
        self, call: ToolCall, future: "asyncio.Future[ToolResult]", issued_s: float
    ) -> None:
        timeout_s = self._timeout_s(call)
        try:
            async with asyncio.timeout(issued_s + timeout_s - time.monotonic()):
                await asyncio.shield(future)
        except TimeoutError:
            raise DeadlineExceeded(
                f"tool {call.name!r} gave no result within {timeout_s:g} s",
                reason="TOOL_TIMEOUT",
                metadata={"tool": call.name, "tool_call_id": call.id, "timeout_s": timeout_s},
            ) from None

    async def _execute_own(self, step: int, call: ToolCall) -> None:
        """Execute a call of the daemon's own. That it may act is on record before it does."""
        once = self.tool(call.name).side_effect is SideEffect.NON_IDEMPOTENT
        record = self._recorder.intended(step, call)
        if once:
            await self._intend(record, call)
        else:
            self._records.call(record)
        self._live.emit(DaemonToolStarted(step, call))
        self._begun[call.id] = record
        try:
            result = await self._call_own(call)
        except asyncio.CancelledError:
            self._lose(call, once=once)
            raise
        except EdgeAgentError as error:
            late = isinstance(error, DeadlineExceeded)
            if once and not isinstance(error, _NEVER_BEGAN):
                self._lose(call, once=True, kind=ResultClass.TIMEOUT if late else None)
                message = f"tool {call.name!r} gave no result: {error.message}"
                metadata = {**error.metadata, "tool": call.name, "tool_call_ids": call.id}
                raise OutcomeUnknown(message, metadata=metadata) from error
            result = ToolResult(call.id, (TextPart(error.message),), is_error=True)
            self._accept(result, ResultClass.TIMEOUT if late else None)
            return
        self.observed_s = time.monotonic()
        self._accept(result)

    async def _intend(self, record: CallRecord, call: ToolCall) -> None:
        """Have it on disk that the call is about to be made; one that then is not, is known not."""
        try:
            await self._records.intend(record)
        except asyncio.CancelledError:
            never = ToolResult(call.id, (), cancelled=True)
            self._records.call(self._recorder.ended(record, call, never))
            raise

    async def _call_own(self, call: ToolCall) -> ToolResult:
        if self._daemon_tools is None:
            raise FailedPrecondition(f"tool {call.name!r}: this daemon has no tools of its own")
        return await self._daemon_tools.call(call, timeout_s=self._timeout_s(call))

    def _accept(self, result: ToolResult, kind: ResultClass | None = None) -> None:
        # First, so that no call is on record as done whose result a restart would not find.
        self._live.emit(ToolResultAccepted(result))
        record = self._begun.pop(result.tool_call_id, None)
        if record is not None:
            call = self._call(result.tool_call_id)
            self._records.call(self._recorder.ended(record, call, result, kind))

    def _lose(self, call: ToolCall, *, once: bool, kind: ResultClass | None = None) -> None:
        record = self._begun.pop(call.id, None)
        if record is not None:
            self._records.call(self._recorder.lost(record, kind))
        if once:
            self._unknown.add(call.id)

    def _call(self, call_id: str) -> ToolCall:
        return next(call for call in history.calls_of(self._live.run) if call.id == call_id)

    def _timeout_s(self, call: ToolCall) -> float:
        return self.tool(call.name).timeout_s or self._settings.tool_timeout_s

    def _check_halts(self, calls: tuple[ToolCall, ...]) -> None:
        for call in calls:
            halt = self._latch.covering_tool(call.name)
            if halt is not None:
                raise Halted(
                    f"tool {call.name!r} is halted: {halt.reason or halt.scope}",
                    metadata={"halt_id": halt.id, "scope": halt.scope, "tool": call.name},
                )

    # --- stopping ---

    def cancel(self, error: RunError) -> bool:
        """Tell the caller to stop its open calls, once; returns whether there are any."""
        calls = self._live.run.open_tool_calls
        if calls and not self._cancelling:
            self._cancelling = True
            for call in calls:
                if call.id not in self._open:  # of a run that was suspended
                    self._open[call.id] = asyncio.get_running_loop().create_future()
                self._live.emit(CancelTool(call.id, error))
        return bool(calls)

    async def confirmed(self) -> tuple[str, ...]:
        """Wait a while for the open calls to confirm; returns those of which nobody knows."""
        waiting = list(self._open.values())
        if waiting:
            await asyncio.wait(waiting, timeout=self._settings.cancel_confirm_s)
        unknown = {*self._unknown, *self._open}
        for call_id in tuple(self._open):
            self._lose(self._call(call_id), once=True)
        self._open.clear()
        self._unknown.clear()
        self._cancelling = False
        return tuple(sorted(unknown))

    def let_go(self) -> None:
        """Stop waiting; what is open stays so, for a later result."""
        self._open.clear()
