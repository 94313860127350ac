"""What is asked of a tool step, what would be right, and the robot set of `_tool_robots.yaml`.

The robot set has two halves. All that is tuned is tuned on `dev`; figures are from `report`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from edge_agent.core import ANSWER, Message, Role, TextPart, Tool, ToolCall, ToolExample

Half = Literal["dev", "report"]
_ROBOTS = Path(__file__).with_name("_tool_robots.yaml")


@dataclass(frozen=True, slots=True)
class Case:
    """One step to decide. `group` has its tools in common; `tool` is the right one, or ANSWER.

    `right` tells whether a call of the right tool has right arguments; None: more would do.
    """

    group: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    tool: str
    right: Callable[[ToolCall], bool] | None


def robot_cases(half: Half) -> list[Case]:
    """Each robot's prompts of one half, in the file's order; the same at every call."""
    robots: list[dict[str, Any]] = yaml.safe_load(_ROBOTS.read_text())
    return [case for robot in robots for case in _cases(robot)[half == "report" :: 2]]


def _cases(robot: Mapping[str, Any]) -> list[Case]:
    tools = tuple(_tool(each) for each in robot["tools"])
    system = Message(Role.SYSTEM, (TextPart(robot["system"]),))
    return [
        Case(
            robot["robot"],
            (system, Message(Role.USER, (TextPart(said),))),
            tools,
            tool,
            None if tool == ANSWER or arguments is None else _same(arguments),
        )
        for said, tool, arguments in robot["prompts"]
    ]


def _tool(fields: Mapping[str, Any]) -> Tool:
    properties = {name: _typed(value) for name, value in fields["properties"].items()}
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    goal, arguments = fields["example"]
    example = ToolExample(goal, json.dumps(arguments))
    return Tool(fields["name"], fields["description"], json.dumps(schema), (example,))


def _typed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return schema if "type" in schema else {"type": "string", **schema}


def _same(arguments: Mapping[str, Any]) -> Callable[[ToolCall], bool]:
    """Whether a call has these arguments; texts are compared without case and outer spaces."""

    def right(call: ToolCall) -> bool:
        return _plain(json.loads(call.arguments_json)) == _plain(arguments)

    return right


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.strip().casefold() if isinstance(value, str) else value
        for name, value in arguments.items()
    }
