"""The ledger on real files: what is written is read again, in order, each change by itself."""

import asyncio
import dataclasses
import threading
from pathlib import Path

import apsw
import pytest

from edge_agent.core import RunError, RunState
from edge_agent.errors import LedgerFailed, LedgerRowCorrupt
from edge_agent.events import Event, RunFinished, StateChanged
from edge_agent.ledger.changes import (
    CallRecorded,
    EventsAdded,
    Existing,
    NewRun,
    ResultsAcked,
    RunRecovered,
    StepRecorded,
    StepStarted,
)
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.opening import FILE_NAME
from edge_agent.ledger.rows import crc
from edge_agent.records import Effect, LoggedText
from tests.support.ledger import (
    SETTINGS,
    call_record,
    changed,
    ended,
    new,
    opened,
    run,
    spec,
    step_record,
    turn,
    went_on,
)


async def finished(ledger: Ledger, name: str, *, client: str = "arm", at_s: float = 2_000.0) -> int:
    """A whole run; its result number."""
    first = new(name, client=client, at_s=at_s - 1)
    step = went_on(first.run)
    (_, _, number) = await ledger.commit(first, step, ended(step.run, at_s=at_s))
    assert isinstance(number, int)
    return number


def test_what_was_committed_is_there_after_a_restart(tmp_path: Path):
    async def main():
        first = new("run-1")
        step = went_on(first.run)
        async with opened(tmp_path) as ledger:
            assert await ledger.commit(first) == (None,)
            await ledger.commit(step, CallRecorded(call_record("run-1")))
        async with opened(tmp_path) as ledger:
            stored = await ledger.find("run-1")
            assert stored is not None
            assert stored.run == dataclasses.replace(step.run, transcript=())
            assert stored.spec == spec()
            assert stored.events == step.events
            assert stored.calls == (call_record("run-1"),)
            assert await ledger.unfinished() == (stored,)
            assert await ledger.find("run-2") is None
            assert ledger.degraded == ()

    asyncio.run(main())


