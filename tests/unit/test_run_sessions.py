"""Runs of a session: what each reads of those before it, who may begin, and what makes room."""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from edge_agent.core import (
    FinishReason,
    Message,
    Overflow,
    Role,
    Run,
    RunError,
    RunState,
    Session,
    SessionUse,
    TextPart,
)
from edge_agent.errors import FailedPrecondition, InvalidRequest, Overloaded, StepFailed
from edge_agent.events import HistoryShortened, TextDelta
from edge_agent.records import CallRecord, StepRecord
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.recording import NoRecords
from edge_agent.runs.runs import Runs
from edge_agent.runs.sessions import Sessions
from tests.support.scripted_engine import (
    SETTINGS,
    USAGE,
    ScriptedEngines,
    Step,
    result,
    settle,
    spec,
)

TOUR = SessionUse("tour")
CONTEXT_TOKENS = 400
CANCEL = RunError("CANCELLED_BY_CALLER", "cancelled by a test")


def messages(*said: tuple[Role, str]) -> tuple[Message, ...]:
    return tuple(Message(role, (TextPart(text),)) for role, text in said)


def goes(text: str, answer: str) -> tuple[Message, ...]:
    return messages((Role.USER, text), (Role.ASSISTANT, answer))


def too_long(prompt_tokens: int = 500) -> StepFailed:
    metadata = {
        "prompt_tokens": str(prompt_tokens),
        "context_tokens": str(CONTEXT_TOKENS),
        "max_output_tokens": "64",
    }
    return StepFailed(RunError("PROMPT_TOO_LONG", "the prompt is too long", metadata=metadata))


class Kept(NoRecords):
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def call(self, record: CallRecord) -> None:
        pass


