"""What the scheduler knows: each change keeps the records whole, each question has one answer."""

import dataclasses
import math

import pytest

from edge_agent.core import EngineState, Priority
from edge_agent.errors import LoadFailed
from edge_agent.scheduling.pressure import Level
from edge_agent.scheduling.residents import Leak, Resident, Running
from edge_agent.scheduling.state import State
from edge_agent.scheduling.values import Heat, MachineView, Memory, QueuedStep, Refuse, Rules
from tests.support.scheduling_world import engine

VIEW = MachineView(Memory(100, 60))
BROKEN = LoadFailed("the worker ended", reason="WORKER_LOST")


@pytest.fixture
def state() -> State:
    return State(Rules(0, 0, 0), VIEW)


def step(number: int, name: str = "a", **more: object) -> QueuedStep:
    plain = QueuedStep(number, name, "arm", Priority.NORMAL, 0.0, 10)
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


def resident(
    state: State, name: str, mode: EngineState = EngineState.READY, *, slots: int = 4
) -> Resident:
    facts = engine(name, 20, slots=slots)
    made = state.residents[name] = Resident(
        facts, asked_s=0.0, state=mode, slots=slots, held_bytes=15, committed_bytes=20
    )
    return made


def running(resident: Resident, step: QueuedStep) -> None:
    resident.running[step.id] = Running(step, (0.0, step.id), 0.0)


def test_memory_counts_as_tight_only_once_somebody_has_said_so():
    assert State(Rules(0, 100, 80), VIEW).level is Level.NORMAL


# --- deadlines ---


def test_the_next_deadline_is_the_earliest_of_those_who_wait(state):
    assert state.next_deadline_s() == math.inf
    state.wait(step(1))
    assert state.next_deadline_s() == math.inf
    for number, due_s in ((2, 30.0), (3, 10.0), (4, 20.0)):
        state.wait(step(number, deadline_s=due_s))
    assert state.next_deadline_s() == 10.0
    state.drop(1)
    state.drop(3)
    assert state.next_deadline_s() == 20.0


def test_who_runs_has_no_deadline_any_more_until_it_waits_again(state):
    late, later = step(1, deadline_s=10.0), step(2, deadline_s=20.0)
    for each in (late, later, step(3)):
        state.wait(each)
    state.take(step(3), 1.0)
    state.take(late, 1.0)
    assert state.next_deadline_s() == 20.0
    assert state.expired(10.0) == []
    state.wait(late, again=True)
    assert state.next_deadline_s() == 10.0
    assert state.expired(10.0) == [late]


def test_whose_deadline_has_come_waits_no_longer(state):
    steps = [step(1, deadline_s=30.0), step(2), step(3, deadline_s=20.0), step(4, deadline_s=10.0)]
    for each in steps:
        state.wait(each)
    assert state.expired(9.9) == []
    assert state.expired(20.0) == [steps[3], steps[2]]
    assert state.expired(20.0) == []
    assert list(state.queue.waiting()) == steps[:2]


# --- leaving without having run ---


def test_who_is_dropped_leaves_no_trace(state):
    lone = step(1, load_only=True, deadline_s=5.0)
    state.wait(lone, again=True)
    resident(state, "a").lease = lone.id
    assert state.drop(lone.id) == lone
    assert len(state.queue) == 0
    assert state.preemptions == {}
    assert state.satisfied() == []
    assert state.residents["a"].lease is None
    assert state.next_deadline_s() == math.inf
    assert state.drop(lone.id) is None


def test_everybody_who_waits_for_an_engine_and_nobody_else_is_refused(state):
    steps = [step(1), step(2, "b"), step(3, client="base")]
    for each in steps:
        state.wait(each)
    assert state.refuse_all("a", BROKEN) == [Refuse(steps[0], BROKEN), Refuse(steps[2], BROKEN)]
    assert list(state.queue.waiting()) == [steps[1]]


def test_who_wants_an_engine_in_memory_is_satisfied_once_it_takes_steps(state):
    wants = [step(1, load_only=True), step(2, "b", load_only=True), step(3)]
    for each in wants:
        state.wait(each)
    assert state.satisfied() == []
    loading = resident(state, "a", EngineState.LOADING)
    assert state.satisfied() == []
    loading.state = EngineState.READY
    assert state.satisfied() == [wants[0]]
    assert state.satisfied() == []
    assert list(state.queue.waiting()) == wants[1:]


# --- waiting ---


def test_each_time_that_a_step_waits_again_is_counted(state):
    state.wait(step(1))
    assert state.preemptions == {}
    for times in (1, 2):
        state.take(step(1), 1.0)
        state.wait(step(1), again=True)
        assert state.preemptions == {1: times}


def turn_s(state: State, name: str) -> float:
    """When the first step that waits for an engine has its turn; its class counts 300 s."""
    head = state.queue.head(name)
    assert head is not None
    return head[0][0] - 300.0


def test_a_turn_is_paid_for_once(state):
    state.wait(step(1), again=True)
    state.take(step(1), 50.0)
    state.wait(step(2))
    assert turn_s(state, "a") == 0.0
    state.take(step(2), 50.0)
    state.wait(step(3))
    assert turn_s(state, "a") == 50.0


