"""Tool calls of a run: who executes them, in which order, with whose approval, and what is left."""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edge_agent.core import (
    Executor,
    HaltScope,
    Message,
    Role,
    Run,
    RunError,
    RunState,
    SideEffect,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
)
from edge_agent.errors import DeadlineExceeded, FailedPrecondition, Halted, NotFound, Overloaded
from edge_agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    CancelTool,
    DaemonToolStarted,
    RunFinished,
    StateChanged,
    ToolCallsIssued,
)
from edge_agent.records import CallRecord, Effect, ResultClass, StepRecord
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.runs import Runs
from edge_agent.tools.results import too_large
from tests.support.scripted_engine import SETTINGS, ScriptedEngines, result, settle, spec

SCHEMA = '{"type":"object"}'
LOOK = Tool("look", "Look.", SCHEMA, side_effect=SideEffect.NONE)
GRIP = Tool("grip", "Grip.", SCHEMA, side_effect=SideEffect.NON_IDEMPOTENT)
CLOCK = Tool("clock", "Tell.", SCHEMA, side_effect=SideEffect.NONE, executor=Executor.DAEMON)
MAIL = Tool(
    "mail", "Send.", SCHEMA, side_effect=SideEffect.NON_IDEMPOTENT, executor=Executor.DAEMON
)
DOOR = Tool("door", "Open.", SCHEMA, side_effect=SideEffect.IDEMPOTENT, needs_approval=True)
CANCEL = RunError("CANCELLED_BY_CALLER", "cancelled by a test")
NOW = Message(Role.USER, (TextPart("The door is open now."),))


