"""What events make of a run: the same live and read again, whatever their order."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import (
    Fence,
    FinishReason,
    Message,
    Role,
    Run,
    RunError,
    RunState,
    TextPart,
    ToolCall,
    ToolResult,
    Usage,
)
from edge_agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    DaemonToolStarted,
    Event,
    MessagesAdded,
    RunFinished,
    StateChanged,
    StepFinished,
    TextDelta,
    ToolCallsIssued,
    ToolResultAccepted,
    ToolUpdated,
)
from edge_agent.runs import history

RUN = Run("run", "", "client", "agent", "engine", RunState.QUEUED, 1.0)
CALLS = tuple(ToolCall(f"call-{n}", "move", "{}") for n in range(1, 5))
RESULT = ToolResult("call-1", (TextPart("begun"),))
USER = Message(Role.USER, (TextPart("The door is open now."),))


def decided(*calls: ToolCall, step: int = 1) -> StepFinished:
    return StepFinished(step, Message(Role.ASSISTANT, (), calls), Usage(), FinishReason.TOOL_CALLS)


def answer(call: ToolCall) -> ToolResultAccepted:
    return ToolResultAccepted(ToolResult(call.id, (TextPart(f"did {call.id}"),)))


def after(*bodies: object, run: Run = RUN) -> Run:
    for body in bodies:
        run = history.apply(run, body)  # type: ignore[arg-type]
    return run


def ids(turns: Sequence[Message]) -> list[str]:
    return [turn.tool_call_id for turn in turns]


@given(st.permutations(range(4)))
def test_results_stand_in_the_order_of_their_calls_however_they_come(order):
    run = after(decided(*CALLS), *(answer(CALLS[at]) for at in order))
    assert ids(run.transcript[1:]) == [call.id for call in CALLS]
    assert history.unanswered(run) == ()


@given(st.sets(st.integers(0, 3)))
def test_what_has_no_result_yet_is_unanswered(answered):
    run = after(decided(*CALLS), *(answer(CALLS[at]) for at in answered))
    assert history.unanswered(run) == tuple(
        call for at, call in enumerate(CALLS) if at not in answered
    )


def test_only_the_last_step_has_unanswered_calls():
    first, second = CALLS[:2]
    run = after(decided(first), answer(first), decided(second, step=2))
    assert history.unanswered(run) == (second,)
    assert history.calls_of(run) == (first, second)


def test_what_is_said_on_resuming_follows_the_results_that_come_later():
    run = after(decided(CALLS[0]), MessagesAdded((USER,)), answer(CALLS[0]))
    assert [turn.role for turn in run.transcript] == [Role.ASSISTANT, Role.TOOL, Role.USER]


def test_a_call_is_open_from_its_issue_to_its_result():
    issued = after(decided(*CALLS[:2]), ToolCallsIssued(1, CALLS[:2]))
    assert (issued.state, issued.open_tool_calls) == (RunState.WAITING_TOOL, CALLS[:2])
    assert after(answer(CALLS[0]), run=issued).open_tool_calls == (CALLS[1],)


def test_a_call_that_is_issued_again_is_open_once():
    run = after(ToolCallsIssued(1, CALLS[:2]), ToolCallsIssued(1, CALLS[:1]))
    assert sorted(call.id for call in run.open_tool_calls) == ["call-1", "call-2"]


def test_a_call_of_the_daemons_own_is_no_callers():
    run = after(decided(CALLS[0]), DaemonToolStarted(1, CALLS[0]))
    assert (run.open_tool_calls, run.daemon_tool_calls) == ((), (CALLS[0],))
    assert run.state is RunState.WAITING_TOOL
    assert after(answer(CALLS[0]), run=run).daemon_tool_calls == ()


def test_a_call_waits_for_approval_until_somebody_decides():
    run = after(ApprovalRequested(1, CALLS[:2]))
    assert (run.state, run.unapproved_tool_calls) == (RunState.WAITING_APPROVAL, CALLS[:2])
    run = after(ApprovalDecided("call-1", True, "client"), run=run)
    assert run.unapproved_tool_calls == (CALLS[1],)


def test_the_cause_of_a_suspension_is_forgotten_when_the_run_goes_on():
    cause = RunError("DAEMON_RESTARTED", "restarted")
    suspended = after(StateChanged(RunState.SUSPENDED, cause=cause))
    assert suspended.error == cause
    assert after(StateChanged(RunState.QUEUED), run=suspended).error is None


def test_an_ended_run_keeps_its_transcript_where_its_event_has_none():
    run = after(decided(CALLS[0]), answer(CALLS[0]))
    ended = after(RunFinished(RUN), run=run)
    assert ended.transcript == run.transcript


def test_a_run_that_was_kept_while_messages_waited_has_each_of_them_once():
    bodies: list[Any] = [
        decided(CALLS[0]),
        MessagesAdded((USER,), pending=True),
        answer(CALLS[0]),
        MessagesAdded(()),
        MessagesAdded((USER,), pending=True),
    ]
    live = after(*bodies)
    happened = [Event(RUN.id, number, body) for number, body in enumerate(bodies, 1)]
    kept = dataclasses.replace(live, transcript=())
    assert history.with_transcript(kept, happened) == live
    assert [turn.role for turn in live.transcript] == [Role.ASSISTANT, Role.TOOL, Role.USER]
    assert live.pending_messages == (USER,)


def test_a_background_call_goes_on_from_its_result_to_its_last_update():
    call = CALLS[0]
    begun = after(decided(call), ToolCallsIssued(1, (call,)), ToolResultAccepted(RESULT, True))
    assert (begun.open_tool_calls, begun.background_tool_calls) == ((), (call,))
    told = after(ToolUpdated(call.id, (TextPart("a leak"),), False, False), run=begun)
    assert told.background_tool_calls == (call,)
    assert [turn.text for turn in told.pending_messages] == ["a leak"]
    done = after(ToolUpdated(call.id, (), False, True), run=told)
    assert done.background_tool_calls == ()
    assert len(done.pending_messages) == 1


def test_the_result_of_a_call_that_the_model_did_not_make_is_no_turn():
    look = ToolCall("call-1-verify", "look", "{}")
    run = after(decided(CALLS[0]), ToolCallsIssued(1, (look,)), answer(look))
    assert run.open_tool_calls == ()
    assert ids(run.transcript) == [""]


def test_what_says_nothing_of_the_run_leaves_it_as_it_is():
    assert after(TextDelta(1, "hello", 1)) is RUN


def test_a_run_without_calls_has_none_unanswered():
    assert history.unanswered(RUN) == ()
    said = dataclasses.replace(RUN, transcript=(USER,))
    assert history.unanswered(said) == ()


def test_a_call_is_found_as_it_was_issued_last():
    call, issued = CALLS[0], dataclasses.replace(CALLS[0], fence=Fence(1, 7))
    run = after(decided(*CALLS))
    assert history.call_of(run, call.id) == call
    assert history.call_of(run, "call-2") == CALLS[1]
    assert history.call_of(after(ToolCallsIssued(1, (issued,)), run=run), call.id) == issued
    assert history.call_of(run, "call-9") is None
