"""Tools and what comes of their calls, from request messages to core values.

Collects all that is wrong with them in the `Violations` of the request that they are part of.
"""

import re
from collections.abc import Sequence

from edge_agent.api.convert_conversation import MAX_ITEMS, check_tool_name, count_items, parts_of
from edge_agent.api.ports import RequestLimits
from edge_agent.api.validation import Violations, shown
from edge_agent.core import (
    Executor,
    Lifecycle,
    Part,
    SideEffect,
    Tool,
    ToolExample,
    ToolResult,
)
from edge_agent.events import ToolUpdated
from edge_agent.v1 import run_service_pb2, types_pb2

NO_ARGUMENTS = '{"type":"object","properties":{},"additionalProperties":false}'
MAX_EXAMPLES = 16
MAX_RESOURCES = 16
_RESOURCE = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_GRAMMAR_OPTIONS = "x-guidance"
_SIDE_EFFECTS = {
    value: SideEffect[name[12:]] for name, value in types_pb2.SideEffect.items() if value
} | {types_pb2.SIDE_EFFECT_UNSPECIFIED: SideEffect.NON_IDEMPOTENT}
_LIFECYCLES = {
    value: Lifecycle[name[10:]] for name, value in types_pb2.Lifecycle.items() if value
} | {types_pb2.LIFECYCLE_UNSPECIFIED: Lifecycle.INSTANT}


def tool_results(
    results: Sequence[types_pb2.ToolResult], limits: RequestLimits, prefix: str = "results"
) -> tuple[ToolResult, ...]:
    """Results of tool calls.

    Raises:
        InvalidRequest: names every wrong field.
        Unsupported: it has parts that are not text.
    """
    found = Violations()
    if not results:
        found.add(prefix, "is empty, at least 1 result expected")
    items = count_items(results, lambda result: len(result.parts))
    if not found.count(prefix, items, MAX_ITEMS, "results and parts in all"):
        found.raise_if_any()
    seen: set[str] = set()
    for index, result in enumerate(results):
        path = f"{prefix}[{index}]"
        found.name(f"{path}.tool_call_id", result.tool_call_id)
        if result.tool_call_id in seen:
            found.add(f"{path}.tool_call_id", f"{shown(result.tool_call_id)} appears twice")
        seen.add(result.tool_call_id)
        if result.HasField("error"):
            found.add(f"{path}.error", "is set, but only the daemon sets it")
    converted = tuple(
        ToolResult(
            tool_call_id=result.tool_call_id,
            parts=_result_parts(result.parts, limits, found, f"{prefix}[{index}].parts"),
            is_error=result.is_error,
            cancelled=result.cancelled,
        )
        for index, result in enumerate(results)
    )
    found.raise_if_any()
    return converted


def tool_update(
    request: run_service_pb2.ToolUpdateRequest, limits: RequestLimits
) -> tuple[str, ToolUpdated]:
    """The run, and the news of one of its calls. Raises as `tool_results` does."""
    found = Violations()
    found.name("run_id", request.run_id)
    found.name("tool_call_id", request.tool_call_id)
    said: tuple[Part, ...] = ()
    if found.count("parts", len(request.parts), MAX_ITEMS, "parts"):
        said = _result_parts(request.parts, limits, found, "parts")
    if not request.parts and not request.done:
        found.add("parts", "is empty, and done is not set: there is no news")
    found.raise_if_any()
    return request.run_id, ToolUpdated(request.tool_call_id, said, request.is_error, request.done)


def schema_of(text: str, found: Violations, path: str) -> dict[str, object] | None:
    """A JSON object that does not tell the grammar engine what to overlook."""
    schema = found.json_object(path, text)
    if schema is not None and _GRAMMAR_OPTIONS in schema:
        found.add(path, f'"{_GRAMMAR_OPTIONS}" is the daemon\'s own, leave it out')
    return schema


def tools_of(
    tools: Sequence[types_pb2.Tool], limits: RequestLimits, found: Violations, path: str
) -> tuple[Tool, ...]:
    """The tools as core values; none where they are too many."""
    if len(tools) > limits.max_tools:
        found.add(path, f"{len(tools)} tools, at most {limits.max_tools} allowed (runs.max_tools)")
        return ()
    first_at: dict[str, int] = {}
    for index, tool in enumerate(tools):
        at = f"{path}[{index}].name"
        check_tool_name(at, tool.name, found)
        if tool.name in first_at:
            found.add(at, f"{shown(tool.name)} is already {path}[{first_at[tool.name]}]")
        first_at.setdefault(tool.name, index)
    converted = tuple(
        _daemon_tool(tool, limits, found, f"{path}[{index}]")
        if tool.executor == types_pb2.EXECUTOR_DAEMON
        else _tool(tool, found, f"{path}[{index}]")
        for index, tool in enumerate(tools)
    )
    _check_verifiers(converted, found, path)
    return converted


