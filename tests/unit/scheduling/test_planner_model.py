"""The planner under any order of what callers, workers, the machine and its owner do.

The invariants are checked by the world at each decision: never over budget, one engine moves at a
time, nothing that is pinned, leased or busy is unloaded for a step, a step runs once at a time. In
the end each step has ended exactly once.
"""

import dataclasses
import math

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from edge_agent.core import EngineState, Priority
from edge_agent.errors import FailedPrecondition, LoadFailed
from edge_agent.scheduling import budget, eviction
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.residents import Resident
from edge_agent.scheduling.state import State
from edge_agent.scheduling.values import Heat, QueuedStep, Rules
from tests.support.chaos import histories
from tests.support.scheduling_world import Process, World, changed, engine

RULES = Rules(reserve_bytes=20, soft_floor_bytes=8, hard_floor_bytes=4, max_waiting_steps=12)
TOTAL = 100
ENGINES = [
    engine("small", 10, slots=2, load_s=2.0),
    engine("wide", 20, slots=4, load_s=4.0, peak=5),
    engine("cached", 30, slots=2, load_s=5.0, cache_gib=10),
    engine("middle", 30, slots=1, load_s=6.0, peak=5),
    engine("large", 60, slots=1, load_s=20.0, peak=10),
    engine("huge", 200, slots=1, load_s=60.0),
]
NAMES = st.sampled_from(["small", "wide", "cached", "middle", "large"])
QUARANTINED = LoadFailed("three boots ended in its load", reason="ENGINE_QUARANTINED")


def _ask(name, client, priority, tokens, within_s, kind):
    return {
        "name": name,
        "client": client,
        "priority": priority,
        "tokens": tokens,
        "within_s": 10.0 if kind == "probe" else within_s,  # nobody may ever load for a probe
        "load_only": kind == "load_only",
        "probe": kind == "probe",
        "preemptible": priority is Priority.BATCH,
    }


ASKS = st.builds(
    _ask,
    name=st.sampled_from(
        ["small", "wide", "cached", "middle", "large", "small", "wide", "cached", "huge"]
    ),
    client=st.sampled_from(["arm", "base", "eye"]),
    priority=st.sampled_from(list(Priority)),
    tokens=st.sampled_from([0, 10, 60, 100, 150]),
    within_s=st.sampled_from([None, None, None, 10.0, 100.0]),
    kind=st.sampled_from(["step", "step", "step", "step", "step", "load_only", "probe"]),
)


