"""Finding out whether a call acted, by a tool that only looks. Pure.

A verifying tool takes the arguments of the call and answers `{"acted": true}` or `false`.
"""

import json

from edge_agent.core import TextPart, Tool, ToolCall, ToolResult

_EVIDENCE_CHARACTERS = 1024


def call_of(call: ToolCall, verifier: Tool) -> ToolCall:
    """The call that looks; its id is the other's with `-verify`."""
    return ToolCall(f"{call.id}-verify", verifier.name, call.arguments_json)


def acted(found: ToolResult) -> bool | None:
    """What the verifying tool has found; None: it does not know."""
    if found.is_error or found.cancelled:
        return None
    try:
        value = json.loads(_text(found))
    except (ValueError, RecursionError):
        return None
    told = value.get("acted") if isinstance(value, dict) else None
    return told if isinstance(told, bool) else None


def evidence(found: ToolResult) -> str:
    """What it said, for people."""
    return _text(found)[:_EVIDENCE_CHARACTERS]


def result(call: ToolCall, problem: str, *, acted: bool) -> ToolResult:
    """What the model is told of the call."""
    what = "it has acted" if acted else "it has not acted"
    text = f"{problem}; a look at it afterwards says that {what}"
    return ToolResult(call.id, (TextPart(text),), is_error=not acted)


def _text(found: ToolResult) -> str:
    return "".join(part.text for part in found.parts if isinstance(part, TextPart))
