"""How a run looks on a terminal, or as JSON lines, while it happens.

The answer goes to stdout, everything around it to stderr, so that the answer can be piped.
"""

import contextlib
import sys
from collections.abc import Iterator

from edge_agent.cli.output import print_error, print_json
from edge_agent.core import Message, Run, RunError, RunState, TextPart, ToolCall, ToolResult
from edge_agent.errors import EdgeAgentError, Unavailable
from edge_agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    CancelTool,
    DaemonToolStarted,
    Event,
    HistoryShortened,
    MessagesAdded,
    Snapshot,
    StateChanged,
    TextDelta,
    ToolCallsIssued,
    ToolResultAccepted,
    ToolUpdated,
)


class RunPrinter:
    """Says what happens in a run while it happens."""

    def __init__(self, *, as_json: bool, stream: bool) -> None:
        self._as_json = as_json
        self._stream = stream
        self._streamed = ""  # of the step that is being decided
        self._step = 0
        self._in_line = False
        self._loading = False
        self._kept = False

    def see(self, event: Event) -> None:
        """Print one event."""
        if isinstance(event.body, Snapshot):
            self._kept = event.body.run.durable
        if self._as_json:
            if self._stream:
                print_json({"type": type(event.body).__name__, **_event(event)})
        elif self._stream:
            self._tell(event)

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Say what becomes of a durable run where the daemon goes away meanwhile."""
        try:
            yield
        except Unavailable:
            self._end_line()
            if self._kept and not self._as_json:
                note("the run is kept: `edge-agent runs list` shows it once the daemon is back")
            raise

    def end(self, run: Run) -> int:
        """Print the answer, where it was not streamed, or the error; returns the exit code."""
        if self._as_json:
            if not self._stream:
                print_json(run)
            return 0 if run.error is None else 1
        self._end_line()
        if run.error is not None:
            print_error(_as_raised(run), as_json=False)
            return 1
        if run.answer is not None and run.answer != self._streamed:
            print(run.answer)
        if self._stream:
            note(_numbers(run))
        return 0

    def _tell(self, event: Event) -> None:
        body = event.body
        if isinstance(body, TextDelta):
            print(body.text, end="", flush=True)
            self._streamed = body.text if body.step != self._step else self._streamed + body.text
            self._step = body.step
            self._in_line = not self._streamed.endswith("\n")
            return
        self._end_line()
        if isinstance(body, StateChanged):
            self._tell_loading(body)
        for line in _lines(event):
            note(line)

    def _tell_loading(self, change: StateChanged) -> None:
        """One line that counts up on a terminal, one remark elsewhere."""
        if change.state is RunState.LOADING:
            if sys.stderr.isatty():
                percent = change.load_progress or 0.0
                print(f"\rloading the engine {percent:4.0%}", end="", file=sys.stderr, flush=True)
            elif not self._loading:
                note("loading the engine")
            self._loading = True
        elif self._loading:
            self._loading = False
            if sys.stderr.isatty():
                note("")

    def _end_line(self) -> None:
        if self._in_line:
            print(flush=True)
            self._in_line = False


def _lines(event: Event) -> list[str]:  # noqa: C901, PLR0911 - one a kind
    """What an event says beside the answer, and which command helps where the run waits."""
    match event.body:
        case ToolCallsIssued(tool_calls=calls):
            return [f"-> {_call(call)}" for call in calls]
        case DaemonToolStarted(tool_call=call):
            return [f"-> {_call(call)} (executed by the daemon)"]
        case ToolResultAccepted(result=result, goes_on=goes_on):
            more = " (goes on in the background)" if goes_on else ""
            return [f"<- {'error: ' if result.is_error else ''}{_text(result)}{more}"]
        case ToolUpdated() as update:
            what = f"{'error: ' if update.is_error else ''}{_text(update)}"
            return [f"<~ {update.tool_call_id}{' is done' if update.done else ''}{_because(what)}"]
        case CancelTool(tool_call_id=call_id, reason=reason):
            return [f"!! stop {call_id}: {reason.message}"]
        case ApprovalRequested(tool_calls=calls):
            return [line for call in calls for line in _approval(event.run_id, call)]
        case ApprovalDecided(approved=approved, client=client, reason=reason):
            return [f"   {'approved' if approved else 'denied'} by {client}{_because(reason)}"]
        case StateChanged(state=RunState.SUSPENDED, cause=cause):
            return _suspended(event.run_id, cause)
        case MessagesAdded(messages=messages):
            return [f"   said: {_text(message)}" for message in messages]
        case HistoryShortened(dropped_messages=dropped, summarised_messages=summarised):
            return [f"   history: {dropped} messages dropped, {summarised} summed up"]
        case _:
            return []


def _approval(run_id: str, call: ToolCall) -> list[str]:
    return [
        f"?? {_call(call)} waits for approval:",
        f"   edge-agent runs approve {run_id} {call.id}",
        f"   edge-agent runs deny {run_id} {call.id}",
    ]


def _suspended(run_id: str, cause: RunError | None) -> list[str]:
    why = _because(cause.message) if cause else ""
    return [f"!! suspended{why}", f"   edge-agent runs resume {run_id}"]


def _call(call: ToolCall) -> str:
    return f"{call.name} {call.arguments_json}"


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _text(said: Message | ToolResult | ToolUpdated) -> str:
    return "".join(part.text for part in said.parts if isinstance(part, TextPart))


def _event(event: Event) -> dict[str, object]:
    return {"run_id": event.run_id, "sequence": event.sequence, "body": event.body}


def _as_raised(run: Run) -> EdgeAgentError:
    """A run's error in the form in which commands print errors."""
    error = run.error
    if error is None:
        return EdgeAgentError(f"the run ended {run.state}")
    hint_s = 1.0 if error.retryable else None
    return EdgeAgentError(
        f"the run ended {run.state}: {error.message}",
        reason=error.reason,
        metadata=error.metadata,
        retry_after_s=hint_s,
    )


def _numbers(run: Run) -> str:
    usage = run.usage
    said = [f"{usage.completion_tokens} tokens in {counted_steps(run)}"]
    if usage.tokens_per_second is not None:
        said.append(f"{usage.tokens_per_second:.1f} tokens/s")
    if usage.ttft_ms is not None:
        said.append(f"first token after {usage.ttft_ms:.0f} ms")
    if usage.load_s:
        said.append(f"engine loaded in {usage.load_s:.1f} s")
    return ", ".join(said)


def counted_steps(run: Run) -> str:
    """How many steps a run has taken, in words."""
    return "1 step" if run.steps == 1 else f"{run.steps} steps"


def note(text: str) -> None:
    """A remark beside the answer."""
    print(text, file=sys.stderr, flush=True)
