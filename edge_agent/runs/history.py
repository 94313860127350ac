"""What each event makes of a run. Pure: a live run and one that is read from the ledger agree.

Numbers no events and decides nothing.
"""

import dataclasses
from collections.abc import Iterable

from edge_agent.core import Message, Role, Run, RunState, ToolCall, ToolResult
from edge_agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    DaemonToolStarted,
    Event,
    EventBody,
    MessagesAdded,
    RunFinished,
    StateChanged,
    StepFinished,
    ToolCallsIssued,
    ToolResultAccepted,
    ToolUpdated,
)
from edge_agent.records import LoggedText


def apply(run: Run, body: EventBody) -> Run:  # noqa: C901, PLR0911 - one a kind
    """The run after this event."""
    match body:
        case StateChanged(state=state, cause=cause):
            return dataclasses.replace(run, state=state, error=cause)
        case StepFinished(step=step, message=message):
            transcript = (*run.transcript, message)
            return dataclasses.replace(run, steps=step, transcript=transcript)
        case ApprovalRequested(tool_calls=calls):
            asked = (*run.unapproved_tool_calls, *calls)
            state = RunState.WAITING_APPROVAL
            return dataclasses.replace(run, state=state, unapproved_tool_calls=asked)
        case ApprovalDecided(tool_call_id=call_id):
            asked = _without(run.unapproved_tool_calls, call_id)
            return dataclasses.replace(run, unapproved_tool_calls=asked)
        case ToolCallsIssued(tool_calls=calls):
            waiting = (*_others(run.open_tool_calls, calls), *calls)
            state = RunState.WAITING_TOOL
            return dataclasses.replace(run, state=state, open_tool_calls=waiting)
        case DaemonToolStarted(tool_call=call):
            started = (*_without(run.daemon_tool_calls, call.id), call)
            state = RunState.WAITING_TOOL
            return dataclasses.replace(run, state=state, daemon_tool_calls=started)
        case ToolResultAccepted(result=result, goes_on=goes_on):
            return _with_result(run, result, goes_on=goes_on)
        case ToolUpdated():
            return _with_update(run, body)
        case MessagesAdded(messages=messages, pending=pending):
            said = (*run.pending_messages, *messages)
            if pending:
                return dataclasses.replace(run, pending_messages=said)
            transcript = (*run.transcript, *said)
            return dataclasses.replace(run, transcript=transcript, pending_messages=())
        case RunFinished(run=ended):
            return dataclasses.replace(ended, transcript=run.transcript)
        case _:
            return run


def with_transcript(run: Run, happened: Iterable[Event | LoggedText]) -> Run:
    """A run that was kept without its transcript, with that which its events tell."""
    told = dataclasses.replace(run, transcript=(), pending_messages=())
    for item in happened:
        if isinstance(item, Event):
            told = apply(told, item.body)
    return dataclasses.replace(run, transcript=told.transcript)


def unanswered(run: Run) -> tuple[ToolCall, ...]:
    """The calls of the last step that have no result yet, in the step's order."""
    start = _last_decision(run.transcript)
    if start is None:
        return ()
    answered = {turn.tool_call_id for turn in run.transcript[start + 1 :]}
    return tuple(call for call in run.transcript[start].tool_calls if call.id not in answered)


def calls_of(run: Run) -> tuple[ToolCall, ...]:
    """All that the model has called, in order."""
    return tuple(call for turn in run.transcript for call in turn.tool_calls)


def call_of(run: Run, call_id: str) -> ToolCall | None:
    """The call as it was issued last; None: the run never made it."""
    issued = (*run.open_tool_calls, *run.daemon_tool_calls, *run.background_tool_calls)
    return next((call for call in (*issued, *calls_of(run)) if call.id == call_id), None)


def _with_result(run: Run, result: ToolResult, *, goes_on: bool) -> Run:
    call_id = result.tool_call_id
    background = run.background_tool_calls
    if goes_on:
        background += tuple(call for call in run.open_tool_calls if call.id == call_id)
    return dataclasses.replace(
        run,
        transcript=_answered(run.transcript, result),
        open_tool_calls=_without(run.open_tool_calls, call_id),
        daemon_tool_calls=_without(run.daemon_tool_calls, call_id),
        background_tool_calls=background,
    )


def _answered(transcript: tuple[Message, ...], result: ToolResult) -> tuple[Message, ...]:
    """The result's turn goes where its call stands among those of the step."""
    start = _last_decision(transcript)
    order = {} if start is None else _order(transcript[start])
    if start is None or result.tool_call_id not in order:
        return transcript  # a call that the model knows nothing of, such as a verification
    turn = Message(Role.TOOL, result.parts, (), result.tool_call_id, result.is_error)
    turns = sorted(
        (*transcript[start + 1 :], turn), key=lambda turn: order.get(turn.tool_call_id, len(order))
    )
    return (*transcript[: start + 1], *turns)


def _order(decision: Message) -> dict[str, int]:
    return {call.id: at for at, call in enumerate(decision.tool_calls)}


def _with_update(run: Run, update: ToolUpdated) -> Run:
    background, pending = run.background_tool_calls, run.pending_messages
    if update.done:
        background = _without(background, update.tool_call_id)
    if update.parts:
        turn = Message(Role.TOOL, update.parts, (), update.tool_call_id, update.is_error)
        pending = (*pending, turn)
    return dataclasses.replace(run, background_tool_calls=background, pending_messages=pending)


def _last_decision(transcript: tuple[Message, ...]) -> int | None:
    """Where the last turn with calls stands."""
    for at in range(len(transcript) - 1, -1, -1):
        if transcript[at].tool_calls:
            return at
    return None


def _without(calls: tuple[ToolCall, ...], call_id: str) -> tuple[ToolCall, ...]:
    return tuple(call for call in calls if call.id != call_id)


def _others(calls: tuple[ToolCall, ...], these: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    ids = {call.id for call in these}
    return tuple(call for call in calls if call.id not in ids)
