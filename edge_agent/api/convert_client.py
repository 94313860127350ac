"""The client's half of the conversions: requests from core values, core values from responses.

Owns `RunOptions`, a run's spec in which everything may be left to the daemon, and what becomes of
values that only a newer daemon knows; `convert_engine` owns the engines. Checks nothing: the daemon
does. Knows no channel.

An event of an unknown kind is passed over; an unknown state or finish reason is UNSPECIFIED. Where
a robot acts on the value it is the one that is safe: a run that has ended in an unknown state is
OUTCOME_UNKNOWN, a Halt of an unknown scope may cover ALL. A message of an unknown role is the
ASSISTANT's: a transcript holds what the model and the tools said. An unknown priority is NORMAL.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from edge_agent import core, events
from edge_agent.api import convert_response
from edge_agent.api.convert_telemetry import run_telemetry
from edge_agent.api.spans import filled, seconds
from edge_agent.heartbeat import Heartbeat
from edge_agent.status import DaemonState, DaemonStatus, HoldStatus, MemoryStatus
from edge_agent.v1 import run_service_pb2, system_service_pb2, types_pb2

_ROLES = {types_pb2.Role.Value(f"ROLE_{role.name}"): role for role in core.Role}
_RUN_STATES = {
    run_service_pb2.RunState.Value(f"RUN_STATE_{state}"): state for state in core.RunState
}
_FINISH_REASONS = {reason.value: reason for reason in core.FinishReason}
_SCOPES = {
    run_service_pb2.HaltScope.Value(f"HALT_SCOPE_{scope}"): scope for scope in core.HaltScope
}
_PRIORITIES = {
    run_service_pb2.Priority.Value(f"PRIORITY_{priority}"): priority for priority in core.Priority
}
_LEVELS = {value: name[13:] for name, value in system_service_pb2.MemoryLevel.items()}
_DAEMON_STATES = {
    system_service_pb2.DaemonState.Value(f"DAEMON_STATE_{state}"): state for state in DaemonState
}


class RunOptions(TypedDict, total=False):
    """What else a run may be given; what is left out is the daemon's default.

    `system` is put in front of the messages, in a session's first run only. `timeout_s` counts from
    acceptance to the end.
    """

    engine: str
    system: str
    output_schema_json: str
    max_steps: int
    max_output_tokens: int
    max_tool_calls: int
    max_tokens: int
    max_same_calls: int
    max_cost_nano_usd: int
    temperature: float
    top_p: float
    seed: int
    timeout_s: float
    agent: str
    priority: core.Priority
    durable: bool
    tool_strategy: core.ToolStrategy
    session: str
    session_overflow: core.Overflow


def run_spec(
    goal: str | Sequence[core.Message], tools: Sequence[core.Tool], options: RunOptions
) -> run_service_pb2.RunSpec:
    """A goal in a user's words, or a whole conversation, with its options."""
    messages = [_said(core.Role.USER, goal)] if isinstance(goal, str) else list(goal)
    if "system" in options:
        messages.insert(0, _said(core.Role.SYSTEM, options["system"]))
    return run_service_pb2.RunSpec(
        messages=[convert_response.message(turn) for turn in messages],
        tools=[tool(each) for each in tools],
        engine=options.get("engine", ""),
        output_schema_json=options.get("output_schema_json", ""),
        limits=types_pb2.Limits(
            max_steps=options.get("max_steps"),
            max_output_tokens=options.get("max_output_tokens"),
            max_tool_calls=options.get("max_tool_calls"),
            max_tokens=options.get("max_tokens"),
            max_same_calls=options.get("max_same_calls"),
            max_cost_nano_usd=options.get("max_cost_nano_usd"),
        ),
        sampling=types_pb2.Sampling(
            temperature=options.get("temperature"),
            top_p=options.get("top_p"),
            seed=options.get("seed"),
        ),
        timeout=convert_response.duration(options.get("timeout_s")),
        agent=options.get("agent", ""),
        priority=convert_response.PRIORITIES[options["priority"]]
        if "priority" in options
        else run_service_pb2.PRIORITY_UNSPECIFIED,
        durable=options.get("durable"),
        tool_strategy=convert_response.TOOL_STRATEGIES[options["tool_strategy"]]
        if "tool_strategy" in options
        else types_pb2.TOOL_STRATEGY_UNSPECIFIED,
        session=_session_use(options) if "session" in options else None,
    )


