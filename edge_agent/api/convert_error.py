"""Between errors and google.rpc.Status, in both directions.

Owns what an error looks like on the wire (AIP-193): code, message, ErrorInfo, BadRequest,
RetryInfo. Knows no calls and no sockets, so that the daemon and its clients share it.
"""

from collections.abc import Iterator

from google.protobuf.duration_pb2 import Duration
from google.rpc import (  # type: ignore[import-untyped]  # it has stubs, but no py.typed
    code_pb2,
    error_details_pb2,
    status_pb2,
)

from edge_agent import errors
from edge_agent.api.spans import filled, seconds
from edge_agent.errors import EdgeAgentError, FieldViolation

DOMAIN = "edge-agent"
DETAILS_KEY = "grpc-status-details-bin"
DEFAULT_RETRY_S = 1.0
MAX_MESSAGE_BYTES = 768
MAX_STATUS_BYTES = 3072
"""gRPC refuses trailing metadata above 8 KiB, and a caller would lose the whole error: message
(percent-encoded) and status (base64) stay below it together."""
_MAX_VALUE_BYTES = 256
_BY_CODE: dict[str, type[EdgeAgentError]] = {
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "FAILED_PRECONDITION": errors.FailedPrecondition,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "RESOURCE_EXHAUSTED": errors.Overloaded,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "UNIMPLEMENTED": errors.Unsupported,
}


def status_of(error: EdgeAgentError) -> status_pb2.Status:
    """The error as a status with details, small enough for trailing metadata."""
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.code), message=_cut(error.message, MAX_MESSAGE_BYTES)
    )
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in error.metadata.items():
        info.metadata[key] = _cut(value, _MAX_VALUE_BYTES)
    bad = error_details_pb2.BadRequest()
    room = MAX_STATUS_BYTES - status.ByteSize() - info.ByteSize()
    for kept, violation in enumerate(error.violations):
        entry = bad.field_violations.add(
            field=_cut(violation.field, _MAX_VALUE_BYTES),
            description=_cut(violation.description, _MAX_VALUE_BYTES),
        )
        room -= entry.ByteSize() + 8
        if room < 0:
            del bad.field_violations[-1]
            info.metadata["violations_left_out"] = str(len(error.violations) - kept)
            break
    status.details.add().Pack(info)
    if bad.field_violations:
        status.details.add().Pack(bad)
    if error.as_run_error().retryable or error.retry_after_s is not None:
        status.details.add().Pack(_retry_info(error.retry_after_s))
    return status


def error_of(code: str, message: str, details: bytes | None) -> EdgeAgentError:
    """The error that a daemon sent: of the class that its reason or else its code names."""
    status = status_pb2.Status.FromString(details) if details else status_pb2.Status()
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    retry_after_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_after_s = seconds(retry.retry_delay)
    kind = _BY_REASON.get((code, info.reason)) or _BY_CODE.get(code, EdgeAgentError)
    return kind(
        message or code,
        reason=info.reason or code,
        metadata=dict(info.metadata),
        violations=[FieldViolation(v.field, v.description) for v in bad.field_violations],
        retry_after_s=retry_after_s,
    )


def _retry_info(after_s: float | None) -> error_details_pb2.RetryInfo:
    delay = filled(Duration(), DEFAULT_RETRY_S if after_s is None else after_s)
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _cut(text: str, max_bytes: int) -> str:
    """At most so many bytes of UTF-8; what is cut ends in dots. Half surrogates become `?`."""
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    return data[: max_bytes - 3].decode(errors="ignore") + "..."


def _tree(kind: type[EdgeAgentError]) -> Iterator[type[EdgeAgentError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)


_BY_REASON = {
    (kind.code, kind.default_reason): kind
    for kind in _tree(EdgeAgentError)
    if kind is not errors.StepFailed  # made of a RunError, and only inside the daemon
}
