"""Reads one YAML document strictly: its data, the line of each key, and keys written twice.

Knows nothing of what the keys mean. YAML itself lets a repeated key win in silence; here it is a
problem that the caller reports beside its own.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

MAX_BYTES: Final = 1 << 20
KeyPath = tuple[str | int, ...]

_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlSyntaxError(Exception):
    """The text is no YAML document; `line` and `column` count from 1, None where unknown."""

    def __init__(self, problem: str, line: int | None, column: int | None) -> None:
        """Store what is wrong and where."""
        super().__init__(problem)
        self.problem = problem
        self.line = line
        self.column = column

    @property
    def place(self) -> str:
        """`line 3, column 5`, or `document` where it is not known."""
        return "document" if self.line is None else f"line {self.line}, column {self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One key that YAML accepts and we don't."""

    path: KeyPath
    description: str


@dataclass(frozen=True, slots=True)
class Document:
    """What the text says. `data` is None for an empty document; `lines` count from 1."""

    data: Any
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def read_yaml(text: str) -> Document:
    """One document.

    Raises:
        YamlSyntaxError: not YAML, more than one document, too long, or nested too deeply.
    """
    if len(text) > MAX_BYTES:
        raise YamlSyntaxError(f"{len(text)} characters, at most {MAX_BYTES}", None, None)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Document(None)
            lines: dict[KeyPath, int] = {}
            problems: list[Problem] = []
            _walk(node, (), lines, problems, set())
            return Document(loader.construct_document(node), lines, tuple(problems))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _syntax_error(error, text) from error
    except RecursionError as error:
        raise YamlSyntaxError("nested too deeply", None, None) from error
    except ValueError as error:  # a date or a number that Python can't hold, such as 2026-02-30
        raise YamlSyntaxError(str(error), None, None) from error


def format_path(path: KeyPath) -> str:
    """`runs.max_steps`, `preload[0]`; `document` for the whole."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f".{key}" if text else key
    return text or "document"


def _walk(
    node: yaml.Node,
    path: KeyPath,
    lines: dict[KeyPath, int],
    problems: list[Problem],
    seen: set[int],
) -> None:
    """Note the lines and repeated keys below `node`, each node once whatever aliases name it."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), lines, problems, seen)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            key = _key(key_node)
            line = key_node.start_mark.line + 1
            if (*path, key) in lines:
                said = f"written twice (lines {lines[(*path, key)]} and {line})"
                problems.append(Problem((*path, key), said))
            lines.setdefault((*path, key), line)
            _walk(value, (*path, key), lines, problems, seen)


def _key(node: yaml.Node) -> str:
    """A key as written; what is no scalar is refused later, when Python can't hash it."""
    value: Hashable = node.value if isinstance(node, yaml.ScalarNode) else "?"
    return str(value)


def _syntax_error(error: yaml.YAMLError, text: str) -> YamlSyntaxError:
    """The library's error with line and column."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        words = [getattr(error, "problem", None), getattr(error, "context", None)]
        problem = ", ".join(word for word in words if word)
        return YamlSyntaxError(problem, mark.line + 1, mark.column + 1)
    position = getattr(error, "position", None)
    if isinstance(position, int):
        before = text[:position]
        column = position - (before.rfind("\n") + 1) + 1
        reason = getattr(error, "reason", "not a text character")
        return YamlSyntaxError(str(reason), before.count("\n") + 1, column)
    return YamlSyntaxError(str(error), None, None)
