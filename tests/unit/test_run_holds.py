"""Runs that use the same resources, tools that go on in the background, and calls that grow old."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.core import (
    FinishReason,
    HaltScope,
    Lifecycle,
    Limits,
    Message,
    Role,
    Run,
    RunError,
    RunState,
    SideEffect,
    StepResult,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
)
from edge_agent.errors import FailedPrecondition, LedgerFailed, NotFound
from edge_agent.events import CancelTool, ToolCallsIssued, ToolUpdated
from edge_agent.ledger.absent import AbsentLedger
from edge_agent.records import Effect, ResultClass
from edge_agent.runs.acknowledged import AcknowledgedRuns, LedgerJournal
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.runs import Runs
from edge_agent.runs.stored_sessions import StoredSessions
from tests.support.scripted_engine import (
    SETTINGS,
    USAGE,
    ScriptedEngines,
    result,
    settle,
    spec,
)
from tests.unit.test_run_calls import KeptRecords, ScriptedTools, World

SCHEMA = '{"type":"object"}'
DRIVE = Tool("drive", "Drive.", SCHEMA, side_effect=SideEffect.IDEMPOTENT, resources=("base",))
PATROL = Tool(
    "patrol",
    "Patrol.",
    SCHEMA,
    side_effect=SideEffect.IDEMPOTENT,
    lifecycle=Lifecycle.BACKGROUND,
    resources=("base",),
)
LIFT = Tool("lift", "Lift.", SCHEMA, side_effect=SideEffect.IDEMPOTENT, resources=("arm", "base"))
LOOK = Tool("look", "Look.", SCHEMA, side_effect=SideEffect.NONE)
PICK = Tool("pick", "Pick.", SCHEMA, verify="holding", timeout_s=0.05)
HOLDING = Tool("holding", "Look.", SCHEMA, side_effect=SideEffect.NONE, timeout_s=0.05)
CANCEL = RunError("CANCELLED_BY_CALLER", "cancelled by a test")


def said(text: str) -> tuple[Message, ...]:
    return (Message(Role.USER, (TextPart(text),)),)


def news(call_id: str, text: str = "", *, done: bool = False, is_error: bool = False):
    parts = (TextPart(text),) if text else ()
    return ToolUpdated(call_id, parts, is_error, done)


@pytest.fixture
def play(tmp_path: Path):
    """Run a scenario."""

    def run(scenario, **changes: Any) -> Any:
        async def bounded() -> Any:
            engines, tools, records = ScriptedEngines(), ScriptedTools(), KeptRecords()
            latch = HaltLatch(tmp_path / "halts.json")
            chosen = dataclasses.replace(SETTINGS, **changes)
            runs = Runs(engines, latch, chosen, daemon_tools=tools, records=records)
            async with asyncio.timeout(20):
                return await scenario(World(runs, engines, tools, records))

        return asyncio.run(bounded())

    return run


async def issued(world: World, run_id: str) -> ToolCallsIssued:
    async with asyncio.timeout(10):
        async for event in world.runs.watch(run_id, 0):
            if isinstance(event.body, ToolCallsIssued):
                return event.body
    raise AssertionError("nothing was issued")


class TestHolds:
    def test_a_second_run_waits_for_the_first_ones_call_and_has_the_higher_fence(self, play):
        async def scenario(world):
            first, second = world.start(DRIVE), world.start(LIFT)
            await world.decide(("drive", "{}"))
            await world.decide(("lift", "{}"))
            before = world.runs.get(second).open_tool_calls
            world.runs.submit(first, [result("call-1", "there")])
            await settle()
            (call,) = world.runs.get(second).open_tool_calls
            (earlier,) = (await issued(world, first)).tool_calls
            return before, earlier, call

        before, earlier, call = play(scenario)
        assert before == ()
        assert call.fence > earlier.fence

    def test_two_calls_of_one_step_for_the_same_resource_come_one_after_the_other(self, play):
        async def scenario(world):
            run_id = world.start(DRIVE)
            await world.decide(("drive", "{}"), ("drive", '{"a":1}'))
            one = [call.id for call in world.runs.get(run_id).open_tool_calls]
            world.runs.submit(run_id, [result("call-1", "there")])
            await settle()
            return one, [call.id for call in world.runs.get(run_id).open_tool_calls]

        assert play(scenario) == (["call-1"], ["call-2"])

    def test_who_holds_in_the_background_is_named_to_the_model_of_the_other(self, play):
        async def scenario(world):
            first = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(first, [result("call-1", "begun")])
            await settle()
            await world.answer("Patrolling")
            second = world.start(DRIVE)
            await world.decide(("drive", "{}"))
            step = await world.engines.next()
            return first, second, step.request.messages[-1], world.records.of("call-1")

        first, _second, told, records = play(scenario)
        assert told.is_error
        assert first in told.text
        assert "patrol" in told.text
        assert "base" in told.text
        assert (Effect.FAILED, ResultClass.DENIED) in records

    def test_a_refusal_is_a_typed_error_on_the_result(self, play):
        async def scenario(world):
            first = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(first, [result("call-1", "begun")])
            await settle()
            await world.answer()
            second = world.start(DRIVE)
            await world.decide(("drive", "{}"))
            await world.answer()
            bodies = await world.events(second)
            return first, next(body.result for body in bodies if hasattr(body, "result"))

        first, refused = play(scenario)
        assert refused.error.reason == "RESOURCE_HELD"
        assert refused.error.metadata["holder_run_id"] == first
        assert refused.error.metadata["resource"] == "base"

    def test_a_call_that_waited_longer_than_it_holds_is_never_issued(self, play):
        async def scenario(world):
            first, second = world.start(DRIVE), world.start(LIFT)
            await world.decide(("drive", "{}"))
            await world.decide(("lift", "{}"))
            step = await world.engines.next()
            step.answer("I could not")
            bodies = await world.events(second)
            return first, step.request.messages[-1], bodies

        first, told, bodies = play(scenario, tool_call_valid_for_s=0.05)
        assert not any(isinstance(body, ToolCallsIssued) for body in bodies)
        assert first in told.text
        assert next(b.result.error.reason for b in bodies if hasattr(b, "result")) == "CALL_EXPIRED"

    def test_a_call_whose_turn_comes_too_late_in_its_step_is_not_issued(self, play):
        async def scenario(world):
            grip = dataclasses.replace(LOOK, name="grip", side_effect=SideEffect.NON_IDEMPOTENT)
            brief = dataclasses.replace(grip, name="brief", valid_for_s=1e-9)
            run_id = world.start(grip, brief)
            await world.decide(("grip", "{}"), ("brief", "{}"))
            world.runs.submit(run_id, [result("call-1", "ok")])
            return (await world.engines.next()).request.messages[-1]

        told = play(scenario)
        assert told.is_error
        assert "1e-09 s" in told.text

    def test_a_run_that_is_cancelled_while_it_waits_leaves_the_line(self, play):
        async def scenario(world):
            first, second, third = world.start(DRIVE), world.start(DRIVE), world.start(DRIVE)
            for _ in range(3):
                await world.decide(("drive", "{}"))
            world.runs.cancel(second, CANCEL)
            await world.events(second)
            world.runs.submit(first, [result("call-1", "there")])
            await settle()
            return world.runs.get(second).state, world.runs.get(third).open_tool_calls

        state, opened = play(scenario)
        assert state is RunState.CANCELLED
        assert [call.id for call in opened] == ["call-1"]

    def test_a_halt_of_a_tool_stops_a_run_that_waits_to_call_it(self, play):
        async def scenario(world):
            first, second = world.start(LIFT), world.start(DRIVE)
            await world.decide(("lift", "{}"))
            await world.decide(("drive", "{}"))
            outcome = await world.runs.halt(HaltScope.TOOL, "drive", "", "test")
            bodies = await world.events(second)
            world.runs.submit(first, [result("call-1", "there")])
            return outcome.runs_stopped, bodies

        stopped, bodies = play(scenario)
        assert stopped == 1
        assert bodies[-1].run.error.reason == "HALTED"
        assert not any(isinstance(body, ToolCallsIssued) for body in bodies)

    def test_a_call_that_nobody_confirmed_keeps_what_it_used_until_that_is_resolved(self, play):
        async def scenario(world):
            first = world.start(DRIVE)
            await world.decide(("drive", "{}"))
            world.runs.cancel(first, CANCEL)
            ended = await world.end(first)
            second = world.start(DRIVE)
            await world.decide(("drive", "{}"))
            refused = await world.engines.next()
            world.runs.resolved(first, "call-1")
            refused.call(("drive", "{}"))
            await settle()
            opened = world.runs.get(second).open_tool_calls
            return ended.state, refused.request.messages[-1].text, opened

        state, told, opened = play(scenario, cancel_confirm_s=0.01)
        assert state is RunState.OUTCOME_UNKNOWN
        assert "ResolveOutcome" in told
        assert [call.name for call in opened] == ["drive"]


class TestBackground:
    def test_a_run_goes_on_while_its_tool_does_and_ends_after_it(self, play):
        async def scenario(world):
            run_id = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(run_id, [result("call-1", "begun")])
            await settle()
            await world.answer("Patrolling")
            going = world.runs.get(run_id)
            world.runs.update_tool(run_id, news("call-1", done=True))
            run = await world.end(run_id)
            return going, run, world.runs.holders(), world.records.of("call-1")

        going, run, holders, records = play(scenario)
        assert going.state is RunState.WAITING_TOOL
        assert [call.name for call in going.background_tool_calls] == ["patrol"]
        assert (run.state, run.answer) == (RunState.SUCCEEDED, "Patrolling")
        assert run.background_tool_calls == ()
        assert holders == {}
        assert records == [(Effect.INTENDED, None), (Effect.DONE, ResultClass.EMPTY)]

    def test_what_it_finds_is_read_by_the_next_step_as_untrusted(self, play):
        async def scenario(world):
            run_id = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(run_id, [result("call-1", "begun")])
            await settle()
            await world.answer("Patrolling")
            world.runs.update_tool(run_id, news("call-1", "a leak at gate 4"))
            step = await world.engines.next()
            step.answer("There is a leak")
            await settle()
            world.runs.update_tool(run_id, news("call-1", done=True))
            return step.request.messages[-1], await world.end(run_id)

        told, run = play(scenario)
        assert (told.role, told.tool_call_id) == (Role.TOOL, "call-1")
        assert told.text == "a leak at gate 4"
        assert run.answer == "There is a leak"

    def test_news_during_a_step_makes_its_answer_not_the_last(self, play):
        async def scenario(world):
            run_id = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(run_id, [result("call-1", "begun")])
            step = await world.engines.next()
            world.runs.update_tool(run_id, news("call-1", "done, nothing seen", done=True))
            step.answer("Patrolling")
            await world.answer("Nothing was seen")
            return await world.end(run_id)

        run = play(scenario)
        assert run.answer == "Nothing was seen"
        turns = [turn.text for turn in run.transcript[-3:]]
        assert turns == ["Patrolling", "done, nothing seen", "Nothing was seen"]

    def test_one_that_fails_to_begin_holds_nothing(self, play):
        async def scenario(world):
            run_id = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            failed = ToolResult("call-1", (TextPart("no map"),), is_error=True)
            world.runs.submit(run_id, [failed])
            await world.answer("I can't")
            return await world.end(run_id), world.runs.holders()

        run, holders = play(scenario)
        assert (run.state, holders) == (RunState.SUCCEEDED, {})

    def test_to_cancel_the_run_cancels_it_and_waits_for_its_last_update(self, play):
        async def scenario(world):
            run_id = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(run_id, [result("call-1", "begun")])
            await world.answer("Patrolling")
            world.runs.cancel(run_id, CANCEL)
            state = world.runs.get(run_id).state
            world.runs.update_tool(run_id, news("call-1", "stopped", done=True))
            return state, await world.events(run_id), world.runs.holders()

        state, bodies, holders = play(scenario)
        assert state is RunState.CANCELLING
        assert [body.tool_call_id for body in bodies if isinstance(body, CancelTool)] == ["call-1"]
        assert bodies[-1].run.state is RunState.CANCELLED
        assert holders == {}

    def test_a_cancelled_result_confirms_it_as_well(self, play):
        async def scenario(world):
            run_id = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(run_id, [result("call-1", "begun")])
            await world.answer("Patrolling")
            world.runs.cancel(run_id, CANCEL)
            world.runs.submit(run_id, [ToolResult("call-1", (), cancelled=True)])
            return await world.end(run_id)

        assert play(scenario).state is RunState.CANCELLED

    def test_one_that_does_not_confirm_has_an_unknown_outcome(self, play):
        async def scenario(world):
            run_id = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(run_id, [result("call-1", "begun")])
            await world.answer("Patrolling")
            world.runs.cancel(run_id, CANCEL)
            return await world.end(run_id), world.runs.holders()

        run, holders = play(scenario, cancel_confirm_s=0.01)
        assert run.state is RunState.OUTCOME_UNKNOWN
        assert holders["base"].holding == "UNKNOWN"

    def test_a_halt_of_the_tool_stops_the_run_while_it_goes_on(self, play):
        async def scenario(world):
            run_id = world.start(PATROL)
            await world.decide(("patrol", "{}"))
            world.runs.submit(run_id, [result("call-1", "begun")])
            await world.answer("Patrolling")
            outcome = await world.runs.halt(HaltScope.TOOL, "patrol", "", "test")
            world.runs.update_tool(run_id, news("call-1", done=True))
            return outcome.runs_stopped, (await world.end(run_id)).error.reason

        assert play(scenario) == (1, "HALTED")

    @pytest.mark.parametrize(
        ("call_id", "kind", "reason"),
        [
            ("call-1", FailedPrecondition, "TOOL_CALL_NOT_BACKGROUND"),
            ("call-9", NotFound, "TOOL_CALL_NOT_FOUND"),
        ],
    )
    def test_news_of_another_call_is_refused(self, play, call_id, kind, reason):
        async def scenario(world):
            run_id = world.start(LOOK)
            await world.decide(("look", "{}"))
            with pytest.raises(kind) as refused:
                world.runs.update_tool(run_id, news(call_id, "x"))
            return refused.value.reason

        assert play(scenario) == reason


class TestMessages:
    def test_what_is_said_during_a_call_is_read_after_its_result(self, play):
        async def scenario(world):
            run_id = world.start(LOOK)
            await world.decide(("look", "{}"))
            run = world.runs.append(run_id, said("Hurry."))
            world.runs.submit(run_id, [result("call-1", "a box")])
            step = await world.engines.next()
            step.answer("Done")
            return run, step.request.messages[-2:], await world.end(run_id)

        run, told, ended = play(scenario)
        assert [turn.text for turn in run.pending_messages] == ["Hurry."]
        assert [turn.text for turn in told] == ["a box", "Hurry."]
        assert [turn.role for turn in ended.transcript[1:3]] == [Role.TOOL, Role.USER]
        assert ended.pending_messages == ()

    def test_what_is_said_during_the_answer_gets_another_one(self, play):
        async def scenario(world):
            run_id = world.start(LOOK)
            step = await world.engines.next()
            world.runs.append(run_id, said("In German, please."))
            step.answer("It is open")
            second = await world.engines.next()
            second.answer("Sie ist offen")
            return second.request.messages[-2:], await world.end(run_id)

        told, run = play(scenario)
        assert [turn.text for turn in told] == ["It is open", "In German, please."]
        assert run.answer == "Sie ist offen"

    def test_the_last_allowed_step_ends_the_run_all_the_same(self, play):
        async def scenario(world):
            run_id = world.start(LOOK, max_steps=1)
            step = await world.engines.next()
            world.runs.append(run_id, said("Wait."))
            step.answer("Done")
            return await world.end(run_id)

        assert play(scenario).answer == "Done"

    def test_a_run_that_has_ended_takes_no_message(self, play):
        async def scenario(world):
            run_id = world.start(LOOK)
            await world.answer("Done")
            with pytest.raises(FailedPrecondition) as refused:
                world.runs.append(run_id, said("Too late."))
            return refused.value.reason

        assert play(scenario) == "RUN_NOT_ACTIVE"


class TestVerification:
    def test_a_call_without_a_result_is_looked_at_and_the_run_goes_on(self, play):
        async def scenario(world):
            run_id = world.start(PICK, HOLDING)
            await world.decide(("pick", '{"what":"cup"}'))
            look = await asked_to_verify(world, run_id)
            world.runs.submit(run_id, [result(look.id, '{"acted": true}')])
            step = await world.engines.next()
            step.answer("I have the cup")
            return look, step.request.messages, await world.end(run_id), world.records.calls

        look, told, run, records = play(scenario, cancel_confirm_s=0.01)
        assert (look.name, look.arguments_json) == ("holding", '{"what":"cup"}')
        assert run.state is RunState.SUCCEEDED
        assert not told[-1].is_error
        assert "it has acted" in told[-1].text
        assert [turn.tool_call_id for turn in told if turn.role is Role.TOOL] == ["call-1"]
        last = [each for each in records if each.call_id == "call-1"][-1]
        assert last.effect is Effect.DONE
        assert last.resolution.evidence == '{"acted": true}'

    def test_one_that_did_not_act_is_an_error_that_the_model_reads(self, play):
        async def scenario(world):
            run_id = world.start(PICK, HOLDING)
            await world.decide(("pick", "{}"))
            look = await asked_to_verify(world, run_id)
            world.runs.submit(run_id, [result(look.id, '{"acted": false}')])
            step = await world.engines.next()
            step.answer("I do not have it")
            return step.request.messages[-1], (await world.end(run_id)).state

        told, state = play(scenario, cancel_confirm_s=0.01)
        assert told.is_error
        assert state is RunState.SUCCEEDED

    @pytest.mark.parametrize("found", ["no idea", '{"acted": "yes"}', "[]"])
    def test_who_looks_and_does_not_know_leaves_the_outcome_unknown(self, play, found):
        async def scenario(world):
            run_id = world.start(PICK, HOLDING)
            await world.decide(("pick", "{}"))
            look = await asked_to_verify(world, run_id)
            world.runs.submit(run_id, [result(look.id, found)])
            return await world.end(run_id)

        run = play(scenario, cancel_confirm_s=0.01)
        assert run.state is RunState.OUTCOME_UNKNOWN
        assert run.error.metadata["tool_call_ids"] == "call-1"

    def test_a_look_that_gives_no_result_leaves_it_unknown_and_is_not_unknown_itself(self, play):
        async def scenario(world):
            run_id = world.start(PICK, HOLDING)
            await world.decide(("pick", "{}"))
            return await world.end(run_id)

        run = play(scenario, cancel_confirm_s=0.01)
        assert run.error.metadata["tool_call_ids"] == "call-1"

    def test_a_result_that_comes_while_it_is_stopped_needs_no_look(self, play):
        async def scenario(world):
            run_id = world.start(PICK, HOLDING)
            await world.decide(("pick", "{}"))
            async for event in world.runs.watch(run_id, 0):
                if isinstance(event.body, CancelTool):
                    break
            world.runs.submit(run_id, [result("call-1", "got it")])
            step = await world.engines.next()
            step.answer("Done")
            return step.request.messages[-1].text

        assert play(scenario, cancel_confirm_s=5.0) == "got it"


async def asked_to_verify(world: World, run_id: str) -> ToolCall:
    async with asyncio.timeout(10):
        async for event in world.runs.watch(run_id, 0):
            if isinstance(event.body, ToolCallsIssued):
                for call in event.body.tool_calls:
                    if call.name == "holding":
                        return call
    raise AssertionError("nobody was asked to look")


class HeldJournal:
    """A `Journal` whose writes are done when its test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[Exception | None], None]] = []
        self.open = False

    def write(self, _run: Run, _events: object, done: Callable[[Exception | None], None]) -> None:
        self.waiting.append(done)
        if self.open:
            self.release()

    def release(self) -> None:
        self.open = True
        while self.waiting:
            self.waiting.pop(0)(None)


