"""The bounds of a run that its history decides."""

import dataclasses

import pytest

from edge_agent.core import (
    FinishReason,
    Limits,
    Message,
    Role,
    Run,
    RunError,
    RunSpec,
    RunState,
    TextPart,
    ToolCall,
    ToolResult,
    Usage,
)
from edge_agent.events import StepFinished, ToolResultAccepted
from edge_agent.runs import history, limits
from tests.support.scripted_engine import spec

RUN = Run("run", "", "client", "agent", "engine", RunState.RUNNING, 1.0)


def wanted(**changes: int) -> RunSpec:
    return dataclasses.replace(spec(), limits=Limits(8, 16, **changes))


def called(*calls: ToolCall, run: Run = RUN, errors: tuple[str, ...] = ()) -> Run:
    message = Message(Role.ASSISTANT, (), calls)
    run = history.apply(run, StepFinished(1, message, Usage(), FinishReason.TOOL_CALLS))
    for call in calls:
        result = ToolResult(call.id, (TextPart("?"),), is_error=call.id in errors)
        run = history.apply(run, ToolResultAccepted(result))
    return run


def told(error: RunError | None) -> tuple[str, dict[str, str]]:
    assert error is not None
    return error.reason, dict(error.metadata)


def call(number: int, name: str = "move", arguments: str = "{}") -> ToolCall:
    return ToolCall(f"call-{number}", name, arguments)


@pytest.mark.parametrize(("used", "reason"), [(99, None), (100, "TOKEN_LIMIT")])
def test_a_step_that_would_begin_above_the_tokens_is_not_taken(used, reason):
    run = dataclasses.replace(RUN, usage=Usage(prompt_tokens=used - 9, completion_tokens=9))
    error = limits.exceeded(run, wanted(max_tokens=100))
    assert (error.reason if error else None) == reason


def test_there_is_no_bound_of_tokens_unless_one_is_asked_for():
    run = dataclasses.replace(RUN, usage=Usage(prompt_tokens=10**9))
    assert limits.exceeded(run, wanted()) is None


def test_an_error_goes_back_to_the_model_once():
    once = called(call(1), call(2, "speak"), errors=("call-1", "call-2"))
    assert limits.exceeded(once, wanted()) is None
    again = called(call(3), run=once, errors=("call-3",))
    error = limits.exceeded(again, wanted())
    assert told(error) == ("TOOL_FAILED_AGAIN", {"tool": "move"})


def test_the_same_call_may_come_so_often_and_no_more():
    run = called(call(1, arguments='{"a":1,"b":2}'), call(2, arguments='{"b": 2, "a": 1}'))
    third = (call(3, arguments='{"a":1, "b":2}'),)
    assert limits.too_many_calls(run, wanted(max_same_calls=3), third) is None
    error = limits.too_many_calls(run, wanted(max_same_calls=2), third)
    assert told(error) == ("SAME_CALL_LIMIT", {"tool": "move", "limit": "2"})


def test_another_tool_or_other_arguments_are_another_call():
    run = called(call(1, arguments='{"a":1}'))
    others = (call(2, arguments='{"a":2}'), call(3, "speak", '{"a":1}'))
    assert limits.too_many_calls(run, wanted(max_same_calls=1), others) is None


def test_one_call_too_many_names_the_limit():
    asked = dataclasses.replace(spec(), limits=Limits(8, 2, max_same_calls=9))
    run = called(call(1))
    assert limits.too_many_calls(run, asked, (call(2),)) is None
    error = limits.too_many_calls(run, asked, (call(2), call(3)))
    assert told(error) == ("TOOL_CALL_LIMIT", {"limit": "2"})


@pytest.mark.parametrize(("made", "left"), [(15, 1), (16, 0), (17, 0)])
def test_too_many_calls_say_how_many_were_left(made, left):
    run = called(*(call(number, f"tool-{number}") for number in range(made)))
    error = limits.too_many_calls(run, wanted(), (call(90, "a"), call(91, "b")))
    assert error is not None
    assert f"2 tool calls in one step, {left} left" in error.message


def test_only_results_that_are_errors_count_as_errors():
    run = called(call(1), call(2), errors=("call-1",))
    said = Message(Role.USER, (TextPart("no"),), (), "call-2", is_error=True)
    fine = Message(Role.TOOL, (TextPart("ok"),), (), "call-2")
    run = dataclasses.replace(run, transcript=(*run.transcript, said, fine))
    assert limits.exceeded(run, wanted()) is None


@pytest.mark.parametrize(("spent", "reason"), [(0, None), (70, None), (71, "COST_LIMIT")])
def test_no_step_begins_once_more_was_spent_than_allowed(spent, reason):
    run = dataclasses.replace(RUN, usage=Usage(cost_nano_usd=spent))
    error = limits.exceeded(run, wanted(max_cost_nano_usd=70))
    assert (error.reason if error else None) == reason
    if error is not None:
        assert dict(error.metadata) == {"cost_nano_usd": "71", "limit": "70"}


def test_there_is_no_bound_of_cost_unless_one_is_asked_for():
    run = dataclasses.replace(RUN, usage=Usage(cost_nano_usd=10**12))
    assert limits.exceeded(run, wanted()) is None
