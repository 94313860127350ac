"""The bounds of a run that its history alone decides. Pure."""

import json
from collections import Counter

from edge_agent.core import Role, Run, RunError, RunSpec, ToolCall
from edge_agent.runs import history

MAX_TOOL_ERRORS = 1
"""How many errors of one tool go back to the model; one more ends the run."""


def exceeded(run: Run, spec: RunSpec) -> RunError | None:
    """The bound that one more step would break, or that the last one has broken; None if none."""
    return _tokens(run, spec) or _cost(run, spec) or _tool_errors(run)


def too_many_calls(run: Run, spec: RunSpec, calls: tuple[ToolCall, ...]) -> RunError | None:
    """The bound that these calls, which a step has decided on, would break; None if none."""
    made = history.calls_of(run)
    limit = spec.limits.max_tool_calls
    if len(made) + len(calls) > limit:
        left = max(0, limit - len(made))
        message = f"{len(calls)} tool calls in one step, {left} left in this run (max_tool_calls)"
        return RunError("TOOL_CALL_LIMIT", message, metadata={"limit": str(limit)})
    counts = Counter(map(_identity, made))
    for call in calls:
        counts[_identity(call)] += 1
        if counts[_identity(call)] > spec.limits.max_same_calls:
            limit = spec.limits.max_same_calls
            message = (
                f"tool {call.name!r} was called with the same arguments more than {limit} times "
                "(max_same_calls)"
            )
            metadata = {"tool": call.name, "limit": str(limit)}
            return RunError("SAME_CALL_LIMIT", message, metadata=metadata)
    return None


def _tokens(run: Run, spec: RunSpec) -> RunError | None:
    limit = spec.limits.max_tokens
    used = run.usage.prompt_tokens + run.usage.completion_tokens
    if limit is None or used < limit:
        return None
    message = f"{used} tokens read and written, at most {limit} allowed (max_tokens)"
    return RunError("TOKEN_LIMIT", message, metadata={"tokens": str(used), "limit": str(limit)})


def _cost(run: Run, spec: RunSpec) -> RunError | None:
    limit, spent = spec.limits.max_cost_nano_usd, run.usage.cost_nano_usd
    if limit is None or spent <= limit:
        return None
    message = f"{spent} nano-USD spent, at most {limit} allowed (max_cost_nano_usd)"
    metadata = {"cost_nano_usd": str(spent), "limit": str(limit)}
    return RunError("COST_LIMIT", message, metadata=metadata)


def _tool_errors(run: Run) -> RunError | None:
    """A tool that errs again would err on: the model was told once."""
    names = {call.id: call.name for call in history.calls_of(run)}
    errors = Counter(
        names[turn.tool_call_id]
        for turn in run.transcript
        if turn.role is Role.TOOL and turn.is_error and turn.tool_call_id in names
    )
    for name, count in errors.items():
        if count > MAX_TOOL_ERRORS:
            message = f"tool {name!r} failed {count} times"
            return RunError("TOOL_FAILED_AGAIN", message, metadata={"tool": name})
    return None


def _identity(call: ToolCall) -> tuple[str, str]:
    return call.name, json.dumps(json.loads(call.arguments_json), sort_keys=True)
