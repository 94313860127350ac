"""From request messages to core values, with every check that needs no state.

Owns what a well-formed request is and collects all that is wrong with it into one InvalidRequest;
fills in the defaults. Never asks the owners of runs or engines anything.
"""

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from edge_agent.api.convert_conversation import (
    check_tools_of,
    messages_of,
)
from edge_agent.api.convert_tools import schema_of, tools_of
from edge_agent.api.ports import RequestLimits
from edge_agent.api.validation import MAX_NAME_BYTES, Violations, shown
from edge_agent.core import (
    HaltScope,
    Limits,
    Message,
    Overflow,
    Priority,
    Role,
    RunSpec,
    RunState,
    Sampling,
    SessionUse,
    ToolStrategy,
)
from edge_agent.heartbeat import Heartbeat
from edge_agent.v1 import engine_service_pb2, run_service_pb2, types_pb2

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_REASON_BYTES = 256
MAX_EVIDENCE_BYTES = 1024
MAX_RESULTS_WAIT_S = 3600.0
MAX_COST_NANO_USD = 10**18
"""A billion dollars: beyond it no bound is meant."""
MAX_CURSOR = 2**63 - 1
"""What the ledger can count to."""
MAX_TOKEN_BYTES = 256
MIN_WINDOW_S = 0.1
MAX_WINDOW_S = 3600.0
MAX_AFTER_LAPSE_S = 86400.0
_MAX_UINT32 = 2**32 - 1
_STATES = {value: RunState[name[10:]] for name, value in run_service_pb2.RunState.items() if value}
_SCOPES = {
    value: HaltScope[name[11:]] for name, value in run_service_pb2.HaltScope.items() if value
}
_PRIORITIES = {
    value: Priority[name[9:]] for name, value in run_service_pb2.Priority.items() if value
} | {run_service_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL}
_OVERFLOWS = {
    value: Overflow[name[17:]] for name, value in run_service_pb2.SessionOverflow.items() if value
}
_STRATEGIES = {
    value: ToolStrategy[name[14:]] for name, value in types_pb2.ToolStrategy.items() if value
}


def run_request(
    request: run_service_pb2.CreateRunRequest | run_service_pb2.ExecuteRunRequest,
    limits: RequestLimits,
    prefix: str = "",
) -> RunSpec:
    """The run that a request asks for; `prefix` (such as `start.`) leads every field path.

    Raises:
        InvalidRequest: names every wrong field.
        Unsupported: it has parts that are not text.
    """
    found = Violations()
    found.text(f"{prefix}request_id", request.request_id, max_bytes=MAX_NAME_BYTES)
    if isinstance(request, run_service_pb2.ExecuteRunRequest):
        on_disconnect = request.on_disconnect
        if on_disconnect not in run_service_pb2.OnDisconnect.values():
            found.add(f"{prefix}on_disconnect", f"{on_disconnect} is no known value")
    if not request.HasField("spec"):
        found.add(f"{prefix}spec", "is missing")
        found.raise_if_any()
    spec = _spec(request.spec, limits, found, f"{prefix}spec")
    found.raise_if_any()
    return spec


def resumption(request: run_service_pb2.ResumeRunRequest) -> tuple[str, tuple[Message, ...]]:
    """The run to resume, and what is to be said first. Raises as `run_request` does."""
    found = Violations()
    found.name("run_id", request.run_id)
    messages = _said_by_users(request.messages, found) if request.messages else ()
    found.raise_if_any()
    return request.run_id, messages


def appended(request: run_service_pb2.AppendMessagesRequest) -> tuple[str, tuple[Message, ...]]:
    """The run, and what is said to it. Raises as `run_request` does."""
    found = Violations()
    found.name("run_id", request.run_id)
    messages = _said_by_users(request.messages, found)
    found.raise_if_any()
    return request.run_id, messages


def resolution(request: run_service_pb2.ResolveOutcomeRequest) -> tuple[str, str, bool, str]:
    """Run, tool call, whether it acted, and how that is known. Raises InvalidRequest."""
    found = Violations()
    found.name("run_id", request.run_id)
    found.name("tool_call_id", request.tool_call_id)
    if request.outcome not in (run_service_pb2.OUTCOME_ACTED, run_service_pb2.OUTCOME_NOT_ACTED):
        found.add("outcome", f"{request.outcome} is neither ACTED nor NOT_ACTED")
    if not request.evidence.strip():
        found.add("evidence", "is empty: say how it is known")
    found.text("evidence", request.evidence, max_bytes=MAX_EVIDENCE_BYTES)
    found.raise_if_any()
    acted = request.outcome == run_service_pb2.OUTCOME_ACTED
    return request.run_id, request.tool_call_id, acted, request.evidence


def decision(request: run_service_pb2.DecideToolCallRequest) -> tuple[str, str, str]:
    """Run, tool call and reason of an approval or denial. Raises InvalidRequest."""
    found = Violations()
    found.name("run_id", request.run_id)
    found.name("tool_call_id", request.tool_call_id)
    found.text("reason", request.reason, max_bytes=MAX_REASON_BYTES)
    found.raise_if_any()
    return request.run_id, request.tool_call_id, request.reason


