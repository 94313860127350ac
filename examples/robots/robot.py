"""What the simulated robots have in common: how a world's methods become tools, and goals.

A world is a class whose methods change and read its state. A method marked with `tool` is one that
the model may call: its docstring is the description, its parameters without a default are required.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edge_agent.client import Tools
from edge_agent.core import SideEffect, Tool, ToolExample

Method = TypeVar("Method", bound=Callable[..., object])

_MARK = "tool"


class CannotDo(Exception):
    """The world is in no state for this. The model is told, as the tool's result."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What somebody wants, in plain words, and the tool that a good agent calls first."""

    text: str
    first_tool: str


@dataclass(frozen=True, slots=True)
class Robot:
    """A demo: a world in its first state, as tools, and the goals given to it in this order.

    `stops` says which BACKGROUND tools' calls are over once a tool has done its work.
    """

    name: str
    tools: Tools
    goals: tuple[Goal, ...]
    max_steps: int = 3
    max_output_tokens: int = 64
    stops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def tool(
    goal: str, arguments: Mapping[str, object] | None = None, /, **properties: object
) -> Callable[[Method], Method]:
    """Mark a method as a tool.

    Args:
        goal: of its one worked example.
        arguments: that the example calls it with; none for a tool without arguments.
        properties: JSON Schema of each of its parameters.
    """

    def mark(method: Method) -> Method:
        parameters = inspect.signature(method).parameters.values()
        optional = {each.name for each in parameters if each.default is not inspect.Parameter.empty}
        schema = {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name not in optional],
            "additionalProperties": False,
        }
        name, description = method.__name__, inspect.getdoc(method) or ""
        example = ToolExample(goal, json.dumps(arguments or {}))
        method.__dict__[_MARK] = Tool(name, description, json.dumps(schema), (example,))
        return method

    return mark


def rules(**fields: Any) -> Callable[[Method], Method]:
    """Say of a tool how it may be called: fields of `Tool`. The model is told nothing of it."""

    def mark(method: Method) -> Method:
        method.__dict__[_MARK] = dataclasses.replace(method.__dict__[_MARK], **fields)
        return method

    return mark


looks = rules(side_effect=SideEffect.NONE)
"""Of a tool that changes nothing."""

sets = rules(side_effect=SideEffect.IDEMPOTENT)
"""Of a tool that may be called twice with the same arguments."""


def tools_of(world: object) -> dict[str, tuple[Tool, Callable[..., object]]]:
    """The marked methods of a world, in the order in which its class defines them."""
    methods = [each for each in vars(type(world)).values() if inspect.isfunction(each)]
    marked = [vars(method)[_MARK] for method in methods if _MARK in vars(method)]
    return {each.name: (each, getattr(world, each.name)) for each in marked}


def one_of(*values: str) -> dict[str, Any]:
    """One of these words."""
    return {"enum": list(values)}


def number(minimum: float, maximum: float) -> dict[str, Any]:
    """A whole number within bounds."""
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def maybe_number(minimum: float, maximum: float) -> dict[str, Any]:
    """A whole number within bounds, or null for what the robot thinks best."""
    return {**number(minimum, maximum), "type": ["integer", "null"]}


def text(max_length: int) -> dict[str, Any]:
    """Some text, not empty."""
    return {"type": "string", "minLength": 1, "maxLength": max_length}


def switch() -> dict[str, Any]:
    """On or off."""
    return {"type": "boolean"}
