"""Reads what a model writes in its own way of calling tools. Pure, and strict: no guessing.

Text before the first call is let go: models think aloud there. Anything else that is not a whole
call or a plain answer is refused in words that the model can act on.
"""

import json
from collections.abc import Sequence
from typing import Any

from edge_agent.core import Tool, ToolCall
from edge_agent.decoding.dialects import to_json
from edge_agent.engines.manifest import NativeFormat


class Malformed(Exception):
    """It is neither a call nor an answer; says why, for the model to write it again."""


def read(text: str, native: NativeFormat, tools: Sequence[Tool]) -> list[ToolCall] | str:
    """The calls that the model made, without ids, or its answer.

    Raises:
        Malformed: a call that is not whole, is no JSON, names no tool, or stands outside its
            markers. Whether the arguments satisfy the tool's schema is for the caller to say.
    """
    opening, closing = native.call.open.strip(), native.call.close.strip()
    if opening not in text:
        if _looks_like_a_call(text):
            raise Malformed(f"a call stands between {opening} and {closing}, and nowhere else")
        return text.strip()
    calls = []
    _, *written = text.split(opening)
    for each in written:
        body, found, rest = each.partition(closing)
        if not found:
            raise Malformed(f"a call has no {closing} after it")
        if rest.strip():
            raise Malformed(f"after {closing} there may be another call, and nothing else")
        calls.append(_call(body, tools))
    return calls


def begins_a_call(text: str, native: NativeFormat) -> bool:
    """Whether what was written so far may still be the beginning of a call's opening."""
    opening, begun = native.call.open.strip(), text.lstrip()
    return opening.startswith(begun) or begun.startswith((opening, "{"))


def _call(body: str, tools: Sequence[Tool]) -> ToolCall:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the call is no JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict) or set(value) != {"name", "arguments"}:
        raise Malformed('a call is a JSON object with "name" and "arguments", and nothing else')
    name, arguments = value["name"], value["arguments"]
    if not isinstance(arguments, dict):
        raise Malformed('"arguments" is a JSON object')
    if name not in [tool.name for tool in tools]:
        raise Malformed(f"there is no tool {name!r}: {', '.join(tool.name for tool in tools)}")
    return ToolCall("", name, to_json(arguments))


def _looks_like_a_call(text: str) -> bool:
    """Whether a call has leaked into the text: JSON with the fields of one, or a half of it."""
    begun = text.strip().removeprefix("```json").removeprefix("```").lstrip()
    return begun.startswith("{") and '"name"' in begun and '"arguments"' in begun
