"""The tool calls that a step decides on: which are made, when, and what the model is told of them.

Enforces that only tools of the run are called, in the order that their side effects allow, with the
resources that they use, while they are still worth making, and never while a Halt covers them.
`open_calls` keeps those that have begun. Decides nothing about steps.
"""

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from edge_agent.core import (
    Executor,
    RunError,
    SideEffect,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
)
from edge_agent.errors import (
    DeadlineExceeded,
    EdgeAgentError,
    FailedPrecondition,
    Halted,
    NotFound,
    OutcomeUnknown,
    Overloaded,
    ResourceHeld,
    StepFailed,
    ToolNotReady,
)
from edge_agent.events import DaemonToolStarted, ToolResultAccepted, ToolUpdated
from edge_agent.records import CallRecord, Resolution, ResultClass
from edge_agent.runs import verification
from edge_agent.runs.approvals import Approvals
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.holding import Resources
from edge_agent.runs.live import LiveRun
from edge_agent.runs.open_calls import OpenCalls
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
    """Those of one run. All methods on the daemon's loop."""

    def __init__(
        self,
        live: LiveRun,
        latch: HaltLatch,
        settings: RunSettings,
        daemon_tools: DaemonTools | None,
        records: Records,
        recorder: StepRecorder,
        resources: Resources,
    ) -> None:
        """Nothing is called yet."""
        self._live = live
        self._latch = latch
        self._settings = settings
        self._daemon_tools = daemon_tools
        self._records = records
        self._recorder = recorder
        self._resources = resources
        self._tools = {tool.name: tool for tool in live.spec.tools}
        self._open = OpenCalls(live, self._tools, records, recorder, resources)
        self._approvals = Approvals(live, self._deny)
        self._decided_s = time.monotonic()
        self._asking: set[str] = set()

    # --- what callers say; see `OpenCalls` and `Approvals` ---

    def submit(self, results: Sequence[ToolResult]) -> None:
        """Take results of open calls."""
        self._open.submit(results)

    def update(self, update: ToolUpdated) -> None:
        """Take news of a call that goes on in the background."""
        self._open.update(update)

    def decide(self, call_id: str, *, approved: bool, client: str, reason: str) -> None:
        """Approve or deny a call that waits for it."""
        self._approvals.decide(call_id, approved=approved, client=client, reason=reason)

    def take_over(self, records: Iterable[CallRecord]) -> None:
        """Those that an earlier daemon has begun, and whose results are still to come."""
        self._open.take_over(records)

    def has_open(self, tool: str) -> bool:
        """Whether a call of this tool is open, goes on, or waits for approval or resources."""
        return tool in self._asking or self._open.has(tool)

    @property
    def observed_s(self) -> float:
        """When the run last saw something of the world."""
        return self._open.observed_s

    def observed(self) -> None:
        """The run has seen something of the world just now."""
        self._open.observed_s = time.monotonic()
        self._open.news.notify()

    async def news(self) -> None:
        """Wait until somebody has told the run something, or a background call is done."""
        await self._open.news.next()

    # --- executing ---

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
        self._decided_s = time.monotonic()
        asked = tuple(call for call in calls if self.tool(call.name).needs_approval)
        if asked:
            approved = await self._approvals.ask(step, asked)
            calls = tuple(call for call in calls if call not in asked or call.id in approved)
            self._decided_s = time.monotonic()  # somebody has just found them right
        for batch in self._batches(calls):
            self._check_halts(batch)
            await self._execute(step, batch)

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
        calls = tuple(call for call in calls if not self._too_late(step, call))
        plain = [call for call in calls if self._is_plain(call)]
        issued = self._open.issue(step, map(self._as_of_now, plain)) if plain else []
        since_s = time.monotonic()
        others = [
            asyncio.create_task(self._execute_one(step, call), name=f"tool-{call.id}")
            for call in calls
            if call not in plain
        ]
        try:
            # Shortest first: no wait outlasts the time of a call that is looked at after it.
            waits = sorted(
                zip(plain, issued, strict=True), key=lambda wait: self._timeout_s(wait[0])
            )
            for call, result in waits:
                await self._result(step, call, result, since_s)
            for task in others:
                await task
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    def _is_plain(self, call: ToolCall) -> bool:
        tool = self.tool(call.name)
        return tool.executor is Executor.CALLER and not tool.resources

    async def _execute_one(self, step: int, call: ToolCall) -> None:
        """Make one call, once it has what it uses."""
        tool = self.tool(call.name)
        if tool.resources:
            held = await self._acquire(step, call, tool)
            if held is None:
                return
            call = held
            try:
                self._check_halts((call,))
            except Halted:
                self._resources.release(self._live.id, call.id)
                raise
        if tool.executor is Executor.DAEMON:
            await self._execute_own(step, call)
            return
        (result,) = self._open.issue(step, (self._as_of_now(call),))
        await self._result(step, call, result, time.monotonic())

    async def _acquire(self, step: int, call: ToolCall, tool: Tool) -> ToolCall | None:
        """The call with its fence; None: it is not made, and the model is told why."""
        left_s = self._decided_s + self._valid_for_s(call) - time.monotonic()
        self._asking.add(call.name)
        try:
            async with asyncio.timeout(left_s):
                fence = await self._resources.acquire(self._open.holder(call), tool.resources)
        except TimeoutError:
            self._expired(step, call)
            return None
        except ResourceHeld as error:
            self._refuse(step, call, error.as_run_error())
            return None
        finally:
            self._asking.discard(call.name)
        return dataclasses.replace(call, fence=fence)

    async def _result(
        self, step: int, call: ToolCall, result: "asyncio.Future[ToolResult]", since_s: float
    ) -> None:
        timeout_s = self._timeout_s(call)
        try:
            async with asyncio.timeout(since_s + timeout_s - time.monotonic()):
                await asyncio.shield(result)
        except TimeoutError:
            late = DeadlineExceeded(
                f"tool {call.name!r} gave no result within {timeout_s:g} s",
                reason="TOOL_TIMEOUT",
                metadata={"tool": call.name, "tool_call_id": call.id, "timeout_s": timeout_s},
            )
            if not await self._was_resolved(step, call, late):
                raise late from None

    async def _execute_own(self, step: int, call: ToolCall) -> None:
        """Execute a call of the daemon's own. That it may act is on record before it does."""
        once = self.tool(call.name).side_effect is SideEffect.NON_IDEMPOTENT
        record = self._open.begin(step, call)
        if once:
            await self._intend(record, call)
        else:
            self._records.call(record)
        self._live.emit(DaemonToolStarted(step, call))
        try:
            result = await self._call_own(call)
        except asyncio.CancelledError:
            self._open.lose(call.id, acts=once)
            raise
        except EdgeAgentError as error:
            await self._own_failed(step, call, error, once=once)
            return
        self._open.observed_s = time.monotonic()
        self._open.accept(result)

    async def _own_failed(
        self, step: int, call: ToolCall, error: EdgeAgentError, *, once: bool
    ) -> None:
        late = ResultClass.TIMEOUT if isinstance(error, DeadlineExceeded) else None
        if not once or isinstance(error, _NEVER_BEGAN):
            result = ToolResult(call.id, (TextPart(error.message),), is_error=True)
            self._open.accept(result, late)
            return
        if await self._was_resolved(step, call, error):
            return
        self._open.lose(call.id, acts=True, kind=late)
        message = f"tool {call.name!r} gave no result: {error.message}"
        metadata = {**error.metadata, "tool": call.name, "tool_call_ids": call.id}
        raise OutcomeUnknown(message, metadata=metadata) from error

    async def _intend(self, record: CallRecord, call: ToolCall) -> None:
        """Have it on disk that the call is about to be made; one that then is not, is known not."""
        try:
            await self._records.intend(record)
        except BaseException:
            self._open.never_began(call)
            raise

    async def _call_own(self, call: ToolCall) -> ToolResult:
        if self._daemon_tools is None:
            raise FailedPrecondition(f"tool {call.name!r}: this daemon has no tools of its own")
        return await self._daemon_tools.call(call, timeout_s=self._timeout_s(call))

    # --- calls of which nobody knows what came of them ---

    async def _was_resolved(self, step: int, call: ToolCall, error: EdgeAgentError) -> bool:
        """Find out by the tool's `verify` tool what came of a call without a result.

        False: there is none, or it does not know.
        """
        verifier = self._tools.get(self.tool(call.name).verify)
        if verifier is None:
            return False
        if self.tool(call.name).executor is Executor.CALLER:
            stopped = self._open.cancel_one(call, error.as_run_error())
            await asyncio.wait([stopped], timeout=self._settings.cancel_confirm_s)
            if stopped.done():
                return True
        check = verification.call_of(call, verifier)
        found = await self._asked(step, check)
        acted = None if found is None else verification.acted(found)
        if found is None or acted is None:
            return False
        resolution = Resolution("", verification.evidence(found), time.time())
        result = verification.result(call, error.message, acted=acted)
        self._open.accept(result, ResultClass.TIMEOUT, resolution)
        return True

    async def _asked(self, step: int, call: ToolCall) -> ToolResult | None:
        """The result of a call that only looks; None: there was none."""
        try:
            if self.tool(call.name).executor is Executor.DAEMON:
                self._records.call(self._open.begin(step, call))
                self._live.emit(DaemonToolStarted(step, call))
                result = await self._call_own(call)
                self._open.accept(result)
                return result
            (future,) = self._open.issue(step, (call,))
            async with asyncio.timeout(self._timeout_s(call)):
                return await asyncio.shield(future)
        except (EdgeAgentError, TimeoutError):
            self._open.abandon(call)
            return None

    # --- calls that are not made ---

    def _deny(self, step: int, call: ToolCall, result: ToolResult) -> None:
        record = self._recorder.intended(step, call)
        self._records.call(self._recorder.ended(record, call, result, ResultClass.DENIED))
        self._live.emit(ToolResultAccepted(result))

    def _refuse(self, step: int, call: ToolCall, error: RunError) -> None:
        parts = (TextPart(error.message),)
        self._deny(step, call, ToolResult(call.id, parts, is_error=True, error=error))

    def _too_late(self, step: int, call: ToolCall) -> bool:
        """Whether the call was decided on too long ago; the model is told."""
        if time.monotonic() - self._decided_s <= self._valid_for_s(call):
            return False
        self._expired(step, call)
        return True

    def _expired(self, step: int, call: ToolCall) -> None:
        valid_for_s = self._valid_for_s(call)
        message = f"tool {call.name!r} was not called: it could not begin within {valid_for_s:g} s"
        metadata = {"tool": call.name, "valid_for_s": f"{valid_for_s:g}"}
        holders = self._resources.holders()
        for resource in self.tool(call.name).resources:
            if (holder := holders.get(resource)) is not None and holder.run_id != self._live.id:
                message += f"; {resource} was held by {holder.tool} of run {holder.run_id}"
                metadata |= {"resource": resource, "holder_run_id": holder.run_id}
                break
        self._refuse(step, call, RunError("CALL_EXPIRED", message, True, metadata))

    def _as_of_now(self, call: ToolCall) -> ToolCall:
        """The call with the age that its observation has when it is issued."""
        if call.observed_ago_s is None:
            return call
        observed_ago_s = call.observed_ago_s + time.monotonic() - self._decided_s
        return dataclasses.replace(call, observed_ago_s=observed_ago_s)

    def _valid_for_s(self, call: ToolCall) -> float:
        return call.valid_for_s or self._settings.tool_call_valid_for_s

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

    # --- stopping; see `OpenCalls` ---

    def cancel(self, error: RunError) -> None:
        """Tell the caller to stop what is open or goes on, once."""
        self._open.cancel(error)

    async def confirmed(self) -> tuple[str, ...]:
        """Wait a while for that; returns the calls of which nobody knows."""
        return await self._open.confirmed(self._settings.cancel_confirm_s)

    def let_go(self) -> None:
        """Stop waiting; what is open stays so, for a later result."""
        self._open.let_go()
