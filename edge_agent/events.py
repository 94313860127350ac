"""What happens to a run: its numbered events, as every follower sees them.

Frozen values only, for `core` values. `runs.history` says what each makes of a run.
"""

from dataclasses import dataclass

from edge_agent.core import (
    FinishReason,
    Message,
    Part,
    Run,
    RunError,
    RunState,
    ToolCall,
    ToolResult,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole run, as the first event of every watch."""

    run: Run


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The run is in another state, or its engine's load went on.

    `cause` of SUSPENDED and CANCELLING only.
    """

    state: RunState
    load_progress: float | None = None
    cause: RunError | None = None


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer being written in `step` (from 1)."""

    step: int
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class ToolCallsIssued:
    """The caller executes these."""

    step: int
    tool_calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class ApprovalRequested:
    """These calls wait for somebody's approval; nobody executes them yet."""

    step: int
    tool_calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class ApprovalDecided:
    """Somebody has approved or denied a call."""

    tool_call_id: str
    approved: bool
    client: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DaemonToolStarted:
    """The daemon executes this call itself; its result comes as `ToolResultAccepted`."""

    step: int
    tool_call: ToolCall


@dataclass(frozen=True, slots=True)
class MessagesAdded:
    """What somebody said to the run.

    `pending`: it joins the conversation later, with the next event of this kind that is not.
    """

    messages: tuple[Message, ...]
    pending: bool = False


@dataclass(frozen=True, slots=True)
class ToolUpdated:
    """News of a call of a BACKGROUND tool; `done`: it does nothing more."""

    tool_call_id: str
    parts: tuple[Part, ...]
    is_error: bool
    done: bool


@dataclass(frozen=True, slots=True)
class ToolResultAccepted:
    """A result that a call waited for has come; `goes_on`: the call does so in the background."""

    result: ToolResult
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class StepFinished:
    """What a step decided, and what it consumed."""

    step: int
    message: Message
    usage: Usage
    finish_reason: FinishReason
    tool_margin: float | None = None
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class CancelTool:
    """The caller stops this call and confirms."""

    tool_call_id: str
    reason: RunError


@dataclass(frozen=True, slots=True)
class HistoryShortened:
    """The oldest turns of the session's history have made room for `step`.

    `dropped_messages` are gone; `summarised_messages` live on in `summary`.
    """

    step: int
    dropped_messages: int
    summarised_messages: int
    kept_messages: int
    summary: str = ""


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The last event of every run."""

    run: Run


EventBody = (
    Snapshot
    | StateChanged
    | TextDelta
    | ToolCallsIssued
    | ApprovalRequested
    | ApprovalDecided
    | DaemonToolStarted
    | MessagesAdded
    | ToolUpdated
    | ToolResultAccepted
    | StepFinished
    | CancelTool
    | HistoryShortened
    | RunFinished
)


@dataclass(frozen=True, slots=True)
class Event:
    """One numbered event of a run."""

    run_id: str
    sequence: int
    body: EventBody