def _session_use(options: RunOptions) -> run_service_pb2.SessionUse:
    overflow = run_service_pb2.SESSION_OVERFLOW_UNSPECIFIED
    if "session_overflow" in options:
        overflow = convert_response.OVERFLOWS[options["session_overflow"]]
    return run_service_pb2.SessionUse(id=options["session"], overflow=overflow)


def tool(value: core.Tool) -> types_pb2.Tool:
    """Something that can be done for the model; of a tool of the daemon's, its name alone."""
    if value.executor is core.Executor.DAEMON:
        return types_pb2.Tool(name=value.name, executor=types_pb2.EXECUTOR_DAEMON)
    return types_pb2.Tool(
        name=value.name,
        description=value.description,
        input_schema_json=value.input_schema_json,
        examples=[
            types_pb2.ToolExample(
                goal=example.goal, arguments_json=example.arguments_json, result=example.result
            )
            for example in value.examples
        ],
        timeout=convert_response.duration(value.timeout_s),
        valid_for=convert_response.duration(value.valid_for_s),
        side_effect=convert_response.SIDE_EFFECTS[value.side_effect],
        executor=types_pb2.EXECUTOR_CALLER,
        needs_approval=value.needs_approval,
        lifecycle=convert_response.LIFECYCLES[value.lifecycle],
        resources=value.resources,
        verify=value.verify,
    )


def resume_request(
    run_id: str, messages: Iterable[core.Message]
) -> run_service_pb2.ResumeRunRequest:
    """The request to let a suspended run go on."""
    said = map(convert_response.message, messages)
    return run_service_pb2.ResumeRunRequest(run_id=run_id, messages=said)


def append_request(
    run_id: str, messages: Iterable[core.Message]
) -> run_service_pb2.AppendMessagesRequest:
    """The request to say something to a run."""
    said = map(convert_response.message, messages)
    return run_service_pb2.AppendMessagesRequest(run_id=run_id, messages=said)


def update_request(run_id: str, update: events.ToolUpdated) -> run_service_pb2.ToolUpdateRequest:
    """News of a call that goes on in the background."""
    return run_service_pb2.ToolUpdateRequest(
        run_id=run_id,
        tool_call_id=update.tool_call_id,
        parts=convert_response.parts(update.parts),
        is_error=update.is_error,
        done=update.done,
    )


def resolve_request(
    run_id: str, tool_call_id: str, evidence: str, *, acted: bool
) -> run_service_pb2.ResolveOutcomeRequest:
    """What really came of a call."""
    return run_service_pb2.ResolveOutcomeRequest(
        run_id=run_id,
        tool_call_id=tool_call_id,
        outcome=run_service_pb2.OUTCOME_ACTED if acted else run_service_pb2.OUTCOME_NOT_ACTED,
        evidence=evidence,
    )


def results_wanted(
    cursor: int, max_results: int, wait_s: float | None
) -> run_service_pb2.WaitResultsRequest:
    """The request for ended runs."""
    wait = convert_response.duration(wait_s)
    return run_service_pb2.WaitResultsRequest(cursor=cursor, max_results=max_results, wait=wait)


def beat_request(
    nonce: int, heartbeat: Heartbeat | None, session: str, *, stop: bool
) -> run_service_pb2.BeatRequest:
    """A beat, for a session or for all (empty); the first one with what is asked for."""
    request = run_service_pb2.BeatRequest(nonce=nonce, stop=stop, session=session)
    if heartbeat is not None:
        filled(request.window, heartbeat.window_s)
        if heartbeat.suspend_after_s is not None:
            filled(request.suspend_after, heartbeat.suspend_after_s)
        if heartbeat.cancel_after_s is not None:
            filled(request.cancel_after, heartbeat.cancel_after_s)
    return request


