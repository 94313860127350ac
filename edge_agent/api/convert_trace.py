"""The records of a run's steps and tool calls, both ways."""

from edge_agent.api import convert_client, convert_response
from edge_agent.api.spans import seconds
from edge_agent.core import Executor, SideEffect
from edge_agent.records import CallRecord, Effect, Resolution, ResultClass, StepRecord
from edge_agent.v1 import run_service_pb2 as pb

_EXECUTORS = {value: name for name, value in convert_response.EXECUTORS.items()}
_SIDE_EFFECTS = {value: name for name, value in convert_response.SIDE_EFFECTS.items()}


def step_record(value: StepRecord) -> pb.StepRecord:
    """One attempt at a step."""
    return pb.StepRecord(
        step=value.step,
        attempt=value.attempt,
        parent=value.parent,
        started_at=convert_response.timestamp(value.started_at_s),
        duration=convert_response.duration(value.duration_s),
        route=value.route,
        engine=value.engine,
        engine_digest=value.engine_digest,
        template_hash=value.template_hash,
        tools_hash=value.tools_hash,
        seed=value.seed,
        usage=convert_response.usage(value.usage),
        finish=value.finish,
        repaired=value.repaired,
        available_before_bytes=value.available_before_bytes,
        available_after_bytes=value.available_after_bytes,
        power_mode=value.power_mode,
        body_json=value.body,
    )


def call_record(value: CallRecord) -> pb.ToolCallRecord:
    """One tool call."""
    return pb.ToolCallRecord(
        step=value.step,
        tool_call_id=value.call_id,
        tool=value.tool,
        executor=convert_response.EXECUTORS[value.executor],
        side_effect=convert_response.SIDE_EFFECTS[value.side_effect],
        arguments_hash=value.arguments_hash,
        effect=value.effect,
        issued_at=convert_response.timestamp(value.issued_at_s),
        ended_at=convert_response.timestamp(value.ended_at_s),
        result_class=value.result_class or "",
        result_bytes=value.result_bytes,
        body_json=value.body,
        resolution=None if value.resolution is None else _resolution(value.resolution),
    )


def read(
    run_id: str, value: pb.GetTraceResponse
) -> tuple[tuple[StepRecord, ...], tuple[CallRecord, ...]]:
    """The records of a run from the wire."""
    steps = tuple(_step(run_id, step) for step in value.steps)
    return steps, tuple(read_call(run_id, call) for call in value.tool_calls)


def _step(run_id: str, value: pb.StepRecord) -> StepRecord:
    return StepRecord(
        run_id=run_id,
        step=value.step,
        attempt=value.attempt,
        parent=value.parent if value.HasField("parent") else None,
        started_at_s=seconds(value.started_at),
        duration_s=seconds(value.duration),
        route=value.route,
        engine=value.engine,
        engine_digest=value.engine_digest,
        template_hash=value.template_hash,
        tools_hash=value.tools_hash,
        seed=value.seed if value.HasField("seed") else None,
        usage=convert_client.usage(value.usage),
        finish=value.finish,
        repaired=value.repaired,
        available_before_bytes=_optional(value, "available_before_bytes"),
        available_after_bytes=_optional(value, "available_after_bytes"),
        power_mode=value.power_mode if value.HasField("power_mode") else None,
        body=value.body_json if value.HasField("body_json") else None,
    )


def read_call(run_id: str, value: pb.ToolCallRecord) -> CallRecord:
    """The record of a call from the wire. What only a newer daemon knows is taken at the worst."""
    known = ResultClass.__members__
    return CallRecord(
        run_id=run_id,
        step=value.step,
        call_id=value.tool_call_id,
        tool=value.tool,
        executor=_EXECUTORS.get(value.executor, Executor.CALLER),
        side_effect=_SIDE_EFFECTS.get(value.side_effect, SideEffect.NON_IDEMPOTENT),
        arguments_hash=value.arguments_hash,
        effect=Effect.__members__.get(value.effect, Effect.UNKNOWN),
        issued_at_s=seconds(value.issued_at),
        ended_at_s=seconds(value.ended_at) if value.HasField("ended_at") else None,
        result_class=known.get(value.result_class),
        result_bytes=value.result_bytes if value.HasField("result_bytes") else None,
        body=value.body_json if value.HasField("body_json") else None,
        resolution=Resolution(
            value.resolution.client,
            value.resolution.evidence,
            seconds(value.resolution.resolved_at),
        )
        if value.HasField("resolution")
        else None,
    )


def _resolution(value: Resolution) -> pb.Resolution:
    return pb.Resolution(
        client=value.client,
        evidence=value.evidence,
        resolved_at=convert_response.timestamp(value.resolved_at_s),
    )


def _optional(value: pb.StepRecord, name: str) -> int | None:
    return getattr(value, name) if value.HasField(name) else None  # type: ignore[arg-type]