class TestHaltAndTheDisk:
    def play(self, tmp_path: Path, scenario: Any, settle_s: float) -> Any:
        async def bounded() -> Any:
            engines, journal = ScriptedEngines(), HeldJournal()
            latch = HaltLatch(tmp_path / "halts.json")
            settings = dataclasses.replace(SETTINGS, halt_settle_s=settle_s)
            runs = Runs(engines, latch, settings, journal=journal)
            async with asyncio.timeout(20):
                return await scenario(World(runs, engines, ScriptedTools(), KeptRecords()), journal)

        return asyncio.run(bounded())

    def test_a_halt_returns_once_what_was_on_its_way_to_be_shown_is_shown(self, tmp_path):
        async def scenario(world, journal):
            run_id = world.start(LOOK, durable=True)
            await world.decide(("look", "{}"))
            halting = asyncio.create_task(world.runs.halt(HaltScope.ALL, "", "", "test"))
            early, _ = await asyncio.wait({halting}, timeout=0.05)
            journal.release()
            await halting
            live = world.runs.live(run_id)
            return early, [type(event.body) async for event in shown(live)]

        early, bodies = self.play(tmp_path, scenario, 10.0)
        assert early == set()
        assert bodies.index(ToolCallsIssued) < bodies.index(CancelTool)

    def test_a_disk_that_does_not_answer_holds_up_no_halt(self, tmp_path):
        async def scenario(world, _journal):
            world.start(LOOK, durable=True)
            await world.decide(("look", "{}"))
            return await world.runs.halt(HaltScope.ALL, "", "", "test")

        assert self.play(tmp_path, scenario, 0.05).runs_stopped == 1


