"""Callers of a real daemon who play a robot's driver by hand, and what they wait for."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

from edge_agent.client import Client
from edge_agent.core import Run, RunState, TextPart, Tool, ToolCall, ToolResult
from edge_agent.events import (
    CancelTool,
    Event,
    EventBody,
    StateChanged,
    ToolCallsIssued,
    ToolResultAccepted,
)
from examples.robots.show import make_robot
from tests.support.daemon import DaemonProcess
from tests.support.scripted_worker import Calls, script

Body = TypeVar("Body", bound=EventBody)


def robot_tools(robot: str, **changes: dict[str, Any]) -> tuple[Tool, ...]:
    """A robot's tools; `changes` are fields of some, by name."""
    tools = (tool for tool, _ in make_robot(robot).tools.values())
    return tuple(dataclasses.replace(tool, **changes.get(tool.name, {})) for tool in tools)


class Caller(Client):
    """One client over a connection of its own."""

    def __init__(self, daemon: DaemonProcess, name: str, robot: str = "quadruped") -> None:
        super().__init__(str(daemon.api_socket), name=name)
        self.tools = robot_tools(robot)

    def __enter__(self) -> Self:
        return self

    def begin(self, *steps: str | Calls, **options: Any) -> str:
        """A run that does these steps."""
        tools = options.pop("tools", self.tools)
        return self.create(script(*steps), tools, **options).id

    def until(self, run_id: str, kind: type[Body], which: Callable[[Body], bool]) -> Body:
        """The first event of this kind for which that holds, from the run's beginning."""
        for event in self.watch(run_id, 0):
            if isinstance(event.body, kind) and which(event.body):
                return event.body
        raise AssertionError(f"the run has ended without: {self.get(run_id)}")

    def issued(self, run_id: str, tool: str) -> ToolCall:
        """The run's first call of this tool, once it is issued."""

        def calls(body: ToolCallsIssued) -> list[ToolCall]:
            return [call for call in body.tool_calls if call.name == tool]

        return calls(self.until(run_id, ToolCallsIssued, lambda body: bool(calls(body))))[0]

    def refused(self, run_id: str, call_id: str = "call-1") -> ToolResult:
        """What a call of the run got instead of being issued."""
        body = self.until(
            run_id, ToolResultAccepted, lambda body: body.result.tool_call_id == call_id
        )
        assert body.result.is_error
        return body.result

    def reached(self, run_id: str, state: RunState) -> Run:
        """The run, once it is in this state."""
        self.until(run_id, StateChanged, lambda body: body.state is state)
        return self.get(run_id)

    def told_to_stop(self, run_id: str, call_id: str) -> CancelTool:
        """The order to stop a call."""
        return self.until(run_id, CancelTool, lambda body: body.tool_call_id == call_id)

    def done(self, run_id: str, call_id: str, text: str = "ok", **fields: Any) -> None:
        """The result of a call."""
        self.submit_tool_results(run_id, [ToolResult(call_id, (TextPart(text),), **fields)])

    def background(self, tool: str = "start_patrol", **options: Any) -> tuple[str, str]:
        """A run whose call goes on, and the call."""
        arguments: dict[str, object] = {"route": "plant"} if tool == "start_patrol" else {}
        run_id = self.begin([(tool, arguments)], "It goes on.", **options)
        call = self.issued(run_id, tool)
        self.done(run_id, call.id, "begun")
        self.until(run_id, ToolResultAccepted, lambda body: body.goes_on)
        return run_id, call.id

    def ended(self, run_id: str) -> Run:
        """The run, once it has ended."""
        for _ in self.watch(run_id):
            pass
        return self.get(run_id)

    def since(self, run_id: str, sequence: int) -> Iterator[Event]:
        """What has happened to a run after an event, until it has ended."""
        return (event for event in self.watch(run_id, sequence) if event.sequence > sequence)
