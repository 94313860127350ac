"""The owner of all runs: what it accepts, finds, halts and ends; and a model of it."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edge_agent.core import Halt, HaltScope, RunError, RunState
from edge_agent.errors import (
    AlreadyExists,
    FailedPrecondition,
    Halted,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from edge_agent.events import CancelTool, Event, RunFinished, Snapshot, ToolCallsIssued
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.runs import Runs
from tests.support.scripted_engine import (
    ENGINE,
    SETTINGS,
    ScriptedEngines,
    new_runs,
    result,
    settle,
    spec,
)

CANCEL = RunError("CANCELLED_BY_CALLER", "cancelled by a test")
SHORT_S = 0.03

Scenario = Callable[[Runs, ScriptedEngines], Coroutine[Any, Any, Any]]


def run_bounded(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


@pytest.fixture
def play(tmp_path: Path):
    """Run a scenario with an owner of runs; `settings` are the owner's."""

    def run(scenario: Scenario, **settings: Any) -> Any:
        async def start() -> Any:
            return await scenario(*new_runs(tmp_path, **settings))

        return run_bounded(start())

    return run


def start(
    runs: Runs, client: str = "client", request_id: str = "", text: str = "Go", **changes: Any
) -> str:
    return runs.create(spec(text, **changes), client=client, request_id=request_id).id


async def end(runs: Runs, run_id: str) -> RunState:
    """Wait for a run's end."""
    async for event in runs.watch(run_id, None):
        if isinstance(event.body, RunFinished):
            await settle()  # its owner has seen it too
            return event.body.run.state
    await settle()
    return runs.get(run_id).state


async def with_open_call(runs: Runs, engines: ScriptedEngines, tool: str, **changes: Any) -> str:
    """A run that waits for the result of a call of this tool."""
    run_id = start(runs, **changes)
    (await engines.next()).call((tool, "{}"))
    async for event in runs.watch(run_id, 0):
        if isinstance(event.body, ToolCallsIssued):
            break
    return run_id


class TestAccepting:
    def test_the_same_request_is_the_same_run(self, play):
        async def scenario(runs, engines):
            first = start(runs, request_id="r1")
            again = start(runs, request_id="r1")
            (await engines.next()).answer("Done")
            await end(runs, first)
            return first, again, start(runs, request_id="r1"), len(engines.steps)

        first, again, after_its_end, steps = play(scenario)
        assert first == again == after_its_end
        assert steps == 1

    def test_the_same_request_id_with_another_body_is_refused(self, play):
        async def scenario(runs, _engines):
            run_id = start(runs, request_id="r1")
            with pytest.raises(AlreadyExists) as caught:
                start(runs, request_id="r1", text="Stop")
            assert caught.value.metadata == {"request_id": "r1", "run_id": run_id}
            return caught.value.reason

        assert play(scenario) == "REQUEST_ID_REUSED"

    def test_request_ids_of_two_clients_are_two_things(self, play):
        async def scenario(runs, _engines):
            return start(runs, "a", "r1") == start(runs, "b", "r1", text="Stop")

        assert not play(scenario)

    def test_without_a_request_id_every_request_is_a_run(self, play):
        async def scenario(runs, _engines):
            return start(runs) == start(runs)

        assert not play(scenario)

    def test_an_unknown_engine_is_refused_and_leaves_nothing(self, play):
        async def scenario(runs, _engines):
            with pytest.raises(NotFound):
                start(runs, engine="unknown", request_id="r1")
            return start(runs, request_id="r1"), sum(runs.counts().values())

        assert play(scenario)[1] == 1

    def test_no_more_are_active_than_the_settings_say(self, play):
        async def scenario(runs, engines):
            first = start(runs)
            start(runs)
            with pytest.raises(Overloaded) as caught:
                start(runs)
            assert caught.value.metadata == {"active": "2", "limit": "2"}
            assert caught.value.retry_after_s
            (await engines.next()).answer("Done")
            await end(runs, first)
            start(runs)
            return caught.value.reason

        assert play(scenario, max_active=2) == "TOO_MANY_RUNS"

    def test_what_was_accepted_can_be_asked_for_again_whatever_came_after(self, play):
        async def scenario(runs, _engines):
            run_id = start(runs, request_id="r1")
            await runs.halt(HaltScope.ALL, "", "", "operator")
            runs.stop_accepting()
            return run_id, start(runs, request_id="r1")

        run_id, again = play(scenario)
        assert run_id == again


class TestFinding:
    def test_an_unknown_run_is_named(self, play):
        async def scenario(runs, _engines):
            for call in (
                lambda: runs.get("nobody"),
                lambda: runs.cancel("nobody", CANCEL),
                lambda: runs.submit("nobody", [result("call-1")]),
                lambda: runs.watch("nobody", None),
            ):
                with pytest.raises(NotFound, match="'nobody'") as caught:
                    call()
                assert caught.value.reason == "RUN_NOT_FOUND"

        play(scenario)

    def test_an_ended_run_is_kept_for_its_retention(self, play):
        async def scenario(runs, engines):
            run_ids = [start(runs) for _ in range(3)]
            for run_id in run_ids:
                (await engines.next()).answer("Done")
                await end(runs, run_id)
            with pytest.raises(NotFound):
                runs.get(run_ids[0])
            kept = [runs.get(run_id).answer for run_id in run_ids[1:]]
            runs.settings = dataclasses.replace(runs.settings, retention_s=-1.0)
            with pytest.raises(NotFound):
                runs.get(run_ids[2])
            return kept

        assert play(scenario, max_retained=2) == ["Done", "Done"]

    def test_states_are_chosen_and_transcripts_left_out(self, play):
        async def scenario(runs, engines):
            done = start(runs)
            (await engines.next()).answer("Done")
            await end(runs, done)
            start(runs)
            chosen = frozenset({RunState.SUCCEEDED})
            (found,) = runs.page(chosen, None, 10)
            assert (found.id, found.answer, found.transcript) == (done, "Done", ())
            await engines.next()
            return runs.counts()

        assert play(scenario) == {RunState.SUCCEEDED: 1, RunState.RUNNING: 1}


