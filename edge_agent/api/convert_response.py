"""From core values to messages.

Owns how runs, events, Halts and the daemon's status look on the wire; `convert_engine` owns the
engines. Checks nothing: core values are right already.
"""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from edge_agent import core, events
from edge_agent.api.convert_telemetry import fill_run_telemetry
from edge_agent.api.spans import filled
from edge_agent.status import DaemonState, DaemonStatus, MemoryStatus
from edge_agent.v1 import run_service_pb2, system_service_pb2, types_pb2

_ROLES = {
    core.Role.SYSTEM: types_pb2.ROLE_SYSTEM,
    core.Role.USER: types_pb2.ROLE_USER,
    core.Role.ASSISTANT: types_pb2.ROLE_ASSISTANT,
    core.Role.TOOL: types_pb2.ROLE_TOOL,
}
_STATES = {state: run_service_pb2.RunState.Value(f"RUN_STATE_{state}") for state in core.RunState}
_SCOPES = {
    scope: run_service_pb2.HaltScope.Value(f"HALT_SCOPE_{scope}") for scope in core.HaltScope
}
PRIORITIES = {
    priority: run_service_pb2.Priority.Value(f"PRIORITY_{priority}") for priority in core.Priority
}
SIDE_EFFECTS = {
    effect: types_pb2.SideEffect.Value(f"SIDE_EFFECT_{effect}") for effect in core.SideEffect
}
EXECUTORS = {
    executor: types_pb2.Executor.Value(f"EXECUTOR_{executor}") for executor in core.Executor
}
LIFECYCLES = {
    lifecycle: types_pb2.Lifecycle.Value(f"LIFECYCLE_{lifecycle}") for lifecycle in core.Lifecycle
}
OVERFLOWS = {
    overflow: run_service_pb2.SessionOverflow.Value(f"SESSION_OVERFLOW_{overflow}")
    for overflow in core.Overflow
}
TOOL_STRATEGIES = {
    strategy: types_pb2.ToolStrategy.Value(f"TOOL_STRATEGY_{strategy.name}")
    for strategy in core.ToolStrategy
}
_DAEMON_STATES = {
    state: system_service_pb2.DaemonState.Value(f"DAEMON_STATE_{state}") for state in DaemonState
}


def duration(seconds: float | None) -> Duration | None:
    """A span; None stays unset."""
    return None if seconds is None else filled(Duration(), seconds)


def timestamp(unix_s: float | None) -> Timestamp | None:
    """A point in time; None stays unset."""
    return None if unix_s is None else filled(Timestamp(), unix_s)


def parts(values: Iterable[core.Part]) -> list[types_pb2.Part]:
    """The pieces of a content."""
    return [_fill_part(types_pb2.Part(), value) for value in values]


def tool_call(call: core.ToolCall) -> types_pb2.ToolCall:
    """One invocation."""
    return types_pb2.ToolCall(
        id=call.id,
        name=call.name,
        arguments_json=call.arguments_json,
        valid_for=duration(call.valid_for_s),
        observed_ago=duration(call.observed_ago_s),
        fence=None
        if call.fence is None
        else types_pb2.Fence(epoch=call.fence.epoch, sequence=call.fence.sequence),
    )


def tool_result(result: core.ToolResult) -> types_pb2.ToolResult:
    """What came of an invocation."""
    return types_pb2.ToolResult(
        tool_call_id=result.tool_call_id,
        parts=parts(result.parts),
        is_error=result.is_error,
        cancelled=result.cancelled,
        error=run_error(result.error),
    )


def message(turn: core.Message) -> types_pb2.Message:
    """One turn of the conversation."""
    return _fill_message(types_pb2.Message(), turn)


def run_error(error: core.RunError | None) -> types_pb2.RunError | None:
    """Why something ended; None stays unset."""
    return None if error is None else _fill_error(types_pb2.RunError(), error)


def usage(used: core.Usage) -> types_pb2.Usage:
    """What was consumed."""
    return _fill_usage(types_pb2.Usage(), used)


def run(value: core.Run, *, with_transcript: bool = True) -> run_service_pb2.Run:
    """A run as it stands."""
    target = run_service_pb2.Run()
    fill_run(target, value, with_transcript=with_transcript)
    return target