def results_wanted(request: run_service_pb2.WaitResultsRequest) -> tuple[int, float]:
    """How many results are wanted, and how long to wait for one. Raises InvalidRequest."""
    found = Violations()
    found.number("cursor", request.cursor, 0, MAX_CURSOR)
    found.number("max_results", request.max_results, 0, MAX_PAGE_SIZE)
    wait_s: float | None = 0.0
    if request.HasField("wait"):
        wait_s = found.duration_s("wait", request.wait, MAX_RESULTS_WAIT_S)
    found.raise_if_any()
    return request.max_results or DEFAULT_PAGE_SIZE, wait_s or 0.0


def acknowledged(request: run_service_pb2.AckResultsRequest) -> int:
    """The cursor up to which results are acknowledged. Raises InvalidRequest."""
    found = Violations()
    found.number("cursor", request.cursor, 0, MAX_CURSOR)
    found.raise_if_any()
    return request.cursor


def heartbeat(request: run_service_pb2.BeatRequest) -> Heartbeat | None:
    """What a client that wants to be watched asks for; None where it is, or wants to be no more.

    Raises InvalidRequest.
    """
    found = Violations()
    found.text("session", request.session, max_bytes=MAX_NAME_BYTES)
    asked_s: dict[str, float | None] = {}
    for field, duration in request.ListFields():
        if isinstance(duration, Duration):
            most_s = MAX_WINDOW_S if field.name == "window" else MAX_AFTER_LAPSE_S
            asked_s[field.name] = found.duration_s(field.name, duration, most_s)
    if request.nonce or request.stop:
        for name in asked_s:
            found.add(name, "is set, but only a beat with nonce 0 that does not stop says it")
        found.raise_if_any()
        return None
    window_s, suspend_s, cancel_s = map(asked_s.get, ("window", "suspend_after", "cancel_after"))
    if "window" not in asked_s:
        found.add("window", "is missing, a beat with nonce 0 begins the watch")
    elif window_s is not None and window_s < MIN_WINDOW_S:
        found.add("window", f"{window_s:g}s is below {MIN_WINDOW_S:g}s")
    if not asked_s.keys() & {"suspend_after", "cancel_after"}:
        found.add("suspend_after", "is missing, and so is cancel_after: one of them is to be set")
    elif suspend_s is not None and cancel_s is not None and cancel_s <= suspend_s:
        found.add("cancel_after", f"{cancel_s:g}s is not above suspend_after, {suspend_s:g}s")
    found.raise_if_any()
    return Heartbeat(window_s or 0.0, suspend_s, cancel_s)


def run_id(value: str) -> str:
    """The id of a run; whether there is one is for the owner of runs to say."""
    return name(value, "run_id")


def explained_run(request: engine_service_pb2.ExplainRequest) -> str:
    """The run whose waiting steps are asked for; empty: all. Raises InvalidRequest."""
    return run_id(request.run_id) if request.HasField("run_id") else ""


def name(value: str, path: str = "name") -> str:
    """A name or id: neither empty nor long. Raises InvalidRequest."""
    found = Violations()
    found.name(path, value)
    found.raise_if_any()
    return value


def page(
    request: run_service_pb2.ListRunsRequest,
) -> tuple[frozenset[RunState], int, str]:
    """States, page size and page token of a listing. Raises InvalidRequest."""
    found = Violations()
    if found.count("states", len(request.states), len(_STATES), "states"):
        for index, state in enumerate(request.states):
            if state not in _STATES:
                found.add(f"states[{index}]", f"{state} is no state")
    found.number("page_size", request.page_size, 0, MAX_PAGE_SIZE)
    found.text("page_token", request.page_token, max_bytes=MAX_TOKEN_BYTES)
    found.raise_if_any()
    states = frozenset(_STATES[state] for state in request.states)
    return states, request.page_size or DEFAULT_PAGE_SIZE, request.page_token


def halt(request: run_service_pb2.HaltRequest) -> tuple[HaltScope, str, str]:
    """Scope, target and reason of a Halt. Raises InvalidRequest.

    The reason is for people, so one that is too long is cut and never a ground to refuse a Halt.
    """
    found = Violations()
    scope = _SCOPES.get(request.scope)
    if scope is None:
        found.add("scope", f"{request.scope} is no scope, one of {', '.join(HaltScope)} expected")
    elif scope is HaltScope.ALL:
        if request.target:
            found.add("target", f"{shown(request.target)} is set, but scope ALL has no target")
    else:
        found.name("target", request.target)
    found.raise_if_any()
    reason = request.reason.replace("\0", "")
    if len(reason.encode()) > MAX_REASON_BYTES:
        cut = reason.encode()[: MAX_REASON_BYTES - 3].decode(errors="ignore")
        reason = f"{cut}..."
    return scope or HaltScope.ALL, request.target, reason


