"""The agent loop of one run: steps, tool calls, limits, and its end.

Decides nothing about memory or order: `Steps` (the scheduler) does. Ends in exactly one
`RunFinished`, whatever happens.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import structlog

from edge_agent.core import (
    CancelTool,
    Message,
    Role,
    RunError,
    RunState,
    RunTelemetry,
    StepFinished,
    StepOrigin,
    StepRequest,
    StepResult,
    TextPart,
    ToolCall,
    ToolCallsIssued,
    ToolResult,
    ToolResultAccepted,
)
from edge_agent.errors import (
    DeadlineExceeded,
    EdgeAgentError,
    FailedPrecondition,
    Halted,
    InvalidRequest,
    NotFound,
    StepFailed,
)
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.live import LiveRun
from edge_agent.runs.settings import RunSettings

log = structlog.get_logger()


class Steps(Protocol):
    """Who decides steps."""

    async def decide(
        self,
        engine: str,
        request: StepRequest,
        origin: StepOrigin,
        *,
        on_text: Callable[[str, int], None],
        on_state: Callable[[RunState, float | None], None],
    ) -> StepResult:
        """Decide one step; see `scheduling.scheduler.Scheduler.decide`.

        Nothing is told any more once this has returned, raised or been cancelled.
        """
        ...


class Recording(Protocol):
    """What the machine goes through from its making to its end."""

    def end(self) -> RunTelemetry:
        """All of it, up to now. Called once."""
        ...


class RunLoop:
    """Drives one run. All methods on the daemon's loop."""

    def __init__(
        self,
        live: LiveRun,
        steps: Steps,
        latch: HaltLatch,
        settings: RunSettings,
        recording: Recording | None = None,
    ) -> None:
        """Ready to `start`. `recording` None: nobody watches the machine."""
        self.live = live
        self._steps = steps
        self._latch = latch
        self._settings = settings
        self._recording = recording
        self._tools = {tool.name: tool for tool in live.spec.tools}
        self._open: dict[str, asyncio.Future[ToolResult]] = {}
        self._calls_issued = 0
        self._observed_s = time.monotonic()
        self._deadline_s: float | None = None
        self._ending: tuple[RunState, RunError] | None = None
        self._task: asyncio.Task[None] | None = None
        self._driving = False

    def start(self) -> "asyncio.Task[None]":
        """Begin; the task ends right after the run."""
        self._task = asyncio.create_task(self._drive(), name=f"run-{self.live.id}")
        return self._task

    def stop(self, state: RunState, error: RunError) -> None:
        """End the run with this state and error. Takes effect at once; the first one counts.

        Open tool calls get CancelTool now, and a while to confirm.
        """
        if self._ending is not None or self.live.state.ended or self._task is None:
            return
        self._ending = (state, error)
        self._cancel_open_tools(error)
        if self._driving:  # a task that is cancelled before it runs would never end the run
            self._task.cancel()

    def has_open_call(self, tool: str) -> bool:
        """Whether a call of this tool waits for its result."""
        return any(call.name == tool for call in self.live.run.open_tool_calls)

    def submit(self, results: Sequence[ToolResult]) -> None:
        """Take results of open tool calls: all of them, or none.

        Raises:
            NotFound: reason TOOL_CALL_NOT_FOUND, the run never made such a call.
            FailedPrecondition: reason TOOL_CALL_CLOSED or RUN_ENDED.
            InvalidRequest: the same call twice.
        """
        seen: set[str] = set()
        for index, result in enumerate(results):
            self._check_result(f"results[{index}].tool_call_id", result.tool_call_id, seen)
        for result in results:
            self._observed_s = time.monotonic()
            self._open.pop(result.tool_call_id).set_result(result)
            still_open = tuple(
                call for call in self.live.run.open_tool_calls if call.id != result.tool_call_id
            )
            self.live.emit(ToolResultAccepted(result), open_tool_calls=still_open)

    def _check_result(self, field: str, call_id: str, seen: set[str]) -> None:
        metadata = {"run_id": self.live.id, "tool_call_id": call_id}
        if call_id in seen:
            raise InvalidRequest.field(field, f"{call_id!r} twice in one request")
        seen.add(call_id)
        if self.live.state.ended:
            message = f"run {self.live.id} has ended: {self.live.state}"
            raise FailedPrecondition(message, reason="RUN_ENDED", metadata=metadata)
        if call_id in self._open:
            return
        if call_id in {f"call-{n}" for n in range(1, self._calls_issued + 1)}:
            message = f"{field}: {call_id!r} has its result already"
            raise FailedPrecondition(message, reason="TOOL_CALL_CLOSED", metadata=metadata)
        message = f"{field}: run {self.live.id} made no call {call_id!r}"
        raise NotFound(message, reason="TOOL_CALL_NOT_FOUND", metadata=metadata)

    # --- the loop ---

    async def _drive(self) -> None:
        spec = self.live.spec
        stopped = self._ending
        if stopped is not None:  # before it began
            await self._end(*stopped)
            return
        self._driving = True
        try:
            async with asyncio.timeout(spec.timeout_s) as limit:
                self._deadline_s = limit.when()
                answer = await self._run_steps()
        except TimeoutError:
            await self._expire()
        except asyncio.CancelledError:
            if self._ending is None:
                raise
            await self._end(*self._ending)
        except EdgeAgentError as error:
            if error.reason == "DEADLINE_PASSED":  # the scheduler's clock was first to notice
                await self._expire()
            else:
                await self._end(RunState.FAILED, error.as_run_error())
        except Exception:  # an owner's loop: one run fails, the daemon goes on
            log.exception("run_crashed", run=self.live.id)
            message = "internal error; the log has the details"
            await self._end(RunState.FAILED, RunError("INTERNAL", message))
        else:
            self._finish(RunState.SUCCEEDED, answer=answer)

    async def _run_steps(self) -> str:
        """Steps until an answer; the limits make the last one answer."""
        limits = self.live.spec.limits
        for step in range(1, limits.max_steps + 1):
            calls_left = limits.max_tool_calls - self._calls_issued
            answer_only = step == limits.max_steps or calls_left <= 0
            result = await self._decide(step, answer_only=answer_only)
            # First, so that a step which the run can't follow counts as well.
            self.live.update(usage=self.live.run.usage.plus(result.usage))
            calls = self._number(result.tool_calls, calls_left)
            self._step_finished(step, result, calls)
            if not calls:
                return result.text
            await self._execute(step, calls)
        raise AssertionError("unreachable: the last step can only answer")

    async def _decide(self, step: int, *, answer_only: bool) -> StepResult:
        spec = self.live.spec
        request = StepRequest(
            messages=(*spec.messages, *self.live.run.transcript),
            tools=spec.tools,
            output_schema_json=spec.output_schema_json,
            answer_only=answer_only,
            max_output_tokens=spec.limits.max_output_tokens,
            sampling=spec.sampling,
        )
        return await self._steps.decide(
            spec.engine,
            request,
            StepOrigin(self.live.run.client, spec.priority, self._deadline_s, self.live.id),
            on_text=lambda text, tokens: self.live.add_text(step, text, tokens),
            on_state=self.live.move_to,
        )

    def _number(self, calls: Iterable[ToolCall], calls_left: int) -> tuple[ToolCall, ...]:
        """Give the decided calls their ids and how long they hold."""
        numbered = []
        for call in calls:
            tool = self._tools[call.name]
            self._calls_issued += 1
            valid_for_s = tool.valid_for_s or self._settings.tool_call_valid_for_s
            age_s = time.monotonic() - self._observed_s
            numbered.append(
                dataclasses.replace(
                    call,
                    id=f"call-{self._calls_issued}",
                    valid_for_s=valid_for_s,
                    observed_ago_s=age_s,
                )
            )
        if len(numbered) > max(0, calls_left):
            message = f"{len(numbered)} tool calls in one step, {calls_left} left in this run"
            raise StepFailed(RunError("TOOL_CALL_LIMIT", message))
        return tuple(numbered)

    def _step_finished(self, step: int, result: StepResult, calls: tuple[ToolCall, ...]) -> None:
        parts = () if calls else (TextPart(result.text),)
        message = Message(Role.ASSISTANT, parts, calls)
        run, usage = self.live.run, result.usage
        self.live.emit(
            StepFinished(step, message, usage, result.finish_reason, result.tool_margin),
            steps=step,
            transcript=(*run.transcript, message),
        )
        log.info(
            "step_finished",
            run=run.id,
            step=step,
            engine=run.engine,
            route="LOCAL",
            finish=result.finish_reason.value,
            tools=[call.name for call in calls],
            queue_ms=round(usage.queue_s * 1000, 1),
            load_ms=round(usage.load_s * 1000, 1),
            ttft_ms=usage.ttft_ms and round(usage.ttft_ms, 1),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
        )

    # --- tools ---

    async def _execute(self, step: int, calls: tuple[ToolCall, ...]) -> None:
        """Hand the calls to the caller and wait for every result."""
        for call in calls:
            halt = self._latch.covering_tool(call.name)
            if halt is not None:
                raise Halted(
                    f"tool {call.name!r} is halted: {halt.reason or halt.scope}",
                    metadata={"halt_id": halt.id, "scope": halt.scope, "tool": call.name},
                )
        futures = {call.id: asyncio.get_running_loop().create_future() for call in calls}
        self._open.update(futures)
        issued_s = time.monotonic()
        self.live.emit(
            ToolCallsIssued(step, calls), state=RunState.WAITING_TOOL, open_tool_calls=calls
        )
        # Shortest first: no wait outlasts the time of a call that is looked at after it.
        due = sorted(calls, key=self._timeout_s)
        results = {call.id: await self._result(call, futures[call.id], issued_s) for call in due}
        transcript = self.live.run.transcript + tuple(
            Message(Role.TOOL, result.parts, (), result.tool_call_id, result.is_error)
            for result in (results[call.id] for call in calls)
        )
        self.live.update(transcript=transcript)

    async def _result(
        self, call: ToolCall, future: "asyncio.Future[ToolResult]", issued_s: float
    ) -> ToolResult:
        timeout_s = self._timeout_s(call)
        try:
            async with asyncio.timeout(issued_s + timeout_s - time.monotonic()):
                return await asyncio.shield(future)
        except TimeoutError:
            raise DeadlineExceeded(
                f"tool {call.name!r} gave no result within {timeout_s:g} s",
                reason="TOOL_TIMEOUT",
                metadata={"tool": call.name, "tool_call_id": call.id, "timeout_s": timeout_s},
            ) from None

    def _timeout_s(self, call: ToolCall) -> float:
        return self._tools[call.name].timeout_s or self._settings.tool_timeout_s

    def _cancel_open_tools(self, error: RunError) -> None:
        if self._open and self.live.state is not RunState.CANCELLING:
            self.live.move_to(RunState.CANCELLING)
            for call_id in self._open:
                self.live.emit(CancelTool(call_id, error))

    # --- the end ---

    async def _expire(self) -> None:
        timeout_s = self.live.spec.timeout_s
        message = f"the run did not end within its timeout of {timeout_s:g} s"
        metadata = {"timeout_s": f"{timeout_s:g}", "state": self.live.state.value}
        await self._end(RunState.EXPIRED, RunError("RUN_TIMEOUT", message, True, metadata))

    async def _end(self, state: RunState, error: RunError) -> None:
        """End otherwise than by an answer, after open calls have confirmed or have not."""
        if self._ending is None:
            self._ending = (state, error)
        self._cancel_open_tools(error)
        if self._open:
            waiting = list(self._open.values())
            await asyncio.wait(waiting, timeout=self._settings.cancel_confirm_s)
        unconfirmed = sorted(self._open)
        if not unconfirmed:
            self._finish(state, error=error)
            return
        names = ", ".join(unconfirmed)
        message = f"{error.message}; nobody confirmed what came of {names}"
        metadata = {**error.metadata, "cause": error.reason, "tool_call_ids": names}
        unknown = RunError("OUTCOME_UNKNOWN", message, metadata=metadata)
        self._finish(RunState.OUTCOME_UNKNOWN, error=unknown)

    def _finish(
        self, state: RunState, *, answer: str | None = None, error: RunError | None = None
    ) -> None:
        self._open.clear()
        self.live.finish(
            state=state,
            answer=answer,
            error=error,
            open_tool_calls=(),
            ended_at_s=time.time(),
            telemetry=self._recording.end() if self._recording else None,
        )
        run = self.live.run
        log.info(
            "run_finished",
            run=run.id,
            client=run.client,
            agent=run.agent,
            engine=run.engine,
            state=state.value,
            reason=error.reason if error else None,
            steps=run.steps,
            duration_ms=round((time.time() - run.created_at_s) * 1000),
            completion_tokens=run.usage.completion_tokens,
        )