def fill_run(target: run_service_pb2.Run, value: core.Run, *, with_transcript: bool = True) -> None:
    """Write a run into the empty `target`: in place, since every copy of it costs."""
    target.id = value.id
    target.request_id = value.request_id
    target.client = value.client
    target.agent = value.agent
    target.engine = value.engine
    target.state = _STATES[value.state]
    filled(target.created_at, value.created_at_s)
    if value.ended_at_s is not None:
        filled(target.ended_at, value.ended_at_s)
    target.steps = value.steps
    if with_transcript:
        for turn in value.transcript:
            _fill_message(target.transcript.add(), turn)
    _fill_open_calls(target, value)
    for turn in value.pending_messages:
        _fill_message(target.pending_messages.add(), turn)
    target.partial_text = value.partial_text
    if value.answer is not None:
        target.answer = value.answer
    if value.error is not None:
        _fill_error(target.error, value.error)
    _fill_usage(target.usage, value.usage)
    target.sequence = value.sequence
    if value.telemetry is not None:
        fill_run_telemetry(target.telemetry, value.telemetry)
    target.priority = PRIORITIES[value.priority]
    target.durable = value.durable
    target.session = value.session


def fill_event(  # noqa: C901, PLR0912 - one a kind
    target: run_service_pb2.RunEvent, event: events.Event
) -> None:
    """Write an event into `target`: in place, since this runs for every token."""
    target.run_id = event.run_id
    target.sequence = event.sequence
    match event.body:
        case events.TextDelta(step=step, text=text, tokens=tokens):
            delta = target.text_delta
            delta.step, delta.text, delta.tokens = step, text, tokens
        case events.StateChanged(state=state, load_progress=progress, cause=cause):
            target.state_changed.state = _STATES[state]
            if progress is not None:
                target.state_changed.load_progress = progress
            if cause is not None:
                _fill_error(target.state_changed.cause, cause)
        case events.ToolCallsIssued(step=step, tool_calls=calls):
            target.tool_calls_issued.step = step
            target.tool_calls_issued.tool_calls.extend(tool_call(call) for call in calls)
        case events.ApprovalRequested(step=step, tool_calls=calls):
            target.approval_requested.step = step
            target.approval_requested.tool_calls.extend(tool_call(call) for call in calls)
        case events.ApprovalDecided() as decided:
            target.approval_decided.CopyFrom(_approval_decided(decided))
        case events.DaemonToolStarted(step=step, tool_call=call):
            target.daemon_tool_started.step = step
            target.daemon_tool_started.tool_call.CopyFrom(tool_call(call))
        case events.MessagesAdded(messages=messages, pending=pending):
            target.messages_added.pending = pending
            for turn in messages:
                _fill_message(target.messages_added.messages.add(), turn)
        case events.ToolUpdated() as update:
            target.tool_updated.tool_call_id = update.tool_call_id
            target.tool_updated.parts.extend(parts(update.parts))
            target.tool_updated.is_error, target.tool_updated.done = update.is_error, update.done
        case events.ToolResultAccepted(result=result, goes_on=goes_on):
            target.tool_result_accepted.goes_on = goes_on
            target.tool_result_accepted.result.CopyFrom(tool_result(result))
        case events.StepFinished() as finished:
            target.step_finished.CopyFrom(_step_finished(finished))
        case events.CancelTool(tool_call_id=call_id, reason=reason):
            target.cancel_tool.tool_call_id = call_id
            _fill_error(target.cancel_tool.reason, reason)
        case events.HistoryShortened() as shortened:
            target.history_shortened.CopyFrom(_history_shortened(shortened))
        case events.Snapshot(run=value):
            fill_run(target.snapshot, value)
        case events.RunFinished(run=value):
            fill_run(target.run_finished.run, value)


def halt(value: core.Halt) -> run_service_pb2.HaltRecord:
    """One latched Halt."""
    return run_service_pb2.HaltRecord(
        halt_id=value.id,
        scope=_SCOPES[value.scope],
        target=value.target,
        reason=value.reason,
        client=value.client,
        created_at=timestamp(value.created_at_s),
    )


def status(value: DaemonStatus) -> system_service_pb2.GetStatusResponse:
    """The daemon as a whole."""
    return system_service_pb2.GetStatusResponse(
        version=value.version,
        state=_DAEMON_STATES[value.state],
        degraded_reasons=value.degraded_reasons,
        pid=value.pid,
        started_at=timestamp(value.started_at_s),
        uptime=duration(value.uptime_s),
        runs={str(state): count for state, count in value.runs.items()},
        engines_installed=value.engines_installed,
        engines_loaded=value.engines_loaded,
        max_resident_engines=value.max_resident_engines,
        halts=[halt(latched) for latched in value.halts],
        holds=[
            system_service_pb2.HoldStatus(
                resource=each.resource,
                run_id=each.run_id,
                tool_call_id=each.tool_call_id,
                tool=each.tool,
                client=each.client,
                agent=each.agent,
                holding=each.holding,
            )
            for each in value.holds
        ],
        config_path=value.config_path,
        memory=None if value.memory is None else memory(value.memory),
        waiting_steps=value.waiting_steps,
        running_steps=value.running_steps,
    )


