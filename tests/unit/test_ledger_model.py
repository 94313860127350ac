"""The ledger against a dictionary: any order of runs, ends, acknowledgements, time and crashes.

What was acknowledged is there as it was said, whatever comes; what is gone is gone by retention.
"""

import asyncio
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edge_agent.core import RunState
from edge_agent.events import Event, RunFinished
from edge_agent.ledger import opening
from edge_agent.ledger.ballast import Ballast
from edge_agent.ledger.changes import (
    EventsAdded,
    Existing,
    NewRun,
    ResultsAcked,
    RunRecovered,
    StepStarted,
    StoredRun,
)
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.retention import Retention
from edge_agent.ledger.settings import LedgerSettings
from edge_agent.ledger.upkeep import Upkeep
from edge_agent.ledger.writer import Entry, Writer
from tests.support.chaos import histories
from tests.support.ledger import ended, run, spec, went_on

SETTINGS = LedgerSettings(max_bytes=64 << 20, retention_s=100.0, ballast_bytes=0)
CLIENTS = ("arm", "base")
TEXTS = ("look", "fetch")
MAY_END = (RunState.SUCCEEDED, RunState.FAILED, RunState.OUTCOME_UNKNOWN)
T = TypeVar("T")


@dataclass
class Expected:
    """A run as the ledger should have it."""

    stored: StoredRun
    text: str
    acked: bool = False


