"""Results of tools as the model gets them: text, and no more of it than is allowed. Pure."""

from edge_agent.core import RunError, TextPart, ToolCall, ToolResult
from edge_agent.units import format_size


def bounded(text: str, max_bytes: int) -> str | None:
    """What is said instead of a text that is too large; None where it fits.

    Bytes are those of UTF-8.
    """
    size_bytes = len(text.encode(errors="replace"))
    if size_bytes <= max_bytes:
        return None
    return (
        f"the result has {size_bytes} bytes, at most {format_size(max_bytes)} are allowed "
        "(runs.max_tool_result_size): ask for less"
    )


def result(call: ToolCall, text: str, *, is_error: bool, max_bytes: int) -> ToolResult:
    """The result of a call; an error of its own where it is too large."""
    instead = bounded(text, max_bytes)
    if instead is not None:
        return too_large(call, instead)
    return ToolResult(call.id, (TextPart(text),), is_error)


def too_large(call: ToolCall, instead: str) -> ToolResult:
    """What is given to the model `instead` of a result that is too large."""
    error = RunError("RESULT_TOO_LARGE", instead)
    return ToolResult(call.id, (TextPart(instead),), is_error=True, error=error)
