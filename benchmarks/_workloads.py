"""What robots really send, as prompts of four sizes: a goal and a set of tools.

The tools are those of `examples/robots`, with their worked examples. Where one robot's are too few,
several robots' stand side by side, and again under further names: a caller that fills a long
context does so with many tools.

    name  tools  tokens    counted with the embedded engine's tokenizer and prompt format, up to
    0.3k      3     314    where the model's turn begins; `tests/benchmarks/test_workloads.py`
    2.5k     25    2536    counts them anew
    5k       54    5092
    11k     118   11391

An engine takes a workload whose tokens, and the output's, fit its context: 5k and 11k are for
engines with a longer one than the embedded engine's 4096.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from edge_agent.core import Message, Role, TextPart, Tool
from examples.robots.show import make_robot


@dataclass(frozen=True, slots=True)
class Workload:
    """How many tokens it is meant to have, the goal, and (robot, number of its tools) in order."""

    nominal_tokens: int
    goal: str
    parts: tuple[tuple[str, int], ...]


WORKLOADS = {
    "0.3k": Workload(300, "Stand up.", (("quadruped", 3),)),
    "2.5k": Workload(2500, "Pick up the red cube.", (("arm", 22), ("warehouse", 3))),
    "5k": Workload(
        5000, "Walk to the pump hall.", (("quadruped", 21), ("arm", 22), ("ros2_operator", 11))
    ),
    "11k": Workload(
        11_000,
        "Walk to the pump hall.",
        (
            ("quadruped", 21),
            ("arm", 22),
            ("ros2_operator", 18),
            ("warehouse", 7),
            ("quadruped", 21),
            ("arm", 22),
            ("ros2_operator", 7),
        ),
    ),
}


def workload(name: str) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """The messages and tools of one of WORKLOADS; the same at every call."""
    chosen = WORKLOADS[name]
    tools: list[Tool] = []
    for robot, count in chosen.parts:
        tools += _as_new(_tools(robot)[:count], {tool.name for tool in tools})
    return (Message(Role.USER, (TextPart(chosen.goal),)),), tuple(tools)


def _tools(robot: str) -> list[Tool]:
    return [tool for tool, _ in make_robot(robot).tools.values()]


def _as_new(tools: Sequence[Tool], taken: AbstractSet[str]) -> list[Tool]:
    """The tools, each under a further name where its own is taken."""
    return [replace(tool, name=_free(tool.name, taken)) for tool in tools]


def _free(name: str, taken: AbstractSet[str]) -> str:
    while name in taken:
        name = f"other_{name}"
    return name
