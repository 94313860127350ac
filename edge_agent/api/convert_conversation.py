"""The turns of a conversation: what a well-formed one is.

Collects all that is wrong with it in the `Violations` of the request that it is part of. Knows
nothing of the rest of a request.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from edge_agent.api.validation import Violations, shown
from edge_agent.core import ANSWER, Message, Part, Role, TextPart, Tool, ToolCall
from edge_agent.v1 import types_pb2

MAX_ITEMS = 4096
"""Messages, parts and calls, or results and parts, in one request: each costs the loop some time,
and a request of 4 MiB has room for a million."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_ROLES = {
    types_pb2.ROLE_SYSTEM: Role.SYSTEM,
    types_pb2.ROLE_USER: Role.USER,
    types_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
    types_pb2.ROLE_TOOL: Role.TOOL,
}
T = TypeVar("T")


def messages_of(
    messages: Sequence[types_pb2.Message], found: Violations, path: str
) -> tuple[Message, ...]:
    """The turns as core values, as far as they are right."""
    if not messages:
        found.add(path, "is empty, at least 1 message expected")
        return ()
    items = count_items(messages, lambda message: len(message.parts) + len(message.tool_calls))
    if not found.count(path, items, MAX_ITEMS, "messages, parts and tool calls in all"):
        return ()
    converted: list[Message] = []
    unanswered: dict[str, bool] = {}
    for index, message in enumerate(messages):
        at = f"{path}[{index}]"
        role = _ROLES.get(message.role)
        if role is None:
            found.add(f"{at}.role", f"{message.role} is no role")
            continue
        if role is Role.SYSTEM and index > 0:
            found.add(f"{at}.role", "ROLE_SYSTEM is only allowed as the first message")
        calls = _calls(message, role, unanswered, found, at)
        _answers(message, role, unanswered, found, at)
        parts = parts_of(message.parts, found, f"{at}.parts")
        _content(message, role, found, at)
        converted.append(
            Message(role, parts, calls, message.tool_call_id, message.is_error, message.is_summary)
        )
    last = messages[-1].role
    if last in (types_pb2.ROLE_SYSTEM, types_pb2.ROLE_ASSISTANT):
        at = f"{path}[{len(messages) - 1}].role"
        found.add(at, f"the last message is {_ROLES[last]}, user or tool expected")
    return tuple(converted)


def check_tools_of(
    messages: Sequence[Message], tools: Sequence[Tool], found: Violations, path: str
) -> None:
    """That the calls of earlier turns are of tools that the model will see."""
    names = {tool.name for tool in tools}
    known = ", ".join(sorted(names)) or "it has none"
    for index, message in enumerate(messages):
        for number, call in enumerate(message.tool_calls):
            if call.name not in names and _TOOL_NAME.fullmatch(call.name):
                at = f"{path}[{index}].tool_calls[{number}].name"
                found.add(at, f"{shown(call.name)} is no tool of this run: {known}")


def parts_of(parts: Iterable[types_pb2.Part], found: Violations, path: str) -> tuple[Part, ...]:
    """The pieces of a content; what no engine takes is noted as unsupported."""
    converted: list[Part] = []
    for index, part in enumerate(parts):
        at, kind = f"{path}[{index}]", part.WhichOneof("kind")
        if kind == "text":
            found.text(f"{at}.text", part.text)
            converted.append(TextPart(part.text))
        elif kind is None:
            found.add(at, "is neither text nor image nor audio")
        else:
            found.add_unsupported(f"{at}.{kind}")
    return tuple(converted)


def count_items(values: Sequence[T], below: Callable[[T], int]) -> int:
    """How many there are with what is below them, counted no further than needed to refuse."""
    number = len(values)
    return number if number > MAX_ITEMS else number + sum(map(below, values))


def check_tool_name(path: str, value: str, found: Violations) -> None:
    """Refuse what can't be the name of a tool."""
    if not _TOOL_NAME.fullmatch(value):
        found.add(path, f"{shown(value)} does not match {_TOOL_NAME.pattern}")
    elif value == ANSWER:
        found.add(path, f'"{ANSWER}" is taken by the branch that answers in words')


def _calls(
    message: types_pb2.Message,
    role: Role,
    unanswered: dict[str, bool],
    found: Violations,
    path: str,
) -> tuple[ToolCall, ...]:
    """The calls of an assistant's turn; notes them in `unanswered`."""
    if message.tool_calls and role is not Role.ASSISTANT:
        found.add(f"{path}.tool_calls", f"is set, but the role is {role}, not assistant")
        return ()
    for index, call in enumerate(message.tool_calls):
        at = f"{path}.tool_calls[{index}]"
        found.name(f"{at}.id", call.id)
        check_tool_name(f"{at}.name", call.name, found)
        found.json_object(f"{at}.arguments_json", call.arguments_json)
        if call.id in unanswered:
            found.add(f"{at}.id", f"{shown(call.id)} is the id of an earlier call")
        unanswered[call.id] = True
    return tuple(ToolCall(call.id, call.name, call.arguments_json) for call in message.tool_calls)


def _answers(
    message: types_pb2.Message,
    role: Role,
    unanswered: dict[str, bool],
    found: Violations,
    path: str,
) -> None:
    """That a tool's turn answers an earlier call, once, and no other turn answers any."""
    at, call_id = f"{path}.tool_call_id", message.tool_call_id
    if role is not Role.TOOL:
        if call_id:
            found.add(at, f"{shown(call_id)} is set, but the role is {role}, not tool")
        if message.is_error:
            found.add(f"{path}.is_error", f"is set, but the role is {role}, not tool")
    elif call_id not in unanswered:
        found.add(at, f"{shown(call_id)} is the id of no earlier tool call")
    elif not unanswered[call_id]:
        found.add(at, f"{shown(call_id)} is already answered by an earlier message")
    else:
        unanswered[call_id] = False


def _content(message: types_pb2.Message, role: Role, found: Violations, path: str) -> None:
    """That a turn says something; only a tool may return nothing."""
    if role is Role.TOOL or message.tool_calls:
        return
    if not any(p.WhichOneof("kind") != "text" or p.text.strip() for p in message.parts):
        found.add(f"{path}.parts", "has no text")
