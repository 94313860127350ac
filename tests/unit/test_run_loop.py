"""One run from acceptance to its end: steps, tools, limits, time, cancellation."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog

from edge_agent.core import FinishReason, HaltScope, Message, Role, Run, RunError, RunState
from edge_agent.errors import WorkerError
from edge_agent.events import (
    CancelTool,
    Event,
    RunFinished,
    StateChanged,
    StepFinished,
    TextDelta,
    ToolCallsIssued,
    ToolResultAccepted,
)
from edge_agent.runs.runs import Runs
from tests.support.scripted_engine import (
    MOVE,
    USAGE,
    ScriptedEngines,
    new_runs,
    result,
    spec,
)
from tests.support.virtual_time import VirtualTimeLoop

CANCEL = RunError("CANCELLED_BY_CALLER", "cancelled by a test")
SHORT_S = 0.03
"""A timeout that a test waits out; whatever else has to happen waits for events."""

Scenario = Callable[[Runs, ScriptedEngines], Coroutine[Any, Any, Any]]


@pytest.fixture
def play(tmp_path: Path):
    """Run a scenario with an owner of runs; `settings` are the owner's."""

    def run(scenario: Scenario, **settings: Any) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(20):
                return await scenario(*new_runs(tmp_path, **settings))

        return asyncio.run(bounded())

    return run


def start(runs: Runs, **changes: Any) -> str:
    return runs.create(spec(**changes), client="client", request_id="").id


async def events(runs: Runs, run_id: str) -> list[Event]:
    """All events of a run, from the first to its end; they are checked to be one life."""
    _, *found = [event async for event in runs.watch(run_id, 0)]
    assert [type(event.body) for event in found].count(RunFinished) == 1
    assert isinstance(found[-1].body, RunFinished)
    assert found[-1].body.run == runs.get(run_id)
    assert found[-1].sequence == runs.get(run_id).sequence
    return found


async def ended(runs: Runs, run_id: str) -> Run:
    body = (await events(runs, run_id))[-1].body
    assert isinstance(body, RunFinished)
    return body.run


async def until(runs: Runs, run_id: str, kind: type) -> Any:
    """The body of the first event of a kind."""
    async for event in runs.watch(run_id, 0):
        if isinstance(event.body, kind):
            return event.body
    raise AssertionError(f"no {kind.__name__}")


