"""Facts go in, decisions come out: who is let wait, who starts, and what each report changes."""

import dataclasses

import pytest

from edge_agent.core import EngineState, Priority
from edge_agent.errors import DeadlineExceeded, FailedPrecondition, LoadFailed, Overloaded
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.planner import LOST, Planner
from edge_agent.scheduling.pressure import Level
from edge_agent.scheduling.residents import Leak, Resident
from edge_agent.scheduling.values import (
    EngineFacts,
    Heat,
    Load,
    MachineView,
    Memory,
    QueuedStep,
    Ready,
    Refuse,
    Rules,
    Start,
)
from tests.support.scheduling_world import engine

RULES = Rules(0, soft_floor_bytes=8, hard_floor_bytes=4, max_waiting_steps=10)
VIEW = MachineView(Memory(100, 100))
NO_MEMORY = LoadFailed("out of memory", reason="LOAD_OUT_OF_MEMORY")
QUARANTINED = LoadFailed("three boots ended in its load", reason="ENGINE_QUARANTINED")
A = engine("a", 20, slots=2, load_s=4.0)
MEASURED = Served(100, 10, prefill_s=2.0, decode_s=3.0)


class Told:
    """A planner that knows engine `a`, and steps numbered as they are asked."""

    def __init__(self, *others: EngineFacts, rules: Rules = RULES) -> None:
        self.planner = Planner(rules, VIEW)
        self.state = self.planner.state
        for facts in (A, *others):
            self.planner.know(facts)
        self.asked = 0

    def ask(self, name: str = "a", now_s: float = 0.0, **more: object) -> QueuedStep:
        self.asked += 1
        plain = QueuedStep(
            self.asked, name, "arm", Priority.NORMAL, now_s, 10, prompt_tokens=100, output_tokens=10
        )
        step = dataclasses.replace(plain, **more)  # type: ignore[arg-type]
        self.planner.submit(step, now_s)
        return step

    def ready(self, name: str = "a") -> Resident:
        """In memory, without any step that it was loaded for."""
        facts = self.state.facts[name]
        made = self.state.residents[name] = Resident(facts, asked_s=0.0)
        self.planner.loaded(name, facts.slots, facts.footprint.steady_bytes, 0.0)
        return made

    def started(self, name: str = "a", **more: object) -> QueuedStep:
        step = self.ask(name, 0.0, **more)
        assert self.planner.decide(0.0) == [Start(step)]
        return step


@pytest.fixture
def told() -> Told:
    return Told()


# --- who is let wait ---


def test_more_steps_than_the_limit_don_t_wait_but_for_a_tenth_of_urgent_ones(told):
    for _ in range(10):
        told.ask()
    with pytest.raises(Overloaded, match="10 steps wait already, at most 10"):
        told.ask()
    told.ask(priority=Priority.URGENT)
    with pytest.raises(Overloaded, match="11 steps wait already, at most 10"):
        told.ask(priority=Priority.URGENT)
    assert len(told.state.queue) == 11


def retry_s(told: Told) -> float | None:
    for _ in range(10):
        told.ask()
    with pytest.raises(Overloaded) as caught:
        told.ask()
    return caught.value.retry_after_s


def test_who_comes_too_many_is_told_when_a_tenth_of_them_will_have_been_served(told):
    told.state.residents["b"] = Resident(engine("b", 20), asked_s=0.0, slots=1)
    told.ready()
    told.state.pace("a").step_s = 5.0
    assert retry_s(told) == pytest.approx(1 / (2 / 5.0))


def test_a_warm_machine_serves_more_slowly(told):
    told.ready()
    told.state.pace("a").step_s = 5.0
    told.planner.observe(dataclasses.replace(VIEW, heat=Heat.THROTTLED))
    assert retry_s(told) == pytest.approx(1 / (1 / 10.0))


def test_who_comes_too_many_before_anything_was_measured_tries_again_in_a_second(told):
    told.ready()
    assert retry_s(told) == 1.0


def test_an_engine_in_quarantine_serves_while_it_is_in_memory_and_is_not_loaded(told):
    told.ready()
    told.planner.know(dataclasses.replace(A, refusal=QUARANTINED))
    told.started()
    told.planner.lost("a")
    told.planner.gone("a")
    with pytest.raises(LoadFailed, match="three boots"):
        told.ask()