def test_a_client_has_the_share_of_one_unless_the_rules_say_otherwise(state):
    state.rules = Rules(0, 0, 0, client_weights={"arm": 0.5})
    for number, client in enumerate(("arm", "arm", "base", "base")):
        state.wait(step(number, client, client=client))
    state.take(step(0, "arm", client="arm"), 10.0)
    state.take(step(2, "base", client="base"), 10.0)
    assert (turn_s(state, "arm"), turn_s(state, "base")) == (20.0, 10.0)


# --- loads ---


def test_engines_are_loaded_in_the_order_of_the_turns_of_those_who_wait_for_them(state):
    classes = (Priority.BATCH, Priority.NORMAL, Priority.INTERACTIVE, Priority.URGENT)
    for number, priority in enumerate(classes):
        state.wait(step(number, priority.name, priority=priority))
    resident(state, "NORMAL")
    assert [each.engine for _, each in state.next_loads()] == ["URGENT", "INTERACTIVE", "BATCH"]


def test_nothing_is_loaded_for_a_probe(state):
    state.wait(step(1, "a", probe=True))
    state.wait(step(2, "b", probe=True))
    state.wait(step(3, "b"))
    assert [each.id for _, each in state.next_loads()] == [3]


@pytest.mark.parametrize(
    ("modes", "moves"),
    [
        ((), False),
        ((EngineState.READY, EngineState.DRAINING), False),
        ((EngineState.READY, EngineState.LOADING), True),
        ((EngineState.STOPPING, EngineState.READY), True),
    ],
)
def test_an_engine_that_comes_or_goes_is_in_transition(state, modes, moves):
    for number, mode in enumerate(modes):
        resident(state, f"engine-{number}", mode)
    assert state.in_transition() is moves


def test_an_engine_is_idle_when_nothing_keeps_it(state):
    kept = {name: resident(state, name) for name in ("running", "waiting", "leased", "pinned")}
    running(kept["running"], step(1, "running"))
    state.wait(step(2, "waiting"))
    kept["leased"].lease = 3
    state.pins.add("pinned")
    resident(state, "draining", EngineState.DRAINING)
    free = resident(state, "free")
    assert state.idle() == [free]


# --- what is known ---


def test_the_choice_of_a_load_looks_at_everything_that_is_known(state):
    state.facts["a"] = engine("a", 20)
    state.leaks["gone"] = Leak(7, 0)
    made = resident(state, "a")
    scene = state.scene()
    assert scene.ledger == (made.reservation, state.leaks["gone"].reservation)
    assert scene.memory is VIEW.memory
    assert scene.rules is state.rules
    assert scene.facts is state.facts
    assert scene.pins is state.pins
    assert scene.demands is state.demands
    assert scene.queue is state.queue


def test_what_no_resident_engine_holds_is_unclaimed_and_a_leak_is(state):
    state.leaks["gone"] = Leak(7, 0)
    assert state.unclaimed_bytes() == 40
    resident(state, "a")
    assert state.unclaimed_bytes() == 25
    state.machine = MachineView(Memory(100, None))
    assert state.unclaimed_bytes() is None


def test_heat_takes_places_from_all_but_urgent_steps(state):
    made = resident(state, "a")
    urgent, normal = step(1, priority=Priority.URGENT), step(2)
    assert [state.parallel(made, each) for each in (urgent, normal, None)] == [4, 4, 4]
    state.machine = dataclasses.replace(VIEW, heat=Heat.THROTTLED)
    assert [state.parallel(made, each) for each in (urgent, normal, None)] == [4, 2, 2]


def test_pace_and_demand_of_an_engine_are_kept(state):
    pace, demand = state.pace("a"), state.demand("a")
    assert state.pace("a") is pace
    assert state.demand("a") is demand
    assert state.pace("b") is not pace
    assert state.demand("b") is not demand
    assert state.demands == {"a": demand, "b": state.demand("b")}
    state.machine = dataclasses.replace(VIEW, power_mode=2)
    assert state.pace("a") is not pace


# --- places ---


def test_a_step_that_ends_gives_its_place_and_its_lease_back(state):
    made = resident(state, "a")
    made.lease = 1
    running(made, step(1))
    running(made, step(2))
    assert state.give_place(step(1), 50.0) is True
    assert list(made.running) == [2]
    assert made.last_used_s == 50.0
    assert made.lease is None


def test_a_step_without_a_place_gives_none_back(state):
    assert state.give_place(step(1), 50.0) is False
    made = resident(state, "a")
    running(made, step(2))
    assert state.give_place(step(1), 50.0) is False
    assert list(made.running) == [2]
    assert made.last_used_s == 0.0


def test_only_the_step_for_which_an_engine_was_loaded_ends_its_lease(state):
    made = resident(state, "a")
    made.lease = 1
    state.end_lease(step(2))
    state.end_lease(step(1, "b"))
    assert made.lease == 1
    state.end_lease(step(1))
    assert made.lease is None


def test_memory_was_read_too_early_once_a_process_has_ended(state):
    made = resident(state, "a")
    assert state.reading_is_old is False
    assert state.leave("a") is made
    assert state.residents == {}
    assert state.reading_is_old is True
