"""Every error that may reach a caller.

    EdgeAgentError                INTERNAL
    ├── ConfigError               INVALID_ARGUMENT
    ├── InvalidRequest            INVALID_ARGUMENT    names field, value and limit
    ├── NotFound                  NOT_FOUND
    ├── AlreadyExists             ALREADY_EXISTS
    ├── FailedPrecondition        FAILED_PRECONDITION
    ├── PermissionDenied          PERMISSION_DENIED
    ├── Halted                    FAILED_PRECONDITION
    ├── ResourceHeld              FAILED_PRECONDITION names the holder
    ├── OutcomeUnknown            ABORTED
    ├── Overloaded                RESOURCE_EXHAUSTED  retryable, says when
    ├── Unavailable               UNAVAILABLE         retryable
    ├── ToolUnavailable           UNAVAILABLE         retryable; the call may have begun
    │   └── ToolNotReady          FAILED_PRECONDITION retryable; nothing has begun
    ├── DeadlineExceeded          DEADLINE_EXCEEDED
    ├── Unsupported               UNIMPLEMENTED
    ├── EngineError               FAILED_PRECONDITION
    │   ├── ManifestError
    │   └── InstallError
    ├── WorkerError               UNAVAILABLE         retryable
    │   └── LoadFailed            FAILED_PRECONDITION not retryable
    ├── StepFailed                INVALID_ARGUMENT    retryable where the worker says so
    ├── LedgerFull                RESOURCE_EXHAUSTED  retryable, says when
    ├── LedgerFailed              UNAVAILABLE         retryable
    └── LedgerRowCorrupt          DATA_LOSS

Each class names its gRPC code as a string, so that nothing here imports grpc; `api.errors` maps it.
`reason` is UPPER_SNAKE_CASE and stable; every dynamic part of the message is in `metadata`
(AIP-193).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from edge_agent.core import RunError


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that is wrong, and how: the value and the limit are in `description`."""

    field: str
    description: str


class EdgeAgentError(Exception):
    """Base of all; reaches a caller as INTERNAL."""

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, object] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        """Store what is wrong; `metadata` values are kept as strings."""
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    def as_run_error(self) -> RunError:
        """The same, as the data that a run carries."""
        return RunError(self.reason, self.message, self.retryable, self.metadata)


class ConfigError(EdgeAgentError):
    """The configuration is wrong; `violations` names every place."""

    code = "INVALID_ARGUMENT"
    default_reason = "CONFIG_INVALID"


class InvalidRequest(EdgeAgentError):
    """The request is wrong; `violations` names the fields."""

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_REQUEST"

    @classmethod
    def field(
        cls, path: str, description: str, *, reason: str | None = None, **metadata: object
    ) -> "InvalidRequest":
        """One wrong field."""
        return cls(
            f"{path}: {description}",
            reason=reason,
            metadata={"field": path, **metadata},
            violations=[FieldViolation(path, description)],
        )


class NotFound(EdgeAgentError):
    """No such run, engine, tool call or Halt."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExists(EdgeAgentError):
    """The same id is taken by something else."""

    code = "ALREADY_EXISTS"
    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(EdgeAgentError):
    """Not in this state."""

    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class PermissionDenied(EdgeAgentError):
    """Not on this socket."""

    code = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class Halted(EdgeAgentError):
    """A Halt is latched over this."""

    code = "FAILED_PRECONDITION"
    default_reason = "HALTED"


class ResourceHeld(EdgeAgentError):
    """Another call has a resource of the robot for as long as it likes; names the call."""

    code = "FAILED_PRECONDITION"
    default_reason = "RESOURCE_HELD"


class OutcomeUnknown(EdgeAgentError):
    """Something may have acted, and nobody knows whether it did."""

    code = "ABORTED"
    default_reason = "OUTCOME_UNKNOWN"


class Overloaded(EdgeAgentError):
    """A bound is reached; `retry_after_s` says when it is worth another try."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True
    default_reason = "OVERLOADED"


class Unavailable(EdgeAgentError):
    """Not now: the daemon is stopping."""

    code = "UNAVAILABLE"
    retryable = True
    default_reason = "UNAVAILABLE"


class ToolUnavailable(EdgeAgentError):
    """Who executes a tool of the daemon's was lost during the call: it may have acted."""

    code = "UNAVAILABLE"
    retryable = True
    default_reason = "TOOL_LOST"


class ToolNotReady(ToolUnavailable):
    """Who executes a tool of the daemon's is not up: nothing has begun."""

    code = "FAILED_PRECONDITION"
    default_reason = "TOOL_NOT_READY"


class DeadlineExceeded(EdgeAgentError):
    """Time ran out."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class Unsupported(EdgeAgentError):
    """The engine or this release can't do it."""

    code = "UNIMPLEMENTED"
    default_reason = "UNSUPPORTED"


class EngineError(EdgeAgentError):
    """An engine on disk is not as it should be."""

    code = "FAILED_PRECONDITION"
    default_reason = "ENGINE_INVALID"


class ManifestError(EngineError):
    """A manifest or recipe that can't be read or says what can't be."""

    default_reason = "MANIFEST_INVALID"


class InstallError(EngineError):
    """An engine could not be obtained; nothing was installed."""

    default_reason = "INSTALL_FAILED"


class WorkerError(EdgeAgentError):
    """The process that hosts the engine ended or does not answer."""

    code = "UNAVAILABLE"
    retryable = True
    default_reason = "WORKER_LOST"


class LoadFailed(WorkerError):
    """The engine could not be loaded."""

    code = "FAILED_PRECONDITION"
    retryable = False
    default_reason = "ENGINE_LOAD_FAILED"


class StepFailed(EdgeAgentError):
    """The worker refused or could not finish a step; carries the worker's own words."""

    code = "INVALID_ARGUMENT"
    default_reason = "STEP_FAILED"

    def __init__(self, error: RunError) -> None:
        """Keep the worker's error as it is."""
        super().__init__(error.message, reason=error.reason, metadata=error.metadata)
        self.error = error

    def as_run_error(self) -> RunError:
        """The worker's error, with its own word on whether to try again."""
        return self.error


class LedgerFull(EdgeAgentError):
    """There is no room on disk for more durable runs; `retry_after_s` says when to try again."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True
    default_reason = "LEDGER_FULL"


class LedgerFailed(EdgeAgentError):
    """The ledger could not be written or read; what was to be written is not there."""

    code = "UNAVAILABLE"
    retryable = True
    default_reason = "LEDGER_FAILED"


class LedgerRowCorrupt(EdgeAgentError):
    """A row of the ledger is not as it was written."""

    code = "DATA_LOSS"
    default_reason = "LEDGER_ROW_CORRUPT"