def _said_by_users(said: Sequence[types_pb2.Message], found: Violations) -> tuple[Message, ...]:
    messages = messages_of(said, found, "messages")
    for index, message in enumerate(messages):
        if message.role is not Role.USER:
            found.add(f"messages[{index}].role", f"is {message.role}, user expected")
    return messages


def _spec(
    spec: run_service_pb2.RunSpec, limits: RequestLimits, found: Violations, path: str
) -> RunSpec:
    engine = spec.engine or limits.default_engine() or ""
    if not engine:
        found.add(
            f"{path}.engine",
            "is empty, runs.default_engine is not set, and there is not exactly 1 engine",
        )
    found.text(f"{path}.engine", spec.engine, max_bytes=MAX_NAME_BYTES)
    found.text(f"{path}.agent", spec.agent, max_bytes=MAX_NAME_BYTES)
    priority = _PRIORITIES.get(spec.priority)
    if priority is None:
        known = ", ".join(Priority)
        found.add(f"{path}.priority", f"{spec.priority} is no priority, one of {known} expected")
    if spec.output_schema_json:
        schema_of(spec.output_schema_json, found, f"{path}.output_schema_json")
    timeout_s = None
    if spec.HasField("timeout"):
        timeout_s = found.duration_s(f"{path}.timeout", spec.timeout, limits.max_timeout_s)
    messages = messages_of(spec.messages, found, f"{path}.messages")
    tools = tools_of(spec.tools, limits, found, f"{path}.tools")
    if len(tools) == len(spec.tools):
        check_tools_of(messages, tools, found, f"{path}.messages")
    strategy = _STRATEGIES.get(spec.tool_strategy)
    if strategy is None and spec.tool_strategy:
        known = ", ".join(each.name for each in ToolStrategy)
        problem = f"{spec.tool_strategy} is no tool strategy, one of {known} expected"
        found.add(f"{path}.tool_strategy", problem)
    return RunSpec(
        messages=messages,
        engine=engine,
        limits=_limits(spec.limits, limits, found, f"{path}.limits"),
        timeout_s=limits.timeout_s if timeout_s is None else timeout_s,
        tools=tools,
        output_schema_json=spec.output_schema_json,
        sampling=_sampling(spec.sampling, found, f"{path}.sampling"),
        agent=spec.agent,
        priority=priority or Priority.NORMAL,
        durable=spec.durable if spec.HasField("durable") else limits.durable,
        tool_strategy=strategy,
        session=_session(spec.session, found, f"{path}.session")
        if spec.HasField("session")
        else None,
    )


def _session(use: run_service_pb2.SessionUse, found: Violations, path: str) -> SessionUse:
    found.name(f"{path}.id", use.id)
    overflow = _OVERFLOWS.get(use.overflow)
    if overflow is None and use.overflow:
        known = ", ".join(Overflow)
        found.add(f"{path}.overflow", f"{use.overflow} is no overflow, one of {known} expected")
    return SessionUse(use.id, overflow)


def _limits(asked: types_pb2.Limits, limits: RequestLimits, found: Violations, path: str) -> Limits:
    steps, calls = limits.max_steps, limits.max_tool_calls
    if asked.HasField("max_steps"):
        found.number(f"{path}.max_steps", asked.max_steps, 1, limits.max_steps)
        steps = asked.max_steps
    if asked.HasField("max_tool_calls"):
        found.number(f"{path}.max_tool_calls", asked.max_tool_calls, 0, limits.max_tool_calls)
        calls = asked.max_tool_calls
    tokens = None
    if asked.HasField("max_output_tokens"):
        found.number(f"{path}.max_output_tokens", asked.max_output_tokens, 1, _MAX_UINT32)
        tokens = asked.max_output_tokens
    same = limits.max_same_calls
    if asked.HasField("max_same_calls"):
        found.number(f"{path}.max_same_calls", asked.max_same_calls, 1, limits.max_same_calls)
        same = asked.max_same_calls
    total = None
    if asked.HasField("max_tokens"):
        found.number(f"{path}.max_tokens", asked.max_tokens, 1, _MAX_UINT32)
        total = asked.max_tokens
    cost = None
    if asked.HasField("max_cost_nano_usd"):
        found.number(f"{path}.max_cost_nano_usd", asked.max_cost_nano_usd, 0, MAX_COST_NANO_USD)
        cost = asked.max_cost_nano_usd
    return Limits(
        steps, calls, tokens, max_tokens=total, max_same_calls=same, max_cost_nano_usd=cost
    )


def _sampling(asked: types_pb2.Sampling, found: Violations, path: str) -> Sampling:
    temperature, top_p = 0.0, 1.0
    if asked.HasField("temperature"):
        temperature = asked.temperature
        found.number(f"{path}.temperature", temperature, 0, 2)
    if asked.HasField("top_p"):
        top_p = asked.top_p
        if not 0 < top_p <= 1:
            found.add(f"{path}.top_p", f"{top_p:g} is not above 0 and at most 1")
    seed = asked.seed if asked.HasField("seed") else None
    return Sampling(temperature=temperature, top_p=top_p, seed=seed)
