"""How calls, answers and results are written in a prompt, and read from what a model writes.

Two ways: JSON objects that we ask for (`JsonDialect`), and the way that the model was trained for
(`NativeDialect`, as the manifest describes it). Pure: from values to pieces of text. Only a piece
that is a marker, which is the manifest's own, may be parsed for control tokens.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from edge_agent.core import ANSWER, Tool, ToolCall
from edge_agent.engines.manifest import NativeFormat, ToolFormat, Turn


class Piece(NamedTuple):
    """A piece of a turn; only a `marker` is parsed for control tokens."""

    text: str
    marker: bool = False


Pieces = Sequence[Piece]


class Dialect(Protocol):
    """How a model is spoken to where there are tools."""

    def system(self, head: str, tools: Sequence[Tool]) -> str:
        """The system's text, with the tools."""
        ...

    def calls(self, calls: Sequence[ToolCall]) -> Pieces:
        """A turn of the assistant that calls tools."""
        ...

    def answer(self, answer: str) -> Pieces:
        """A turn of the assistant that answers in words."""
        ...

    def result(self, name: str, content: str, *, is_error: bool) -> Pieces:
        """A turn that brings a tool's result."""
        ...


class JsonDialect:
    """`{"name": ..., "arguments": ...}` or `{"answer": ...}`, after a list of the tools."""

    def __init__(self, tools: ToolFormat) -> None:
        """With the manifest's words."""
        self._instructions = tools.instructions

    def system(self, head: str, tools: Sequence[Tool]) -> str:
        """A line for each tool, and one for the answer."""
        lines = [head, self._instructions, *(f"- {signature(tool)}" for tool in tools)]
        lines.append(f"- {ANSWER}: Say something when no tool fits.")
        return "\n".join(lines)

    def calls(self, calls: Sequence[ToolCall]) -> Pieces:
        """One object a line."""
        return [Piece("\n".join(call_text(call) for call in calls))]

    def answer(self, answer: str) -> Pieces:
        """As an object of its own."""
        return [Piece(to_json({ANSWER: answer}))]

    def result(self, name: str, content: str, *, is_error: bool) -> Pieces:
        """An object that says whose it is, and that it is not to be trusted."""
        return [Piece(result_text(name, content, is_error=is_error))]


class NativeDialect:
    """What the manifest's `tools.native` says."""

    def __init__(self, native: NativeFormat) -> None:
        """With the manifest's words and markers."""
        self._native = native

    def system(self, head: str, tools: Sequence[Tool]) -> str:
        """The tools as JSON, a line each, where the manifest wants them."""
        lines = "\n".join(to_json(_described(tool)) for tool in tools)
        return f"{head}\n{self._native.instructions.replace('{tools}', lines)}"

    def calls(self, calls: Sequence[ToolCall]) -> Pieces:
        """Each call between its markers."""
        return [piece for call in calls for piece in _between(self._native.call, call_text(call))]

    def answer(self, answer: str) -> Pieces:
        """Plain words."""
        return [Piece(answer)]

    def result(self, name: str, content: str, *, is_error: bool) -> Pieces:
        """Between its markers, as not to be trusted."""
        return _between(self._native.result, result_text(name, content, is_error=is_error))


def _between(turn: Turn, text: str) -> list[Piece]:
    return [Piece(turn.open, marker=True), Piece(text), Piece(turn.close, marker=True)]


def _described(tool: Tool) -> dict[str, object]:
    schema: object = json.loads(tool.input_schema_json)
    function = {"name": tool.name, "description": tool.description, "parameters": schema}
    return {"type": "function", "function": function}


def signature(tool: Tool) -> str:
    """A tool in one line, such as `set_lamp(lamp: front|rear): Switch a lamp.`."""
    schema: Mapping[str, Any] = json.loads(tool.input_schema_json)
    required = schema.get("required", [])
    arguments = ", ".join(
        f"{name}{'' if name in required else '?'}: {_type_text(value)}"
        for name, value in schema.get("properties", {}).items()
    )
    return f"{tool.name}({arguments}): {tool.description}"


def _type_text(schema: object) -> str:
    if not isinstance(schema, Mapping):
        return "any"
    if "enum" in schema:
        return "|".join(str(value) for value in schema["enum"])
    kind = schema.get("type", "any")
    text = "|".join(kind) if isinstance(kind, list) else str(kind)
    note = schema.get("description")
    return f"{text} ({note})" if note else text


def call_text(call: ToolCall) -> str:
    """A call as the model writes it."""
    return to_json({"name": call.name, "arguments": json.loads(call.arguments_json)})


def result_text(name: str, content: str, *, is_error: bool) -> str:
    """A tool's result as the model reads it; JSON stays JSON."""
    try:
        value: object = json.loads(content)
    except (ValueError, RecursionError):
        value = content
    return to_json({"tool": name, "untrusted_error" if is_error else "untrusted_result": value})


def to_json(value: object) -> str:
    """JSON that is text: an escaped half of a surrogate pair is no character of any token."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode(errors="replace").decode()
