"""How a run looks on a terminal, or as JSON lines, while it happens.

The answer goes to stdout, everything around it to stderr, so that the answer can be piped.
"""

import sys

from edge_agent.cli.output import print_error, print_json
from edge_agent.core import (
    CancelTool,
    Event,
    Run,
    RunState,
    StateChanged,
    TextDelta,
    TextPart,
    ToolCallsIssued,
    ToolResultAccepted,
)
from edge_agent.errors import EdgeAgentError


class RunPrinter:
    """Says what happens in a run while it happens."""

    def __init__(self, *, as_json: bool, stream: bool) -> None:
        self._as_json = as_json
        self._stream = stream
        self._streamed = ""  # of the step that is being decided
        self._step = 0
        self._in_line = False
        self._loading = False

    def see(self, event: Event) -> None:
        """Print one event."""
        if self._as_json:
            if self._stream:
                print_json({"type": type(event.body).__name__, **_event(event)})
        elif self._stream:
            self._tell(event)

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
        elif isinstance(body, ToolCallsIssued):
            for call in body.tool_calls:
                note(f"-> {call.name} {call.arguments_json}")
        elif isinstance(body, ToolResultAccepted):
            text = "".join(p.text for p in body.result.parts if isinstance(p, TextPart))
            note(f"<- {'error: ' if body.result.is_error else ''}{text}")
        elif isinstance(body, CancelTool):
            note(f"!! stop {body.tool_call_id}: {body.reason.message}")

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
    said = [f"{usage.completion_tokens} tokens in {run.steps} steps"]
    if usage.tokens_per_second is not None:
        said.append(f"{usage.tokens_per_second:.1f} tokens/s")
    if usage.ttft_ms is not None:
        said.append(f"first token after {usage.ttft_ms:.0f} ms")
    if usage.load_s:
        said.append(f"engine loaded in {usage.load_s:.1f} s")
    return ", ".join(said)


def note(text: str) -> None:
    """A remark beside the answer."""
    print(text, file=sys.stderr, flush=True)