class PlannerMachine(RuleBasedStateMachine):
    """Any history. What is decided is carried out at once; what comes of it is a rule's."""

    planner_type: type[Planner] = Planner

    def __init__(self) -> None:
        super().__init__()
        world = type("AnyWorld", (World,), {"planner_type": self.planner_type})
        self.world: World = world(RULES, TOTAL, ENGINES)

    def teardown(self) -> None:
        self.world.come_to_rest()

    # --- callers ---

    @rule(asks=st.lists(ASKS, min_size=1, max_size=4))
    def submit(self, asks):
        for ask in asks:
            self.world.submit(**ask)

    @rule(asks=st.lists(ASKS, min_size=1, max_size=3), times=st.integers(1, 8))
    def submit_and_go_on(self, asks, times):
        self.submit(asks)
        self.go_on(times)

    @rule(times=st.integers(1, 12))
    def go_on(self, times):
        """Whatever is under way comes to its end, as it should."""
        for _ in range(times):
            self.world.move_on()

    @precondition(lambda self: bool(self.world.waiting))
    @rule(data=st.data())
    def withdraw(self, data):
        self.world.withdraw(data.draw(st.sampled_from(sorted(self.world.waiting))))

    # --- workers ---

    def running(self, data: st.DataObject) -> QueuedStep:
        return data.draw(st.sampled_from(sorted(self.world.running(), key=lambda s: s.id)))

    def process(self, data: st.DataObject, *states: EngineState) -> tuple[str, Process]:
        processes = self.world.processes
        names = [name for name, process in processes.items() if process.state in states]
        name = data.draw(st.sampled_from(names))
        return name, processes[name]

    def has(self, *states: EngineState) -> bool:
        return any(process.state in states for process in self.world.processes.values())

    @precondition(lambda self: any(self.world.running()))
    @rule(data=st.data())
    def first_token(self, data):
        self.world.first_token(self.running(data))

    @precondition(lambda self: any(self.world.running()))
    @rule(data=st.data(), seconds=st.sampled_from([None, 0.1, 5.0]))
    def finish(self, data, seconds):
        served = None if seconds is None else Served(10, 10, seconds, seconds)
        self.world.finish(self.running(data), served)

    @precondition(lambda self: bool(self.world.preempting))
    @rule(data=st.data())
    def let_go(self, data):
        stopping = [step for step in self.world.running() if step.id in self.world.preempting]
        self.world.let_go(data.draw(st.sampled_from(stopping)))

    @precondition(lambda self: self.has(EngineState.LOADING))
    @rule(data=st.data(), held=st.sampled_from([None, 0, 5]), seconds=st.sampled_from([0.0, 4.0]))
    def load_ends(self, data, held, seconds):
        self.world.now_s += seconds
        self.world.load_ends(self.process(data, EngineState.LOADING)[0], held)

    @precondition(lambda self: self.has(EngineState.LOADING))
    @rule(data=st.data(), retry=st.booleans())
    def load_fails(self, data, retry):
        self.world.load_fails(self.process(data, EngineState.LOADING)[0], retry=retry)

    @precondition(lambda self: self.has(EngineState.LOADING))
    @rule(data=st.data())
    def load_takes_memory(self, data):
        process = self.process(data, EngineState.LOADING)[1]
        process.real_bytes = process.facts.footprint.load_peak_bytes
        self.world.observe()

    @precondition(lambda self: self.has(EngineState.STOPPING))
    @rule(data=st.data(), leak_bytes=st.sampled_from([0, 0, 0, 7]), look=st.booleans())
    def process_ends(self, data, leak_bytes, look):
        name, _ = self.process(data, EngineState.STOPPING)
        if self.world.planner.state.residents[name].ready_s == 0.0:  # killed while it was loaded
            self.world.load_fails(name, retry=True)
        else:
            self.world.process_ends(name, leak_bytes)
        if look:
            self.world.observe()

    @precondition(lambda self: self.has(EngineState.READY))
    @rule(data=st.data(), steps_fail=st.booleans())
    def crash(self, data, steps_fail):
        self.world.crash(self.process(data, EngineState.READY)[0], steps_fail=steps_fail)

    # --- the machine ---

    @rule(
        others=st.sampled_from([0, 0, 10, 40]),
        free=st.sampled_from([None, None, None, 3, 6, 9, 30]),
        heat=st.sampled_from([Heat.NOMINAL, Heat.NOMINAL, *Heat]),
        blind=st.sampled_from([False, False, False, True]),
        leaks_are_back=st.booleans(),
    )
    def machine_changes(self, others, free, heat, blind, leaks_are_back):
        """Others take so much, or so much that this is left."""
        self.world.others_bytes, self.world.heat, self.world.blind = 0, heat, blind
        if leaks_are_back:
            self.world.leaked_bytes.clear()
        left = self.world.available_bytes()
        self.world.others_bytes = others if free is None else max(0, left - free)
        self.world.observe()

    @rule(seconds=st.sampled_from([0.5, 5.0, 30.0, 120.0]))
    def time_passes(self, seconds):
        self.world.let_time_pass(seconds)

    @rule()
    def time_comes(self):
        wake_s = self.world.planner.wake_s()
        if wake_s is not None:
            self.world.let_time_pass(wake_s - self.world.now_s)

    # --- the owner ---

    @rule(name=st.sampled_from(["small", "cached", "large"]), pinned=st.booleans())
    def pin(self, name, pinned):
        self.world.pin(name, pinned=pinned)

    @rule(name=NAMES)
    def unload(self, name):
        process = self.world.processes.get(name)
        used = bool(process and process.running) or any(
            step.engine == name for step in self.world.waiting.values()
        )
        try:
            self.world.unload(name)
        except FailedPrecondition:
            assert used or (process and process.state is EngineState.LOADING)
        else:
            assert not used or process is None or process.state is EngineState.STOPPING

    @rule(
        most=st.sampled_from([1, 2, 3, 8]),
        budget=st.sampled_from([None, None, 75]),
        reserve=st.sampled_from([0, 20, 30]),
    )
    def reload(self, most, budget, reserve):
        self.world.reload(
            changed(RULES, max_resident_engines=most, budget_bytes=budget, reserve_bytes=reserve)
        )

    @rule(name=NAMES, quarantined=st.booleans())
    def operate(self, name, quarantined):
        """Boots ended in its load; or somebody has looked after it."""
        refusal = QUARANTINED if quarantined else None
        self.world.know(dataclasses.replace(self.world.facts[name], refusal=refusal))
        if not quarantined:
            self.world.planner.release(name)
            self.world.turn()


