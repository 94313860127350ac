"""Runs under any order of calls, results, cancels, Halts and passing time.

The invariants are those of a robot: a run that has ended never changes, every accepted run ends
exactly once, its events have no gap, and nothing is called while a Halt covers it.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edge_agent.core import Halt, HaltOutcome, HaltScope, Run, RunError, RunState
from edge_agent.errors import EdgeAgentError, Halted, WorkerError
from edge_agent.events import Event, RunFinished, TextDelta, ToolCallsIssued
from edge_agent.runs.halts import HaltLatch, covers_run, covers_tool
from edge_agent.runs.live import LiveRun
from edge_agent.runs.loop import RunLoop
from edge_agent.runs.runs import Runs
from tests.support.scripted_engine import SETTINGS, ScriptedEngines, Step, result, spec
from tests.support.virtual_time import VirtualTimeLoop

RUN_TIMEOUT_S = 100.0
TOOL_TIMEOUT_S = 40.0
CONFIRM_S = 10.0
CANCEL = RunError("CANCELLED_BY_CALLER", "cancelled by a test")
CLIENTS = st.sampled_from(["arm", "base"])
AGENTS = st.sampled_from(["picker", "packer"])
TOOLS = st.sampled_from(["move", "speak"])
HALTS = st.one_of(
    st.just((HaltScope.ALL, "")),
    CLIENTS.map(lambda target: (HaltScope.CLIENT, target)),
    AGENTS.map(lambda target: (HaltScope.AGENT, target)),
    TOOLS.map(lambda target: (HaltScope.TOOL, target)),
)


class RunsMachine(RuleBasedStateMachine):
    """The real owner and loops on a clock of the test's; only the engine is played."""

    runs_type: type[Runs] = Runs
    latch_type: type[HaltLatch] = HaltLatch
    halts = Bundle("halts")

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.directory = tempfile.TemporaryDirectory()
        self.engines = self.loop.do(self._make_engines())
        latch = self.latch_type(Path(self.directory.name) / "halts.json")
        changed = {"tool_timeout_s": TOOL_TIMEOUT_S, "cancel_confirm_s": CONFIRM_S}
        settings_of_runs = type(SETTINGS)(
            **{name: changed.get(name, getattr(SETTINGS, name)) for name in SETTINGS.__slots__}
        )
        self.runs = self.runs_type(self.engines, latch, settings_of_runs)
        self.ids: list[str] = []
        self.born_s: dict[str, float] = {}
        self.ended: dict[str, Run] = {}
        self.issued: dict[str, int] = {}
        self.latched: dict[str, Halt] = {}

    async def _make_engines(self) -> ScriptedEngines:
        return ScriptedEngines()

    def teardown(self) -> None:
        """Whatever has happened, every run ends once it is told to, or time is up."""
        try:
            self.loop.settle(RUN_TIMEOUT_S + TOOL_TIMEOUT_S)
            self.loop.settle(CONFIRM_S + 1)
            for run_id in self.ids:
                assert self.runs.get(run_id).state.ended
            self.check()
        finally:
            self.loop.do(self.loop.shutdown_default_executor())
            self.loop.close()
            self.directory.cleanup()

    # --- what callers do ---

    @rule(client=CLIENTS, agent=AGENTS, many=st.integers(1, 3))
    def create(self, client: str, agent: str, many: int) -> None:
        if len(self.active()) >= SETTINGS.max_active:
            return
        wanted = spec(agent=agent, timeout_s=RUN_TIMEOUT_S, max_steps=many, max_tool_calls=4)
        covered = any(covers_run(halt, client, agent) for halt in self.latched.values())
        try:
            run = self.loop.do(self._create(client, wanted))
        except Halted:
            assert covered
            return
        assert not covered
        self.ids.append(run.id)
        self.born_s[run.id] = self.loop.time()
        self.issued[run.id] = 0
        self.loop.settle()

    async def _create(self, client: str, wanted: Any) -> Run:
        return self.runs.create(wanted, client=client, request_id="")

    @precondition(lambda self: self.active())
    @rule(data=st.data(), cancelled=st.booleans(), settle=st.booleans())
    def submit(self, data: st.DataObject, cancelled: bool, settle: bool) -> None:  # noqa: FBT001
        run_id = data.draw(st.sampled_from(self.active()))
        run = self.runs.get(run_id)
        call_id = data.draw(st.sampled_from([c.id for c in run.open_tool_calls] + ["call-9"]))
        with contextlib.suppress(EdgeAgentError):
            self.runs.submit(run_id, [result(call_id, cancelled=cancelled)])
            assert call_id != "call-9"
        if settle:
            self.loop.settle()

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), settle=st.booleans())
    def cancel(self, data: st.DataObject, settle: bool) -> None:  # noqa: FBT001
        self.runs.cancel(data.draw(st.sampled_from(self.ids)), CANCEL)
        if settle:
            self.loop.settle()

    # --- what the engine does ---

    def step(self, data: st.DataObject) -> Step | None:
        steps = self.engines.open()
        return data.draw(st.sampled_from(steps)) if steps else None

    @rule(data=st.data(), pieces=st.integers(1, 3))
    def say(self, data: st.DataObject, pieces: int) -> None:
        if step := self.step(data):
            step.say(*["word "] * pieces)

    @rule(data=st.data(), calls=st.lists(TOOLS, max_size=3), settle=st.booleans())
    def decide(self, data: st.DataObject, calls: list[str], settle: bool) -> None:  # noqa: FBT001
        if step := self.step(data):
            if calls and not step.request.answer_only:
                step.call(*((tool, "{}") for tool in calls))
            else:
                step.answer("Done")
            if settle:
                self.loop.settle()

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if step := self.step(data):
            step.fail(WorkerError("it ended"))
            self.loop.settle()

    # --- Halt ---

    @rule(target=halts, halt=HALTS)
    def halt(self, halt: tuple[HaltScope, str]) -> Any:
        outcome = self.loop.do(self._halt(*halt))
        assert outcome.recorded
        self.latched[outcome.halt.id] = outcome.halt
        self.loop.settle()
        self.no_covered_run_goes_on()
        return multiple(outcome.halt.id)

    async def _halt(self, scope: HaltScope, target: str) -> HaltOutcome:
        self.check()  # a decision that has come already is acted on before the Halt
        return await self.runs.halt(scope, target, "a person", "operator")

    @rule(halt_id=consumes(halts))
    def clear(self, halt_id: str) -> None:
        self.loop.do(self.runs.clear_halt(halt_id))
        del self.latched[halt_id]
        assert {halt.id for halt in self.runs.halts()} == self.latched.keys()

    # --- time ---

    @rule(seconds=st.sampled_from([1.0, CONFIRM_S + 1, TOOL_TIMEOUT_S + 1, RUN_TIMEOUT_S + 1]))
    def wait(self, seconds: float) -> None:
        self.loop.settle(seconds)
        self.loop.settle()

    # --- what always holds ---

    def active(self) -> list[str]:
        return [run_id for run_id in self.ids if not self.runs.get(run_id).state.ended]

    def events(self, run_id: str) -> list[Event]:
        loop = self.runs._store.get(run_id)
        assert loop is not None
        return list(loop.live._log.since(0))

    @invariant()
    def check(self) -> None:
        for run_id in self.ids:
            run, events = self.runs.get(run_id), self.events(run_id)
            self.sequences_have_no_gap(run, events)
            self.it_ends_exactly_once(run, events)
            self.an_ended_run_never_changes(run)
            self.nothing_is_called_under_a_halt(run, events)
            self.no_run_outlives_its_time(run)

    def sequences_have_no_gap(self, run: Run, events: list[Event]) -> None:
        last = 0
        for event in events:
            size = event.body.tokens if isinstance(event.body, TextDelta) else 1
            assert event.sequence == last + size
            last = event.sequence
        assert run.sequence == last

    def it_ends_exactly_once(self, run: Run, events: list[Event]) -> None:
        ends = [event for event in events if isinstance(event.body, RunFinished)]
        assert len(ends) == (1 if run.state.ended else 0)
        assert not ends or ends == [events[-1]]
        assert run.state.ended == (run.ended_at_s is not None)

    def an_ended_run_never_changes(self, run: Run) -> None:
        if run.state.ended:
            assert self.ended.setdefault(run.id, run) == run
            assert run.open_tool_calls == ()

    def nothing_is_called_under_a_halt(self, run: Run, events: list[Event]) -> None:
        issued = [e.body for e in events if isinstance(e.body, ToolCallsIssued)]
        for body in issued[self.issued[run.id] :]:
            for halt in self.latched.values():
                assert not covers_run(halt, run.client, run.agent)
                assert not any(covers_tool(halt, call.name) for call in body.tool_calls)
        self.issued[run.id] = len(issued)

    def no_covered_run_goes_on(self) -> None:
        for run_id in self.active():
            run = self.runs.get(run_id)
            covered = any(covers_run(h, run.client, run.agent) for h in self.latched.values())
            assert not covered or run.state is RunState.CANCELLING

    def no_run_outlives_its_time(self, run: Run) -> None:
        age_s = self.loop.time() - self.born_s[run.id]
        if not run.state.ended and age_s > RUN_TIMEOUT_S:
            assert run.state is RunState.CANCELLING