def results_request(results: Iterable[core.ToolResult]) -> run_service_pb2.ConverseRequest:
    """A later message of a conversation."""
    converted = [convert_response.tool_result(result) for result in results]
    return run_service_pb2.ConverseRequest(
        tool_results=run_service_pb2.ToolResults(results=converted)
    )


def run(value: run_service_pb2.Run) -> core.Run:
    """A run as it stands."""
    state = _run_state(value.state)
    if state is core.RunState.UNSPECIFIED and value.HasField("ended_at"):
        state = core.RunState.OUTCOME_UNKNOWN
    return core.Run(
        id=value.id,
        request_id=value.request_id,
        client=value.client,
        agent=value.agent,
        engine=value.engine,
        state=state,
        created_at_s=seconds(value.created_at),
        sequence=value.sequence,
        ended_at_s=seconds(value.ended_at) if value.HasField("ended_at") else None,
        steps=value.steps,
        transcript=tuple(message(turn) for turn in value.transcript),
        open_tool_calls=tuple(map(_tool_call, value.open_tool_calls)),
        daemon_tool_calls=tuple(map(_tool_call, value.daemon_tool_calls)),
        unapproved_tool_calls=tuple(map(_tool_call, value.unapproved_tool_calls)),
        background_tool_calls=tuple(map(_tool_call, value.background_tool_calls)),
        pending_messages=tuple(map(message, value.pending_messages)),
        partial_text=value.partial_text,
        answer=value.answer if value.HasField("answer") else None,
        error=run_error(value.error) if value.HasField("error") else None,
        usage=usage(value.usage),
        telemetry=run_telemetry(value.telemetry) if value.HasField("telemetry") else None,
        priority=priority(value.priority),
        durable=value.durable,
        session=value.session,
    )


def priority(value: "run_service_pb2.Priority.ValueType") -> core.Priority:
    """How soon a run's steps go."""
    return _PRIORITIES.get(value, core.Priority.NORMAL)


def event(value: run_service_pb2.RunEvent) -> events.Event | None:
    """An event; None for a kind that a newer daemon sends and this client does not know."""
    body = _body(value)
    return None if body is None else events.Event(value.run_id, value.sequence, body)


def halt(value: run_service_pb2.HaltRecord) -> core.Halt:
    """One latched Halt."""
    return core.Halt(
        id=value.halt_id,
        scope=_SCOPES.get(value.scope, core.HaltScope.ALL),
        target=value.target,
        reason=value.reason,
        client=value.client,
        created_at_s=seconds(value.created_at),
    )


def hold(value: system_service_pb2.HoldStatus) -> HoldStatus:
    """Who has a resource."""
    return HoldStatus(
        resource=value.resource,
        run_id=value.run_id,
        tool_call_id=value.tool_call_id,
        tool=value.tool,
        client=value.client,
        agent=value.agent,
        holding=value.holding,
    )


def halt_outcome(value: run_service_pb2.HaltResponse) -> core.HaltOutcome:
    """What a Halt did."""
    return core.HaltOutcome(halt(value.halt), value.runs_stopped, value.recorded)


def halt_request(scope: core.HaltScope, target: str, reason: str) -> run_service_pb2.HaltRequest:
    """The request for a Halt."""
    wire_scope = run_service_pb2.HaltScope.Value(f"HALT_SCOPE_{scope}")
    return run_service_pb2.HaltRequest(scope=wire_scope, target=target, reason=reason)


def list_request(
    states: Iterable[core.RunState], page_token: str
) -> run_service_pb2.ListRunsRequest:
    """The request for one page of runs."""
    wire_states = [run_service_pb2.RunState.Value(f"RUN_STATE_{state}") for state in states]
    return run_service_pb2.ListRunsRequest(states=wire_states, page_token=page_token)


