"""Executing a run's tool calls in the caller's own code.

Owns which issued calls still wait and which must not be started any more. Sends and receives
nothing.
"""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from inspect import iscoroutinefunction

from edge_agent.core import Run, TextPart, Tool, ToolCall, ToolResult
from edge_agent.events import CancelTool, Event, RunFinished, ToolCallsIssued

Tools = Mapping[str, tuple[Tool, Callable[..., object]]]
"""Name -> the tool and what executes it: called with the arguments as keywords."""


class Toolbox:
    """The calls of one run that are still to be executed, and the rules for executing them."""

    def __init__(self, tools: Tools | None) -> None:
        self._tools = tools or {}
        self._expires_at_s: dict[str, float] = {}
        self._cancelled: set[str] = set()
        self._running: tuple[str, asyncio.Future[object]] | None = None
        self.waiting: deque[ToolCall] = deque()
        self.arrived = asyncio.Event()

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the model is told of."""
        return tuple(tool for tool, _ in self._tools.values())

    def see(self, event: Event, on_event: Callable[[Event], object] | None) -> Run | None:
        """Take note of an event; returns the run once it has ended."""
        if on_event is not None:
            on_event(event)
        body = event.body
        if isinstance(body, ToolCallsIssued):
            for call in body.tool_calls:
                if call.valid_for_s is not None:
                    self._expires_at_s[call.id] = time.monotonic() + call.valid_for_s
            self.waiting.extend(body.tool_calls)
            self.arrived.set()
        elif isinstance(body, CancelTool):
            self._cancelled.add(body.tool_call_id)
            if self._running and self._running[0] == body.tool_call_id:
                self._running[1].cancel()
        return body.run if isinstance(body, RunFinished) else None

    def execute_next(self) -> ToolResult:
        """Execute the first waiting call here; what it raises is its result."""
        call = self.waiting.popleft()
        if (refused := self._refusal(call)) is not None:
            return refused
        try:
            return _result(call, self._tools[call.name][1](**json.loads(call.arguments_json)))
        except Exception as error:  # noqa: BLE001 - the model is told, whatever the tool raises
            return _failed(call, f"{type(error).__name__}: {error}")

    async def execute_next_async(self) -> ToolResult:
        """The same without blocking the loop."""
        call = self.waiting.popleft()
        if (refused := self._refusal(call)) is not None:
            return refused
        function = self._tools[call.name][1]
        arguments = json.loads(call.arguments_json)
        if iscoroutinefunction(function):
            task: asyncio.Future[object] = asyncio.ensure_future(function(**arguments))
            self._running = (call.id, task)
        else:
            task = asyncio.ensure_future(asyncio.to_thread(function, **arguments))
        try:
            await asyncio.wait({task})
            return _stopped(call) if task.cancelled() else _result(call, task.result())
        except Exception as error:  # noqa: BLE001 - the model is told, whatever the tool raises
            return _failed(call, f"{type(error).__name__}: {error}")
        finally:
            self._running = None
            task.cancel()

    def _refusal(self, call: ToolCall) -> ToolResult | None:
        """Why a call must not be started any more."""
        if call.id in self._cancelled:
            return _stopped(call)
        if time.monotonic() > self._expires_at_s.get(call.id, float("inf")):
            return _failed(call, f"expired: not started within {call.valid_for_s:g} s")
        if call.name not in self._tools:
            return _failed(call, f"unknown tool {call.name}")
        return None


def _result(call: ToolCall, value: object) -> ToolResult:
    text = value if isinstance(value, str) else json.dumps(value)
    return ToolResult(call.id, (TextPart(text),))


def _failed(call: ToolCall, problem: str) -> ToolResult:
    return ToolResult(call.id, (TextPart(problem),), is_error=True)


def _stopped(call: ToolCall) -> ToolResult:
    return ToolResult(call.id, (TextPart("cancelled"),), cancelled=True)