def test_a_deadline_that_can_t_be_met_is_refused_when_most_of_the_estimate_is_too_long(told):
    told.ready()
    told.state.pace("a").observe(MEASURED)
    told.ask(deadline_s=104.0, now_s=100.0)  # four fifths of 5 s
    told.ask(deadline_s=100.1, now_s=100.0, load_only=True)
    with pytest.raises(DeadlineExceeded, match=r"= 5\.0 s, but only 3\.9 s are left"):
        told.ask(deadline_s=103.9, now_s=100.0)


def test_nothing_is_too_late_before_anything_was_measured(told):
    told.ask(deadline_s=0.1)
    told.ask()
    assert len(told.state.queue) == 2


def test_steps_are_demand_for_an_engine_and_probes_are_not(told):
    told.ask(probe=True)
    assert told.state.demands == {}
    told.ask()
    assert told.state.demands["a"].count == 1.0


def test_who_withdraws_waits_no_longer(told):
    step = told.ask()
    assert told.planner.withdraw(step.id) is True
    assert told.planner.withdraw(step.id) is False
    assert told.planner.decide(0.0) == []


# --- time ---


def test_a_deadline_ends_waiting_with_how_long_it_was(told):
    told.ready().state = EngineState.LOADING
    told.ask()
    step = told.ask(deadline_s=15.0, now_s=5.0)
    assert told.planner.wake_s() == 15.0
    assert told.planner.decide(14.0) == []
    (refused,) = told.planner.decide(15.0)
    assert isinstance(refused, Refuse)
    assert refused.step == step
    assert str(refused.error) == "waited 10.0 s for engine a, until the deadline"
    assert refused.error.reason == "DEADLINE_PASSED"
    assert refused.error.metadata == {"engine": "a", "waited_s": "10.0"}
    assert told.planner.wake_s() is None


def test_the_planner_wakes_for_whatever_time_changes_first():
    told = Told(engine("b", 90), rules=dataclasses.replace(RULES, min_residency_s=30.0))
    told.ready()
    told.started()
    told.ask("b", deadline_s=50.0)
    told.planner.decide(0.0)
    assert told.planner.wake_s() == 30.0  # `a` may go
    told.ask("b", deadline_s=20.0)
    told.planner.decide(0.0)
    assert told.planner.wake_s() == 20.0


# --- who starts ---


def test_places_are_given_out_in_turn_until_none_is_left(told):
    made = told.ready()
    late, first, second = told.ask(priority=Priority.BATCH), told.ask(), told.ask()
    assert told.planner.decide(7.0) == [Start(first), Start(second)]
    assert list(made.running) == [first.id, second.id]
    assert made.running[first.id].started_s == made.last_used_s == 7.0
    told.planner.ended(first, 8.0, None)
    assert told.planner.decide(8.0) == [Start(late)]


@pytest.mark.parametrize("state", [EngineState.LOADING, EngineState.DRAINING, EngineState.STOPPING])
def test_only_an_engine_that_is_ready_takes_steps(told, state):
    told.ready().state = state
    told.ask()
    assert told.planner.decide(0.0) == []


def test_a_step_costs_a_second_of_its_client_s_turns_before_anything_was_measured(told):
    told.ready()
    turns = [told.state.residents["a"].running[told.started().id].key[0] for _ in range(2)]
    assert turns == [300.0, 301.0]


def test_a_step_costs_what_was_measured(told):
    told.ready()
    told.state.pace("a").observe(MEASURED)
    turns = [told.state.residents["a"].running[told.started().id].key[0] for _ in range(2)]
    assert turns == [300.0, 305.0]


def test_a_start_moves_its_client_s_turn_in_the_other_engines_at_once():
    told = Told(engine("b", 20))
    told.ready()
    told.ready("b")
    told.started(need_tokens=150)  # of 200
    told.ask(client="eye", need_tokens=100)
    small = told.ask(client="base", need_tokens=50)
    other = told.ask("b", client="eye")
    assert told.planner.decide(0.0) == [Start(other), Start(small)]


def test_a_victim_that_stays_takes_steps_at_once():
    told = Told(engine("b", 90), rules=dataclasses.replace(RULES, min_residency_s=0.0))
    told.ready()
    told.started()
    other = told.ask("b", client="base")
    assert told.planner.decide(1000.0) == []
    assert told.state.residents["a"].state is EngineState.DRAINING
    late = told.ask()
    assert told.planner.decide(1000.0) == []
    told.planner.withdraw(other.id)
    assert told.planner.decide(1000.0) == [Start(late)]