def status(value: system_service_pb2.GetStatusResponse) -> DaemonStatus:
    """The daemon as a whole."""
    return DaemonStatus(
        version=value.version,
        state=_DAEMON_STATES.get(value.state, DaemonState.UNSPECIFIED),
        degraded_reasons=tuple(value.degraded_reasons),
        pid=value.pid,
        started_at_s=seconds(value.started_at),
        uptime_s=seconds(value.uptime),
        runs=_counts(value.runs),
        engines_installed=value.engines_installed,
        engines_loaded=value.engines_loaded,
        max_resident_engines=value.max_resident_engines,
        halts=tuple(halt(latched) for latched in value.halts),
        holds=tuple(hold(each) for each in value.holds),
        config_path=value.config_path,
        memory=_memory(value.memory) if value.HasField("memory") else None,
        waiting_steps=value.waiting_steps,
        running_steps=value.running_steps,
    )


def run_error(value: types_pb2.RunError) -> core.RunError:
    """Why something ended as it did."""
    return core.RunError(value.reason, value.message, value.retryable, dict(value.metadata))


def _body(  # noqa: C901, PLR0911, PLR0912 - one a kind
    value: run_service_pb2.RunEvent,
) -> events.EventBody | None:
    match value.WhichOneof("kind"):
        case "text_delta":
            delta = value.text_delta
            return events.TextDelta(delta.step, delta.text, delta.tokens)
        case "snapshot":
            return events.Snapshot(run(value.snapshot))
        case "state_changed":
            change = value.state_changed
            progress = change.load_progress if change.HasField("load_progress") else None
            cause = run_error(change.cause) if change.HasField("cause") else None
            return events.StateChanged(_run_state(change.state), progress, cause)
        case "tool_calls_issued":
            issued = value.tool_calls_issued
            return events.ToolCallsIssued(issued.step, tuple(map(_tool_call, issued.tool_calls)))
        case "approval_requested":
            asked = value.approval_requested
            return events.ApprovalRequested(asked.step, tuple(map(_tool_call, asked.tool_calls)))
        case "approval_decided":
            decided = value.approval_decided
            return events.ApprovalDecided(
                decided.tool_call_id, decided.approved, decided.client, decided.reason
            )
        case "daemon_tool_started":
            started = value.daemon_tool_started
            return events.DaemonToolStarted(started.step, _tool_call(started.tool_call))
        case "messages_added":
            added = value.messages_added
            return events.MessagesAdded(tuple(map(message, added.messages)), added.pending)
        case "tool_updated":
            update = value.tool_updated
            return events.ToolUpdated(
                update.tool_call_id, _parts(update.parts), update.is_error, update.done
            )
        case "tool_result_accepted":
            accepted = value.tool_result_accepted
            return events.ToolResultAccepted(_tool_result(accepted.result), accepted.goes_on)
        case "step_finished":
            return _step_finished(value.step_finished)
        case "cancel_tool":
            cancel = value.cancel_tool
            return events.CancelTool(cancel.tool_call_id, run_error(cancel.reason))
        case "history_shortened":
            shortened = value.history_shortened
            return events.HistoryShortened(
                shortened.step,
                shortened.dropped_messages,
                shortened.summarised_messages,
                shortened.kept_messages,
                shortened.summary,
            )
        case "run_finished":
            return events.RunFinished(run(value.run_finished.run))
        case _:
            return None


def _step_finished(value: run_service_pb2.StepFinished) -> events.StepFinished:
    return events.StepFinished(
        step=value.step,
        message=message(value.message),
        usage=usage(value.usage),
        finish_reason=_FINISH_REASONS.get(value.finish_reason, core.FinishReason.UNSPECIFIED),
        tool_margin=value.tool_margin if value.HasField("tool_margin") else None,
        repaired=value.repaired,
    )


