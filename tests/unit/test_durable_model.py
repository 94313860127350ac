"""Durable runs over any order of calls, results, Halts, slow disks, restarts, kills and time.

The model is in `tests.support.durable_model`; it finds bugs that are planted.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from edge_agent.core import Halt, HaltScope, Message, Run, RunState
from edge_agent.ledger.changes import ResultsAcked
from edge_agent.runs import recovery
from edge_agent.runs.acknowledged import LedgerJournal
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.runs import Runs
from tests.support.chaos import TIMES, histories
from tests.support.durable_life import Life, Parts, World, arguments, wanted
from tests.support.durable_model import DurableRuns


def test_no_history_takes_back_what_was_shown_or_does_it_twice():
    chosen = settings(histories(40, 30), derandomize=TIMES == 1)  # `make chaos` looks elsewhere
    run_state_machine_as_test(DurableRuns, settings=chosen)


def test_a_run_that_a_halt_stopped_waits_for_somebody_also_where_the_disk_was_slow(tmp_path: Path):
    directory = tmp_path / "life"
    directory.mkdir()
    life = Life(directory, World(), Parts())
    spec = wanted("look", "watcher", durable=True)
    run = life.loop.do(life.owner.create(spec, client="arm", request_id=""))
    life.settle()
    life.hold()
    outcome = life.loop.do(life.owner.halt(HaltScope.ALL, "", "stop", "operator"))
    life.loop.create_task(life.owner.clear_halt(outcome.halt.id))
    life.settle()
    life = Life(life.die(written=False), World(), Parts())
    life.recover()
    life.settle()
    assert life.loop.do(life.owner.get(run.id)).state is RunState.SUSPENDED
    shutil.rmtree(life.die(written=True))


# --- the model finds bugs: each of these was planted ---


class SaysItFirst(LedgerJournal):
    """A planted bug: what happens to a run is shown before it is on disk."""

    def write(self, run: Any, events: Any, done: Callable[[Exception | None], None]) -> None:
        super().write(run, events, lambda _error: None)
        done(None)


class NoLatch(HaltLatch):
    """Covers nothing."""

    def covering_run(self, client: str, agent: str) -> Halt | None:  # noqa: ARG002
        return None


class DeafRuns(Runs):
    """A planted bug: a Halt does not stop a resume."""

    def resume(self, run_id: str, messages: tuple[Message, ...], client: str) -> Run:
        latch, self._latch = self._latch, NoLatch(Path("/dev/null/nothing"))
        try:
            return super().resume(run_id, messages, client)
        finally:
            self._latch = latch


def planted(**parts: Any) -> type[DurableRuns]:
    return type("Planted", (DurableRuns,), {"parts": Parts(**parts)})


def notice(machine: type[DurableRuns]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=400,
                stateful_step_count=30,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )


def test_the_model_notices_what_is_shown_before_it_is_on_disk():
    notice(planted(journal=SaysItFirst))


def test_the_model_notices_a_resume_that_a_halt_does_not_stop():
    notice(planted(runs=DeafRuns))


def test_the_model_notices_events_that_are_numbered_anew(monkeypatch):
    monkeypatch.setattr(recovery, "SEQUENCE_GAP", 0)
    notice(DurableRuns)


def test_the_model_notices_a_run_that_acts_and_goes_on_by_itself(monkeypatch):
    monkeypatch.setattr(recovery, "acts_nowhere", lambda _spec: True)
    notice(DurableRuns)


def test_the_model_notices_results_that_are_delivered_again(monkeypatch):
    monkeypatch.setattr(ResultsAcked, "apply", lambda _self, _book: None)
    notice(DurableRuns)


def test_the_model_notices_a_call_that_starts_twice(monkeypatch):
    """Led to it by hand: a history found at random takes minutes."""
    monkeypatch.setattr(recovery, "_settled", lambda call, _run: call)
    model = DurableRuns()
    model.begin()
    model.create(client="arm", agent="worker", durable=True, request_id="", text="fetch")
    (step,) = model.life.steps()
    model.life.begin(step)
    step.call(("mail", arguments(step.origin.run_id, 1)))
    model.settle()
    model.crash(written=True)
    model.asleep.clear()
    resumed = model.life.owner.resume(step.origin.run_id, (), "arm")
    with pytest.raises(AssertionError):
        model.ask(resumed, lambda _task: model.nothing_starts_twice())
    shutil.rmtree(model.life.die(written=True))