class ScriptedTools:
    """`DaemonTools`: each call waits until its test says what came of it."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._asked: asyncio.Queue[tuple[ToolCall, asyncio.Future[ToolResult]]] = asyncio.Queue()

    async def call(self, call: ToolCall, *, timeout_s: float) -> ToolResult:  # noqa: ARG002
        outcome: asyncio.Future[ToolResult] = asyncio.get_running_loop().create_future()
        self.calls.append(call)
        self._asked.put_nowait((call, outcome))
        return await outcome

    async def next(self) -> tuple[ToolCall, "asyncio.Future[ToolResult]"]:
        async with asyncio.timeout(10):
            return await self._asked.get()


class KeptRecords:
    """`Records` in a list; `broken` refuses what must be on disk first."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.calls: list[CallRecord] = []
        self.broken = False
        self.slow = False

    def step_started(self, run_id: str, step: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def call(self, record: CallRecord) -> None:
        self.calls.append(record)

    async def intend(self, record: CallRecord) -> None:
        if self.slow:
            await asyncio.Event().wait()
        if self.broken:
            raise Overloaded("the disk is full", reason="LEDGER_FULL")
        self.calls.append(record)

    def of(self, call_id: str) -> list[tuple[Effect, ResultClass | None]]:
        return [(each.effect, each.result_class) for each in self.calls if each.call_id == call_id]


@dataclasses.dataclass
class World:
    """An owner of runs with everything around it played."""

    runs: Runs
    engines: ScriptedEngines
    tools: ScriptedTools
    records: KeptRecords

    async def decide(self, *calls: tuple[str, str]) -> None:
        (await self.engines.next()).call(*calls)
        await settle()

    async def answer(self, text: str = "Done") -> None:
        (await self.engines.next()).answer(text)
        await settle()

    async def events(self, run_id: str) -> list[Any]:
        async with asyncio.timeout(10):
            return [event.body async for event in self.runs.watch(run_id, 0)][1:]

    async def end(self, run_id: str) -> Run:
        await self.events(run_id)
        return self.runs.get(run_id)

    def start(self, *tools: Tool, durable: bool = False, **changes: Any) -> str:
        wanted = dataclasses.replace(spec(**changes), tools=tools, durable=durable)
        return self.runs.create(wanted, client="client", request_id="").id


Scenario = Callable[[World], Coroutine[Any, Any, Any]]


@pytest.fixture
def play(tmp_path: Path):
    """Run a scenario."""

    def run(scenario: Scenario, **settings: Any) -> Any:
        async def bounded() -> Any:
            engines, tools, records = ScriptedEngines(), ScriptedTools(), KeptRecords()
            latch = HaltLatch(tmp_path / "halts.json")
            chosen = dataclasses.replace(SETTINGS, **settings)
            runs = Runs(engines, latch, chosen, daemon_tools=tools, records=records)
            async with asyncio.timeout(20):
                return await scenario(World(runs, engines, tools, records))

        return asyncio.run(bounded())

    return run


def issued(bodies: list[Any]) -> list[list[str]]:
    """Who was called together, in order."""
    found = [body for body in bodies if isinstance(body, ToolCallsIssued)]
    return [[call.name for call in body.tool_calls] for body in found]


class TestOrder:
    def test_what_acts_once_runs_by_itself_and_in_its_turn(self, play):
        async def scenario(world):
            run_id = world.start(LOOK, GRIP)
            await world.decide(("look", "{}"), ("look", '{"a":1}'), ("grip", "{}"), ("look", "{}"))
            for ids in (("call-2", "call-1"), ("call-3",), ("call-4",)):
                opened = {call.id for call in world.runs.get(run_id).open_tool_calls}
                assert opened == set(ids)
                for call_id in ids:
                    world.runs.submit(run_id, [result(call_id, "ok")])
                await settle()
            await world.answer()
            return await world.events(run_id)

        bodies = play(scenario)
        assert issued(bodies) == [["look", "look"], ["grip"], ["look"]]
        assert bodies[-1].run.state is RunState.SUCCEEDED

    def test_a_call_whose_turn_has_not_come_takes_no_result(self, play):
        async def scenario(world):
            run_id = world.start(GRIP)
            await world.decide(("grip", "{}"), ("grip", '{"a":1}'))
            with pytest.raises(FailedPrecondition) as refused:
                world.runs.submit(run_id, [result("call-2", "ok")])
            return refused.value

        assert play(scenario).reason == "TOOL_CALL_NOT_YOURS"

    def test_a_halt_between_two_calls_of_a_step_stops_the_second(self, play):
        async def scenario(world):
            run_id = world.start(GRIP, LOOK)
            await world.decide(("look", "{}"), ("grip", "{}"))
            await world.runs.halt(HaltScope.TOOL, "grip", "", "test")
            world.runs.submit(run_id, [result("call-1", "ok")])
            return await world.events(run_id)

        bodies = play(scenario)
        assert issued(bodies) == [["look"]]
        assert bodies[-1].run.error.reason == "HALTED"


class TestDaemonTools:
    def test_the_daemon_executes_its_own_and_tells_the_model(self, play):
        async def scenario(world):
            run_id = world.start(CLOCK)
            await world.decide(("clock", "{}"))
            call, outcome = await world.tools.next()
            run = world.runs.get(run_id)
            assert (run.state, run.open_tool_calls) == (RunState.WAITING_TOOL, ())
            assert [each.id for each in run.daemon_tool_calls] == [call.id]
            outcome.set_result(result(call.id, "noon"))
            step = await world.engines.next()
            assert step.request.messages[-1].text == "noon"
            step.answer("It is noon")
            return await world.events(run_id), world.records.of(call.id)

        bodies, records = play(scenario)
        assert any(isinstance(body, DaemonToolStarted) for body in bodies)
        assert issued(bodies) == []
        assert records == [(Effect.INTENDED, None), (Effect.DONE, ResultClass.OK)]

    def test_nobody_else_may_hand_in_its_result(self, play):
        async def scenario(world):
            run_id = world.start(CLOCK)
            await world.decide(("clock", "{}"))
            with pytest.raises(FailedPrecondition) as refused:
                world.runs.submit(run_id, [result("call-1", "midnight")])
            return refused.value

        assert play(scenario).reason == "TOOL_CALL_NOT_YOURS"

    def test_what_acts_once_does_not_start_unless_that_is_on_disk(self, play):
        async def scenario(world):
            world.records.broken = True
            run_id = world.start(MAIL)
            await world.decide(("mail", "{}"))
            return await world.end(run_id), world.tools.calls

        run, calls = play(scenario)
        assert (run.state, run.error.reason, calls) == (RunState.FAILED, "LEDGER_FULL", [])

    def test_a_call_that_is_cancelled_before_it_began_is_known_not_to_have_acted(self, play):
        async def scenario(world):
            world.records.slow = True
            run_id = world.start(MAIL)
            await world.decide(("mail", "{}"))
            world.runs.cancel(run_id, CANCEL)
            return await world.end(run_id), world.tools.calls, world.records.of("call-1")

        run, calls, records = play(scenario)
        assert (run.state, calls) == (RunState.CANCELLED, [])
        assert records == [(Effect.FAILED, ResultClass.CANCELLED)]

    def test_what_acts_once_and_gives_no_result_leaves_the_outcome_unknown(self, play):
        async def scenario(world):
            run_id = world.start(MAIL)
            await world.decide(("mail", "{}"))
            _, outcome = await world.tools.next()
            outcome.set_exception(DeadlineExceeded("too late", reason="TOOL_TIMEOUT"))
            return await world.end(run_id), world.records.of("call-1")

        run, records = play(scenario)
        assert (run.state, run.error.reason) == (RunState.OUTCOME_UNKNOWN, "OUTCOME_UNKNOWN")
        assert run.error.metadata["tool_call_ids"] == "call-1"
        assert records == [(Effect.INTENDED, None), (Effect.UNKNOWN, ResultClass.TIMEOUT)]

    @pytest.mark.parametrize("tool", [CLOCK, MAIL])
    def test_a_call_that_never_began_is_an_error_for_the_model(self, play, tool):
        async def scenario(world):
            run_id = world.start(tool)
            await world.decide((tool.name, "{}"))
            _, outcome = await world.tools.next()
            outcome.set_exception(Overloaded("60 calls a minute", reason="TOOL_RATE_LIMITED"))
            step = await world.engines.next()
            step.answer("Later")
            return step.request.messages[-1], (await world.end(run_id)).state

        turn, state = play(scenario)
        assert (turn.is_error, turn.text) == (True, "60 calls a minute")
        assert state is RunState.SUCCEEDED

    @pytest.mark.parametrize(
        ("tool", "state"), [(MAIL, RunState.OUTCOME_UNKNOWN), (CLOCK, RunState.CANCELLED)]
    )
    def test_cancelling_reaches_a_call_and_says_what_may_have_acted(self, play, tool, state):
        async def scenario(world):
            run_id = world.start(tool)
            await world.decide((tool.name, "{}"))
            _, outcome = await world.tools.next()
            world.runs.cancel(run_id, CANCEL)
            ended = await world.end(run_id)
            return ended, outcome.cancelled()

        run, cancelled = play(scenario)
        assert (run.state, cancelled) == (state, True)
        assert run.daemon_tool_calls == ()


class TestApproval:
    def test_an_approved_call_is_made_and_not_before(self, play):
        async def scenario(world):
            run_id = world.start(DOOR)
            await world.decide(("door", "{}"))
            run = world.runs.get(run_id)
            assert (run.state, run.open_tool_calls) == (RunState.WAITING_APPROVAL, ())
            world.runs.decide(run_id, "call-1", approved=True, client="boss", reason="")
            await settle()
            world.runs.submit(run_id, [result("call-1", "open")])
            await world.answer()
            return await world.events(run_id)

        bodies = play(scenario)
        kinds = [type(b) for b in bodies if not isinstance(b, StateChanged)]
        assert kinds.index(ApprovalRequested) < kinds.index(ApprovalDecided)
        assert kinds.index(ApprovalDecided) < kinds.index(ToolCallsIssued)
        assert ApprovalDecided("call-1", True, "boss") in bodies

    def test_a_denied_call_is_never_made_and_the_model_is_told(self, play):
        async def scenario(world):
            run_id = world.start(DOOR)
            await world.decide(("door", "{}"))
            world.runs.decide(run_id, "call-1", approved=False, client="boss", reason="no visits")
            step = await world.engines.next()
            step.answer("It stays shut")
            return step.request.messages[-1], await world.events(run_id), world.records.of("call-1")

        turn, bodies, records = play(scenario)
        assert (turn.is_error, turn.text) == (True, "denied: no visits")
        assert issued(bodies) == []
        assert records[-1] == (Effect.FAILED, ResultClass.DENIED)

    def test_one_that_does_not_wait_for_it_can_not_be_decided(self, play):
        async def scenario(world):
            run_id = world.start(DOOR)
            await world.decide(("door", "{}"))
            world.runs.decide(run_id, "call-1", approved=True, client="boss", reason="")
            with pytest.raises(FailedPrecondition) as late:
                world.runs.decide(run_id, "call-1", approved=False, client="boss", reason="")
            with pytest.raises(NotFound) as unknown:
                world.runs.decide(run_id, "call-9", approved=True, client="boss", reason="")
            return late.value.reason, unknown.value.reason

        assert play(scenario) == ("TOOL_CALL_NOT_WAITING", "TOOL_CALL_NOT_FOUND")

    def test_a_run_that_waits_for_approval_is_cancelled_at_once(self, play):
        async def scenario(world):
            run_id = world.start(DOOR)
            await world.decide(("door", "{}"))
            world.runs.cancel(run_id, CANCEL)
            return await world.end(run_id)

        run = play(scenario)
        assert (run.state, run.unapproved_tool_calls) == (RunState.CANCELLED, ())


class TestSuspension:
    def test_a_halt_suspends_a_durable_run_and_nothing_moves_until_it_is_resumed(self, play):
        async def scenario(world):
            run_id = world.start(LOOK, durable=True)
            await world.engines.next()
            outcome = await world.runs.halt(HaltScope.ALL, "", "stop", "test")
            await settle()
            run = world.runs.get(run_id)
            assert (run.state, run.error.reason) == (RunState.SUSPENDED, "HALTED")
            with pytest.raises(Halted):
                world.runs.resume(run_id, (NOW,), "client")
            await world.runs.clear_halt(outcome.halt.id)
            await settle()
            assert world.engines.open() == []
            world.runs.resume(run_id, (NOW,), "client")
            step = await world.engines.next()
            assert step.request.messages[-1] == NOW
            step.answer("Done")
            return await world.end(run_id)

        run = play(scenario)
        assert (run.state, run.error) == (RunState.SUCCEEDED, None)

    def test_open_calls_confirm_before_the_run_is_suspended(self, play):
        async def scenario(world):
            run_id = world.start(GRIP, durable=True)
            await world.decide(("grip", "{}"))
            await world.runs.halt(HaltScope.ALL, "", "stop", "test")
            await settle()
            assert world.runs.get(run_id).state is RunState.CANCELLING
            world.runs.submit(run_id, [ToolResult("call-1", (), cancelled=True)])
            await settle()
            return world.runs.get(run_id)

        run = play(scenario)
        assert (run.state, run.open_tool_calls) == (RunState.SUSPENDED, ())

    def test_a_call_that_nobody_confirms_leaves_the_outcome_unknown(self, play):
        async def scenario(world):
            run_id = world.start(GRIP, durable=True)
            await world.decide(("grip", "{}"))
            await world.runs.halt(HaltScope.ALL, "", "stop", "test")
            return await world.events(run_id)

        bodies = play(scenario, cancel_confirm_s=0.02)
        assert any(isinstance(body, CancelTool) for body in bodies)
        assert bodies[-1].run.state is RunState.OUTCOME_UNKNOWN

    def test_a_stopping_daemon_leaves_a_durable_run_and_its_calls_as_they_are(self, play):
        async def scenario(world):
            run_id = world.start(GRIP, durable=True)
            await world.decide(("grip", "{}"))
            await world.runs.drain(0)
            return world.runs.get(run_id)

        run = play(scenario)
        assert (run.state, run.error.reason) == (RunState.SUSPENDED, "DAEMON_STOPPING")
        assert [call.id for call in run.open_tool_calls] == ["call-1"]

    def test_calls_that_act_are_answered_before_the_run_goes_on(self, play):
        async def scenario(world):
            run_id = world.start(GRIP, durable=True)
            await world.decide(("grip", "{}"))
            await world.runs.drain(0)
            world.runs._accepting = True  # as after a restart
            with pytest.raises(FailedPrecondition) as refused:
                world.runs.resume(run_id, (), "client")
            world.runs.submit(run_id, [result("call-1", "gripped")])
            world.runs.resume(run_id, (NOW,), "client")
            step = await world.engines.next()
            assert [turn.text for turn in step.request.messages[-2:]] == [
                "gripped",
                "The door is open now.",
            ]
            step.answer("Done")
            return refused.value, (await world.end(run_id)).state

        refused, state = play(scenario)
        assert (refused.reason, refused.metadata["tool_call_ids"]) == ("TOOL_CALLS_OPEN", "call-1")
        assert state is RunState.SUCCEEDED

    def test_what_leaves_nothing_behind_is_called_again(self, play):
        async def scenario(world):
            run_id = world.start(LOOK, durable=True)
            await world.decide(("look", "{}"))
            await world.runs.drain(0)
            world.runs._accepting = True  # as after a restart
            world.runs.resume(run_id, (), "client")
            await settle()
            world.runs.submit(run_id, [result("call-1", "a wall")])
            await world.answer()
            return await world.events(run_id)

        assert issued(play(scenario)) == [["look"], ["look"]]

    def test_a_suspended_run_can_be_cancelled(self, play):
        async def scenario(world):
            run_id = world.start(LOOK, durable=True)
            await world.engines.next()
            await world.runs.halt(HaltScope.ALL, "", "", "test")
            await settle()
            world.runs.cancel(run_id, CANCEL)
            return await world.end(run_id)

        run = play(scenario)
        assert (run.state, run.error.reason) == (RunState.CANCELLED, "CANCELLED_BY_CALLER")

    def test_a_cancel_outweighs_a_suspension_that_waits_for_a_confirmation(self, play):
        async def scenario(world):
            run_id = world.start(GRIP, durable=True)
            await world.decide(("grip", "{}"))
            await world.runs.halt(HaltScope.ALL, "", "stop", "test")
            world.runs.cancel(run_id, CANCEL)
            world.runs.submit(run_id, [ToolResult("call-1", (), cancelled=True)])
            return await world.end(run_id)

        run = play(scenario)
        assert (run.state, run.error.reason) == (RunState.CANCELLED, "CANCELLED_BY_CALLER")

    def test_nobody_resumes_it_for_ever(self, play):
        async def scenario(world):
            run_id = world.start(LOOK, durable=True)
            await world.engines.next()
            await world.runs.halt(HaltScope.ALL, "", "", "test")
            return await world.end(run_id)

        run = play(scenario, suspended_retention_s=0.02)
        assert (run.state, run.error.reason) == (RunState.EXPIRED, "SUSPENDED_TOO_LONG")

    def test_only_a_suspended_run_is_resumed(self, play):
        async def scenario(world):
            run_id = world.start(LOOK, durable=True)
            with pytest.raises(FailedPrecondition) as refused:
                world.runs.resume(run_id, (), "client")
            return refused.value.reason

        assert play(scenario) == "RUN_NOT_SUSPENDED"


class TestRecords:
    def test_every_attempt_at_a_step_is_on_record(self, play):
        async def scenario(world):
            run_id = world.start(LOOK)
            await world.decide(("look", '{"a":1}'))
            world.runs.submit(run_id, [result("call-1", "{}")])
            await world.engines.next()
            world.runs.cancel(run_id, CANCEL)
            await world.end(run_id)
            return world.records

        records = play(scenario)
        assert [(r.step, r.parent, r.attempt, r.finish) for r in records.steps] == [
            (1, None, 1, "TOOL_CALLS"),
            (2, 1, 1, "CANCELLED_BY_CALLER"),
        ]
        assert records.steps[0].engine_digest == "0" * 64
        assert records.steps[0].tools_hash == records.steps[1].tools_hash != ""
        assert records.of("call-1") == [(Effect.INTENDED, None), (Effect.DONE, ResultClass.EMPTY)]
        assert all(record.body is None for record in (*records.steps, *records.calls))

    def test_bodies_are_kept_where_the_policy_says_so(self, play):
        async def scenario(world):
            run_id = world.start(LOOK)
            await world.decide(("look", '{"a":1}'))
            world.runs.submit(run_id, [result("call-1", "a wall")])
            await world.answer("A wall")
            await world.end(run_id)
            return world.records

        records = play(scenario, bodies="all")
        assert "A wall" in records.steps[1].body
        assert records.calls[-1].body == '{"arguments":{"a":1},"result":"a wall"}'
        records = play(scenario, bodies="errors")
        assert (records.steps[1].body, records.calls[-1].body) == (None, None)


def test_a_run_ends_once_whatever_its_tools_do(play):
    async def scenario(world):
        run_id = world.start(CLOCK, LOOK)
        await world.decide(("clock", "{}"), ("look", "{}"))
        _, outcome = await world.tools.next()
        world.runs.cancel(run_id, CANCEL)
        await settle()
        assert outcome.cancelled()
        world.runs.submit(run_id, [ToolResult("call-2", (), cancelled=True)])
        return await world.events(run_id)

    bodies = play(scenario)
    assert [type(body) for body in bodies].count(RunFinished) == 1
    assert bodies[-1].run.state is RunState.CANCELLED


class TestResultClasses:
    def test_a_result_that_was_not_let_through_is_on_record_as_invalid(self, play):
        async def scenario(world):
            run_id = world.start(CLOCK)
            await world.decide(("clock", "{}"))
            call, outcome = await world.tools.next()
            outcome.set_result(too_large(call, "the result has 9 bytes"))
            await world.answer()
            await world.end(run_id)
            return world.records.of(call.id)[-1]

        assert play(scenario) == (Effect.FAILED, ResultClass.INVALID)