TestRuns = RunsMachine.TestCase
TestRuns.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class LeakyLatch(HaltLatch):
    """A planted bug: a Halt of all does not stop tools."""

    def covering_tool(self, tool: str) -> Halt | None:  # noqa: ARG002
        return None


class DeafRuns(Runs):
    """A planted bug: a Halt is latched, but stops nothing that runs."""

    def _covered(self, halt: Halt) -> Any:  # noqa: ARG002
        return iter(())


class ReopeningRuns(Runs):
    """A planted bug: a cancel of an ended run ends it again."""

    def cancel(self, run_id: str, reason: RunError) -> Run:
        loop = self._find(run_id)
        if loop.live.state.ended:
            loop.live.finish(state=RunState.CANCELLED, error=reason)
        return super().cancel(run_id, reason)


def planted(**types: type) -> type[RunsMachine]:
    return type("Planted", (RunsMachine,), types)


def notice(machine: type[RunsMachine]) -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=400,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )


def test_the_model_notices_a_halt_that_does_not_reach_tools():
    notice(planted(latch_type=LeakyLatch))


def test_the_model_notices_a_halt_that_stops_nothing_that_runs():
    notice(planted(runs_type=DeafRuns))


def test_the_model_notices_a_run_that_ends_twice():
    notice(planted(runs_type=ReopeningRuns))


def test_the_model_notices_a_gap_in_the_sequence(monkeypatch):
    def forgetful(self: LiveRun, step: int, text: str, tokens: int) -> None:
        self._log.add_text(step, text, tokens)
        self._log.sequence += 1

    monkeypatch.setattr(LiveRun, "add_text", forgetful)
    notice(RunsMachine)


def test_the_model_notices_a_run_whose_stop_is_lost(monkeypatch):
    def deaf(self: RunLoop, state: RunState, error: RunError) -> None:
        if self._ending is None and not self.live.state.ended:
            self._ending = (state, error)  # and nobody is woken

    monkeypatch.setattr(RunLoop, "stop", deaf)
    notice(RunsMachine)