def _daemon_tool(tool: types_pb2.Tool, limits: RequestLimits, found: Violations, path: str) -> Tool:
    """A tool of the allow-list, named and nothing else."""
    for field, _ in tool.ListFields():
        if field.name not in ("name", "executor"):
            found.add(f"{path}.{field.name}", "is set, but the daemon has its own for this tool")
    allowed = limits.daemon_tools.get(tool.name)
    if allowed is None:
        known = ", ".join(sorted(limits.daemon_tools)) or "it has none"
        found.add(f"{path}.name", f"{shown(tool.name)} is no tool of the daemon's: {known}")
    return allowed or Tool(tool.name, "", NO_ARGUMENTS, executor=Executor.DAEMON)


def _tool(tool: types_pb2.Tool, found: Violations, path: str) -> Tool:
    found.text(f"{path}.description", tool.description)
    if tool.executor not in types_pb2.Executor.values():
        known = ", ".join(Executor)
        found.add(f"{path}.executor", f"{tool.executor} is no executor, one of {known} expected")
    if tool.input_schema_json:
        at = f"{path}.input_schema_json"
        schema = schema_of(tool.input_schema_json, found, at)
        if schema is not None and schema.get("type") != "object":
            found.add(at, f'{shown(tool.input_schema_json)} must have "type": "object"')
    few = found.count(f"{path}.examples", len(tool.examples), MAX_EXAMPLES, "examples")
    examples = tool.examples if few else ()
    for index, example in enumerate(examples):
        at = f"{path}.examples[{index}]"
        found.text(f"{at}.goal", example.goal)
        found.text(f"{at}.result", example.result)
        found.json_object(f"{at}.arguments_json", example.arguments_json)
    timeout_s = valid_for_s = None
    if tool.HasField("timeout"):
        timeout_s = found.duration_s(f"{path}.timeout", tool.timeout)
    if tool.HasField("valid_for"):
        valid_for_s = found.duration_s(f"{path}.valid_for", tool.valid_for)
    side_effect = _SIDE_EFFECTS.get(tool.side_effect)
    if side_effect is None:
        known = ", ".join(SideEffect)
        found.add(
            f"{path}.side_effect", f"{tool.side_effect} is no side effect, one of {known} expected"
        )
    lifecycle = _LIFECYCLES.get(tool.lifecycle)
    if lifecycle is None:
        known = ", ".join(Lifecycle)
        found.add(f"{path}.lifecycle", f"{tool.lifecycle} is no lifecycle, one of {known} expected")
    return Tool(
        name=tool.name,
        description=tool.description,
        input_schema_json=tool.input_schema_json or NO_ARGUMENTS,
        examples=tuple(ToolExample(e.goal, e.arguments_json, e.result) for e in examples),
        timeout_s=timeout_s,
        valid_for_s=valid_for_s,
        side_effect=side_effect or SideEffect.NON_IDEMPOTENT,
        needs_approval=tool.needs_approval,
        lifecycle=lifecycle or Lifecycle.INSTANT,
        resources=_resources(tool.resources, found, f"{path}.resources"),
        verify=tool.verify,
    )


def _resources(names: Sequence[str], found: Violations, path: str) -> tuple[str, ...]:
    if not found.count(path, len(names), MAX_RESOURCES, "resources"):
        return ()
    for index, name in enumerate(names):
        if not _RESOURCE.fullmatch(name):
            found.add(f"{path}[{index}]", f"{shown(name)} does not match {_RESOURCE.pattern}")
        elif name in names[:index]:
            found.add(f"{path}[{index}]", f"{shown(name)} appears twice")
    return tuple(names)


def _check_verifiers(tools: Sequence[Tool], found: Violations, path: str) -> None:
    """That who tells whether a call acted is there, and acts not itself."""
    by_name = {tool.name: tool for tool in tools}
    for index, tool in enumerate(tools):
        if not tool.verify:
            continue
        at, verifier = f"{path}[{index}].verify", by_name.get(tool.verify)
        if verifier is None:
            found.add(at, f"{shown(tool.verify)} is no tool of this run")
        elif verifier.side_effect is not SideEffect.NONE or verifier.resources:
            found.add(at, f"{shown(tool.verify)} must have side effect NONE and no resources")
        elif verifier.lifecycle is Lifecycle.BACKGROUND or verifier.needs_approval:
            found.add(at, f"{shown(tool.verify)} must be INSTANT and need no approval")


def _result_parts(
    parts: Sequence[types_pb2.Part], limits: RequestLimits, found: Violations, path: str
) -> tuple[Part, ...]:
    size = sum(len(part.text.encode()) for part in parts)
    if size > limits.max_tool_result_bytes:
        limit = limits.max_tool_result_bytes
        where = "(runs.max_tool_result_size)"
        found.add(path, f"{size} bytes of text, at most {limit} allowed {where}")
    return parts_of(parts, found, path)