TestPlanner = PlannerMachine.TestCase
TestPlanner.settings = histories(120, 40)


# --- the model notices planted bugs ---


def notice(planner_type: type[Planner] = Planner) -> None:
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(
            type("Planted", (PlannerMachine,), {"planner_type": planner_type}),
            settings=settings(
                max_examples=600,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )


class ForgetfulPlanner(Planner):
    """A step that was preempted is not let wait again."""

    def preempted(self, step, now_s):
        self.state.give_place(step, now_s)


class CarelessPlanner(Planner):
    """A step whose engine's process has ended is not let wait again."""

    def gone(self, engine):
        steps = [run.step for run in self.state.residents[engine].running.values()]
        super().gone(engine)
        for step in steps[:1]:
            self.state.drop(step.id)


@pytest.mark.parametrize("planted", [ForgetfulPlanner, CarelessPlanner])
def test_the_model_notices_a_step_that_is_forgotten(planted):
    notice(planted)


def test_the_model_notices_a_victim_that_takes_steps_again(monkeypatch):
    serve = Planner._serve_all

    def serve_draining(self, now_s):
        for name in list(self.state.queue.engines()):
            resident = self.state.residents.get(name)
            if resident is not None and resident.state is EngineState.DRAINING:
                yield from self._serve(resident, now_s)
        yield from serve(self, now_s)

    monkeypatch.setattr(Planner, "_serve_all", serve_draining)
    notice()


def test_the_model_notices_that_two_engines_move_at_once(monkeypatch):
    monkeypatch.setattr(State, "in_transition", lambda _self: False)
    notice()


def test_the_model_notices_a_load_beyond_the_budget(monkeypatch):
    room_bytes = budget.room_bytes
    monkeypatch.setattr(eviction, "room_bytes", lambda *args: room_bytes(*args) + 6)
    notice()


def test_the_model_notices_a_pinned_victim(monkeypatch):
    scene = State.scene
    monkeypatch.setattr(
        State, "scene", lambda self: dataclasses.replace(scene(self), pins=frozenset())
    )
    notice()


def test_the_model_notices_a_victim_that_was_loaded_for_somebody(monkeypatch):
    def free(self: Resident, *_args: object, **_more: object) -> float:
        self.lease = None
        return -math.inf

    monkeypatch.setattr(Resident, "protected_until_s", free)
    monkeypatch.setattr(State, "end_lease", lambda _self, _step: None)
    notice()


def test_the_model_notices_too_many_steps_at_once(monkeypatch):
    monkeypatch.setattr(Resident, "has_place", lambda *_args, **_more: True)
    notice()


def test_the_model_notices_a_kill_after_an_old_reading(monkeypatch):
    leave = State.leave

    def unnoticed(self, name):
        gone = leave(self, name)
        self.reading_is_old = False
        return gone

    monkeypatch.setattr(State, "leave", unnoticed)
    notice()
