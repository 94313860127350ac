"""The agent loop of one run: steps, limits, suspension, and its end.

Decides nothing about memory or order: `Steps` (the scheduler) does; `calls` executes what a step
decides. Ends in exactly one `RunFinished`, whatever happens.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from edge_agent.core import (
    EngineInfo,
    Message,
    Role,
    RunError,
    RunState,
    RunTelemetry,
    StepOrigin,
    StepRequest,
    StepResult,
    TextPart,
    ToolCall,
    ToolResult,
)
from edge_agent.errors import EdgeAgentError, FailedPrecondition, OutcomeUnknown, StepFailed
from edge_agent.events import MessagesAdded, StateChanged, StepFinished, ToolUpdated
from edge_agent.records import CallRecord
from edge_agent.runs import history, limits
from edge_agent.runs.calls import DaemonTools, ToolCalls
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.holding import Resources
from edge_agent.runs.live import LiveRun
from edge_agent.runs.recording import SUMMARY, Machine, NoRecords, Records, StepRecorder
from edge_agent.runs.sessions import Sessions
from edge_agent.runs.settings import RunSettings
from edge_agent.runs.shortening import PastTurns

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


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every run of a daemon has around it. None: nobody does that."""

    steps: Steps
    latch: HaltLatch
    daemon_tools: DaemonTools | None = None
    records: Records = field(default_factory=NoRecords)
    machine: Machine | None = None
    resources: Resources = field(default_factory=Resources)
    sessions: Sessions = field(default_factory=Sessions)