def test_who_asks_for_no_more_than_the_engine_is_ready_once_it_is_in_memory(told):
    step = told.ask(load_only=True)
    assert told.planner.decide(0.0) == [Load("a", 1)]
    told.planner.loaded("a", 2, 20, 4.0)
    assert told.planner.decide(4.0) == [Ready(step)]
    assert told.state.residents["a"].running == {}


# --- what steps report ---


def test_the_first_token_ends_the_lease_of_the_load_that_was_made_for_it(told):
    step = told.ask()
    told.planner.decide(0.0)
    made = told.state.residents["a"]
    assert made.lease == step.id
    told.planner.first_token(step)
    assert made.lease is None


def test_a_step_that_has_ended_leaves_nothing_but_what_was_measured(told):
    told.ready()
    step = told.started()
    told.state.preemptions[step.id] = 2
    told.planner.ended(step, 5.0, MEASURED)
    assert told.state.residents["a"].running == {}
    assert told.state.residents["a"].last_used_s == 5.0
    assert told.state.preemptions == {}
    assert told.state.pace("a").step_s == 5.0
    told.planner.ended(told.started(), 6.0, None)
    assert told.state.pace("a").step_s == 5.0


def test_what_is_measured_counts_as_if_the_machine_were_cool(told):
    told.ready()
    step = told.started()
    told.planner.observe(dataclasses.replace(VIEW, heat=Heat.THROTTLED))
    told.planner.ended(step, 5.0, MEASURED)
    assert told.state.pace("a").step_s == 2.5


def test_a_step_that_waits_again_and_has_ended_after_all_waits_no_longer(told):
    told.ready()
    step = told.started()
    told.planner.lost("a")
    told.planner.gone("a")
    told.planner.ended(step, 5.0, None)
    assert len(told.state.queue) == 0


def test_a_step_that_was_stopped_for_another_waits_again_once(told):
    told.ready()
    step = told.started(priority=Priority.BATCH)
    told.planner.preempted(step, 5.0)
    assert told.state.preemptions == {step.id: 1}
    assert list(told.state.queue.waiting()) == [step]
    told.planner.preempted(step, 5.0)
    assert told.state.preemptions == {step.id: 1}
    assert len(told.state.queue) == 1


# --- what engines report ---


def test_what_is_in_memory_keeps_what_it_was_loaded_with(told):
    made = told.ready()
    told.planner.know(dataclasses.replace(A, slots=9))
    assert made.slots == 2
    assert told.state.facts["a"].slots == 9


def test_an_engine_that_was_loaded_takes_steps_and_has_what_it_was_seen_to_take(told):
    step = told.ask()
    told.planner.decide(0.0)
    told.planner.loaded("a", 2, 15, 4.0)
    made = told.state.residents["a"]
    assert (made.state, made.slots, made.ready_s) == (EngineState.READY, 2, 4.0)
    assert (made.committed_bytes, made.held_bytes) == (20, 15)
    assert told.planner.decide(4.0) == [Start(step)]


@pytest.mark.parametrize(
    ("steady", "held", "committed", "kept"),
    [(18, 17, 20, 17), (25, 24, 25, 24), (18, 30, 20, 20)],
)
def test_an_engine_claims_the_most_that_it_was_seen_to_need(told, steady, held, committed, kept):
    made = told.ready()
    told.planner.remeasured("a", steady, held)
    assert (made.committed_bytes, made.held_bytes) == (committed, kept)


def test_a_load_that_lacked_memory_is_tried_once_more_and_then_all_who_wait_are_refused(told):
    first, second = told.ask(), told.ask()
    assert told.planner.decide(0.0) == [Load("a", 1)]
    assert told.planner.load_failed("a", NO_MEMORY, retry=True) == []
    assert told.planner.decide(0.0) == [Load("a", 2)]
    refused = told.planner.load_failed("a", NO_MEMORY, retry=True)
    assert refused == [Refuse(first, NO_MEMORY), Refuse(second, NO_MEMORY)]
    told.ask()
    assert told.planner.decide(0.0) == [Load("a", 1)]


def test_a_load_that_failed_for_another_reason_is_not_tried_again(told):
    step = told.ask()
    told.planner.decide(0.0)
    assert told.planner.load_failed("a", NO_MEMORY, retry=False) == [Refuse(step, NO_MEMORY)]
    assert told.planner.decide(0.0) == []


