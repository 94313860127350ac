"""The daemon's own tools: the allow-list, what it names, and the calls of that.

Owns the allow-list's enforcement, the rate limits and the built-ins. Decides nothing about runs:
whether a call may be made now, was approved or is on record is theirs. All on the daemon's loop.
"""

import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime

import msgspec

from edge_agent.core import Executor, TextPart, Tool, ToolCall, ToolResult
from edge_agent.errors import NotFound, Overloaded, ToolNotReady
from edge_agent.tools import builtin
from edge_agent.tools.bucket import Bucket
from edge_agent.tools.process import McpProcess, ServerState
from edge_agent.tools.results import result, too_large
from edge_agent.tools.settings import CLOCK, AllowedTool, Builtin, ServerTool, ToolsSettings

_NO_MCP = "tools.servers: the package mcp is not installed: install edge-agent[mcp]"


class DaemonTools:
    """What the daemon executes itself, from `start` to `stop`."""

    def __init__(
        self,
        settings: ToolsSettings,
        *,
        status: Callable[[], Mapping[str, object]],
        monotonic_s: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = builtin.now_utc,
        uptime_s: Callable[[], float] = builtin.machine_uptime_s,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`status` is what `device_status` tells; nothing runs yet.

        `on_change` is called where `tools` or `problems` may have changed.
        """
        self._settings = settings
        self._status = status
        self._monotonic_s = monotonic_s
        self._now = now
        self._uptime_s = uptime_s
        self._buckets = {
            name: Bucket(allowed.rate_limit, monotonic_s())
            for name, allowed in settings.allow.items()
            if allowed.rate_limit is not None
        }
        wanted: dict[str, list[str]] = defaultdict(list)
        for allowed in settings.allow.values():
            if isinstance(allowed.source, ServerTool):
                wanted[allowed.source.server].append(allowed.source.tool)
        has_mcp = importlib.util.find_spec("mcp") is not None
        self._process = McpProcess(settings, wanted, on_change) if wanted and has_mcp else None
        self._lacks_mcp = bool(wanted) and not has_mcp

    async def start(self) -> None:
        """Begin to bring up the servers that the allow-list names; returns at once."""
        if self._process is not None:
            self._process.start()

    async def stop(self) -> None:
        """End them; open calls fail."""
        if self._process is not None:
            await self._process.stop()

    @property
    def pid(self) -> int | None:
        """The process that speaks to MCP servers; None while there is none."""
        return self._process.pid if self._process is not None else None

    def tools(self) -> Mapping[str, Tool]:
        """What may be called, by the name that the model sees.

        Those of a server that is not up are as they were the last time; absent if it never was.
        """
        return {
            name: tool
            for name, allowed in self._settings.allow.items()
            if (tool := self._tool(name, allowed)) is not None
        }

    def problems(self) -> tuple[str, ...]:
        """Why the daemon is degraded: servers that are not up, allowed tools that are not there."""
        if self._lacks_mcp:
            return (_NO_MCP,)
        process = self._process
        if process is None:
            return ()
        down = [
            f"tool server {name} is not up: {state.why_down}"
            for name, state in process.servers.items()
            if state.why_down
        ]
        wrong = [
            problem
            for name, allowed in self._settings.allow.items()
            if isinstance(source := allowed.source, ServerTool)
            and (problem := _wrong_tool(name, source, process.servers[source.server]))
        ]
        return (*([process.problem] if process.problem else []), *down, *wrong)

    def _tool(self, name: str, allowed: AllowedTool) -> Tool | None:
        if isinstance(allowed.source, Builtin):
            description, schema = builtin.DESCRIPTIONS[allowed.source.name], builtin.NO_ARGUMENTS
        else:
            process, source = self._process, allowed.source
            state = process.servers[source.server] if process is not None else None
            listed = state.tools.get(source.tool) if state is not None else None
            if listed is None:
                return None
            description, schema = listed.description, listed.input_schema_json
        return Tool(
            name,
            description,
            schema,
            timeout_s=allowed.timeout_s,
            side_effect=allowed.side_effect,
            executor=Executor.DAEMON,
            needs_approval=allowed.needs_approval,
            resources=allowed.resources,
            verify=allowed.verify,
        )

    async def call(self, call: ToolCall, *, timeout_s: float) -> ToolResult:
        """Execute one; to cancel this cancels it, and returns at once.

        An error of the tool's own is a result.

        Raises:
            NotFound: reason TOOL_NOT_LISTED, the allow-list does not name it.
            Overloaded: reason TOOL_RATE_LIMITED.
            ToolNotReady: its server is not up, or lacks it; nothing has begun.
            ToolUnavailable: its server was lost meanwhile.
            DeadlineExceeded: reason TOOL_TIMEOUT.
        """
        allowed = self._settings.allow.get(call.name)
        if allowed is None:
            message = f"tool {call.name!r} is not in the daemon's allow-list (tools.allow)"
            raise NotFound(message, reason="TOOL_NOT_LISTED", metadata={"tool": call.name})
        if self._tool(call.name, allowed) is None:
            message = f"tool {call.name!r}: {self._why_absent(call.name, allowed)}"
            raise ToolNotReady(message, metadata={"tool": call.name})
        if problem := _wrong_arguments(call.arguments_json):
            return self._result(call, problem, is_error=True)
        if isinstance(allowed.source, Builtin):
            self._take(call.name)
            return self._result(call, self._builtin(allowed.source), is_error=False)
        assert self._process is not None  # noqa: S101 - or the tool would be absent
        self._process.require_up(allowed.source)  # or the call would cost one of its rate
        self._take(call.name)
        said = await self._process.call(allowed.source, call.arguments_json, timeout_s)
        if said.too_large:
            return too_large(call, said.text)
        return ToolResult(call.id, (TextPart(said.text),), said.is_error)

    def _why_absent(self, name: str, allowed: AllowedTool) -> str:
        if self._process is None:
            return _NO_MCP
        assert isinstance(allowed.source, ServerTool)  # noqa: S101 - built-ins are always there
        state = self._process.servers[allowed.source.server]
        wrong = _wrong_tool(name, allowed.source, state)
        return wrong or state.why_down or self._process.problem or "its server is starting"

    def _take(self, name: str) -> None:
        bucket = self._buckets.get(name)
        wait_s = bucket.take(self._monotonic_s()) if bucket is not None else None
        if wait_s is not None:
            limit = self._settings.allow[name].rate_limit
            raise Overloaded(
                f"tool {name!r} was called too often: {limit} calls a minute "
                f"(tools.allow.{name}.rate_limit), the next one in {wait_s:.1f} s",
                reason="TOOL_RATE_LIMITED",
                metadata={"tool": name, "rate_limit": limit, "wait_s": f"{wait_s:.1f}"},
                retry_after_s=wait_s,
            )

    def _builtin(self, source: Builtin) -> str:
        if source.name == CLOCK:
            return builtin.clock(self._now(), self._uptime_s())
        return builtin.device_status(self._status)

    def _result(self, call: ToolCall, text: str, *, is_error: bool) -> ToolResult:
        limit = self._settings.max_result_bytes
        return result(call, text, is_error=is_error, max_bytes=limit)


def _wrong_tool(name: str, source: ServerTool, state: ServerState) -> str | None:
    """Why a server that was up has not the tool that is allowed."""
    if source.tool in state.refused:
        return f"tools.allow.{name}: {state.refused[source.tool]}"
    if state.seen and source.tool not in state.tools:
        return f"tools.allow.{name}: server {source.server} has no tool {source.tool}"
    return None


def _wrong_arguments(arguments_json: str) -> str | None:
    try:
        msgspec.json.decode(arguments_json, type=dict[str, object])
    except msgspec.DecodeError as error:
        return f"the arguments are no JSON object: {error}"
    return None
