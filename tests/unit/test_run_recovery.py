"""What becomes of a run that a daemon left unfinished: nothing stale acts, nothing acts twice."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import (
    Executor,
    Message,
    Role,
    Run,
    RunError,
    RunState,
    SideEffect,
    TextPart,
    Tool,
    ToolCall,
)
from edge_agent.records import CallRecord, Effect
from edge_agent.runs.recovery import MAX_DEATHS, SEQUENCE_GAP, Unfinished, judge
from tests.support.scripted_engine import spec

RUN = Run("run", "", "client", "agent", "engine", RunState.RUNNING, 1.0, durable=True)
ALIVE = [state for state in RunState if not state.ended and state is not RunState.UNSPECIFIED]
CALL = ToolCall("call-1", "move", "{}")


def tool(effect: SideEffect) -> Tool:
    return Tool("move", "Move.", '{"type":"object"}', side_effect=effect)


def call(effect: Effect, side_effect: SideEffect, executor: Executor) -> CallRecord:
    return CallRecord("run", 1, "call-1", "move", executor, side_effect, "", effect, 1.0)


def left(
    run: Run = RUN,
    side_effect: SideEffect = SideEffect.NON_IDEMPOTENT,
    running_step: int | None = None,
    deaths: int = 0,
    calls: tuple[CallRecord, ...] = (),
) -> Unfinished:
    wanted = dataclasses.replace(spec(), tools=(tool(side_effect),))
    return Unfinished(run, wanted, running_step, deaths, calls)


RECORDS = st.builds(
    call, st.sampled_from(Effect), st.sampled_from(SideEffect), st.sampled_from(Executor)
)
LEFT = st.builds(
    left,
    st.builds(
        lambda state, is_open: dataclasses.replace(
            RUN, state=state, open_tool_calls=(CALL,) if is_open else ()
        ),
        st.sampled_from(ALIVE),
        st.booleans(),
    ),
    st.sampled_from(SideEffect),
    st.none() | st.integers(1, 9),
    st.integers(0, 3),
    st.lists(RECORDS, max_size=2).map(tuple),
)


@given(LEFT)
def test_only_a_run_that_can_do_no_harm_goes_on_by_itself(what):
    verdict = judge(what)
    if verdict.state is RunState.QUEUED:
        assert all(each.side_effect is SideEffect.NONE for each in what.spec.tools)
        assert what.run.state not in (RunState.SUSPENDED, RunState.CANCELLING)
        assert verdict.deaths < MAX_DEATHS


@given(LEFT)
def test_every_run_goes_on_waits_with_a_reason_or_ends_with_one(what):
    verdict = judge(what)
    assert verdict.state in (RunState.QUEUED, RunState.SUSPENDED) or verdict.state.ended
    resting = what.run.state is RunState.SUSPENDED and verdict.state is RunState.SUSPENDED
    assert resting or (verdict.error is None) == (verdict.state is RunState.QUEUED)


@given(LEFT)
def test_what_acts_once_and_may_have_acted_is_never_run_again(what):
    may_have = [
        each
        for each in what.calls
        if (each.effect, each.side_effect, each.executor)
        == (Effect.INTENDED, SideEffect.NON_IDEMPOTENT, Executor.DAEMON)
    ]
    verdict = judge(what)
    unknown = [each for each in verdict.calls if each.effect is Effect.UNKNOWN]
    assert len(unknown) == len(may_have)
    assert not may_have or verdict.state is RunState.OUTCOME_UNKNOWN


def test_a_step_that_two_daemons_died_in_fails():
    first = judge(left(side_effect=SideEffect.NONE, running_step=3))
    assert (first.state, first.deaths) == (RunState.QUEUED, 1)
    second = judge(left(side_effect=SideEffect.NONE, running_step=3, deaths=1))
    assert second.error is not None
    assert (second.state, second.error.reason) == (RunState.FAILED, "STEP_ENDS_DAEMON")
    assert second.error.metadata["step"] == "3"


def test_a_run_that_waited_for_a_tool_kills_nobody():
    assert judge(left(side_effect=SideEffect.NONE)).deaths == 0


def test_a_suspended_run_stays_so_for_its_own_reason():
    halted = RunError("HALTED", "halted")
    run = dataclasses.replace(RUN, state=RunState.SUSPENDED, error=halted)
    verdict = judge(left(run, SideEffect.NONE, running_step=2, deaths=1))
    assert (verdict.state, verdict.error, verdict.deaths) == (RunState.SUSPENDED, halted, 1)


def test_a_call_that_was_to_be_cancelled_and_never_confirmed_is_unknown():
    run = dataclasses.replace(RUN, state=RunState.CANCELLING, open_tool_calls=(CALL,))
    verdict = judge(left(run))
    assert verdict.state is RunState.OUTCOME_UNKNOWN
    assert verdict.error is not None
    assert verdict.error.metadata["tool_call_ids"] == "call-1"


def test_a_callers_own_call_is_not_taken_for_lost():
    run = dataclasses.replace(RUN, state=RunState.WAITING_TOOL, open_tool_calls=(CALL,))
    intended = call(Effect.INTENDED, SideEffect.NON_IDEMPOTENT, Executor.CALLER)
    assert judge(left(run, calls=(intended,))).state is RunState.SUSPENDED


@pytest.mark.parametrize(("is_error", "effect"), [(False, Effect.DONE), (True, Effect.FAILED)])
def test_a_call_whose_result_is_there_has_acted_whatever_its_record_says(is_error, effect):
    turn = Message(Role.TOOL, (TextPart("sent"),), (), "call-1", is_error)
    run = dataclasses.replace(RUN, transcript=(turn,))
    intended = call(Effect.INTENDED, SideEffect.NON_IDEMPOTENT, Executor.DAEMON)
    verdict = judge(left(run, calls=(intended,)))
    assert [each.effect for each in verdict.calls] == [effect]
    assert verdict.state is RunState.SUSPENDED


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("CANCELLED_BY_CALLER", RunState.CANCELLED),
        ("RUN_TIMEOUT", RunState.EXPIRED),
        ("TOOL_TIMEOUT", RunState.FAILED),
        ("HALTED", RunState.SUSPENDED),
    ],
)
def test_what_was_being_stopped_is_stopped_for_the_same_reason(reason, state):
    error = RunError(reason, "stopped")
    run = dataclasses.replace(RUN, state=RunState.CANCELLING, error=error)
    verdict = judge(left(run, SideEffect.NONE))
    assert verdict.state is state
    assert verdict.error is not None
    assert verdict.error.reason == (reason if state.ended else "DAEMON_RESTARTED")


@pytest.mark.parametrize(
    ("effect", "state"),
    [(SideEffect.NONE, RunState.QUEUED), (SideEffect.IDEMPOTENT, RunState.SUSPENDED)],
)
def test_what_a_stopping_daemon_left_goes_on_where_it_can_do_no_harm(effect, state):
    error = RunError("DAEMON_STOPPING", "the daemon is stopping")
    run = dataclasses.replace(RUN, state=RunState.SUSPENDED, error=error)
    assert judge(left(run, effect)).state is state


def test_a_run_of_which_one_tool_acts_waits_though_another_leaves_nothing_behind():
    what = left()
    tools = (tool(SideEffect.NONE), dataclasses.replace(tool(SideEffect.IDEMPOTENT), name="grip"))
    what = dataclasses.replace(what, spec=dataclasses.replace(what.spec, tools=tools))
    verdict = judge(what)
    assert verdict.state is RunState.SUSPENDED
    assert verdict.error is not None
    assert verdict.error.retryable


@pytest.mark.parametrize(
    "what",
    [
        left(running_step=1, deaths=MAX_DEATHS - 1),
        left(calls=(call(Effect.INTENDED, SideEffect.NON_IDEMPOTENT, Executor.DAEMON),)),
    ],
)
def test_what_ended_a_run_for_good_is_not_worth_another_try(what):
    error = judge(what).error
    assert error is not None
    assert not error.retryable


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_run_that_is_over_has_no_deaths_to_remember(deaths):
    begun = call(Effect.INTENDED, SideEffect.NON_IDEMPOTENT, Executor.DAEMON)
    assert judge(left(deaths=deaths, calls=(begun,))).deaths == 0


def test_a_call_that_goes_on_in_the_background_has_begun_and_is_not_done():
    told = Message(Role.ASSISTANT, (), (CALL,))
    begun = Message(Role.TOOL, (TextPart("begun"),), (), CALL.id)
    run = dataclasses.replace(RUN, transcript=(told, begun), background_tool_calls=(CALL,))
    intended = call(Effect.INTENDED, SideEffect.NON_IDEMPOTENT, Executor.CALLER)
    assert judge(left(run, calls=(intended,))).calls == (intended,)


def test_a_background_call_that_was_being_stopped_has_an_unknown_outcome():
    run = dataclasses.replace(RUN, state=RunState.CANCELLING, background_tool_calls=(CALL,))
    verdict = judge(left(run))
    assert verdict.state is RunState.OUTCOME_UNKNOWN
    assert verdict.error is not None
    assert verdict.error.metadata["tool_call_ids"] == "call-1"


def test_more_text_deltas_than_a_step_can_have_lie_between_two_daemons():
    assert SEQUENCE_GAP == 1 << 20


def test_a_call_of_which_an_earlier_daemon_knew_nothing_either_is_never_made_again():
    lost = call(Effect.UNKNOWN, SideEffect.NON_IDEMPOTENT, Executor.DAEMON)
    verdict = judge(left(calls=(lost,)))
    assert verdict.state is RunState.OUTCOME_UNKNOWN
    assert verdict.error is not None
    assert verdict.error.metadata["tool_call_ids"] == "call-1"