def test_a_second_attempt_that_went_well_is_the_last_of_that_load(told):
    steps = [told.ask() for _ in range(3)]
    told.planner.decide(0.0)
    told.planner.load_failed("a", NO_MEMORY, retry=True)
    assert told.planner.decide(0.0) == [Load("a", 2)]
    told.planner.loaded("a", 2, 20, 0.0)
    assert told.planner.decide(0.0) == [Start(steps[0]), Start(steps[1])]
    told.planner.lost("a")
    told.planner.gone("a")
    assert told.planner.decide(0.0) == [Load("a", 1)]


def test_a_lost_engine_takes_no_steps_and_those_it_had_wait_again_their_turn_paid_for(told):
    made = told.ready()
    step = told.started()
    told.planner.lost("a")
    assert (made.state, made.why) == (EngineState.STOPPING, LOST)
    assert told.planner.decide(0.0) == []
    told.planner.gone("a")
    assert told.state.residents == {}
    assert list(told.state.queue.waiting()) == [step]
    assert told.state.preemptions == {step.id: 1}
    made = told.ready()
    assert told.planner.decide(0.0) == [Start(step)]
    assert made.running[told.started().id].key[0] == 301.0


# --- memory ---


def test_the_machine_is_seen_as_telemetry_says(told):
    told.ready()
    told.planner.lost("a")
    told.planner.gone("a")
    tight = dataclasses.replace(VIEW, memory=Memory(100, 7))
    told.planner.observe(tight)
    assert told.state.machine is tight
    assert told.state.level is Level.SOFT
    assert told.state.reading_is_old is False


def leak(told: Told, missing_bytes: int) -> Leak:
    told.ready()
    told.planner.lost("a")
    told.planner.leaked("a", missing_bytes)
    assert told.state.residents == {}
    return told.state.leaks["a"]


def test_what_does_not_come_back_is_a_leak_beside_what_others_use(told):
    told.planner.observe(MachineView(Memory(100, 70)))
    assert leak(told, 12) == Leak(12, 18)
    assert leak(told, 3) == Leak(15, 15)


@pytest.mark.parametrize("available_bytes", [None, 100, 95])
def test_nobody_else_uses_memory_where_nothing_more_than_the_leak_is_seen(told, available_bytes):
    told.planner.observe(MachineView(Memory(100, available_bytes)))
    assert leak(told, 12) == Leak(12, 0)


def test_a_leak_counts_until_it_is_seen_to_have_come_back(told):
    told.planner.observe(MachineView(Memory(100, 70)))
    made = leak(told, 12)
    for available_bytes in (70, None, 78):
        told.planner.observe(MachineView(Memory(100, available_bytes)))
        assert told.state.leaks == {"a": made}
    told.planner.observe(MachineView(Memory(100, 79)))  # all but a quarter of the 12
    assert told.state.leaks == {}


def test_a_leak_is_forgotten_when_somebody_has_looked_after_it(told):
    leak(told, 12)
    assert told.planner.release("a") is True
    assert told.planner.release("a") is False
    assert told.state.leaks == {}


# --- somebody wants an engine out of memory ---


@pytest.mark.parametrize("state", [EngineState.READY, EngineState.DRAINING])
def test_an_engine_that_nobody_uses_goes_on_request(told, state):
    made = told.ready()
    made.state = state
    assert told.planner.unload("a") is True
    assert (made.state, made.why) == (EngineState.STOPPING, "REQUESTED")
    assert told.planner.unload("a") is False


def test_an_engine_that_is_not_in_memory_need_not_go(told):
    assert told.planner.unload("a") is False


def busy(told: Told) -> tuple[str, str]:
    """How many steps use and wait for the engine, by the refusal to unload it."""
    with pytest.raises(FailedPrecondition) as caught:
        told.planner.unload("a")
    assert caught.value.reason == "ENGINE_BUSY"
    assert told.state.residents["a"].state is not EngineState.STOPPING
    metadata = caught.value.metadata
    assert metadata.keys() == {"engine", "active_steps", "waiting_steps"}
    assert metadata["engine"] == "a"
    return metadata["active_steps"], metadata["waiting_steps"]


def test_an_engine_that_is_used_waited_for_or_loaded_stays(told):
    made = told.ready()
    told.started()
    assert busy(told) == ("1", "0")
    told.ask()
    assert busy(told) == ("1", "1")
    made.running.clear()
    assert busy(told) == ("0", "1")
    for step in list(told.state.queue.waiting()):
        told.planner.withdraw(step.id)
    made.state = EngineState.LOADING
    assert busy(told) == ("0", "0")