class TestAnswers:
    def test_an_answer_is_streamed_and_ends_the_run(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            step = await engines.next()
            step.say("Hel", "lo")
            step.answer("Hello")
            return await events(runs, run_id)

        *before, last = play(scenario)
        assert [event.body for event in before[:2]] == [
            StateChanged(RunState.RUNNING),
            TextDelta(1, "Hello", 2),
        ]
        finished = before[2].body
        assert isinstance(finished, StepFinished)
        assert (finished.step, finished.usage) == (1, USAGE)
        assert finished.message.text == "Hello"
        assert (last.body.run.state, last.body.run.answer) == (RunState.SUCCEEDED, "Hello")
        assert [event.sequence for event in [*before, last]] == [1, 3, 4, 5]

    def test_the_step_is_asked_for_what_the_caller_wanted(self, play):
        async def scenario(runs, engines):
            wanted = spec("Go on", output_schema_json='{"type":"integer"}')
            runs.create(wanted, client="client", request_id="")
            step = await engines.next()
            step.answer("7")
            return wanted, step.request

        wanted, request = play(scenario)
        assert request.messages == wanted.messages
        assert request.tools == wanted.tools
        assert request.output_schema_json == wanted.output_schema_json
        assert not request.answer_only

    def test_a_truncated_answer_is_an_answer_that_says_so(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).answer("Hel", FinishReason.TRUNCATED)
            await ended(runs, run_id)
            return (await until(runs, run_id, StepFinished)), runs.get(run_id)

        finished, run = play(scenario)
        assert finished.finish_reason is FinishReason.TRUNCATED
        assert (run.state, run.answer) == (RunState.SUCCEEDED, "Hel")

    def test_loading_is_reported_with_its_progress(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            step = await engines.next()
            step.on_state(RunState.LOADING, None)
            step.on_state(RunState.LOADING, 0.5)
            step.on_state(RunState.LOADING, None)  # says nothing new
            step.answer("Hello")
            return await events(runs, run_id)

        bodies = [event.body for event in play(scenario)]
        assert bodies[1:3] == [
            StateChanged(RunState.LOADING),
            StateChanged(RunState.LOADING, 0.5),
        ]
        assert isinstance(bodies[3], StepFinished)

    def test_text_told_after_the_end_of_a_step_is_not_written(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            step = await engines.next()
            runs.cancel(run_id, CANCEL)
            await ended(runs, run_id)
            step.say("too late")
            return await events(runs, run_id)

        assert not any(isinstance(event.body, TextDelta) for event in play(scenario))


class TestTools:
    def test_a_call_goes_to_the_caller_and_its_result_to_the_model(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).call(("move", '{"x": 1}'))
            issued = await until(runs, run_id, ToolCallsIssued)
            assert runs.get(run_id).state is RunState.WAITING_TOOL
            assert runs.get(run_id).open_tool_calls == issued.tool_calls
            runs.submit(run_id, [result("call-1", "moved")])
            step = await engines.next()
            step.answer("Done")
            run = await ended(runs, run_id)
            return issued, step.request, run

        issued, request, run = play(scenario)
        (call,) = issued.tool_calls
        assert (call.id, call.name, call.arguments_json) == ("call-1", "move", '{"x": 1}')
        decided, told = request.messages[-2:]
        assert [each.id for each in decided.tool_calls] == [call.id]
        assert (told.role, told.tool_call_id, told.text) == (Role.TOOL, "call-1", "moved")
        assert run.transcript[:2] == (decided, told)
        assert (run.steps, run.usage.completion_tokens) == (2, 10)
        assert run.usage.ttft_ms == USAGE.ttft_ms

    def test_several_calls_of_a_step_wait_for_all_results_in_any_order(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).call(("move", "{}"), ("speak", "{}"), ("move", "{}"))
            await until(runs, run_id, ToolCallsIssued)
            left = runs.submit(run_id, [result("call-3", "3"), result("call-1", "1")])
            assert [call.id for call in left.open_tool_calls] == ["call-2"]
            assert left.state is RunState.WAITING_TOOL
            runs.submit(run_id, [result("call-2", "2", is_error=True)])
            step = await engines.next()
            step.answer("Done")
            return step.request.messages, await events(runs, run_id)

        messages, seen = play(scenario)
        told = [(m.tool_call_id, m.text, m.is_error) for m in messages if m.role is Role.TOOL]
        assert told == [("call-1", "1", False), ("call-2", "2", True), ("call-3", "3", False)]
        accepted = [e.body for e in seen if isinstance(e.body, ToolResultAccepted)]
        assert [each.result.tool_call_id for each in accepted] == ["call-3", "call-1", "call-2"]

    def test_a_call_says_how_long_it_holds_and_how_old_its_observation_is(self, play):
        async def scenario(runs, engines):
            quick = dataclasses.replace(MOVE, name="quick", valid_for_s=0.5)
            run_id = start(runs, tools=[MOVE, quick])
            (await engines.next()).call(("move", "{}"), ("quick", "{}"))
            return (await until(runs, run_id, ToolCallsIssued)).tool_calls

        move, quick = play(scenario, tool_call_valid_for_s=5.0)
        assert (move.valid_for_s, quick.valid_for_s) == (5.0, 0.5)
        assert 0.0 <= move.observed_ago_s < 5.0

    def test_a_tool_that_the_run_has_not_is_never_called(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).call(("fly", "{}"))
            found = await events(runs, run_id)
            return found, runs.get(run_id)

        found, run = play(scenario)
        assert (run.state, run.error.reason) == (RunState.FAILED, "TOOL_NOT_ALLOWED")
        assert run.error.metadata["tool"] == "fly"
        assert not any(isinstance(event.body, ToolCallsIssued) for event in found)

    def test_a_bug_fails_the_run_and_nothing_else(self, play):
        async def scenario(runs, engines):
            broken, other = start(runs), start(runs)
            first, second = await engines.next(), await engines.next()
            with structlog.testing.capture_logs() as logs:
                first.fail(KeyError("fly"))
                run = await ended(runs, broken)
            second.answer("Done")
            return run, logs, await ended(runs, other)

        run, logs, other = play(scenario)
        assert (run.state, run.error.reason) == (RunState.FAILED, "INTERNAL")
        assert "fly" not in run.error.message
        assert [line["log_level"] for line in logs if line["event"] == "run_crashed"] == ["error"]
        assert other.state is RunState.SUCCEEDED


class TestLimits:
    def test_the_last_step_can_only_answer(self, play):
        async def scenario(runs, engines):
            run_id = start(runs, max_steps=2)
            first = await engines.next()
            first.call(("move", "{}"))
            await until(runs, run_id, ToolCallsIssued)
            runs.submit(run_id, [result("call-1")])
            second = await engines.next()
            second.answer("Done")
            await ended(runs, run_id)
            return first.request.answer_only, second.request.answer_only

        assert play(scenario) == (False, True)

    def test_the_only_step_can_only_answer(self, play):
        async def scenario(runs, engines):
            start(runs, max_steps=1)
            return (await engines.next()).request.answer_only

        assert play(scenario)

    def test_without_calls_left_a_step_can_only_answer(self, play):
        async def scenario(runs, engines):
            run_id = start(runs, max_tool_calls=2)
            asked = []
            for number in (1, 2):
                step = await engines.next()
                asked.append(step.request.answer_only)
                step.call(("move", "{}"))
                async for event in runs.watch(run_id, 0):
                    if runs.get(run_id).open_tool_calls:
                        break
                    assert not isinstance(event.body, RunFinished)
                runs.submit(run_id, [result(f"call-{number}")])
            return [*asked, (await engines.next()).request.answer_only]

        assert play(scenario) == [False, False, True]

    def test_more_calls_in_a_step_than_are_left_are_not_issued(self, play):
        async def scenario(runs, engines):
            run_id = start(runs, max_tool_calls=1)
            (await engines.next()).call(("move", "{}"), ("speak", "{}"))
            return await events(runs, run_id)

        seen = play(scenario)
        assert not any(isinstance(event.body, ToolCallsIssued) for event in seen)
        assert seen[-1].body.run.error.reason == "TOOL_CALL_LIMIT"
        assert seen[-1].body.run.state is RunState.FAILED
        assert seen[-1].body.run.usage == USAGE


class TestTime:
    @pytest.mark.parametrize("state", [RunState.QUEUED, RunState.LOADING, RunState.RUNNING])
    def test_it_runs_out_wherever_a_step_is(self, play, state: RunState):
        async def scenario(runs, engines):
            run_id = start(runs, timeout_s=SHORT_S)
            step = await engines.next()
            step.on_state(state, None)
            return await ended(runs, run_id), step.outcome.cancelled()

        run, let_go = play(scenario)
        assert (run.state, run.error.reason) == (RunState.EXPIRED, "RUN_TIMEOUT")
        assert run.error.metadata["state"] == state.value
        assert run.error.retryable
        assert let_go

    def test_it_runs_out_before_anything_began(self, play):
        async def scenario(runs, _engines):
            return await ended(runs, start(runs, timeout_s=SHORT_S))

        assert play(scenario).error.metadata["state"] == "QUEUED"

    def test_it_runs_out_while_a_tool_works_and_the_tool_confirms(self, play):
        async def scenario(runs, engines):
            run_id = start(runs, timeout_s=SHORT_S)
            (await engines.next()).call(("move", "{}"))
            cancel = await until(runs, run_id, CancelTool)
            assert runs.get(run_id).state is RunState.CANCELLING
            runs.submit(run_id, [result("call-1", cancelled=True)])
            return cancel, await ended(runs, run_id)

        cancel, run = play(scenario)
        assert (cancel.tool_call_id, cancel.reason.reason) == ("call-1", "RUN_TIMEOUT")
        assert (run.state, run.error.reason) == (RunState.EXPIRED, "RUN_TIMEOUT")
        assert run.open_tool_calls == ()

    def test_it_runs_out_while_a_tool_works_and_nobody_confirms(self, play):
        async def scenario(runs, engines):
            run_id = start(runs, timeout_s=SHORT_S)
            (await engines.next()).call(("move", "{}"))
            return await ended(runs, run_id)

        run = play(scenario, cancel_confirm_s=SHORT_S)
        assert (run.state, run.error.reason) == (RunState.OUTCOME_UNKNOWN, "OUTCOME_UNKNOWN")
        assert run.error.metadata["cause"] == "RUN_TIMEOUT"
        assert run.error.metadata["tool_call_ids"] == "call-1"

    @pytest.mark.parametrize("own", [True, False])
    def test_a_tools_time_is_its_own_or_the_settings(self, play, own):
        async def scenario(runs, engines):
            tool = dataclasses.replace(MOVE, timeout_s=SHORT_S if own else None)
            run_id = start(runs, tools=[tool])
            (await engines.next()).call(("move", "{}"))
            await until(runs, run_id, CancelTool)
            runs.submit(run_id, [result("call-1", cancelled=True)])
            return await ended(runs, run_id)

        run = play(scenario, tool_timeout_s=60.0 if own else SHORT_S)
        assert (run.state, run.error.reason) == (RunState.FAILED, "TOOL_TIMEOUT")
        assert run.error.metadata["tool_call_id"] == "call-1"

    def test_a_tool_that_gives_no_result_and_does_not_confirm_is_unknown(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).call(("move", "{}"))
            return await ended(runs, run_id)

        run = play(scenario, tool_timeout_s=SHORT_S, cancel_confirm_s=SHORT_S)
        assert (run.state, run.error.metadata["cause"]) == (
            RunState.OUTCOME_UNKNOWN,
            "TOOL_TIMEOUT",
        )

    def test_a_short_time_counts_beside_a_long_one(self, play):
        async def scenario(runs, engines):
            quick = dataclasses.replace(MOVE, name="quick", timeout_s=SHORT_S)
            run_id = start(runs, tools=[MOVE, quick])
            (await engines.next()).call(("move", "{}"), ("quick", "{}"))
            cancelled = await until(runs, run_id, CancelTool)
            runs.submit(run_id, [result("call-1"), result("call-2", cancelled=True)])
            return cancelled, await ended(runs, run_id)

        cancelled, run = play(scenario, tool_timeout_s=60.0)
        assert cancelled.reason.reason == "TOOL_TIMEOUT"
        assert run.error.metadata["tool_call_id"] == "call-2"

    def test_a_result_in_its_short_time_waits_for_a_long_one(self, tmp_path: Path):
        runs, engines = new_runs(tmp_path, tool_timeout_s=60.0)

        async def until_the_quick_one_has_its_result() -> str:
            quick = dataclasses.replace(MOVE, name="quick", timeout_s=20.0)
            run_id = start(runs, tools=[quick, MOVE])
            (await engines.next()).call(("move", "{}"), ("quick", "{}"))
            await until(runs, run_id, ToolCallsIssued)
            runs.submit(run_id, [result("call-2")])
            return run_id

        async def to_the_end(run_id: str) -> tuple[Run, Sequence[Message]]:
            runs.submit(run_id, [result("call-1")])
            step = await engines.next()
            step.answer("Done")
            return await ended(runs, run_id), step.request.messages

        with contextlib.closing(VirtualTimeLoop()) as loop:
            run_id = loop.do(until_the_quick_one_has_its_result())
            loop.settle(40.0)  # past the short time: nothing may come of it
            assert runs.get(run_id).state is RunState.WAITING_TOOL
            run, messages = loop.do(to_the_end(run_id))
        assert run.state is RunState.SUCCEEDED
        assert [message.tool_call_id for message in messages[-2:]] == ["call-1", "call-2"]


class TestCancelling:
    def test_a_step_is_let_go_of(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            step = await engines.next()
            step.say("Hel")
            runs.cancel(run_id, CANCEL)
            return await ended(runs, run_id), step.outcome.cancelled()

        run, let_go = play(scenario)
        assert (run.state, run.error) == (RunState.CANCELLED, CANCEL)
        assert let_go

    def test_a_decision_that_comes_in_the_same_moment_does_not_act(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            step = await engines.next()
            step.call(("move", "{}"))
            runs.cancel(run_id, CANCEL)
            return await events(runs, run_id)

        seen = play(scenario)
        assert not any(isinstance(event.body, ToolCallsIssued) for event in seen)
        assert seen[-1].body.run.state is RunState.CANCELLED

    def test_open_calls_are_cancelled_at_once_and_waited_for(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).call(("move", "{}"), ("speak", "{}"))
            await until(runs, run_id, ToolCallsIssued)
            at_once = runs.cancel(run_id, CANCEL)
            assert at_once.state is RunState.CANCELLING
            runs.submit(run_id, [result("call-1", cancelled=True)])
            still = runs.submit(run_id, [result("call-2", "too late to stop it")])
            assert still.state is RunState.CANCELLING
            return await events(runs, run_id)

        seen = play(scenario)
        kinds = [type(event.body).__name__ for event in seen]
        assert kinds[-6:] == [
            "StateChanged",
            "CancelTool",
            "CancelTool",
            "ToolResultAccepted",
            "ToolResultAccepted",
            "RunFinished",
        ]
        assert seen[-1].body.run.state is RunState.CANCELLED

    def test_a_call_that_nobody_confirms_is_unknown_by_name(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).call(("move", "{}"), ("speak", "{}"))
            await until(runs, run_id, ToolCallsIssued)
            runs.cancel(run_id, CANCEL)
            runs.submit(run_id, [result("call-1", cancelled=True)])
            return await ended(runs, run_id)

        run = play(scenario, cancel_confirm_s=SHORT_S)
        assert run.state is RunState.OUTCOME_UNKNOWN
        assert run.error.metadata == {"cause": "CANCELLED_BY_CALLER", "tool_call_ids": "call-2"}

    def test_the_first_reason_counts(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).call(("move", "{}"))
            await until(runs, run_id, ToolCallsIssued)
            runs.cancel(run_id, CANCEL)
            runs.cancel(run_id, RunError("ANOTHER", "too late"))
            runs.submit(run_id, [result("call-1")])
            run = await ended(runs, run_id)
            assert runs.cancel(run_id, RunError("ANOTHER", "too late")) == run
            return run

        assert play(scenario).error == CANCEL


class TestFailures:
    def test_a_lost_worker_is_a_typed_error_that_may_be_tried_again(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).fail(WorkerError("it ended", metadata={"pid": 7}))
            return await ended(runs, run_id)

        run = play(scenario)
        assert run.state is RunState.FAILED
        assert run.error == RunError("WORKER_LOST", "it ended", True, {"pid": "7"})

    def test_a_halted_tool_is_not_called(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            step = await engines.next()
            outcome = await runs.halt(HaltScope.TOOL, "move", "a person", "operator")
            step.call(("speak", "{}"), ("move", "{}"))
            return outcome, await events(runs, run_id)

        outcome, seen = play(scenario)
        assert outcome.runs_stopped == 0
        assert not any(isinstance(event.body, ToolCallsIssued) for event in seen)
        run = seen[-1].body.run
        assert (run.state, run.error.reason) == (RunState.FAILED, "HALTED")
        assert run.error.metadata["halt_id"] == outcome.halt.id
        assert run.error.metadata["tool"] == "move"