def memory(value: MemoryStatus) -> system_service_pb2.MemoryStatus:
    """What is left for engines."""
    return system_service_pb2.MemoryStatus(
        total_bytes=value.total_bytes,
        available_bytes=value.available_bytes,
        reserve_bytes=value.reserve_bytes,
        budget_bytes=value.budget_bytes,
        soft_floor_bytes=value.soft_floor_bytes,
        hard_floor_bytes=value.hard_floor_bytes,
        kept_bytes=value.kept_bytes,
        committed_bytes=value.committed_bytes,
        held_bytes=value.held_bytes,
        leaked_bytes=value.leaked_bytes,
        room_bytes=value.room_bytes,
        level=system_service_pb2.MemoryLevel.Value(f"MEMORY_LEVEL_{value.level}"),
    )


def _fill_open_calls(target: run_service_pb2.Run, value: core.Run) -> None:
    if value.open_tool_calls:
        target.open_tool_calls.extend(map(tool_call, value.open_tool_calls))
    if value.daemon_tool_calls:
        target.daemon_tool_calls.extend(map(tool_call, value.daemon_tool_calls))
    if value.unapproved_tool_calls:
        target.unapproved_tool_calls.extend(map(tool_call, value.unapproved_tool_calls))
    if value.background_tool_calls:
        target.background_tool_calls.extend(map(tool_call, value.background_tool_calls))


def _fill_error(target: types_pb2.RunError, error: core.RunError) -> types_pb2.RunError:
    target.reason, target.message = error.reason, error.message
    target.retryable = error.retryable
    target.metadata.update(error.metadata)
    return target


def _history_shortened(shortened: events.HistoryShortened) -> run_service_pb2.HistoryShortened:
    return run_service_pb2.HistoryShortened(
        step=shortened.step,
        dropped_messages=shortened.dropped_messages,
        summarised_messages=shortened.summarised_messages,
        kept_messages=shortened.kept_messages,
        summary=shortened.summary,
    )


def _fill_message(target: types_pb2.Message, turn: core.Message) -> types_pb2.Message:
    target.role = _ROLES[turn.role]
    for part in turn.parts:
        _fill_part(target.parts.add(), part)
    if turn.tool_calls:
        target.tool_calls.extend(map(tool_call, turn.tool_calls))
    target.tool_call_id, target.is_error = turn.tool_call_id, turn.is_error
    target.is_summary = turn.is_summary
    return target


def _fill_usage(target: types_pb2.Usage, used: core.Usage) -> types_pb2.Usage:
    target.prompt_tokens = used.prompt_tokens
    target.cached_tokens = used.cached_tokens
    target.completion_tokens = used.completion_tokens
    filled(target.queue_time, used.queue_s)
    filled(target.load_time, used.load_s)
    if used.ttft_ms is not None:
        target.ttft_ms = used.ttft_ms
    target.cost_nano_usd = used.cost_nano_usd
    if (tokens_per_second := used.tokens_per_second) is not None:
        target.tokens_per_second = tokens_per_second
    return target


def _fill_part(target: types_pb2.Part, value: core.Part) -> types_pb2.Part:
    if isinstance(value, core.TextPart):
        target.text = value.text
        return target
    blob = target.image if value.kind is core.PartKind.IMAGE else target.audio
    blob.media_type, blob.data = value.media_type, value.data
    return target


def _approval_decided(value: events.ApprovalDecided) -> run_service_pb2.ApprovalDecided:
    return run_service_pb2.ApprovalDecided(
        tool_call_id=value.tool_call_id,
        approved=value.approved,
        client=value.client,
        reason=value.reason,
    )


def _step_finished(value: events.StepFinished) -> run_service_pb2.StepFinished:
    return run_service_pb2.StepFinished(
        step=value.step,
        message=message(value.message),
        usage=usage(value.usage),
        finish_reason=value.finish_reason,
        tool_margin=value.tool_margin,
        repaired=value.repaired,
    )
