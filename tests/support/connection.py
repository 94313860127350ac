"""The generated stubs over one connection of its own, and short forms of what tests send.

Plain gRPC on purpose: what a caller in another language would see.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import (  # type: ignore[import-untyped]  # it has stubs, but no py.typed
    error_details_pb2,
    status_pb2,
)
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]

from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import types_pb2 as pb
from edge_agent.v1.engine_service_pb2_grpc import EngineServiceStub
from edge_agent.v1.run_service_pb2_grpc import RunServiceStub
from edge_agent.v1.system_service_pb2_grpc import SystemServiceStub

CALL_TIMEOUT_S = 30.0
"""A test that hangs says where."""

_Details = collections.namedtuple(  # noqa: PYI024 - gRPC wants these attributes of a call's details
    "_Details",
    ("method", "timeout", "metadata", "credentials", "wait_for_ready", "compression"),
    defaults=(None, None, None, None),
)


class Connection:
    """One client of the daemon: a channel that shares its connection with nobody."""

    def __init__(
        self, socket: Path, client: str = "test", options: Sequence[tuple[str, Any]] = ()
    ) -> None:
        channel = grpc.insecure_channel(
            f"unix:{socket}",
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", -1),
                *options,
            ],
        )
        self._channel = channel
        named = grpc.intercept_channel(channel, _Named(client))
        self.runs = RunServiceStub(named)
        self.engines = EngineServiceStub(named)
        self.system = SystemServiceStub(named)
        self.health = health_pb2_grpc.HealthStub(named)
        self.channel = named

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def create(
        self, spec: run_pb.RunSpec, request_id: str = "", *, wait_for_ready: bool = False
    ) -> run_pb.Run:
        """CreateRun."""
        request = run_pb.CreateRunRequest(spec=spec, request_id=request_id)
        return self.runs.CreateRun(
            request, timeout=CALL_TIMEOUT_S, wait_for_ready=wait_for_ready
        ).run

    def execute(self, spec: run_pb.RunSpec, **fields: Any) -> Any:
        """ExecuteRun: the call, whose items are responses."""
        request = run_pb.ExecuteRunRequest(spec=spec, **fields)
        return self.runs.ExecuteRun(request, timeout=CALL_TIMEOUT_S)

    def watch(self, run_id: str, after_sequence: int | None = None) -> Iterator[run_pb.RunEvent]:
        """WatchRun's events."""
        request = run_pb.WatchRunRequest(run_id=run_id, after_sequence=after_sequence)
        return events(self.runs.WatchRun(request, timeout=CALL_TIMEOUT_S))

    def get(self, run_id: str) -> run_pb.Run:
        """GetRun."""
        return self.runs.GetRun(run_pb.GetRunRequest(run_id=run_id), timeout=CALL_TIMEOUT_S).run

    def end_of(self, run_id: str) -> run_pb.Run:
        """The run, once it has ended."""
        for _ in self.watch(run_id):
            pass
        return self.get(run_id)

    def until(self, run_id: str, kind: str) -> run_pb.RunEvent:
        """The first event of this kind, from the run's beginning."""
        return first(self.watch(run_id, 0), kind)

    def submit(self, run_id: str, *results: pb.ToolResult) -> run_pb.Run:
        """SubmitToolResults."""
        request = run_pb.SubmitToolResultsRequest(run_id=run_id, results=results)
        return self.runs.SubmitToolResults(request, timeout=CALL_TIMEOUT_S).run

    def halt(self, scope: int, target: str = "", reason: str = "") -> run_pb.HaltResponse:
        """Halt."""
        request = run_pb.HaltRequest(scope=scope, target=target, reason=reason)  # type: ignore[arg-type]
        return self.runs.Halt(request, timeout=CALL_TIMEOUT_S)

    def clear_halt(self, halt_id: str) -> None:
        """ClearHalt."""
        self.runs.ClearHalt(run_pb.ClearHaltRequest(halt_id=halt_id), timeout=CALL_TIMEOUT_S)


class _Named(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Says who calls, in every call."""

    def __init__(self, client: str) -> None:
        self._metadata = (("edge-agent-client", client),)

    def _with_name(self, details: Any) -> Any:
        return _Details(
            details.method,
            details.timeout,
            (*(details.metadata or ()), *self._metadata),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_name(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_name(details), request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(self._with_name(details), requests)


def goal(text: str, **fields: Any) -> run_pb.RunSpec:
    """A run of one user message; `fields` are RunSpec's, `timeout_s` and those of Limits."""
    limits = {
        name: fields.pop(name)
        for name in ("max_steps", "max_output_tokens", "max_tool_calls")
        if name in fields
    }
    timeout_s = fields.pop("timeout_s", None)
    spec = run_pb.RunSpec(
        messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=text)])],
        limits=pb.Limits(**limits),
        **fields,
    )
    if timeout_s is not None:
        spec.timeout.CopyFrom(duration(timeout_s))
    return spec


def duration(seconds: float) -> Duration:
    """On the wire."""
    return Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))


def result(call_id: str, text: str = "ok", **fields: Any) -> pb.ToolResult:
    """A tool's result of one text part."""
    return pb.ToolResult(tool_call_id=call_id, parts=[pb.Part(text=text)], **fields)


def events(responses: Iterable[Any]) -> Iterator[run_pb.RunEvent]:
    """The events in a stream's responses."""
    return (response.event for response in responses)


def first(found: Iterable[run_pb.RunEvent], kind: str) -> run_pb.RunEvent:
    """The first event of this kind; those before it are dropped."""
    return next(event for event in found if event.WhichOneof("kind") == kind)


def text_of(found: Iterable[run_pb.RunEvent], step: int = 1) -> str:
    """A step's deltas, joined."""
    return "".join(e.text_delta.text for e in found if e.text_delta.step == step)


def kinds(found: Iterable[run_pb.RunEvent]) -> list[str]:
    """What happened, in order."""
    return [event.WhichOneof("kind") or "" for event in found]


class Problem:
    """A failed call's code, reason, metadata and field violations."""

    def __init__(self, error: grpc.RpcError) -> None:
        call: Any = error
        self.code = call.code()
        self.message = call.details()
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        self.retry = error_details_pb2.RetryInfo()
        for key, value in call.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                for detail in status_pb2.Status.FromString(value).details:
                    for kind in (info, bad, self.retry):
                        detail.Unpack(kind)
        self.reason = info.reason
        self.metadata = dict(info.metadata)
        self.fields = {each.field: each.description for each in bad.field_violations}
