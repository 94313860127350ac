"""From core values to messages.

Owns how runs, events, engines, Halts and the daemon's status look on the wire. Checks nothing:
core values are right already.
"""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from edge_agent import core
from edge_agent.v1 import engine_service_pb2, run_service_pb2, system_service_pb2, types_pb2

_NANOS = 1_000_000_000
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
_ENGINE_STATES = {
    state: engine_service_pb2.EngineState.Value(f"ENGINE_STATE_{state}")
    for state in core.EngineState
}
_DAEMON_STATES = {
    state: system_service_pb2.DaemonState.Value(f"DAEMON_STATE_{state}")
    for state in core.DaemonState
}


def duration(seconds: float | None) -> Duration | None:
    """A span; None stays unset."""
    if seconds is None:
        return None
    nanos = round(seconds * _NANOS)
    return Duration(seconds=nanos // _NANOS, nanos=nanos % _NANOS)


def timestamp(unix_s: float | None) -> Timestamp | None:
    """A point in time; None stays unset."""
    if unix_s is None:
        return None
    nanos = round(unix_s * _NANOS)
    return Timestamp(seconds=nanos // _NANOS, nanos=nanos % _NANOS)


def parts(values: Iterable[core.Part]) -> list[types_pb2.Part]:
    """The pieces of a content."""
    return [_part(value) for value in values]


def tool_call(call: core.ToolCall) -> types_pb2.ToolCall:
    """One invocation."""
    return types_pb2.ToolCall(
        id=call.id,
        name=call.name,
        arguments_json=call.arguments_json,
        valid_for=duration(call.valid_for_s),
        observed_ago=duration(call.observed_ago_s),
    )


def tool_result(result: core.ToolResult) -> types_pb2.ToolResult:
    """What came of an invocation."""
    return types_pb2.ToolResult(
        tool_call_id=result.tool_call_id,
        parts=parts(result.parts),
        is_error=result.is_error,
        cancelled=result.cancelled,
    )


def message(turn: core.Message) -> types_pb2.Message:
    """One turn of the conversation."""
    return types_pb2.Message(
        role=_ROLES[turn.role],
        parts=parts(turn.parts),
        tool_calls=[tool_call(call) for call in turn.tool_calls],
        tool_call_id=turn.tool_call_id,
        is_error=turn.is_error,
    )


def run_error(error: core.RunError | None) -> types_pb2.RunError | None:
    """Why something ended; None stays unset."""
    if error is None:
        return None
    return types_pb2.RunError(
        reason=error.reason,
        message=error.message,
        retryable=error.retryable,
        metadata=error.metadata,
    )


def usage(used: core.Usage) -> types_pb2.Usage:
    """What was consumed."""
    return types_pb2.Usage(
        prompt_tokens=used.prompt_tokens,
        cached_tokens=used.cached_tokens,
        completion_tokens=used.completion_tokens,
        queue_time=duration(used.queue_s),
        load_time=duration(used.load_s),
        ttft_ms=used.ttft_ms,
        tokens_per_second=used.tokens_per_second,
    )


def run(value: core.Run, *, with_transcript: bool = True) -> run_service_pb2.Run:
    """A run as it stands."""
    return run_service_pb2.Run(
        id=value.id,
        request_id=value.request_id,
        client=value.client,
        agent=value.agent,
        engine=value.engine,
        state=_STATES[value.state],
        created_at=timestamp(value.created_at_s),
        ended_at=timestamp(value.ended_at_s),
        steps=value.steps,
        transcript=[message(turn) for turn in value.transcript] if with_transcript else (),
        open_tool_calls=[tool_call(call) for call in value.open_tool_calls],
        partial_text=value.partial_text,
        answer=value.answer,
        error=run_error(value.error),
        usage=usage(value.usage),
        sequence=value.sequence,
    )


def fill_event(target: run_service_pb2.RunEvent, event: core.Event) -> None:
    """Write an event into `target`: in place, since this runs for every token."""
    target.run_id = event.run_id
    target.sequence = event.sequence
    match event.body:
        case core.TextDelta(step=step, text=text, tokens=tokens):
            delta = target.text_delta
            delta.step, delta.text, delta.tokens = step, text, tokens
        case core.StateChanged(state=state, load_progress=progress):
            target.state_changed.state = _STATES[state]
            if progress is not None:
                target.state_changed.load_progress = progress
        case core.ToolCallsIssued(step=step, tool_calls=calls):
            target.tool_calls_issued.step = step
            target.tool_calls_issued.tool_calls.extend(tool_call(call) for call in calls)
        case core.ToolResultAccepted(result=result):
            target.tool_result_accepted.result.CopyFrom(tool_result(result))
        case core.StepFinished() as finished:
            target.step_finished.CopyFrom(_step_finished(finished))
        case core.CancelTool(tool_call_id=call_id, reason=reason):
            target.cancel_tool.tool_call_id = call_id
            target.cancel_tool.reason.CopyFrom(run_error(reason) or types_pb2.RunError())
        case core.Snapshot(run=value):
            target.snapshot.CopyFrom(run(value))
        case core.RunFinished(run=value):
            target.run_finished.run.CopyFrom(run(value))


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


def engine(info: core.EngineInfo) -> engine_service_pb2.Engine:
    """An installed engine."""
    worker = info.worker
    return engine_service_pb2.Engine(
        name=info.name,
        digest=info.digest,
        backend=info.backend,
        state=_ENGINE_STATES[info.state],
        context_tokens=info.context_tokens,
        max_output_tokens=info.max_output_tokens,
        load_peak_bytes=info.load_peak_bytes,
        steady_bytes=info.steady_bytes,
        capabilities=info.capabilities,
        licence=info.licence,
        worker=None if worker is None else _worker(worker),
        error=run_error(info.error),
        load_progress=info.load_progress,
    )


def status(value: core.DaemonStatus) -> system_service_pb2.GetStatusResponse:
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
        config_path=value.config_path,
    )


def _part(value: core.Part) -> types_pb2.Part:
    if isinstance(value, core.TextPart):
        return types_pb2.Part(text=value.text)
    blob = types_pb2.Blob(media_type=value.media_type, data=value.data)
    if value.kind is core.PartKind.IMAGE:
        return types_pb2.Part(image=blob)
    return types_pb2.Part(audio=blob)


def _step_finished(value: core.StepFinished) -> run_service_pb2.StepFinished:
    return run_service_pb2.StepFinished(
        step=value.step,
        message=message(value.message),
        usage=usage(value.usage),
        finish_reason=value.finish_reason,
        tool_margin=value.tool_margin,
    )


def _worker(value: core.WorkerInfo) -> engine_service_pb2.Worker:
    return engine_service_pb2.Worker(
        pid=value.pid,
        slots=value.slots,
        active_steps=value.active_steps,
        waiting_steps=value.waiting_steps,
        load_time=duration(value.load_s),
    )