def _said(role: core.Role, text: str) -> core.Message:
    return core.Message(role, (core.TextPart(text),))


def _run_state(value: "run_service_pb2.RunState.ValueType") -> core.RunState:
    return _RUN_STATES.get(value, core.RunState.UNSPECIFIED)


def _counts(runs: Mapping[str, int]) -> dict[core.RunState, int]:
    """Runs by state, those in states that we do not know together."""
    counts = {
        core.RunState[name]: count
        for name, count in runs.items()
        if name in core.RunState.__members__
    }
    unknown = sum(runs.values()) - sum(counts.values())
    return counts | ({core.RunState.UNSPECIFIED: unknown} if unknown else {})


def message(value: types_pb2.Message) -> core.Message:
    """One turn of a conversation."""
    return core.Message(
        role=_ROLES.get(value.role, core.Role.ASSISTANT),
        parts=_parts(value.parts),
        tool_calls=tuple(_tool_call(call) for call in value.tool_calls),
        tool_call_id=value.tool_call_id,
        is_error=value.is_error,
        is_summary=value.is_summary,
    )


def _parts(values: Iterable[types_pb2.Part]) -> tuple[core.Part, ...]:
    return tuple(_part(value) for value in values)


def _part(value: types_pb2.Part) -> core.Part:
    if value.HasField("image"):
        return core.BlobPart(core.PartKind.IMAGE, value.image.media_type, value.image.data)
    if value.HasField("audio"):
        return core.BlobPart(core.PartKind.AUDIO, value.audio.media_type, value.audio.data)
    return core.TextPart(value.text)


def _tool_call(value: types_pb2.ToolCall) -> core.ToolCall:
    return core.ToolCall(
        id=value.id,
        name=value.name,
        arguments_json=value.arguments_json,
        valid_for_s=seconds(value.valid_for) if value.HasField("valid_for") else None,
        observed_ago_s=seconds(value.observed_ago) if value.HasField("observed_ago") else None,
        fence=core.Fence(value.fence.epoch, value.fence.sequence)
        if value.HasField("fence")
        else None,
    )


def _tool_result(value: types_pb2.ToolResult) -> core.ToolResult:
    return core.ToolResult(
        tool_call_id=value.tool_call_id,
        parts=_parts(value.parts),
        is_error=value.is_error,
        cancelled=value.cancelled,
        error=run_error(value.error) if value.HasField("error") else None,
    )


def _memory(value: system_service_pb2.MemoryStatus) -> MemoryStatus:
    return MemoryStatus(
        total_bytes=value.total_bytes,
        available_bytes=value.available_bytes if value.HasField("available_bytes") else None,
        reserve_bytes=value.reserve_bytes,
        budget_bytes=value.budget_bytes if value.HasField("budget_bytes") else None,
        soft_floor_bytes=value.soft_floor_bytes,
        hard_floor_bytes=value.hard_floor_bytes,
        kept_bytes=value.kept_bytes,
        committed_bytes=value.committed_bytes,
        held_bytes=value.held_bytes,
        leaked_bytes=value.leaked_bytes,
        room_bytes=value.room_bytes,
        level=_LEVELS.get(value.level, "UNSPECIFIED"),
    )


def usage(value: types_pb2.Usage) -> core.Usage:
    """The speed on the wire becomes the time that decoding took, which core derives it from."""
    speed = value.tokens_per_second if value.HasField("tokens_per_second") else 0.0
    return core.Usage(
        prompt_tokens=value.prompt_tokens,
        cached_tokens=value.cached_tokens,
        completion_tokens=value.completion_tokens,
        queue_s=seconds(value.queue_time),
        load_s=seconds(value.load_time),
        decode_s=value.completion_tokens / speed if speed > 0 else 0.0,
        ttft_ms=value.ttft_ms if value.HasField("ttft_ms") else None,
        cost_nano_usd=value.cost_nano_usd,
    )