def test_text_that_is_written_again_takes_its_old_rows_place(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            before = run("run-1")
            short = LoggedText(1, 2, "on", (2,), (1,))
            longer = LoggedText(1, 2, "on the table", (2, 12), (1, 2))
            events = (Event("run-1", 1, StateChanged(RunState.RUNNING)), short)
            await ledger.commit(NewRun(before, spec()), EventsAdded(before, events))
            last = Event("run-1", 4, StateChanged(RunState.RUNNING, 1.0))
            await ledger.commit(EventsAdded(before, (longer, last)))
            stored = await ledger.find("run-1")
            assert stored is not None
            assert stored.events == (events[0], longer, last)

    asyncio.run(main())


@pytest.mark.parametrize("restarted", [False, True])
def test_a_request_that_has_made_a_run_makes_no_other(tmp_path: Path, restarted: bool):  # noqa: FBT001
    async def main():
        async with opened(tmp_path) as ledger:
            await ledger.commit(new("run-1", request_id="r", client="arm"))
            if not restarted:
                await check(ledger)
        if restarted:
            async with opened(tmp_path) as ledger:
                await check(ledger)

    async def check(ledger: Ledger):
        again = new("run-2", request_id="r", client="arm")
        other = dataclasses.replace(again, spec=spec("look elsewhere"))
        assert await ledger.commit(again) == (Existing("run-1", same_body=True),)
        assert await ledger.commit(other) == (Existing("run-1", same_body=False),)
        assert await ledger.commit(new("run-3", request_id="r", client="base")) == (None,)
        assert await ledger.commit(new("run-4"), new("run-5")) == (None, None)
        assert await ledger.find("run-2") is None

    asyncio.run(main())


def test_attempts_and_deaths_are_those_of_the_running_step(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            first = new("run-1")
            await ledger.commit(first, StepStarted("run-1", 1))
            assert await marks(ledger) == (1, 1, 0)
            await ledger.commit(RunRecovered("run-1", 1), StepStarted("run-1", 1))
        async with opened(tmp_path) as ledger:
            assert await marks(ledger) == (1, 2, 1)
            step = went_on(first.run)
            await ledger.commit(step)
            assert await marks(ledger) == (None, 0, 0)
            await ledger.commit(StepStarted("run-1", 2))
            assert await marks(ledger) == (2, 1, 0)

    async def marks(ledger: Ledger) -> tuple[int | None, int, int]:
        stored = await ledger.find("run-1")
        assert stored is not None
        return stored.running_step, stored.attempts, stored.deaths

    asyncio.run(main())


def test_a_step_of_a_run_that_is_not_durable_counts_nowhere(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            await ledger.commit(StepStarted("run-1", 1))
            assert await ledger.find("run-1") is None

    asyncio.run(main())


def test_results_are_numbered_in_the_order_of_their_end_until_they_are_acknowledged(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            numbers = [await finished(ledger, f"run-{n}") for n in (1, 2, 3)]
            assert numbers == sorted(set(numbers))
            await finished(ledger, "run-4", client="base")
            await ledger.commit(new("run-5"))
            results = await ledger.results("arm", 0, 10)
            assert [each.id for each in results] == ["run-1", "run-2", "run-3"]
            assert [each.result_number for each in results] == numbers
            assert results[0].transcript == (turn("on the table"),)
            assert [each.id for each in await ledger.results("arm", numbers[0], 1)] == ["run-2"]
            await ledger.commit(ResultsAcked("arm", numbers[1]))
            assert [each.id for each in await ledger.results("arm", 0, 10)] == ["run-3"]
            assert len(await ledger.results("base", 0, 10)) == 1
        async with opened(tmp_path) as ledger:
            assert [each.id for each in await ledger.results("arm", 0, 10)] == ["run-3"]
            assert await finished(ledger, "run-6") > numbers[2]

    asyncio.run(main())


def test_the_last_event_holds_the_result_number_and_no_transcript(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            number = await finished(ledger, "run-1")
            stored = await ledger.find("run-1")
            assert stored is not None
            assert stored.run.result_number == number
            last = stored.events[-1]
            assert isinstance(last, Event)
            assert isinstance(last.body, RunFinished)
            assert last.body.run == stored.run

    asyncio.run(main())


def test_pages_are_newest_first_and_go_on_where_the_last_one_ended(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            for n, at_s in enumerate([3.0, 1.0, 2.0, 2.0]):
                await ledger.commit(new(f"run-{n}", at_s=at_s))
            await ledger.commit(ended(run("run-2", at_s=2.0), RunState.FAILED))
            everything: frozenset[RunState] = frozenset()
            page = await ledger.page(everything, None, 2)
            assert [each.id for each in page] == ["run-0", "run-3"]
            page = await ledger.page(everything, (page[-1].created_at_s, page[-1].id), 2)
            assert [each.id for each in page] == ["run-2", "run-1"]
            page = await ledger.page(frozenset({RunState.FAILED, RunState.SUCCEEDED}), None, 9)
            assert [each.id for each in page] == ["run-2"]
            assert await ledger.counts() == {RunState.FAILED: 1}

    asyncio.run(main())


def test_a_trace_has_each_attempt_and_the_last_word_on_each_call(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            intended = call_record("run-1", effect=Effect.INTENDED)
            await ledger.commit(CallRecorded(intended))
            steps = [step_record("run-1", 1), step_record("run-1", 1, 2), step_record("run-1", 2)]
            for record in (steps[2], *steps[:2], step_record("run-2")):
                ledger.note(StepRecorded(record))
            done = dataclasses.replace(intended, effect=Effect.DONE, result_bytes=12)
            ledger.note(CallRecorded(call_record("run-1", "call-2")), CallRecorded(done))
            await ledger.commit()
            assert await ledger.trace("run-1") == (
                tuple(steps),
                (done, call_record("run-1", "call-2")),
            )

    asyncio.run(main())


def test_changes_apply_in_the_order_of_the_calls_and_are_told_of_in_that_order(tmp_path: Path):
    async def main():
        told: list[str] = []
        async with opened(tmp_path) as ledger:
            first = new("run-1")
            ledger.note(first)
            ledger.note(StepStarted("run-1", 1))
            one = went_on(first.run, "one")
            two = went_on(one.run, "two")
            ledger.enqueue(one, done=lambda error: told.append(f"one {error}"))
            ledger.enqueue(two, done=lambda error: told.append(f"two {error}"))
            await ledger.commit()
            assert told == ["one None", "two None"]
            stored = await ledger.find("run-1")
            assert stored is not None
            assert stored.events == (*one.events, *two.events)

    asyncio.run(main())


def test_a_note_is_written_though_nothing_else_is(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            ledger.note(new("run-1"))
            async with asyncio.timeout(20):
                while await ledger.find("run-1") is None:  # noqa: ASYNC110 - nothing tells of it
                    await asyncio.sleep(0)

    asyncio.run(main())


def test_what_fails_fails_alone_and_leaves_nothing(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            unknown = went_on(run("run-9"))
            outcomes = await asyncio.gather(
                ledger.commit(new("run-1")),
                ledger.commit(new("run-2"), unknown),
                ledger.commit(new("run-1")),
                ledger.commit(new("run-3")),
                return_exceptions=True,
            )
            assert [type(each) for each in outcomes] == [tuple, LedgerFailed, LedgerFailed, tuple]
            assert {each.run.id for each in await ledger.unfinished()} == {"run-1", "run-3"}

    asyncio.run(main())


def test_changes_that_are_written_together_build_on_each_other(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            first = new("run-1")
            short = LoggedText(1, 1, "on", (2,), (1,))
            longer = LoggedText(1, 1, "on the table", (2, 12), (1, 2))
            text = [EventsAdded(first.run, (each,)) for each in (short, longer)]
            step = went_on(dataclasses.replace(first.run, sequence=2), "there")
            last = ended(step.run)
            late = Event("run-1", last.run.sequence + 1, StateChanged(RunState.SUCCEEDED))
            after = EventsAdded(last.run, (late,))
            await ledger.commit(first, *text, StepStarted("run-1", 1), step, last, after)
            stored = await ledger.find("run-1")
            assert stored is not None
            assert stored.events[:-2] == (longer, *step.events)
            assert stored.events[-1] == late
            assert stored.running_step is None

    asyncio.run(main())


def test_what_was_refused_leaves_no_trace_in_what_comes_after(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            first = new("run-1")
            step = went_on(first.run)
            await ledger.commit(first)
            with pytest.raises(LedgerFailed):
                await ledger.commit(step, StepStarted("run-1", 7), step)
            await ledger.commit(new("run-2"))
            stored = await ledger.find("run-1")
            assert stored is not None
            assert (stored.events, stored.running_step) == ((), None)
            await ledger.commit(step)
            stored = await ledger.find("run-1")
            assert stored is not None
            assert stored.events == step.events

    asyncio.run(main())


def test_events_come_in_their_order_only(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            first = new("run-1")
            step = went_on(first.run)
            await ledger.commit(first, step)
            with pytest.raises(LedgerFailed, match="event 1 comes after event 4"):
                await ledger.commit(step)

    asyncio.run(main())


def test_the_events_of_another_run_are_not_taken_for_its_own(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            for name in ("run-1", "run-2"):
                first = new(name)
                await ledger.commit(first, went_on(first.run))
        connection = apsw.Connection(str(tmp_path / FILE_NAME))
        query = "SELECT * FROM heads WHERE run = ?"
        one, other = (connection.execute(query, (run,)).fetchall()[0] for run in (1, 2))
        mixed = (*one[:3], other[3], *one[4:9])
        connection.execute(
            "UPDATE heads SET tail = ?, crc = ? WHERE run = 1", (other[3], crc(mixed))
        )
        connection.close()
        async with opened(tmp_path) as ledger:
            with pytest.raises(LedgerRowCorrupt, match="not an event of run 1"):
                await ledger.find("run-1")

    asyncio.run(main())


def test_who_stops_waiting_changes_nothing(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            waiting = asyncio.create_task(ledger.commit(new("run-1")))
            await asyncio.sleep(0)
            waiting.cancel()
            await ledger.commit(new("run-2"))
            assert waiting.cancelled()
            assert len(await ledger.unfinished()) == 2

    asyncio.run(main())


def test_closing_writes_what_waits_and_refuses_what_comes_after(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            told: list[Exception | None] = []
            ledger.enqueue(new("run-1"), done=told.append)
            ledger.note(new("run-2"))
            await ledger.close()
            assert told == [None]
            with pytest.raises(LedgerFailed):
                await ledger.commit(new("run-3"))
            with pytest.raises(LedgerFailed):
                await ledger.find("run-1")
            ledger.note(new("run-4"))
        async with opened(tmp_path) as ledger:
            assert len(await ledger.unfinished()) == 2

    asyncio.run(main())


def test_notes_are_dropped_and_counted_when_too_many_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def main():
        gate, held = threading.Event(), threading.Event()

        def apply(self: StepStarted, book: object) -> None:
            held.set()
            gate.wait(20)

        async with opened(tmp_path) as ledger:
            monkeypatch.setattr(StepStarted, "apply", apply)
            ledger.enqueue(StepStarted("run-1", 1), done=lambda _error: None)
            await asyncio.to_thread(held.wait, 20)
            for n in range(4100):
                ledger.note(StepRecorded(step_record("run-1", n + 1)))
            gate.set()
            await ledger.commit()
            assert ledger.degraded == ("4 records were dropped, because too many waited",)
            assert len((await ledger.trace("run-1"))[0]) == 4096
            ledger.note(StepRecorded(step_record("run-2")))
            await ledger.commit()
            assert len((await ledger.trace("run-2"))[0]) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("UPDATE heads SET head = substr(head, 1, length(head) - 1) || x'c3'", "heads"),
        ("UPDATE heads SET tail = tail - 1", "heads"),
        ("UPDATE heads SET state = CAST(x'c3' AS TEXT)", "heads"),
        ("UPDATE runs SET created_at_s = 3.0", "runs"),
        ("UPDATE events SET kind = 'TextDelta' WHERE kind = 'LoggedText'", "events"),
        ("DELETE FROM events WHERE kind = 'LoggedText'", "events"),
        ("UPDATE tool_calls SET body = zeroblob(9)", "tool_calls"),
        ("DELETE FROM heads", "heads"),
    ],
)
def test_a_row_that_is_not_as_it_was_written_is_an_error_of_its_run_alone(
    tmp_path: Path, statement: str, table: str
):
    async def main():
        first = new("run-1")
        async with opened(tmp_path) as ledger:
            await ledger.commit(first, went_on(first.run), CallRecorded(call_record("run-1")))
        changed(tmp_path, statement)
        async with opened(tmp_path) as ledger:
            other = new("run-2")
            step = went_on(other.run)
            await ledger.commit(other, step)
            with pytest.raises(LedgerRowCorrupt) as raised:
                await ledger.find("run-1")
            assert raised.value.metadata["table"] == table
            assert [each.run.id for each in await ledger.unfinished()] == ["run-2"]
            assert any(table in each for each in ledger.degraded) or "FROM heads" in statement
            assert "run-2" in {each.id for each in await ledger.page(frozenset(), None, 9)}
            await ledger.commit(ended(step.run, RunState.FAILED))

    asyncio.run(main())


def test_a_broken_head_is_not_written_over(tmp_path: Path):
    async def main():
        first = new("run-1")
        async with opened(tmp_path) as ledger:
            await ledger.commit(first)
        changed(tmp_path, "UPDATE heads SET last = 77")
        async with opened(tmp_path) as ledger:
            with pytest.raises(LedgerRowCorrupt):
                await ledger.commit(went_on(first.run))

    asyncio.run(main())


def test_an_error_in_a_run_is_kept_with_it(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            first = new("run-1")
            error = RunError("STEP_ENDS_DAEMON", "it died twice", False, {"step": "1"})
            last = ended(dataclasses.replace(first.run, error=error), RunState.FAILED)
            await ledger.commit(first, last)
            (result,) = await ledger.results("arm", 0, 1)
            assert result.error == error

    asyncio.run(main())


def test_no_ledger_can_be_opened_where_there_is_no_directory(tmp_path: Path):
    with pytest.raises(LedgerFailed):
        Ledger.open(tmp_path / "nowhere", SETTINGS)