async def shown(live: Any) -> AsyncIterator[Any]:
    """The events that a follower sees now."""
    events = live.follow(0)
    last = live.snapshot().sequence
    async for event in events:
        yield event
        if event.sequence >= last and not hasattr(event.body, "run"):
            return


class TestWithoutALedger:
    def test_what_an_unknown_call_held_can_be_freed_all_the_same(self, tmp_path):
        async def scenario() -> Any:
            engines, ledger = ScriptedEngines(), AbsentLedger(LedgerFailed("broken"))
            latch = HaltLatch(tmp_path / "halts.json")
            settings = dataclasses.replace(SETTINGS, cancel_confirm_s=0.01)
            runs = Runs(engines, latch, settings)
            sessions = StoredSessions(ledger)
            owner = AcknowledgedRuns(runs, ledger, LedgerJournal(ledger, sessions.memory), sessions)
            world = World(runs, engines, ScriptedTools(), KeptRecords())
            run_id = world.start(DRIVE)
            await world.decide(("drive", "{}"))
            runs.cancel(run_id, CANCEL)
            await world.end(run_id)
            held = runs.holders()["base"].holding
            record = await owner.resolve(
                run_id, "call-1", acted=False, client="ann", evidence="it stands still"
            )
            with pytest.raises(NotFound):
                await owner.resolve(run_id, "call-1", acted=False, client="ann", evidence="again")
            return held, record, runs.holders()

        held, record, holders = asyncio.run(scenario())
        assert held == "UNKNOWN"
        assert (record.effect, record.tool) == (Effect.FAILED, "drive")
        assert record.resolution is not None
        assert record.resolution.client == "ann"
        assert holders == {}


class TestCost:
    def test_a_run_ends_before_the_step_after_the_one_that_spent_too_much(self, play):
        async def scenario(world):
            bounds = Limits(8, 16, max_cost_nano_usd=100)
            wanted = dataclasses.replace(spec(), tools=(LOOK,), limits=bounds)
            run_id = world.runs.create(wanted, client="client", request_id="").id
            for number, cost in ((1, 60), (2, 60)):
                step = await world.engines.next()
                call = ToolCall("", "look", f'{{"n":{number}}}')
                usage = dataclasses.replace(USAGE, cost_nano_usd=cost)
                step.outcome.set_result(StepResult("", (call,), FinishReason.TOOL_CALLS, usage))
                await settle()
                world.runs.submit(run_id, [result(f"call-{number}", "a box")])
            return await world.end(run_id)

        run = play(scenario)
        assert (run.state, run.steps, run.usage.cost_nano_usd) == (RunState.FAILED, 2, 120)
        assert run.error.reason == "COST_LIMIT"
