"""The calls of one run that have begun: their results, their records, and what they hold.

A call is here from when it is issued until it has its result, or until it is given up. Decides
nothing about which calls are made. All methods on the daemon's loop.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence

from edge_agent.core import (
    Lifecycle,
    RunError,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
)
from edge_agent.errors import FailedPrecondition, InvalidRequest, NotFound
from edge_agent.events import CancelTool, ToolCallsIssued, ToolResultAccepted, ToolUpdated
from edge_agent.records import CallRecord, Effect, Resolution, ResultClass
from edge_agent.runs import history
from edge_agent.runs.holding import Resources
from edge_agent.runs.holds import Holder, Holding
from edge_agent.runs.live import LiveRun
from edge_agent.runs.recording import Records, StepRecorder
from edge_agent.wakeup import Wakeup


class OpenCalls:
    """Those of one run. `observed_s` is when it last saw something of the world."""

    def __init__(
        self,
        live: LiveRun,
        tools: Mapping[str, Tool],
        records: Records,
        recorder: StepRecorder,
        resources: Resources,
    ) -> None:
        """Nothing is open yet."""
        self._live = live
        self._tools = tools
        self._records = records
        self._recorder = recorder
        self._resources = resources
        self._waited: dict[str, asyncio.Future[ToolResult]] = {}
        self._begun: dict[str, CallRecord] = {}
        self._unknown: set[str] = set()
        self._cancelling = False
        self._told: set[str] = set()
        self.news = Wakeup()
        self.observed_s = time.monotonic()

    # --- beginning ---

    def take_over(self, records: Iterable[CallRecord]) -> None:
        """Those that an earlier daemon has begun: what they used is theirs still."""
        for record in records:
            tool = self._tools.get(record.tool)
            if record.effect is Effect.INTENDED:
                self._begun[record.call_id] = record
            if tool is None or not tool.resources:
                continue
            if record.effect in (Effect.INTENDED, Effect.UNKNOWN):
                holding = self._held_after_restart(record)
                call = ToolCall(record.call_id, record.tool, "{}")
                self._resources.retake(self.holder(call, holding), tool.resources)

    def issue(self, step: int, calls: Iterable[ToolCall]) -> "list[asyncio.Future[ToolResult]]":
        """Have the caller execute these; each future is done with the call's result."""
        issued = tuple(calls)
        for call in issued:
            self._records.call(self.begin(step, call))
            self._waited[call.id] = asyncio.get_running_loop().create_future()
        self._live.emit(ToolCallsIssued(step, issued))
        return [self._waited[call.id] for call in issued]

    def begin(self, step: int, call: ToolCall) -> CallRecord:
        """A call is about to be made."""
        self._begun[call.id] = self._recorder.intended(step, call)
        return self._begun[call.id]

    def holder(self, call: ToolCall, holding: Holding = Holding.INSTANT) -> Holder:
        """The call, as whoever wants the same resources is told of it."""
        run = self._live.run
        return Holder(run.id, call.id, call.name, run.client, run.agent, holding)

    # --- results ---

    def submit(self, results: Sequence[ToolResult]) -> None:
        """Take results of open calls: all of them, or none.

        Raises:
            NotFound: reason TOOL_CALL_NOT_FOUND, the run never made such a call.
            FailedPrecondition: reason TOOL_CALL_CLOSED, TOOL_CALL_NOT_YOURS or RUN_ENDED.
            InvalidRequest: the same call twice.
        """
        seen: set[str] = set()
        for index, result in enumerate(results):
            self._check_result(f"results[{index}].tool_call_id", result, seen)
        for result in results:
            if self._goes_on(result.tool_call_id):
                call_id, parts = result.tool_call_id, result.parts
                self._update(ToolUpdated(call_id, parts, result.is_error, done=True), result)
                continue
            self.observed_s = time.monotonic()
            self.accept(result)

    def update(self, update: ToolUpdated) -> None:
        """Take news of a call that goes on in the background.

        Raises:
            NotFound: reason TOOL_CALL_NOT_FOUND, the run never made such a call.
            FailedPrecondition: reason RUN_ENDED, or TOOL_CALL_NOT_BACKGROUND: it does not go on.
        """
        call_id = update.tool_call_id
        self._check_not_ended(call_id)
        if not self._goes_on(call_id):
            self._check_made("tool_call_id", call_id)
            message = f"tool_call_id: {call_id!r} does not go on in the background"
            metadata = {"run_id": self._live.id, "tool_call_id": call_id}
            raise FailedPrecondition(message, reason="TOOL_CALL_NOT_BACKGROUND", metadata=metadata)
        self._update(update, ToolResult(call_id, update.parts, update.is_error))

    def accept(
        self,
        result: ToolResult,
        kind: ResultClass | None = None,
        resolution: Resolution | None = None,
    ) -> None:
        """A call has its result."""
        call_id = result.tool_call_id
        call = history.call_of(self._live.run, call_id)
        record = self._begun.get(call_id)
        goes_on = self._begins_background(call, result)
        # First, so that no call is on record as done whose result a restart would not find.
        self._live.emit(ToolResultAccepted(result, goes_on))
        if goes_on:
            self._resources.change(self._live.id, call_id, Holding.BACKGROUND)
        else:
            self._begun.pop(call_id, None)
            self._resources.release(self._live.id, call_id)
            if record is not None and call is not None:
                ended = self._recorder.ended(record, call, result, kind, resolution)
                self._records.call(ended)
        waited = self._waited.pop(call_id, None)
        if waited is not None and not waited.done():
            waited.set_result(result)

    def never_began(self, call: ToolCall) -> None:
        """A call that was on record as about to be made was not made."""
        record = self._begun.pop(call.id, None)
        self._resources.release(self._live.id, call.id)
        if record is not None:
            never = ToolResult(call.id, (), cancelled=True)
            self._records.call(self._recorder.ended(record, call, never))

    def abandon(self, call: ToolCall) -> None:
        """Nobody waits any longer for the result of a call that only looks."""
        run = self._live.run
        if call in (*run.open_tool_calls, *run.daemon_tool_calls):
            parts = (TextPart("no result"),)
            self.accept(ToolResult(call.id, parts, is_error=True), ResultClass.TIMEOUT)

    def lose(self, call_id: str, *, acts: bool, kind: ResultClass | None = None) -> None:
        """Nobody knows what came of a call; `acts`: it may go on, with what it uses."""
        record = self._begun.pop(call_id, None)
        if record is not None:
            self._records.call(self._recorder.lost(record, kind))
        if acts:
            self._unknown.add(call_id)
            self._resources.change(self._live.id, call_id, Holding.UNKNOWN)
        else:
            self._resources.release(self._live.id, call_id)

    def has(self, tool: str) -> bool:
        """Whether a call of this tool is open, goes on, or waits for approval."""
        run = self._live.run
        calls = (
            *run.open_tool_calls,
            *run.daemon_tool_calls,
            *run.unapproved_tool_calls,
            *run.background_tool_calls,
        )
        return any(call.name == tool for call in calls)

    # --- stopping ---

    def cancel(self, error: RunError) -> None:
        """Tell the caller to stop what is open or goes on, once."""
        run = self._live.run
        if self._cancelling:
            return
        self._cancelling = True
        for call in (*run.open_tool_calls, *run.background_tool_calls):
            self.cancel_one(call, error)

    def cancel_one(self, call: ToolCall, error: RunError) -> "asyncio.Future[ToolResult]":
        """Tell the caller to stop one call, once; the future is done when that is confirmed."""
        if call.id not in self._waited:  # it goes on, or is of a run that was suspended
            self._waited[call.id] = asyncio.get_running_loop().create_future()
        if call.id not in self._told:
            self._told.add(call.id)
            self._live.emit(CancelTool(call.id, error))
        return self._waited[call.id]

    async def confirmed(self, timeout_s: float) -> tuple[str, ...]:
        """Wait a while for the open calls to confirm; returns those of which nobody knows."""
        waiting = list(self._waited.values())
        if waiting:
            await asyncio.wait(waiting, timeout=timeout_s)
        for call_id in tuple(self._waited):
            self.lose(call_id, acts=True)
        unknown, self._unknown = self._unknown, set()
        self._waited.clear()
        self._cancelling = False
        return tuple(sorted(unknown))

    def let_go(self) -> None:
        """Stop waiting; what is open stays so, for a later result."""
        self._waited.clear()

    # --- inside ---

    def _update(self, update: ToolUpdated, result: ToolResult) -> None:
        call_id = update.tool_call_id
        call, record = history.call_of(self._live.run, call_id), self._begun.get(call_id)
        self._live.emit(update)
        self.observed_s = time.monotonic()
        if update.done:
            self._begun.pop(call_id, None)
            self._resources.release(self._live.id, call_id)
            if record is not None and call is not None:
                self._records.call(self._recorder.ended(record, call, result))
            waited = self._waited.pop(call_id, None)
            if waited is not None and not waited.done():
                waited.set_result(result)
        self.news.notify()

    def _goes_on(self, call_id: str) -> bool:
        return any(call.id == call_id for call in self._live.run.background_tool_calls)

    def _begins_background(self, call: ToolCall | None, result: ToolResult) -> bool:
        if call is None or result.is_error or result.cancelled:
            return False
        tool = self._tools.get(call.name)
        return tool is not None and tool.lifecycle is Lifecycle.BACKGROUND

    def _held_after_restart(self, record: CallRecord) -> Holding:
        if record.effect is Effect.UNKNOWN:
            return Holding.UNKNOWN
        return Holding.BACKGROUND if self._goes_on(record.call_id) else Holding.INSTANT

    def _check_result(self, field: str, result: ToolResult, seen: set[str]) -> None:
        run, call_id = self._live.run, result.tool_call_id
        metadata = {"run_id": run.id, "tool_call_id": call_id}
        if call_id in seen:
            raise InvalidRequest.field(field, f"{call_id!r} twice in one request")
        seen.add(call_id)
        self._check_not_ended(call_id)
        if call_id in {call.id for call in run.open_tool_calls}:
            return
        if result.cancelled and self._goes_on(call_id):
            return
        self._check_made(field, call_id)
        if call_id in {call.id for call in history.unanswered(run)}:
            message = f"{field}: {call_id!r} is not the caller's to execute, or not yet"
            raise FailedPrecondition(message, reason="TOOL_CALL_NOT_YOURS", metadata=metadata)
        message = f"{field}: {call_id!r} has its result already"
        raise FailedPrecondition(message, reason="TOOL_CALL_CLOSED", metadata=metadata)

    def _check_not_ended(self, call_id: str) -> None:
        run = self._live.run
        if run.state.ended:
            metadata = {"run_id": run.id, "tool_call_id": call_id}
            message = f"run {run.id} has ended: {run.state}"
            raise FailedPrecondition(message, reason="RUN_ENDED", metadata=metadata)

    def _check_made(self, field: str, call_id: str) -> None:
        run = self._live.run
        if history.call_of(run, call_id) is None:
            message = f"{field}: run {run.id} made no call {call_id!r}"
            metadata = {"run_id": run.id, "tool_call_id": call_id}
            raise NotFound(message, reason="TOOL_CALL_NOT_FOUND", metadata=metadata)
