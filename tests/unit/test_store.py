"""How long runs are kept: against a plain model, with a clock that the test turns."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from edge_agent.core import Run, RunState
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.live import LiveRun
from edge_agent.runs.loop import RunLoop, Surroundings
from edge_agent.runs.store import MemoryRunStore
from tests.support.scripted_engine import ENGINE, SETTINGS, ScriptedEngines, spec


def accepted(run_id: str, client: str = "client", request_id: str = "") -> RunLoop:
    """A run that has not begun."""
    run = Run(run_id, request_id, client, "", ENGINE, RunState.QUEUED, created_at_s=0.0)
    latch = HaltLatch(Path("/nowhere/halts.json"))
    return RunLoop(LiveRun(run, spec()), Surroundings(ScriptedEngines(), latch), SETTINGS, None)


class StoreMachine(RuleBasedStateMachine):
    """The store against a list of runs and the times at which they ended."""

    store_type: type[MemoryRunStore] = MemoryRunStore
    runs = Bundle("runs")

    @initialize(retention_s=st.integers(0, 10), max_retained=st.integers(0, 4))
    def start(self, retention_s: int, max_retained: int) -> None:
        self.now_s = 100.0
        self.retention_s, self.max_retained = float(retention_s), max_retained
        self.store = self.store_type(
            retention_s=lambda: self.retention_s,
            max_retained=lambda: self.max_retained,
            clock=lambda: self.now_s,
        )
        self.ids = (f"run-{n}" for n in itertools.count())
        self.kept: dict[str, RunLoop] = {}
        self.ended: list[tuple[float, str]] = []  # oldest end first

    def expire(self) -> None:
        while self.ended and (
            self.now_s - self.ended[0][0] > self.retention_s or len(self.ended) > self.max_retained
        ):
            del self.kept[self.ended.pop(0)[1]]

    @rule(target=runs, client=st.sampled_from("ab"), request_id=st.sampled_from(["", "r1", "r2"]))
    def add(self, client: str, request_id: str) -> str:
        self.expire()
        taken = any(
            (each.live.run.client, each.live.run.request_id) == (client, request_id)
            for each in self.kept.values()
        )
        loop = accepted(next(self.ids), client, "" if taken else request_id)
        self.kept[loop.live.id] = loop
        self.store.add(loop)
        return loop.live.id

    @rule(run_id=runs)
    def end(self, run_id: str) -> None:
        if run_id in self.kept and run_id not in {each for _, each in self.ended}:
            self.ended.append((self.now_s, run_id))
            self.store.ended(run_id)
            self.expire()

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(retention_s=st.integers(0, 10), max_retained=st.integers(0, 4))
    def reload(self, retention_s: int, max_retained: int) -> None:
        self.retention_s, self.max_retained = float(retention_s), max_retained

    @rule(run_id=runs)
    def get(self, run_id: str) -> None:
        self.expire()
        assert self.store.get(run_id) is self.kept.get(run_id)

    @invariant()
    def all_are_listed_newest_first(self) -> None:
        self.expire()
        listed = [loop.live.id for loop in self.store.newest_first()]
        assert listed == list(reversed(self.kept))

    @invariant()
    def nothing_is_remembered_of_runs_that_are_gone(self) -> None:
        self.expire()
        list(self.store.newest_first())
        assert set(self.store._requests.values()) <= set(self.kept)

    @invariant()
    def a_request_finds_its_run_as_long_as_that_is_kept(self) -> None:
        self.expire()
        for client, request_id in itertools.product("ab", ["r1", "r2"]):
            found = [
                each
                for each in self.kept.values()
                if (each.live.run.client, each.live.run.request_id) == (client, request_id)
            ]
            expected = found[0] if found else None
            assert self.store.find_request(client, request_id) is expected


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class ForgetsRequests(MemoryRunStore):
    """A planted bug: the request outlives its run, and finds the wrong one or none."""

    def find_request(self, client: str, request_id: str) -> RunLoop | None:
        found = super().find_request(client, request_id)
        return found or super().find_request("a", request_id)


class CountsFromTheStart(MemoryRunStore):
    """A planted bug: retention counts from the acceptance of a run."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._added: dict[str, float] = {}

    def add(self, loop: RunLoop) -> None:
        self._added[loop.live.id] = self._clock()
        super().add(loop)

    def ended(self, run_id: str) -> None:
        self._ended.append((self._added[run_id], run_id))
        self._expire()


class KeepsOneTooMany(MemoryRunStore):
    """A planted bug: off by one."""

    def __init__(self, **arguments: Any) -> None:
        most = arguments.pop("max_retained")
        super().__init__(max_retained=lambda: most() + 1, **arguments)


@pytest.mark.parametrize("planted", [ForgetsRequests, CountsFromTheStart, KeepsOneTooMany])
def test_the_model_notices_a_planted_bug(planted: type[MemoryRunStore]):
    class Planted(StoreMachine):
        store_type = planted

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Planted,
            settings=settings(
                max_examples=300,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )
