"""Runs and steps of a plausible size: a robot that looks for a cup, a tool call at each step."""

import dataclasses

from edge_agent.core import (
    Executor,
    FinishReason,
    Limits,
    Message,
    Role,
    Run,
    RunSpec,
    RunState,
    SideEffect,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
)
from edge_agent.events import (
    Event,
    RunFinished,
    StateChanged,
    StepFinished,
    ToolCallsIssued,
    ToolResultAccepted,
)
from edge_agent.ledger.changes import EventsAdded, NewRun
from edge_agent.records import CallRecord, Effect, LoggedText, ResultClass, StepRecord

NOW_S = 1_764_000_000.25
TEXT = "I will look on the table in the kitchen first, because cups are often left there. "
TOKENS = 20
USAGE = Usage(412, 380, 38, 0.0021, 0.0, 1.9, 61.5)
SCHEMA = '{"type":"object","properties":{"place":{"type":"string"}},"required":["place"]}'
TOOLS = tuple(
    Tool(name, f"{name} at a place that has a name on the map.", SCHEMA)
    for name in ("look", "move_to", "pick_up", "put_down")
)


def new_run(number: int) -> NewRun:
    """A run that is accepted."""
    goal = Message(Role.USER, (TextPart("Find the red cup and bring it to the kitchen."),))
    spec = RunSpec((goal,), "smollm2-135m-instruct", Limits(8, 8), 120.0, TOOLS, durable=True)
    run = Run(
        f"run-{number:032x}",
        f"request-{number}",
        "arm",
        "fetch",
        spec.engine,
        RunState.QUEUED,
        NOW_S,
        durable=True,
    )
    return NewRun(run, spec)


def state_changed(run: Run, sequence: int) -> EventsAdded:
    """The smallest thing that happens to a run."""
    return EventsAdded(run, (Event(run.id, sequence, StateChanged(RunState.RUNNING)),))


def durable_step(run: Run, step: int) -> EventsAdded:
    """A step that says a sentence and calls a tool, and the tool's result."""
    first = run.sequence + 1
    call = ToolCall(f"call-{step}", "look", '{"place":"kitchen table"}', 10.0)
    said = Message(Role.ASSISTANT, (TextPart(TEXT),), (call,))
    ends = tuple(len(TEXT) * (n + 1) // TOKENS for n in range(TOKENS))
    seen = ToolResult(call.id, (TextPart('{"seen":["plate","red cup"],"distance_m":1.2}'),))
    last = first + TOKENS + 4
    events = (
        Event(run.id, first, StateChanged(RunState.RUNNING)),
        LoggedText(step, first + 1, TEXT, ends, (1,) * TOKENS),
        Event(run.id, last - 3, StepFinished(step, said, USAGE, FinishReason.TOOL_CALLS, 2.5)),
        Event(run.id, last - 2, ToolCallsIssued(step, (call,))),
        Event(run.id, last - 1, ToolResultAccepted(seen)),
    )
    after = dataclasses.replace(
        run, state=RunState.RUNNING, sequence=last, steps=step, usage=run.usage.plus(USAGE)
    )
    return EventsAdded(after, events)


def last_of(run: Run) -> EventsAdded:
    """The end of the run."""
    sequence = run.sequence + 1
    after = dataclasses.replace(
        run, state=RunState.SUCCEEDED, sequence=sequence, ended_at_s=NOW_S + 9, answer=TEXT
    )
    return EventsAdded(after, (Event(run.id, sequence, RunFinished(after)),))


def records(run_id: str, step: int) -> tuple[StepRecord, CallRecord]:
    """What is kept of a step and its call, without bodies."""
    digest = "0123456789abcdef"
    step_record = StepRecord(
        run_id=run_id,
        step=step,
        attempt=1,
        parent=step - 1 or None,
        started_at_s=NOW_S,
        duration_s=1.9,
        route="LOCAL",
        engine="smollm2-135m-instruct",
        engine_digest=f"sha256:{digest * 4}",
        template_hash=digest,
        tools_hash=digest,
        seed=7,
        usage=USAGE,
        finish="TOOL_CALLS",
        available_before_bytes=3 << 30,
        available_after_bytes=3 << 30,
        power_mode="15W",
    )
    call_record = CallRecord(
        run_id=run_id,
        step=step,
        call_id=f"call-{step}",
        tool="look",
        executor=Executor.CALLER,
        side_effect=SideEffect.NONE,
        arguments_hash=digest,
        effect=Effect.DONE,
        issued_at_s=NOW_S,
        ended_at_s=NOW_S + 1.1,
        result_class=ResultClass.OK,
        result_bytes=45,
    )
    return step_record, call_record
