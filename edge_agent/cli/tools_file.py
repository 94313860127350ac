"""The tools file of `edge-agent run`: tools and, for each that wants one, a fixed result.

Owns the file's shape and names every error in it at once. What a tool may be is the daemon's to
check.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from edge_agent.core import Executor, SideEffect, Tool, ToolExample
from edge_agent.errors import ConfigError, FieldViolation
from edge_agent.strict_yaml import YamlSyntaxError, format_path, read_yaml


class _Key(NamedTuple):
    """What a key holds; `said` in words."""

    kind: type
    said: str

    def holds(self, value: object) -> bool:
        """Whether it may be this."""
        if issubclass(self.kind, StrEnum):
            return isinstance(value, str) and value in tuple(self.kind)
        return isinstance(value, self.kind)


_Keys = Mapping[str, _Key]
_TEXT = _Key(str, "a text")
_KEYS: _Keys = {
    "name": _TEXT,
    "description": _TEXT,
    "input_schema": _Key(dict, "a mapping, a JSON Schema"),
    "examples": _Key(list, "a list of {goal, arguments, result}"),
    "result": _TEXT,
    "side_effect": _Key(SideEffect, "NONE, IDEMPOTENT or NON_IDEMPOTENT"),
    "needs_approval": _Key(bool, "true or false"),
    "resources": _Key(list, "a list of names"),
    "verify": _TEXT,
    "executor": _Key(Executor, "CALLER or DAEMON"),
}
_EXAMPLE_KEYS: _Keys = {
    "goal": _TEXT,
    "arguments": _Key(dict, "a mapping"),
    "result": _TEXT,
}
_DAEMON_KEYS = ("name", "executor")
_PATIENCE_S = 3600.0
"""For a person to type a result."""


def load_tools(path: Path) -> list[tuple[Tool, str | None]]:
    """The tools in a file, each with its fixed result.

    Raises:
        ConfigError: the file can't be read, or all that is wrong in it.
    """
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except YamlSyntaxError as error:
        raise _report(path, [FieldViolation(error.place, error.problem)]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _report(path, [FieldViolation("file", str(error))]) from error
    found = [FieldViolation(format_path(p.path), p.description) for p in document.problems]
    entries = document.data
    if not isinstance(entries, list):
        found.append(FieldViolation("document", "must be a list of tools"))
        raise _report(path, found)
    for index, entry in enumerate(entries):
        found += _wrong(entry, _KEYS, f"[{index}]", required=("name",))
        found += _unquoted(entry, f"[{index}]")
        found += _daemons_own(entry, f"[{index}]")
    if found:
        raise _report(path, found)
    return [_tool(entry) for entry in entries]


def _wrong(
    entry: Any, keys: _Keys, path: str, required: tuple[str, ...]
) -> Iterator[FieldViolation]:
    if not isinstance(entry, dict):
        yield FieldViolation(path, "must be a mapping")
        return
    for key in required:
        if key not in entry:
            yield FieldViolation(f"{path}.{key}", "is missing")
    for key, value in entry.items():
        if not isinstance(key, str):
            continue  # named by _unquoted
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f", did you mean {close[0]}?" if close else f", known: {', '.join(keys)}"
            yield FieldViolation(f"{path}.{key}", f"unknown key{hint}")
            continue
        if not keys[key].holds(value):
            yield FieldViolation(f"{path}.{key}", f"must be {keys[key].said}")
    examples = entry.get("examples")
    for index, example in enumerate(examples if isinstance(examples, list) else ()):
        at = f"{path}.examples[{index}]"
        yield from _wrong(example, _EXAMPLE_KEYS, at, required=("goal",))


def _unquoted(value: Any, path: str) -> Iterator[FieldViolation]:
    """Keys that YAML does not take for text, such as a bare `on`, which it reads as true."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                said = f"{json.dumps(key, default=str)} is no text: put the key in quotes"
                yield FieldViolation(path, f"the key {said}")
            yield from _unquoted(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unquoted(item, f"{path}[{index}]")


def _daemons_own(entry: Any, path: str) -> Iterator[FieldViolation]:
    """What is said of a tool that the daemon defines and executes."""
    if isinstance(entry, dict) and entry.get("executor") == Executor.DAEMON:
        for key in _KEYS:
            if key in entry and key not in _DAEMON_KEYS:
                yield FieldViolation(f"{path}.{key}", "the daemon has its own for this tool")


def _tool(entry: dict[str, Any]) -> tuple[Tool, str | None]:
    schema = entry.get("input_schema")
    result = entry.get("result")
    tool = Tool(
        name=entry["name"],
        description=entry.get("description", ""),
        input_schema_json="" if schema is None else json.dumps(schema, default=str),
        examples=tuple(
            ToolExample(
                goal=example["goal"],
                arguments_json=json.dumps(example.get("arguments", {}), default=str),
                result=example.get("result", ""),
            )
            for example in entry.get("examples", ())
        ),
        timeout_s=_PATIENCE_S if result is None else None,
        side_effect=SideEffect(entry.get("side_effect", SideEffect.NON_IDEMPOTENT)),
        executor=Executor(entry.get("executor", Executor.CALLER)),
        needs_approval=entry.get("needs_approval", False),
        resources=tuple(map(str, entry.get("resources", ()))),
        verify=entry.get("verify", ""),
    )
    return tool, result


def _report(path: Path, found: list[FieldViolation]) -> ConfigError:
    count = "1 error" if len(found) == 1 else f"{len(found)} errors"
    lines = [f"{path}: {count} in the tools"]
    lines += [f"  {violation.field}: {violation.description}" for violation in found]
    return ConfigError(
        "\n".join(lines),
        reason="TOOLS_FILE_INVALID",
        metadata={"source": path},
        violations=found,
    )