class LedgerModel(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.now_s = 10_000.0
        self.made = 0
        self.expected: dict[str, Expected] = {}
        self.ledger = self._opened()

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self._do(self.ledger.close())
            self.loop.close()
            shutil.rmtree(self.directory)

    # --- what a daemon does ---

    @rule(
        client=st.sampled_from(CLIENTS),
        request_id=st.sampled_from(["", "r1", "r2"]),
        text=st.sampled_from(TEXTS),
    )
    def create(self, client: str, request_id: str, text: str) -> None:
        self.made += 1
        fresh = run(f"run-{self.made}", request_id=request_id, client=client, at_s=self.now_s)
        (outcome,) = self._do(self.ledger.commit(NewRun(fresh, spec(text))))
        made = [
            each
            for each in self.expected.values()
            if request_id and each.stored.run.client == client
            if each.stored.run.request_id == request_id
        ]
        if made:
            run_id = made[0].stored.run.id
            assert outcome == Existing(run_id, same_body=made[0].text == text)
        else:
            assert outcome is None
            stored = StoredRun(fresh, spec(text), (), None, 0, 0, ())
            self.expected[fresh.id] = Expected(stored, text)

    @precondition(lambda self: self._unfinished())
    @rule(data=st.data(), waits=st.booleans())
    def take_a_step(self, data: st.DataObject, waits: bool) -> None:  # noqa: FBT001
        expected = data.draw(st.sampled_from(self._unfinished()))
        standing = dataclasses.replace(expected.stored.run, transcript=())
        change = went_on(standing, data.draw(st.sampled_from(["on", "on the table" * 30])))
        change = EventsAdded(dataclasses.replace(change.run, transcript=()), change.events)
        if waits:
            self._do(self.ledger.commit(change))
        else:
            self._do(self._enqueued(change))
        cleared = expected.stored.running_step == change.run.steps
        self._store(expected, change, cleared=cleared)

    @precondition(lambda self: self._unfinished())
    @rule(data=st.data(), step=st.integers(1, 3))
    def start_a_step(self, data: st.DataObject, step: int) -> None:
        expected = data.draw(st.sampled_from(self._unfinished()))
        stored = expected.stored
        self.ledger.note(StepStarted(stored.run.id, step))
        self._do(self.ledger.commit())
        again = stored.running_step == step
        expected.stored = dataclasses.replace(
            stored,
            running_step=step,
            attempts=stored.attempts + 1 if again else 1,
            deaths=stored.deaths if again else 0,
        )

    @precondition(lambda self: self._running())
    @rule(data=st.data(), deaths=st.integers(0, 2))
    def recover(self, data: st.DataObject, deaths: int) -> None:
        expected = data.draw(st.sampled_from(self._running()))
        self._do(self.ledger.commit(RunRecovered(expected.stored.run.id, deaths)))
        expected.stored = dataclasses.replace(expected.stored, deaths=deaths)

    @precondition(lambda self: self._unfinished())
    @rule(data=st.data(), state=st.sampled_from(MAY_END))
    def end(self, data: st.DataObject, state: RunState) -> None:
        expected = data.draw(st.sampled_from(self._unfinished()))
        change = ended(expected.stored.run, state, at_s=self.now_s)
        (number,) = self._do(self.ledger.commit(change))
        assert isinstance(number, int)
        numbers = [each.stored.run.result_number or 0 for each in self.expected.values()]
        assert number > max(numbers)
        after = dataclasses.replace(change.run, result_number=number)
        (last,) = change.events
        assert isinstance(last, Event)
        last = Event(after.id, last.sequence, RunFinished(after))
        running = expected.stored.running_step
        self._store(expected, EventsAdded(after, (last,)), cleared=running is None)

    @rule(client=st.sampled_from(CLIENTS), upto=st.integers(0, 12))
    def acknowledge(self, client: str, upto: int) -> None:
        self._do(self.ledger.commit(ResultsAcked(client, upto)))
        for each in self.expected.values():
            number = each.stored.run.result_number
            if each.stored.run.client == client and number is not None and number <= upto:
                each.acked = True

    # --- what happens to it ---

    @rule(seconds=st.sampled_from([1.0, 60.0, 101.0]))
    def time_passes(self, seconds: float) -> None:
        """Retention does what is due."""
        self._do(self.ledger.close())
        self.now_s += seconds
        connection = opening.open_file(self.directory, SETTINGS.max_bytes).connection
        ballast = Ballast(self.directory, 0)
        upkeep = Upkeep(connection, SETTINGS, ballast, forget=_nothing, clock=lambda: self.now_s)
        while upkeep.when_idle() < 1.0:
            pass
        connection.close()
        before_s = self.now_s - SETTINGS.retention_s
        self.expected = {
            run_id: each
            for run_id, each in self.expected.items()
            if each.stored.run.ended_at_s is None or each.stored.run.ended_at_s >= before_s
        }
        self.ledger = self._opened()

    @rule()
    def crash(self) -> None:
        """Nothing is closed: the next daemon finds the files as they are now."""
        found = Path(tempfile.mkdtemp(dir="/dev/shm"))
        for name in (opening.FILE_NAME, f"{opening.FILE_NAME}-wal"):  # the log last
            shutil.copy(self.directory / name, found / name)
        self._do(self.ledger.close())
        shutil.rmtree(self.directory)
        self.directory = found
        self.ledger = self._opened()

    # --- what must hold ---

    @invariant()
    def what_is_there_is_what_was_written(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for run_id in (f"run-{n + 1}" for n in range(self.made)):
            expected = self.expected.get(run_id)
            found = self._do(self.ledger.find(run_id))
            assert found == (None if expected is None else expected.stored)
        unfinished = [each.stored for each in self._unfinished()]
        assert list(self._do(self.ledger.unfinished())) == unfinished
        for client in CLIENTS:
            results = self._do(self.ledger.results(client, 0, 99))
            assert [each.id for each in results] == self._to_deliver(client)
        assert self.ledger.degraded == ()

    def _unfinished(self) -> list[Expected]:
        return [each for each in self.expected.values() if not each.stored.run.state.ended]

    def _running(self) -> list[Expected]:
        return [each for each in self._unfinished() if each.stored.running_step is not None]

    def _to_deliver(self, client: str) -> list[str]:
        waiting = [
            each.stored.run
            for each in self.expected.values()
            if each.stored.run.client == client and not each.acked
            if each.stored.run.result_number is not None
        ]
        return [each.id for each in sorted(waiting, key=lambda each: each.result_number or 0)]

    def _store(self, expected: Expected, change: EventsAdded, *, cleared: bool) -> None:
        stored = expected.stored
        expected.stored = dataclasses.replace(
            stored,
            run=change.run,
            events=(*stored.events, *change.events),
            running_step=None if cleared else stored.running_step,
            attempts=0 if cleared else stored.attempts,
            deaths=0 if cleared else stored.deaths,
        )

    async def _enqueued(self, change: EventsAdded) -> None:
        told: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.ledger.enqueue(change, done=told.set_result)
        assert await told is None

    def _opened(self) -> Ledger:
        return Ledger.open(self.directory, SETTINGS, clock=lambda: self.now_s)

    def _do(self, task: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(task)


def _nothing() -> None:
    pass


def test_no_history_loses_or_changes_what_was_acknowledged():
    run_state_machine_as_test(LedgerModel, settings=histories(25, 30))


# --- the model finds bugs: each of these was planted ---


def _told_too_early(patched: pytest.MonkeyPatch) -> None:
    """Each group is acknowledged at once, and written with the next one."""
    waiting: dict[int, list[Entry]] = {}
    write = Writer._write

    def late(self: Writer, group: list[Entry]) -> None:
        write(self, waiting.pop(id(self), []))
        self._connection.execute("BEGIN")
        for entry in group:
            entry.values = tuple(change.apply(self._book) for change in entry.changes)
        self._roll_back()
        waiting[id(self)] = group

    patched.setattr(Writer, "_write", late)


def _retention_of_everything(patched: pytest.MonkeyPatch) -> None:
    runs = Retention._runs

    def all_runs(self: Retention, _which: str, before_s: float) -> int:
        return runs(self, "SELECT run FROM heads WHERE ifnull(ended_at_s, 0) < ?", before_s)

    patched.setattr(Retention, "_runs", all_runs)


def _attempts_that_stay(patched: pytest.MonkeyPatch) -> None:
    """A run keeps its attempts after the step is decided."""
    patched.setattr("edge_agent.ledger.changes._finishes", lambda _events, _step: False)


def _any_client(patched: pytest.MonkeyPatch) -> None:
    def apply(self: ResultsAcked, book: Any) -> None:
        book.execute("UPDATE outcomes SET acked = 1 WHERE number <= ?", (self.up_to_number,))

    patched.setattr(ResultsAcked, "apply", apply)


@pytest.mark.parametrize(
    "plant", [_told_too_early, _retention_of_everything, _attempts_that_stay, _any_client]
)
def test_the_model_finds_a_planted_bug(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
):
    found = settings(
        max_examples=300,
        stateful_step_count=30,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with monkeypatch.context() as patched:
        plant(patched)
        with pytest.raises(AssertionError):
            run_state_machine_as_test(LedgerModel, settings=found)
