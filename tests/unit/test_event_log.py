"""A run's events against a plain list of them: no gap, no repeat, the same text, from anywhere."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import Limits, Run, RunSpec, RunState
from edge_agent.errors import InvalidRequest
from edge_agent.events import Event, EventBody, Snapshot, StateChanged, TextDelta
from edge_agent.runs.live import LiveRun
from edge_agent.runs.log import EventLog, TextSpan

OTHER = StateChanged(RunState.RUNNING)


@dataclass
class NaiveLog:
    """One event for each thing that happened."""

    events: list[EventBody] = field(default_factory=list)

    def since(self, after: int) -> list[EventBody]:
        return self.events[max(0, after) :]


@dataclass(frozen=True)
class Text:
    step: int
    text: str
    tokens: int


TEXTS = st.builds(Text, st.integers(1, 2), st.text(max_size=4), st.integers(0, 3))
HAPPENINGS = st.lists(st.none() | TEXTS, max_size=30)


def write(happenings: Sequence[Text | None], log: EventLog) -> tuple[EventLog, NaiveLog]:
    naive = NaiveLog()
    for each in happenings:
        if each is None:
            log.add(OTHER)
            naive.events.append(OTHER)
        else:
            log.add_text(each.step, each.text, each.tokens)
            naive.events.append(TextDelta(each.step, each.text, each.tokens))
    return log, naive


def merged(events: Sequence[EventBody]) -> list[EventBody]:
    """Neighbouring text of one step as one delta."""
    found: list[EventBody] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta) and last.step == event.step:
            found[-1] = TextDelta(last.step, last.text + event.text, last.tokens + event.tokens)
        else:
            found.append(event)
    return found


def check(log: EventLog, naive: NaiveLog) -> None:
    """From wherever a reader stopped, it gets what the plain list has from there."""
    assert log.sequence == len(naive.events)
    for after in range(-1, len(naive.events) + 2):
        events = list(log.since(after))
        assert [event.body for event in events] == merged(naive.since(after))
        numbers = [event.sequence for event in events]
        assert numbers == sorted(set(numbers))
        if numbers:
            assert numbers[0] > after
            assert numbers[-1] == len(naive.events)


@given(HAPPENINGS)
def test_a_reader_gets_everything_once_from_wherever_it_stopped(happenings):
    check(*write(happenings, EventLog("run")))


@given(HAPPENINGS, st.lists(st.integers(0, 30), max_size=6))
def test_reading_meanwhile_changes_nothing(happenings, reads: list[int]):
    log = EventLog("run")
    for position, each in enumerate(happenings):
        write([each], log)
        if position in reads:
            list(log.since(reads[0]))
    _, naive = write(happenings, EventLog("run"))
    check(log, naive)


@given(HAPPENINGS, st.data())
def test_several_readings_join_to_all_the_text(happenings, data: st.DataObject):
    log = EventLog("run")
    after, texts = 0, []
    for each in happenings:
        write([each], log)
        if data.draw(st.booleans()):
            for event in log.since(after):
                after = event.sequence
                texts.append(event.body)
    texts += [event.body for event in log.since(after)]
    _, naive = write(happenings, EventLog("run"))
    assert merged(texts) == merged(naive.events)


@given(HAPPENINGS)
def test_the_open_text_is_that_of_the_last_span(happenings):
    log, naive = write(happenings, EventLog("run"))
    last = merged(naive.events)[-1:]
    expected = last[0].text if last and isinstance(last[0], TextDelta) else ""
    assert log.text_at(log.sequence) == expected


class ForgetfulLog(EventLog):
    """A planted bug: a reader in the middle of a span gets the whole span again."""

    def since(self, after: int, upto: int | None = None) -> Iterator[Event]:
        for event in super().since(after, upto):
            for item in self._items:
                if isinstance(item, TextSpan) and item.last == event.sequence:
                    yield Event(event.run_id, event.sequence, item.since(item.first - 1))
                    break
            else:
                yield event


class LateLog(EventLog):
    """A planted bug: the event right after the reader's last one is left out."""

    def since(self, after: int, upto: int | None = None) -> Iterator[Event]:
        return super().since(after + 1, upto)


