"""Engines and waiting steps on the wire and back.

Owns how they look there. Decides nothing about them. What only a newer daemon knows is UNSPECIFIED,
as in `convert_client`.
"""

from edge_agent import core
from edge_agent.api import convert_client, convert_response
from edge_agent.api.spans import seconds
from edge_agent.status import StepWait, WaitReason
from edge_agent.v1 import engine_service_pb2 as pb

_STATES = {state: pb.EngineState.Value(f"ENGINE_STATE_{state}") for state in core.EngineState}
_READ_STATES = {value: state for state, value in _STATES.items()}
_REASONS = {reason: pb.WaitReason.Value(f"WAIT_REASON_{reason}") for reason in WaitReason}
_READ_REASONS = {value: reason for reason, value in _REASONS.items()}


def engine(info: core.EngineInfo) -> pb.Engine:
    """An installed engine."""
    return pb.Engine(
        name=info.name,
        digest=info.digest,
        backend=info.backend,
        state=_STATES[info.state],
        context_tokens=info.context_tokens,
        max_output_tokens=info.max_output_tokens,
        load_peak_bytes=info.load_peak_bytes,
        steady_bytes=info.steady_bytes,
        capabilities=info.capabilities,
        licence=info.licence,
        worker=None if info.worker is None else _worker(info.worker),
        error=convert_response.run_error(info.error),
        load_progress=info.load_progress,
        pinned=info.pinned,
        quarantined=info.quarantined,
        leaked_bytes=info.leaked_bytes,
        measurements=map(_measured, info.measurements),
        estimated_load_peak_bytes=info.estimated_load_peak_bytes,
        estimated_steady_bytes=info.estimated_steady_bytes,
    )


def engine_info(value: pb.Engine) -> core.EngineInfo:
    """The engine that a daemon tells of."""
    return core.EngineInfo(
        name=value.name,
        digest=value.digest,
        backend=value.backend,
        state=_READ_STATES.get(value.state, core.EngineState.UNSPECIFIED),
        context_tokens=value.context_tokens,
        max_output_tokens=value.max_output_tokens,
        load_peak_bytes=value.load_peak_bytes,
        steady_bytes=value.steady_bytes,
        capabilities=tuple(value.capabilities),
        licence=value.licence,
        worker=_worker_info(value.worker) if value.HasField("worker") else None,
        error=convert_client.run_error(value.error) if value.HasField("error") else None,
        load_progress=value.load_progress if value.HasField("load_progress") else None,
        pinned=value.pinned,
        quarantined=value.quarantined,
        leaked_bytes=value.leaked_bytes,
        measurements=tuple(map(_measured_load, value.measurements)),
        estimated_load_peak_bytes=value.estimated_load_peak_bytes,
        estimated_steady_bytes=value.estimated_steady_bytes,
    )


def wait(value: StepWait) -> pb.StepWait:
    """Why one step waits. What is overdue is due now."""
    deadline_in_s = None if value.deadline_in_s is None else max(0.0, value.deadline_in_s)
    return pb.StepWait(
        run_id=value.run_id,
        client=value.client,
        engine=value.engine,
        priority=convert_response.PRIORITIES[value.priority],
        waited=convert_response.duration(value.waited_s),
        reason=_REASONS[value.reason],
        text=value.text,
        engines=value.engines,
        position=value.position,
        missing_bytes=value.missing_bytes,
        starts_in=convert_response.duration(value.starts_in_s),
        deadline_in=convert_response.duration(deadline_in_s),
    )


def step_wait(value: pb.StepWait) -> StepWait:
    """The waiting step that a daemon tells of."""
    return StepWait(
        run_id=value.run_id,
        client=value.client,
        engine=value.engine,
        priority=convert_client.priority(value.priority),
        waited_s=seconds(value.waited),
        reason=_READ_REASONS.get(value.reason, WaitReason.UNSPECIFIED),
        text=value.text,
        engines=tuple(value.engines),
        position=value.position,
        missing_bytes=value.missing_bytes,
        starts_in_s=seconds(value.starts_in) if value.HasField("starts_in") else None,
        deadline_in_s=seconds(value.deadline_in) if value.HasField("deadline_in") else None,
    )


def explain_request(run_id: str) -> pb.ExplainRequest:
    """The request for the waiting steps of a run; empty: of all."""
    return pb.ExplainRequest(run_id=run_id or None)


def _worker(value: core.WorkerInfo) -> pb.Worker:
    return pb.Worker(
        pid=value.pid,
        slots=value.slots,
        active_steps=value.active_steps,
        waiting_steps=value.waiting_steps,
        load_time=convert_response.duration(value.load_s),
    )


def _worker_info(value: pb.Worker) -> core.WorkerInfo:
    return core.WorkerInfo(
        pid=value.pid,
        slots=value.slots,
        active_steps=value.active_steps,
        waiting_steps=value.waiting_steps,
        load_s=seconds(value.load_time) if value.HasField("load_time") else None,
    )


def _measured(value: core.MeasuredLoad) -> pb.MeasuredLoad:
    return pb.MeasuredLoad(
        load_peak_bytes=value.load_peak_bytes,
        steady_bytes=value.steady_bytes,
        source=value.source,
        measured_at=convert_response.timestamp(value.measured_at_s),
    )


def _measured_load(value: pb.MeasuredLoad) -> core.MeasuredLoad:
    return core.MeasuredLoad(
        load_peak_bytes=value.load_peak_bytes,
        steady_bytes=value.steady_bytes,
        source=value.source,
        measured_at_s=seconds(value.measured_at),
    )
