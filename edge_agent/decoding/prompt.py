"""From messages and tools to the token ids of a prompt.

Only the manifest's own markers are parsed for control tokens. Every text from a caller, a tool or
the model is tokenised as plain text, so that nobody can forge a turn.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_agent.core import ANSWER, Message, Role, Tool, ToolCall
from edge_agent.engines.manifest import Manifest, Turn

Tokenize = Callable[[str, bool], list[int]]
"""From a text, and whether control tokens are parsed in it, to token ids."""

_CACHED_SEGMENTS = 1024
_CACHED_CHARACTERS = 16_384


class PromptRenderer:
    """Renders prompts for one engine. Not thread-safe: the caller holds its own lock."""

    def __init__(self, manifest: Manifest, tokenize: Tokenize) -> None:
        """Render in the manifest's format, with the engine's tokenizer."""
        self._format = manifest.prompt
        self._tools = manifest.tools
        self._tokenize = tokenize
        self._segments: OrderedDict[tuple[str, bool], list[int]] = OrderedDict()

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """The prompt up to where the assistant's turn begins."""
        head, rest = self._split_system(messages)
        ids = list(self.markers(self._format.prefix)) if self._format.prefix else []
        ids += self._turn(self._format.system, self._system_text(head, tools))
        for turn, text in self._examples(tools):
            ids += self._turn(turn, text)
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        for message in rest:
            ids += self._turn(self._turn_of(message.role), message_text(message, names, tools))
        return ids + self.markers(self._format.assistant.open)

    def user_turn(self, text: str) -> list[int]:
        """One user message, closed, and the beginning of the assistant's turn."""
        return self._turn(self._format.user, text) + self.markers(self._format.assistant.open)

    def markers(self, text: str) -> list[int]:
        """Tokens of the manifest's own text."""
        return self._ids(text, markers=True)

    def plain(self, text: str) -> list[int]:
        """Tokens of anybody else's text."""
        return self._ids(text, markers=False)

    def _ids(self, text: str, *, markers: bool) -> list[int]:
        if not text:
            return []
        key = (text, markers)
        cached = self._segments.get(key)
        if cached is not None:
            self._segments.move_to_end(key)
            return cached
        ids = self._tokenize(text, markers)
        if len(text) <= _CACHED_CHARACTERS:
            self._segments[key] = ids
            if len(self._segments) > _CACHED_SEGMENTS:
                self._segments.popitem(last=False)
        return ids

    def _turn(self, turn: Turn, text: str) -> list[int]:
        return self.markers(turn.open) + self.plain(text) + self.markers(turn.close)

    def _turn_of(self, role: Role) -> Turn:
        turn: Turn = getattr(self._format, role.value)
        return turn

    def _split_system(self, messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
        if messages and messages[0].role is Role.SYSTEM:
            return messages[0].text, messages[1:]
        return self._format.default_system, messages

    def _system_text(self, head: str, tools: Sequence[Tool]) -> str:
        if not tools:
            return head
        lines = [head, self._tools.instructions, *(f"- {signature(tool)}" for tool in tools)]
        lines.append(f"- {ANSWER}: Say something when no tool fits.")
        return "\n".join(lines)

    def _examples(self, tools: Sequence[Tool]) -> list[tuple[Turn, str]]:
        """The tools' own worked examples as turns, then one of an answer; none without any."""
        turns: list[tuple[Turn, str]] = []
        for tool in tools:
            for example in tool.examples:
                call = ToolCall("", tool.name, example.arguments_json)
                result = example.result or self._tools.example_result
                turns += [
                    (self._format.user, example.goal),
                    (self._format.assistant, call_text(call)),
                    (self._format.tool, result_text(tool.name, result, is_error=False)),
                    (self._format.assistant, answer_text(self._tools.example_answer)),
                ]
        if turns:
            for goal, answer in self._tools.answer_examples:
                turns += [(self._format.user, goal), (self._format.assistant, answer_text(answer))]
        return turns


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


def message_text(message: Message, names: Mapping[str, str], tools: Sequence[Tool]) -> str:
    """One message's text as the model is to see it; `names` maps call ids to tool names."""
    if message.role is Role.TOOL:
        name = names.get(message.tool_call_id, "tool")
        return result_text(name, message.text, is_error=message.is_error)
    if message.tool_calls:
        return "\n".join(call_text(call) for call in message.tool_calls)
    if message.role is Role.ASSISTANT and tools:
        return answer_text(message.text)
    return message.text


def call_text(call: ToolCall) -> str:
    """A call as the model writes it."""
    return to_json({"name": call.name, "arguments": json.loads(call.arguments_json)})


def answer_text(answer: str) -> str:
    """An answer as the model writes it when there are tools."""
    return to_json({ANSWER: answer})


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
