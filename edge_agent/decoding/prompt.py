"""From messages and tools to the token ids of a prompt.

Only the manifest's own markers are parsed for control tokens. Every text from a caller, a tool or
the model is tokenised as plain text, so that nobody can forge a turn.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from edge_agent.core import Message, Role, Tool, ToolCall
from edge_agent.decoding.dialects import Dialect, JsonDialect, NativeDialect, Piece, Pieces
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
        self._json = JsonDialect(manifest.tools)
        self._native = NativeDialect(manifest.tools.native) if manifest.tools.native else None
        self._tokenize = tokenize
        self._segments: OrderedDict[tuple[str, bool], list[int]] = OrderedDict()

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, native: bool = False
    ) -> list[int]:
        """The prompt up to where the assistant's turn begins.

        `native`: in the way that the model was trained for, which its manifest must describe.
        """
        dialect = self._native if native and self._native else self._json
        head, rest = self._split_system(messages)
        ids = list(self.markers(self._format.prefix)) if self._format.prefix else []
        ids += self._turn(
            self._format.system, [Piece(dialect.system(head, tools) if tools else head)]
        )
        for turn, pieces in self._examples(tools, dialect):
            ids += self._turn(turn, pieces)
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        for message in rest:
            pieces = _said(message, names, dialect, has_tools=bool(tools))
            ids += self._turn(self._turn_of(message.role), pieces)
        return ids + self.markers(self._format.assistant.open)

    def user_turn(self, text: str) -> list[int]:
        """One user message, closed, and the beginning of the assistant's turn."""
        opening = self.markers(self._format.assistant.open)
        return self._turn(self._format.user, [Piece(text)]) + opening

    def conversation(self, system: str, turns: Sequence[tuple[str, str]], last: str) -> list[int]:
        """After (user's, assistant's) turns a last user's, up to where the assistant's begins."""
        ids = list(self.markers(self._format.prefix)) if self._format.prefix else []
        ids += self._turn(self._format.system, [Piece(system)])
        for said, replied in turns:
            ids += self._turn(self._format.user, [Piece(said)])
            ids += self._turn(self._format.assistant, [Piece(replied)])
        return ids + self.user_turn(last)

    def corrected(self, written: str, problem: str) -> list[int]:
        """After a prompt: what the model wrote, what is wrong with it, and its next turn."""
        close = self.markers(self._format.assistant.close)
        return self.plain(written) + close + self.user_turn(problem)

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

    def _turn(self, turn: Turn, pieces: Pieces) -> list[int]:
        ids = list(self.markers(turn.open))
        for piece in pieces:
            ids += self.markers(piece.text) if piece.marker else self.plain(piece.text)
        return ids + self.markers(turn.close)

    def _turn_of(self, role: Role) -> Turn:
        turn: Turn = getattr(self._format, role.value)
        return turn

    def _split_system(self, messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
        if messages and messages[0].role is Role.SYSTEM:
            return messages[0].text, messages[1:]
        return self._format.default_system, messages

    def _examples(self, tools: Sequence[Tool], dialect: Dialect) -> list[tuple[Turn, Pieces]]:
        """The tools' own worked examples as turns, then one of an answer; none without any."""
        form, turns = self._format, list[tuple[Turn, Pieces]]()
        for tool in tools:
            for example in tool.examples:
                call = ToolCall("", tool.name, example.arguments_json)
                result = example.result or self._tools.example_result
                turns += [
                    (form.user, [Piece(example.goal)]),
                    (form.assistant, dialect.calls([call])),
                    (form.tool, dialect.result(tool.name, result, is_error=False)),
                    (form.assistant, dialect.answer(self._tools.example_answer)),
                ]
        if turns:
            for goal, answer in self._tools.answer_examples:
                turns += [(form.user, [Piece(goal)]), (form.assistant, dialect.answer(answer))]
        return turns


def _said(
    message: Message, names: Mapping[str, str], dialect: Dialect, *, has_tools: bool
) -> Pieces:
    """One message as the model is to see it; `names` maps call ids to tool names."""
    if message.role is Role.TOOL:
        name = names.get(message.tool_call_id, "tool")
        return dialect.result(name, message.text, is_error=message.is_error)
    if message.tool_calls:
        return dialect.calls(message.tool_calls)
    if message.role is Role.ASSISTANT and has_tools:
        return dialect.answer(message.text)
    return [Piece(message.text)]