@pytest.mark.parametrize("planted", [ForgetfulLog, LateLog])
def test_the_model_notices_a_planted_bug(planted: type[EventLog]):
    happenings = [Text(1, "a", 1), Text(1, "b", 1), None, Text(2, "c", 1), Text(2, "d", 1)]
    check(*write(happenings, EventLog("run")))
    with pytest.raises(AssertionError):
        check(*write(happenings, planted("run")))


# --- followers ---


def live_run() -> LiveRun:
    run = Run("run", "", "client", "", "engine", RunState.QUEUED, created_at_s=0.0)
    return LiveRun(run, RunSpec((), "engine", Limits(1, 1), 10.0))


async def collect(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


class TestFollowing:
    def test_text_written_while_the_reader_is_busy_comes_as_one_delta(self):
        async def scenario() -> list[Event]:
            live = live_run()
            follower = live.follow(None)
            seen = [await anext(follower)]
            live.add_text(1, "Hel", 1)
            seen.append(await anext(follower))
            for piece in ("lo", ", ", "world"):
                live.add_text(1, piece, 1)
            seen.append(await anext(follower))
            live.finish(state=RunState.SUCCEEDED, answer="Hello, world")
            return seen + await collect(follower)

        snapshot, first, second, *_, last = asyncio.run(scenario())
        assert isinstance(snapshot.body, Snapshot)
        assert first.body == TextDelta(1, "Hel", 1)
        assert second.body == TextDelta(1, "lo, world", 3)
        assert second.sequence == 4
        assert last.sequence == 5

    @given(HAPPENINGS, st.integers(0, 30), st.integers(0, 30))
    def test_a_snapshot_and_what_follows_it_hold_all_the_text(self, happenings, joins, after):
        async def scenario() -> tuple[list[Event], int]:
            live = live_run()

            def happen(each: Text | None) -> None:
                if each is None:
                    live.emit(OTHER)
                else:
                    live.add_text(each.step, each.text, each.tokens)

            for each in happenings[:joins]:
                happen(each)
            known = min(after, len(happenings) + 1)
            whole, resumed = live.follow(None), live.follow(known)
            first = await anext(whole)
            for each in happenings[joins:]:
                happen(each)
            live.finish(state=RunState.SUCCEEDED, answer="")
            events = [first, *await collect(whole)]
            _, *rest = await collect(resumed)
            assert rest == list(live._log.since(known))
            return events, len(happenings)

        events, count = asyncio.run(scenario())
        assert isinstance(events[0].body, Snapshot)
        assert events[0].sequence == min(joins, count)
        assert events[-1].sequence == count + 1
        step_text = events[0].body.run.partial_text
        texts = [event.body.text for event in events[1:] if isinstance(event.body, TextDelta)]
        _, naive = write(happenings, EventLog("run"))
        tail = merged(naive.since(min(joins, count)))
        assert "".join(texts) == "".join(e.text for e in tail if isinstance(e, TextDelta))
        open_before = merged(naive.events[: min(joins, count)])[-1:]
        expected = open_before[0] if open_before else None
        assert step_text == (expected.text if isinstance(expected, TextDelta) else "")

    def test_an_event_that_has_not_happened_can_not_be_known(self):
        async def scenario() -> None:
            live = live_run()
            live.emit(OTHER)
            assert (await anext(live.follow(1))).sequence == 1
            for unknown in (2, 2**64 - 1):
                with pytest.raises(InvalidRequest, match="is above 1, the run's last event"):
                    await anext(live.follow(unknown))

        asyncio.run(scenario())

    def test_a_reader_that_left_costs_nothing_and_stops_nobody(self):
        async def scenario() -> list[Event]:
            live = live_run()
            gone, stays = live.follow(None), live.follow(None)
            await anext(gone)
            await anext(stays)
            waiting = asyncio.ensure_future(anext(gone))
            await asyncio.sleep(0)
            waiting.cancel()
            live.add_text(1, "a", 1)
            live.finish(state=RunState.SUCCEEDED, answer="a")
            return await collect(stays)

        assert [event.sequence for event in asyncio.run(scenario())] == [1, 2]