class RunLoop:
    """Drives one run. All methods on the daemon's loop."""

    def __init__(
        self,
        live: LiveRun,
        around: Surroundings,
        settings: RunSettings,
        engine: EngineInfo | None,
        recording: Recording | None = None,
    ) -> None:
        """Ready to `start`. `engine` None: it is not there, which a step will say.

        `recording` None: nobody watches the machine.
        """
        self.live = live
        self._attempt = 1
        self._around = around
        self._recording = recording
        self._recorder = StepRecorder(live.id, live.spec, engine, around.machine, settings.bodies)
        self._calls = ToolCalls(
            live,
            around.latch,
            settings,
            around.daemon_tools,
            around.records,
            self._recorder,
            around.resources,
        )
        self._past = PastTurns(live, around.sessions, engine)
        self._settings = settings
        self._deadline_s: float | None = None
        self._ending: tuple[RunState, RunError] | None = None
        self._task: asyncio.Task[None] | None = None
        self._driving = False
        live.on_lost = self._not_written

    def take_over(self, attempt: int, calls: Iterable[CallRecord]) -> None:
        """Go on where an earlier daemon was: the attempt at its step, and calls that had begun."""
        self._attempt = attempt
        self._calls.take_over(calls)

    def start(self) -> "asyncio.Task[None]":
        """Begin, or go on; the task ends right after the run, or when it is suspended."""
        self._task = asyncio.create_task(self._drive(), name=f"run-{self.live.id}")
        return self._task

    def stop(self, state: RunState, error: RunError) -> None:
        """End the run with this state and error, or suspend it. At once; the first one counts.

        Open tool calls get CancelTool now, and a while to confirm. An end outweighs a suspension
        that waits for that.
        """
        if self.live.state.ended:
            return
        if self._ending is not None:
            if self._ending[0] is RunState.SUSPENDED and state.ended:
                self._ending = (state, error)
            return
        self._ending = (state, error)
        self._cancel_open_tools(error)
        if self._driving and self._task is not None:
            # A task that is cancelled before it runs would never end the run.
            self._task.cancel()

    def park(self, cause: RunError) -> None:
        """Suspend the run as it is: open calls stay open, for a result that comes later."""
        if self._ending is None and not self.live.state.ended:
            self._calls.let_go()
            self._ending = (RunState.SUSPENDED, cause)
            if self._driving and self._task is not None:
                self._task.cancel()

    def say(self, messages: tuple[Message, ...]) -> None:
        """What is to be said before a suspended run goes on."""
        if messages:
            self.live.emit(MessagesAdded(messages))
        self.live.move_to(RunState.QUEUED)
        self._calls.observed()

    def append(self, messages: tuple[Message, ...]) -> None:
        """What is said to a run that goes on: its next step reads it.

        Raises:
            FailedPrecondition: reason RUN_NOT_ACTIVE, it has ended, or is suspended or stopped.
        """
        state = self.live.state
        if state.ended or state in (RunState.SUSPENDED, RunState.CANCELLING):
            message = f"run {self.live.id} is {state}: it takes no more messages"
            metadata = {"run_id": self.live.id, "state": state}
            raise FailedPrecondition(message, reason="RUN_NOT_ACTIVE", metadata=metadata)
        self.live.emit(MessagesAdded(messages, pending=True))
        self._calls.observed()

    def settle_as(self, state: RunState, error: RunError) -> None:
        """Suspend or end at once a run that nothing drives."""
        if state is RunState.SUSPENDED:
            self._suspend(error)
        else:
            self._finish(state, error=error)

    def has_open_call(self, tool: str) -> bool:
        """Whether a call of this tool is open, goes on, or waits for its turn."""
        return self._calls.has_open(tool)

    def submit(self, results: Sequence[ToolResult]) -> None:
        """Take results of open tool calls; see `ToolCalls.submit`."""
        self._calls.submit(results)

    def update(self, update: ToolUpdated) -> None:
        """Take news of a background call; see `OpenCalls.update`."""
        self._calls.update(update)

    def decide(self, call_id: str, *, approved: bool, client: str, reason: str) -> None:
        """Approve or deny a call; see `ToolCalls.decide`."""
        self._calls.decide(call_id, approved=approved, client=client, reason=reason)

    # --- the loop ---

    async def _drive(self) -> None:
        stopped = self._ending
        if stopped is not None:  # before it began
            await self._end(*stopped)
            return
        self._driving = True
        try:
            async with asyncio.timeout(self.live.spec.timeout_s) as limit:
                self._deadline_s = limit.when()
                answer = await self._run_steps()
        except TimeoutError:
            await self._expire()
        except asyncio.CancelledError:
            if self._ending is None:
                raise
            await self._end(*self._ending)
        except EdgeAgentError as error:
            await self._fail(error)
        except Exception:  # an owner's loop: one run fails, the daemon goes on
            log.exception("run_crashed", run=self.live.id)
            message = "internal error; the log has the details"
            await self._end(RunState.FAILED, RunError("INTERNAL", message))
        else:
            self._finish(RunState.SUCCEEDED, answer=answer)
        finally:
            self._driving = False

    async def _fail(self, error: EdgeAgentError) -> None:
        if error.reason == "DEADLINE_PASSED":  # the scheduler's clock was first to notice
            await self._expire()
        elif isinstance(error, OutcomeUnknown):
            await self._end(RunState.OUTCOME_UNKNOWN, error.as_run_error())
        else:
            await self._end(RunState.FAILED, error.as_run_error())

    async def _run_steps(self) -> str:
        """Steps until an answer; the limits make the last one answer."""
        spec = self.live.spec
        left = history.unanswered(self.live.run)
        if left:  # of the step before it was suspended
            await self._calls.execute(self.live.run.steps, left)
        for step in range(self.live.run.steps + 1, spec.limits.max_steps + 1):
            if self.live.run.pending_messages:
                self.live.emit(MessagesAdded(()))
            if error := limits.exceeded(self.live.run, spec):
                raise StepFailed(error)
            calls_left = spec.limits.max_tool_calls - len(history.calls_of(self.live.run))
            answer_only = step == spec.limits.max_steps or calls_left <= 0
            result = await self._decide(step, answer_only=answer_only)
            calls = self._number(result.tool_calls)
            self._step_finished(step, result, calls)
            if calls:
                await self._calls.execute(step, calls)
            elif not await self._goes_on(last=step == spec.limits.max_steps):
                return result.text
        raise AssertionError("unreachable: the last step can only answer")

    async def _goes_on(self, *, last: bool) -> bool:
        """After an answer: whether there is something that the model has not read yet.

        The run waits for its background calls. `last`: no step may follow, so it only waits.
        """
        while last or not self.live.run.pending_messages:
            if not self.live.run.background_tool_calls:
                return False
            self.live.move_to(RunState.WAITING_TOOL)
            await self._calls.news()
        return True

    async def _decide(self, step: int, *, answer_only: bool) -> StepResult:
        """Decide a step; the history of the run's session makes room for it where it has to."""

        async def summarise(request: StepRequest) -> StepResult:
            return await self._ask(step, request, is_summary=True)

        await self._past.bound(step, self._settings.max_history_bytes, summarise)
        while True:
            try:
                return await self._ask(step, self._request(answer_only=answer_only))
            except StepFailed as failed:
                await self._past.make_room(step, failed, summarise)

    def _request(self, *, answer_only: bool) -> StepRequest:
        spec = self.live.spec
        return StepRequest(
            messages=(*self._past.messages, *spec.messages, *self.live.run.transcript),
            tools=spec.tools,
            output_schema_json=spec.output_schema_json,
            answer_only=answer_only,
            max_output_tokens=spec.limits.max_output_tokens,
            sampling=spec.sampling,
            tool_strategy=spec.tool_strategy,
        )

    async def _ask(
        self, step: int, request: StepRequest, *, is_summary: bool = False
    ) -> StepResult:
        """One attempt at a step, on record."""
        spec, run, records = self.live.spec, self.live.run, self._around.records
        if run.durable:
            records.step_started(run.id, step)
        record = self._recorder.begin(step, run.steps or None, self._attempt)
        if is_summary:
            record = dataclasses.replace(record, route=SUMMARY, tools_hash="", seed=None)
        self._attempt += 1

        def on_text(text: str, tokens: int) -> None:
            if not is_summary:
                self.live.add_text(step, text, tokens)

        try:
            result = await self._around.steps.decide(
                spec.engine,
                request,
                StepOrigin(run.client, spec.priority, self._deadline_s, run.id),
                on_text=on_text,
                on_state=self.live.move_to,
            )
        except asyncio.CancelledError:
            reason = self._ending[1].reason if self._ending else "CANCELLED"
            records.step(self._recorder.failed(record, reason, ""))
            raise
        except EdgeAgentError as error:
            records.step(self._recorder.failed(record, error.reason, error.message))
            raise
        message = _message(result, result.tool_calls)
        records.step(self._recorder.decided(record, result, message))
        # First, so that a step which the run can't follow counts as well.
        self.live.update(usage=self.live.run.usage.plus(result.usage))
        if not is_summary:
            self._attempt = 1
        return result

    def _number(self, decided: tuple[ToolCall, ...]) -> tuple[ToolCall, ...]:
        """Give the decided calls their ids and how long they hold."""
        if error := limits.too_many_calls(self.live.run, self.live.spec, decided):
            raise StepFailed(error)
        made = len(history.calls_of(self.live.run))
        age_s = time.monotonic() - self._calls.observed_s
        return tuple(
            dataclasses.replace(
                call,
                id=f"call-{number}",
                valid_for_s=self._calls.tool(call.name).valid_for_s
                or self._settings.tool_call_valid_for_s,
                observed_ago_s=age_s,
            )
            for number, call in enumerate(decided, made + 1)
        )

    def _step_finished(self, step: int, result: StepResult, calls: tuple[ToolCall, ...]) -> None:
        run, usage = self.live.run, result.usage
        self.live.emit(
            StepFinished(
                step,
                _message(result, calls),
                usage,
                result.finish_reason,
                result.tool_margin,
                result.repaired,
            )
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

    # --- the end ---

    def _not_written(self, error: Exception) -> None:
        """The ledger has failed this run: it ends, and what is on disk is an earlier state."""
        message = f"the ledger could not keep what this run did: {error}"
        reason = error.reason if isinstance(error, EdgeAgentError) else "LEDGER_FAILED"
        self.stop(RunState.FAILED, RunError(reason, message, retryable=True))

    def _cancel_open_tools(self, error: RunError) -> None:
        run = self.live.run
        begun = run.open_tool_calls or run.background_tool_calls
        if begun and run.state is not RunState.CANCELLING:
            self.live.emit(StateChanged(RunState.CANCELLING, cause=error))
            self._calls.cancel(error)

    async def _expire(self) -> None:
        timeout_s = self.live.spec.timeout_s
        message = f"the run did not end within its timeout of {timeout_s:g} s"
        metadata = {"timeout_s": f"{timeout_s:g}", "state": self.live.state.value}
        await self._end(RunState.EXPIRED, RunError("RUN_TIMEOUT", message, True, metadata))

    async def _end(self, state: RunState, error: RunError) -> None:
        """End otherwise than by an answer, after open calls have confirmed or have not."""
        if self._ending is None:
            self._ending = (state, error)
        parked = (
            self._ending[0] is RunState.SUSPENDED and self.live.state is not RunState.CANCELLING
        )
        if not parked:
            self._cancel_open_tools(error)
        unknown = await self._calls.confirmed()
        state, error = self._ending
        if unknown:
            names = ", ".join(unknown)
            message = f"{error.message}; nobody confirmed what came of {names}"
            metadata = {**error.metadata, "cause": error.reason, "tool_call_ids": names}
            state, error = (
                RunState.OUTCOME_UNKNOWN,
                RunError("OUTCOME_UNKNOWN", message, False, metadata),
            )
        if state is RunState.SUSPENDED:
            self._suspend(error)
        else:
            self._finish(state, error=error)

    def _suspend(self, cause: RunError) -> None:
        self._ending = None
        self.live.update(daemon_tool_calls=(), unapproved_tool_calls=())
        self.live.emit(StateChanged(RunState.SUSPENDED, cause=cause))
        log.info("run_suspended", run=self.live.id, reason=cause.reason)

    def _finish(
        self, state: RunState, *, answer: str | None = None, error: RunError | None = None
    ) -> None:
        self.live.finish(
            state=state,
            answer=answer,
            error=error,
            open_tool_calls=(),
            daemon_tool_calls=(),
            unapproved_tool_calls=(),
            background_tool_calls=(),
            pending_messages=(),
            ended_at_s=time.time(),
            telemetry=self._recording.end() if self._recording else None,
        )
        run = self.live.run
        self._around.sessions.ended(run)
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


def _message(result: StepResult, calls: tuple[ToolCall, ...]) -> Message:
    return Message(Role.ASSISTANT, () if calls else (TextPart(result.text),), calls)