class World:
    """A client's runs, and what was written of its sessions."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.engines = ScriptedEngines()
        self.records = Kept()
        self.written: list[Session] = []
        self.sessions = Sessions(self.written.append, clock=lambda: 50.0)
        self.runs = Runs(
            self.engines,
            HaltLatch(directory / "halts.json"),
            dataclasses.replace(SETTINGS, **settings),
            records=self.records,
            sessions=self.sessions,
        )

    def start(self, text: str = "Go", *, client: str = "robot", **more: Any) -> Run:
        wanted = spec(text, **{"session": TOUR, **more})
        return self.runs.create(wanted, client=client, request_id="")

    async def end(self, run: Run) -> Run:
        async for _event in self.runs.watch(run.id, 0):
            pass
        return self.runs.get(run.id)

    async def said(self, text: str, answer: str, **more: Any) -> Step:
        """A run from its beginning to its answer; returns its step."""
        run = self.start(text, **more)
        step = await self.engines.next()
        step.answer(answer)
        assert (await self.end(run)).state is RunState.SUCCEEDED
        return step

    async def shortened(self, run: Run) -> list[HistoryShortened]:
        events = [event.body async for event in self.runs.watch(run.id, 0)]
        return [body for body in events if isinstance(body, HistoryShortened)]

    @property
    def history(self) -> tuple[Message, ...]:
        return self.sessions.get("robot", "tour").messages


@pytest.fixture
def play(tmp_path: Path):
    def run(scenario: Callable[[World], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(20):
                return await scenario(World(tmp_path, **settings))

        return asyncio.run(bounded())

    return run


class TestHistory:
    def test_a_run_reads_what_those_before_it_said(self, play):
        async def scenario(world):
            await world.said("Go", "Gone")
            await world.said("Back", "I am back")
            return (await world.said("Where?", "Here")).request.messages

        before = (*goes("Go", "Gone"), *goes("Back", "I am back"))
        assert play(scenario) == (*before, *messages((Role.USER, "Where?")))

    def test_calls_and_results_are_part_of_it_and_its_front_never_changes(self, play):
        async def scenario(world):
            run = world.start()
            (await world.engines.next()).call(("move", '{"x": 1}'))
            async for event in world.runs.watch(run.id, 0):
                if type(event.body).__name__ == "ToolCallsIssued":
                    world.runs.submit(run.id, [result("call-1")])
                    (await world.engines.next()).answer("Done")
            first = world.engines.steps[-1].request.messages
            return first, (await world.said("Again", "Done")).request.messages

        first, second = play(scenario)
        of_call = next(message for message in first if message.tool_calls)
        assert [message.text for message in second[: len(first)]] == [turn.text for turn in first]
        assert second[1].tool_calls[0].name == of_call.tool_calls[0].name
        assert [message.tool_call_id for message in second if message.tool_call_id] == ["1/call-1"]

    def test_it_belongs_to_its_client_and_a_run_without_a_session_reads_none(self, play):
        async def scenario(world):
            await world.said("Go", "Gone")
            other = await world.said("Hello", "Hi", client="app")
            alone = await world.said("Hello", "Hi", session=None)
            return other.request.messages, alone.request.messages

        assert play(scenario) == (messages((Role.USER, "Hello")),) * 2

    def test_a_run_that_fails_leaves_its_whole_turns_and_one_that_did_nothing_leaves_none(
        self, play
    ):
        async def scenario(world):
            run = world.start()
            step = await world.engines.next()
            step.fail(StepFailed(RunError("ENGINE_FAILED", "no")))
            await world.end(run)
            nothing = world.history
            run = world.start()
            (await world.engines.next()).call(("move", "{}"), ("speak", "{}"))
            await settle()
            world.runs.submit(run.id, [result("call-1")])
            world.runs.cancel(run.id, CANCEL)
            world.runs.submit(run.id, [result("call-2", cancelled=True)])
            await world.end(run)
            return nothing, world.history

        nothing, history = play(scenario)
        assert nothing == ()
        assert [turn.role for turn in history][:3] == [Role.USER, Role.ASSISTANT, Role.TOOL]

    def test_each_run_s_end_is_written_once(self, play):
        async def scenario(world):
            await world.said("Go", "Gone")
            await world.said("Back", "I am back")
            return world.written

        first, second = play(scenario)
        assert (first.runs, first.messages) == (1, goes("Go", "Gone"))
        assert (second.runs, len(second.messages)) == (2, 4)
        assert (second.overflow, second.used_at_s, second.run_id) == (Overflow.REFUSE, 50.0, "")


class TestWhoMayBegin:
    def test_one_run_at_a_time_and_the_other_is_named(self, play):
        async def scenario(world):
            run = world.start()
            with pytest.raises(FailedPrecondition) as busy:
                world.start()
            (await world.engines.next()).answer("Done")
            await world.end(run)
            world.start()
            return busy.value, run.id

        busy, run_id = play(scenario)
        assert (busy.reason, busy.metadata["run_id"]) == ("SESSION_BUSY", run_id)

    def test_a_repeated_request_is_not_busy_with_itself(self, play):
        async def scenario(world):
            wanted = spec(session=TOUR)
            runs = [world.runs.create(wanted, client="robot", request_id="1") for _ in range(2)]
            return {run.id for run in runs}

        assert len(play(scenario)) == 1

    def test_only_the_first_run_has_a_system_message(self, play):
        async def scenario(world):
            system = messages((Role.SYSTEM, "Be kind."))
            wanted = spec(session=TOUR)
            first = system + wanted.messages
            run = world.runs.create(
                dataclasses.replace(wanted, messages=first), client="robot", request_id=""
            )
            (await world.engines.next()).answer("Done")
            await world.end(run)
            with pytest.raises(InvalidRequest) as wrong:
                world.runs.create(
                    dataclasses.replace(wanted, messages=first), client="robot", request_id=""
                )
            step = await world.said("Go", "Gone")
            return wrong.value.violations[0].field, step.request.messages[0]

        assert play(scenario) == ("spec.messages[0].role", *messages((Role.SYSTEM, "Be kind.")))

    def test_a_session_keeps_its_overflow(self, play):
        async def scenario(world):
            drop = SessionUse("tour", Overflow.DROP_OLDEST)
            await world.said("Go", "Gone", session=drop)
            await world.said("Go", "Gone", session=drop)
            await world.said("Go", "Gone")
            with pytest.raises(FailedPrecondition) as differs:
                world.start(session=SessionUse("tour", Overflow.REFUSE))
            return differs.value.reason, world.sessions.get("robot", "tour").overflow

        assert play(scenario) == ("SESSION_OVERFLOW_DIFFERS", Overflow.DROP_OLDEST)

    def test_no_more_sessions_than_the_configuration_allows(self, play):
        async def scenario(world):
            for number in range(2):
                await world.said("Go", "Gone", session=SessionUse(str(number)))
            with pytest.raises(Overloaded) as many:
                world.start(session=SessionUse("2"))
            await world.said("Go", "Gone", session=SessionUse("1"))
            return many.value.reason

        assert play(scenario, max_sessions=2) == "TOO_MANY_SESSIONS"

    def test_a_refused_run_leaves_its_session_free(self, play):
        async def scenario(world):
            with pytest.raises(Overloaded):
                world.start()
            return world.sessions.all(None)

        assert play(scenario, max_active=0) == ()


class TestTooMuchHistory:
    def test_a_session_that_refuses_fails_the_run_and_is_named(self, play):
        async def scenario(world):
            await world.said("Go", "Gone")
            run = world.start("Back")
            (await world.engines.next()).fail(too_long())
            return await world.end(run), world.history

        run, history = play(scenario)
        assert (run.state, run.error.reason) == (RunState.FAILED, "PROMPT_TOO_LONG")
        assert run.error.metadata["session_id"] == "tour"
        assert "'tour'" in run.error.message
        assert history == goes("Go", "Gone")

    def test_the_oldest_turns_are_dropped_and_the_step_is_asked_again(self, play):
        async def scenario(world):
            use = SessionUse("tour", Overflow.DROP_OLDEST)
            for number in range(3):
                await world.said(f"{number}" * 400, "Done", session=use)
            run = world.start("Back")
            (await world.engines.next()).fail(too_long(450))
            step = await world.engines.next()
            step.answer("Done")
            return step.request.messages, await world.shortened(run), world.history

        asked, events, history = play(scenario)
        # 450 tokens are to become 300: 600 characters, which is two turns.
        assert asked == (*goes("2" * 400, "Done"), *messages((Role.USER, "Back")))
        assert events == [HistoryShortened(1, 4, 0, 2)]
        assert history == (*asked, *messages((Role.ASSISTANT, "Done")))

    def test_it_is_tried_again_until_it_fits_and_fails_where_nothing_is_left(self, play):
        async def scenario(world):
            use = SessionUse("tour", Overflow.DROP_OLDEST)
            for _ in range(2):
                await world.said("x" * 4000, "Done", session=use)
            run = world.start("Back")
            for _ in range(3):
                (await world.engines.next()).fail(too_long())
            return await world.end(run), await world.shortened(run), world.history

        run, events, history = play(scenario)
        assert (run.state, run.error.reason) == (RunState.FAILED, "PROMPT_TOO_LONG")
        assert [event.kept_messages for event in events] == [2, 0]
        assert history == ()

    def test_another_failure_drops_nothing(self, play):
        async def scenario(world):
            use = SessionUse("tour", Overflow.DROP_OLDEST)
            await world.said("Go", "Gone", session=use)
            run = world.start("Back")
            (await world.engines.next()).fail(StepFailed(RunError("ENGINE_FAILED", "no")))
            return (await world.end(run)).error.reason, world.history

        assert play(scenario) == ("ENGINE_FAILED", goes("Go", "Gone"))

    def test_a_history_larger_than_allowed_makes_room_before_the_first_step(self, play):
        async def scenario(world):
            use = SessionUse("tour", Overflow.DROP_OLDEST)
            for number in range(3):
                await world.said(f"{number}" * 400, "Done", session=use)
            await world.said("Back", "Done")
            return world.history

        kept = (*goes("2" * 400, "Done"), *goes("Back", "Done"))
        assert play(scenario, max_history_bytes=900) == kept

    def test_a_history_larger_than_allowed_is_refused_where_nothing_is_dropped(self, play):
        async def scenario(world):
            await world.said("x" * 400, "Done")
            with pytest.raises(FailedPrecondition) as full:
                world.start()
            return full.value.reason, full.value.metadata["limit_bytes"]

        assert play(scenario, max_history_bytes=100) == ("SESSION_FULL", "100")


class TestSummaries:
    USE = SessionUse("tour", Overflow.SUMMARISE)

    def test_a_summary_takes_the_place_of_the_oldest_turns_as_a_step_on_record(self, play):
        async def scenario(world):
            for number in range(3):
                await world.said(f"{number}" * 400, "Done", session=self.USE)
            before = len(world.records.steps)
            run = world.start("Back")
            (await world.engines.next()).fail(too_long(450))
            summing = await world.engines.next()
            summing.say("not for ", "anybody")
            summing.answer("Counted to one.")
            (await world.engines.next()).answer("Done")
            ended = await world.end(run)
            records = world.records.steps[before:]
            told = [event.body async for event in world.runs.watch(run.id, 0)]
            assert not any(isinstance(body, TextDelta) for body in told)
            return summing.request, await world.shortened(run), ended, records, world.history

        asked, (event,), run, records, history = play(scenario)
        assert asked.tools == ()
        assert asked.max_output_tokens == 256
        assert "0" * 400 in asked.messages[1].text
        assert "2" * 400 not in asked.messages[1].text
        assert (event.dropped_messages, event.summarised_messages, event.kept_messages) == (0, 4, 2)
        assert history[0].is_summary
        assert history[0].text == event.summary
        assert "Counted to one." in event.summary
        assert history[1:] == (*goes("2" * 400, "Done"), *goes("Back", "Done"))
        assert [(each.step, each.attempt, each.route, each.finish) for each in records] == [
            (1, 1, "LOCAL", "PROMPT_TOO_LONG"),
            (1, 2, "SUMMARY", FinishReason.STOP),
            (1, 3, "LOCAL", FinishReason.STOP),
        ]
        assert (run.answer, run.steps) == ("Done", 1)
        assert run.usage.completion_tokens == 2 * USAGE.completion_tokens

    def test_what_does_not_fit_into_the_summary_s_own_prompt_is_dropped_and_told(self, play):
        async def scenario(world):
            for number in range(3):
                await world.said(f"{number}" * 400, "Done", session=self.USE)
            run = world.start("Back")
            (await world.engines.next()).fail(too_long(600))
            (await world.engines.next()).fail(too_long(250))
            summing = await world.engines.next()
            summing.answer("Short.")
            (await world.engines.next()).answer("Done")
            return summing.request.messages[1].text, await world.shortened(run)

        text, (event,) = play(scenario)
        assert "0" * 400 not in text
        assert "1" * 400 in text
        assert (event.dropped_messages, event.summarised_messages) == (2, 4)

    @pytest.mark.parametrize("words", ["", " \n", "longer " * 400])
    def test_a_summary_that_says_nothing_or_is_longer_is_none(self, play, words):
        async def scenario(world):
            await world.said("x" * 400, "Done", session=self.USE)
            run = world.start("Back")
            (await world.engines.next()).fail(too_long())
            (await world.engines.next()).answer(words)
            step = await world.engines.next()
            step.answer("Done")
            return step.request.messages, await world.shortened(run)

        asked, events = play(scenario)
        assert asked == messages((Role.USER, "Back"))
        assert events == [HistoryShortened(1, 2, 0, 0)]

    def test_a_summary_alone_is_dropped_and_not_summed_up_again(self, play):
        async def scenario(world):
            await world.said("x" * 400, "Done", session=self.USE)
            run = world.start("Back")
            (await world.engines.next()).fail(too_long())
            (await world.engines.next()).answer("They spoke.")
            (await world.engines.next()).fail(too_long())
            step = await world.engines.next()
            step.answer("Done")
            return step.request.messages, await world.shortened(run)

        asked, events = play(scenario)
        assert asked == messages((Role.USER, "Back"))
        assert events[1] == HistoryShortened(1, 1, 0, 0)