class TestResults:
    @pytest.mark.parametrize(
        ("call_ids", "error", "reason"),
        [
            (["call-1", "call-9"], NotFound, "TOOL_CALL_NOT_FOUND"),
            (["call-1", "call-1"], InvalidRequest, "INVALID_REQUEST"),
            (["call-1", "call-2"], FailedPrecondition, "TOOL_CALL_CLOSED"),
        ],
    )
    def test_all_are_taken_or_none(self, play, call_ids, error, reason):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).call(("move", "{}"), ("speak", "{}"), ("move", "{}"))
            await settle()
            runs.submit(run_id, [result("call-2")])
            before = runs.get(run_id)
            with pytest.raises(error) as caught:
                runs.submit(run_id, [result(call_id) for call_id in call_ids])
            assert runs.get(run_id) == before
            assert "results[1]" in caught.value.message
            return caught.value.reason

        assert play(scenario) == reason

    def test_nobody_asked_before_the_first_call(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            await engines.next()
            with pytest.raises(NotFound, match="made no call 'call-1'"):
                runs.submit(run_id, [result("call-1")])

        play(scenario)

    def test_none_are_taken_after_the_end(self, play):
        async def scenario(runs, engines):
            run_id = await with_open_call(runs, engines, "move")
            runs.cancel(run_id, CANCEL)
            assert await end(runs, run_id) is RunState.OUTCOME_UNKNOWN
            before = runs.get(run_id)
            with pytest.raises(FailedPrecondition) as caught:
                runs.submit(run_id, [result("call-1")])
            assert runs.get(run_id) == before
            return caught.value.reason

        assert play(scenario, cancel_confirm_s=SHORT_S) == "RUN_ENDED"


class TestFollowing:
    def test_from_any_place_there_is_no_gap_and_no_repeat(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            resumed: list[tuple[int, asyncio.Task[list[Event]]]] = []

            async def collect(after: int) -> list[Event]:
                return [event async for event in runs.watch(run_id, after)]

            async def join() -> None:
                places = range(runs.get(run_id).sequence + 1)
                resumed.extend((after, asyncio.create_task(collect(after))) for after in places)
                await settle()

            step = await engines.next()
            await join()
            step.say("I ", "move")
            await join()
            step.call(("move", "{}"))
            await settle()
            await join()
            runs.submit(run_id, [result("call-1")])
            step = await engines.next()
            step.say("Do", "ne")
            step.answer("Done")
            await end(runs, run_id)
            await join()  # ended runs too
            return [(after, await task) for after, task in resumed]

        followed = play(scenario)
        whole = [event for event in followed[0][1][1:] if event.sequence > 0]
        last = whole[-1].sequence
        texts: dict[int, str] = {}
        for after, (snapshot, *rest) in followed:
            assert isinstance(snapshot.body, Snapshot)
            numbers = [event.sequence for event in rest]
            assert numbers == sorted(set(numbers))
            assert all(number > after for number in numbers)
            assert (numbers[-1] if numbers else after) == last
            bodies = [event.body for event in rest]
            text = "".join(getattr(body, "text", "") for body in bodies)
            assert texts.setdefault(after, text) == text
            kinds = [e.sequence for e in whole if not hasattr(e.body, "text")]
            seen = [e.sequence for e in rest if not hasattr(e.body, "text")]
            assert seen == [number for number in kinds if number > after]
        assert texts[0] == "I moveDone"

    def test_without_a_place_it_begins_after_the_snapshot(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            step = await engines.next()
            step.say("Hel")
            watching = runs.watch(run_id, None)
            snapshot = await anext(watching)
            step.say("lo")
            step.answer("Hello")
            return snapshot, [event async for event in watching]

        snapshot, (delta, *_) = play(scenario)
        assert snapshot.body.run.partial_text == "Hel"
        assert (delta.sequence, delta.body.text) == (snapshot.sequence + 1, "lo")

    def test_of_an_ended_run_there_is_a_snapshot_with_its_end(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            (await engines.next()).answer("Done")
            await end(runs, run_id)
            return [event async for event in runs.watch(run_id, None)]

        (snapshot,) = play(scenario)
        assert snapshot.body.run.state is RunState.SUCCEEDED
        assert snapshot.body.run.answer == "Done"


class TestHalting:
    @pytest.mark.parametrize(
        ("scope", "target", "stopped"),
        [
            (HaltScope.ALL, "", {"arm", "base", "base/picker"}),
            (HaltScope.CLIENT, "base", {"base", "base/picker"}),
            (HaltScope.AGENT, "picker", {"base/picker"}),
            (HaltScope.TOOL, "move", {"arm"}),
            (HaltScope.CLIENT, "move", set()),  # a tool's name, but no client's
            (HaltScope.AGENT, "move", set()),
        ],
    )
    def test_stops_what_its_scope_covers_and_nothing_else(self, play, scope, target, stopped):
        async def scenario(runs, engines):
            names = {
                await with_open_call(runs, engines, "move", client="arm"): "arm",
                await with_open_call(runs, engines, "speak", client="base"): "base",
                start(runs, client="base", agent="picker"): "base/picker",
            }
            await engines.next()
            outcome = await runs.halt(scope, target, "a person", "operator")
            await settle()
            hit = {
                names[run_id]
                for run_id in names
                if runs.get(run_id).state in {RunState.CANCELLING, RunState.CANCELLED}
            }
            assert outcome.recorded
            assert outcome.runs_stopped == len(stopped)
            return hit

        assert play(scenario) == stopped

    def test_acts_before_it_is_recorded(self, play):
        async def scenario(runs, engines):
            run_id = await with_open_call(runs, engines, "move")
            halting = asyncio.create_task(runs.halt(HaltScope.ALL, "", "", "operator"))
            await asyncio.sleep(0)  # it has begun, no more
            assert not halting.done()
            state = runs.get(run_id).state
            await halting
            return state

        assert play(scenario) is RunState.CANCELLING

    def test_covered_runs_are_refused_until_it_is_cleared(self, play):
        async def scenario(runs, _engines):
            outcome = await runs.halt(HaltScope.CLIENT, "arm", "a person", "operator")
            with pytest.raises(Halted, match="a person") as caught:
                start(runs, client="arm")
            assert caught.value.metadata["halt_id"] == outcome.halt.id
            start(runs, client="base")
            await runs.clear_halt(outcome.halt.id)
            start(runs, client="arm")
            assert runs.halts() == ()
            with pytest.raises(NotFound):
                await runs.clear_halt(outcome.halt.id)

        play(scenario)

    def test_survives_a_restart_until_it_is_cleared(self, tmp_path: Path):
        async def life(clear: Halt | None) -> tuple[Halt, ...]:
            runs, _ = new_runs(tmp_path)
            latched = runs.halts()
            if clear is None:
                await runs.halt(HaltScope.AGENT, "picker", "", "operator")
            else:
                await runs.clear_halt(clear.id)
            return latched

        assert run_bounded(life(None)) == ()
        (halt,) = run_bounded(life(None))
        assert (halt.scope, halt.target) == (HaltScope.AGENT, "picker")
        first, second = run_bounded(life(halt))
        assert first == halt
        assert run_bounded(life(second)) == (second,)
        assert run_bounded(life(None)) == ()

    def test_acts_even_where_the_disk_refuses_and_says_so(self, play, tmp_path: Path):
        async def scenario(runs, engines):
            run_id = await with_open_call(runs, engines, "move")
            (tmp_path / "halts.json.partial").mkdir()  # in the record's way
            outcome = await runs.halt(HaltScope.ALL, "", "", "operator")
            assert runs.get(run_id).state is RunState.CANCELLING
            with pytest.raises(Halted):
                start(runs)
            with pytest.raises(FailedPrecondition, match="stays latched") as caught:
                await runs.clear_halt(outcome.halt.id)
            assert runs.halts() == (outcome.halt,)
            return outcome.recorded, caught.value.reason

        assert play(scenario) == (False, "HALT_NOT_RECORDED")

    def test_one_more_than_the_limit_stops_what_it_covers_and_everything_else(
        self, play, monkeypatch
    ):
        monkeypatch.setattr("edge_agent.runs.halts.MAX_HALTS", 1)

        async def scenario(runs, engines):
            await runs.halt(HaltScope.TOOL, "speak", "", "operator")
            run_id = await with_open_call(runs, engines, "move", client="arm")
            outcome = await runs.halt(HaltScope.CLIENT, "base", "a person", "operator")
            assert (outcome.halt.scope, outcome.runs_stopped) == (HaltScope.ALL, 1)
            assert runs.get(run_id).state is RunState.CANCELLING
            with pytest.raises(Halted, match="a person"):
                start(runs, client="arm")
            again = await runs.halt(HaltScope.TOOL, "move", "", "operator")
            assert (again.halt, again.recorded) == (outcome.halt, True)
            assert len(runs.halts()) == 2

        play(scenario)


class SlowDisk(HaltLatch):
    """Writes when the test lets it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begun = threading.Event()
        self.writable = threading.Event()

    def record(self, halts: tuple[Halt, ...]) -> None:
        self.begun.set()
        assert self.writable.wait(10)
        super().record(halts)


class TestSlowDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> SlowDisk:
        return SlowDisk(tmp_path / "halts.json")

    def test_a_halt_whose_caller_has_gone_is_recorded_all_the_same(self, disk):
        async def scenario() -> None:
            runs = Runs(ScriptedEngines(), disk, SETTINGS)
            first = asyncio.create_task(runs.halt(HaltScope.TOOL, "move", "", "a"))
            await asyncio.to_thread(disk.begun.wait, 10)
            second = asyncio.create_task(runs.halt(HaltScope.TOOL, "speak", "", "b"))
            await settle()  # it waits for the first one's write
            for task in (first, second):
                task.cancel()
            await asyncio.wait([first, second])
            disk.writable.set()
            await asyncio.gather(*runs._halting._going_on)

        run_bounded(scenario())
        assert [halt.target for halt in HaltLatch(disk._path).halts()] == ["move", "speak"]

    def test_an_answer_does_not_wait_for_it_forever(self, disk, monkeypatch):
        monkeypatch.setattr("edge_agent.runs.halting._RECORD_TIMEOUT_S", SHORT_S)

        async def scenario() -> bool:
            runs = Runs(ScriptedEngines(), disk, SETTINGS)
            outcome = await runs.halt(HaltScope.ALL, "", "", "operator")
            disk.writable.set()
            await asyncio.gather(*runs._halting._going_on)
            assert HaltLatch(disk._path).halts() == (outcome.halt,)
            return outcome.recorded

        assert run_bounded(scenario()) is False

    def test_clearing_whose_caller_has_gone_is_finished(self, disk):
        async def scenario() -> None:
            runs = Runs(ScriptedEngines(), disk, SETTINGS)
            disk.writable.set()
            outcome = await runs.halt(HaltScope.ALL, "", "", "operator")
            disk.begun.clear()
            disk.writable.clear()
            clearing = asyncio.create_task(runs.clear_halt(outcome.halt.id))
            await asyncio.to_thread(disk.begun.wait, 10)
            assert runs.halts() == (outcome.halt,)  # not lifted before it is on disk
            clearing.cancel()
            await asyncio.wait([clearing])
            disk.writable.set()
            await asyncio.gather(*runs._halting._going_on)
            assert runs.halts() == ()

        run_bounded(scenario())
        assert HaltLatch(disk._path).halts() == ()


class TestDraining:
    def test_running_ones_finish_and_new_ones_are_refused(self, play):
        async def scenario(runs, engines):
            run_id = start(runs)
            step = await engines.next()
            draining = asyncio.create_task(runs.drain(60.0))
            await settle()
            with pytest.raises(Unavailable) as caught:
                start(runs)
            step.answer("Done")
            await draining
            return caught.value.reason, runs.get(run_id).state

        assert play(scenario) == ("DAEMON_DRAINING", RunState.SUCCEEDED)

    def test_what_is_left_after_the_grace_ends_with_an_event(self, play):
        async def scenario(runs, engines):
            deciding = start(runs)
            await engines.next()
            waiting = await with_open_call(runs, engines, "move")
            await runs.drain(0.0)
            return runs.get(deciding), runs.get(waiting)

        deciding, waiting = play(scenario, cancel_confirm_s=SHORT_S)
        assert deciding.state is RunState.FAILED
        assert (deciding.error.reason, deciding.error.retryable) == ("DAEMON_STOPPING", True)
        assert waiting.state is RunState.OUTCOME_UNKNOWN
        assert waiting.error.metadata["cause"] == "DAEMON_STOPPING"

    def test_a_tool_may_still_confirm(self, play):
        async def scenario(runs, engines):
            run_id = await with_open_call(runs, engines, "move")
            draining = asyncio.create_task(runs.drain(0.0))
            async for event in runs.watch(run_id, 0):
                if isinstance(event.body, CancelTool):
                    break
            runs.submit(run_id, [result("call-1", cancelled=True)])
            await draining
            return runs.get(run_id).state

        assert play(scenario) is RunState.FAILED

    def test_nothing_to_drain_takes_no_time(self, play):
        async def scenario(runs, _engines):
            async with asyncio.timeout(5.0):
                await runs.drain(3600.0)
            return runs.counts()

        assert play(scenario) == {}


def test_the_engine_asked_for_is_the_engine_that_decides(play):
    async def scenario(runs, engines):
        start(runs)
        return (await engines.next()).engine

    assert play(scenario) == ENGINE
