"""Who comes into memory and who leaves it, one transition at a time, over the real records."""

import dataclasses
import itertools
import math

import pytest

from edge_agent.core import EngineState, Priority
from edge_agent.errors import LoadFailed
from edge_agent.scheduling.making_room import RoomMaker
from edge_agent.scheduling.pressure import Level
from edge_agent.scheduling.residents import Resident, Running
from edge_agent.scheduling.state import State
from edge_agent.scheduling.values import (
    Action,
    DropCache,
    EngineFacts,
    Kill,
    Load,
    MachineView,
    Memory,
    Preempt,
    QueuedStep,
    Refuse,
    Rules,
    Unload,
)
from tests.support.scheduling_world import engine

NOW_S = 1000.0
RULES = Rules(
    reserve_bytes=20,
    soft_floor_bytes=0,
    hard_floor_bytes=0,
    min_residency_s=10.0,
    residency_per_load=0.0,
)
QUARANTINED = LoadFailed("three boots ended in its load", reason="ENGINE_QUARANTINED")


class House:
    """100 units of memory, 80 of them for engines, and what waits for them."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.state = State(rules, MachineView(Memory(100, None)))
        self.room = RoomMaker(self.state)
        self.numbers = itertools.count(1)

    def step(self, name: str, priority: Priority = Priority.NORMAL, **more: object) -> QueuedStep:
        """Each is of a client of its own."""
        number = next(self.numbers)
        plain = QueuedStep(number, name, f"client-{number}", priority, NOW_S, 10)
        return dataclasses.replace(plain, **more)  # type: ignore[arg-type]

    def ask(
        self, facts: EngineFacts, priority: Priority = Priority.NORMAL, **more: object
    ) -> QueuedStep:
        """A step waits for an engine that is installed."""
        self.state.facts.setdefault(facts.name, facts)
        step = self.step(facts.name, priority, **more)
        self.state.wait(step)
        return step

    def put(
        self,
        name: str,
        gib: int = 10,
        state: EngineState = EngineState.READY,
        *,
        used_s: float = 0.0,
        ready_s: float = 0.0,
    ) -> Resident:
        """An engine that has been in memory for long."""
        facts = self.state.facts[name] = engine(name, gib, slots=4, load_s=100.0)
        resident = self.state.residents[name] = Resident(
            facts,
            asked_s=0.0,
            state=state,
            slots=4,
            held_bytes=gib,
            committed_bytes=gib,
            ready_s=ready_s,
            last_used_s=used_s,
        )
        return resident

    def run(self, resident: Resident, *priorities: Priority) -> list[Running]:
        """Steps that run in it, the BATCH ones preemptible, each with its class's turn."""
        runs = []
        for priority in priorities:
            step = self.step(resident.name, priority, preemptible=priority is Priority.BATCH)
            run = Running(step, (float(priority.rank) * 100.0, step.id), 0.0)
            resident.running[step.id] = run
            runs.append(run)
        return runs

    def make_way(self, now_s: float = NOW_S) -> list[Action]:
        return list(self.room.make_way(now_s))

    def relieve(self) -> list[Action]:
        return list(self.room.relieve())


@pytest.fixture
def house() -> House:
    return House()


# --- below the floors ---


def test_with_memory_enough_nobody_is_relieved_of_anything(house):
    house.put("a")
    assert house.relieve() == []


def test_below_the_soft_floor_whoever_was_used_least_recently_goes(house):
    house.put("a", used_s=20.0)
    house.put("c", used_s=10.0)
    gone = house.put("b", used_s=10.0)
    house.state.level = Level.SOFT
    assert house.relieve() == [Unload("b", "SOFT_FLOOR")]
    assert (gone.state, gone.why) == (EngineState.STOPPING, "SOFT_FLOOR")


@pytest.mark.parametrize("level", [Level.SOFT, Level.HARD])
def test_below_a_floor_what_goes_or_has_gone_may_be_enough(house, level):
    house.put("a")
    house.state.level = level
    house.state.reading_is_old = True
    assert house.relieve() == []
    house.state.reading_is_old = False
    going = house.put("b", state=EngineState.STOPPING)
    assert house.relieve() == []
    going.state = EngineState.READY
    assert len(house.relieve()) == 1


def test_below_the_soft_floor_nobody_goes_beside_a_load_or_from_work(house):
    house.state.level = Level.SOFT
    assert house.relieve() == []
    house.run(house.put("a"), Priority.BATCH)
    assert house.relieve() == []
    house.put("b")
    loading = house.put("c", state=EngineState.LOADING)
    assert house.relieve() == []
    loading.state = EngineState.READY
    assert house.relieve() == [Unload("b", "SOFT_FLOOR")]


def test_below_the_hard_floor_one_worker_is_killed(house):
    house.state.level = Level.HARD
    assert house.relieve() == []
    killed = house.put("a")
    house.put("b")
    assert house.relieve() == [Kill("a")]
    assert (killed.state, killed.why) == (EngineState.STOPPING, "HARD_FLOOR")


def test_the_least_important_worker_is_killed_first(house):
    pinned = house.put("pinned", 50, EngineState.LOADING)
    house.state.pins.add(pinned.name)
    urgent = house.put("urgent", 40)
    house.run(urgent, Priority.BATCH, Priority.URGENT)
    normal = house.put("normal", 30)
    house.run(normal, Priority.NORMAL)
    batch = house.put("batch", 10)
    house.run(batch, Priority.BATCH)
    for name in ("small-b", "small-a"):
        house.put(name, 10)
    house.put("very-large", 20)
    house.run(house.put("loading", 10, EngineState.LOADING), Priority.URGENT)
    house.state.level = Level.HARD
    killed = []
    while house.state.residents:
        (action,) = house.relieve()
        assert isinstance(action, Kill)
        killed.append(action.engine)
        del house.state.residents[action.engine]
    assert killed == [
        "loading",
        "very-large",
        "small-a",
        "small-b",
        "batch",
        "normal",
        "urgent",
        "pinned",
    ]


def test_below_a_floor_a_victim_takes_steps_again(house):
    victim = house.put("a", 50)
    house.run(victim, Priority.NORMAL)
    house.ask(engine("new", 50))
    assert house.make_way() == []
    assert (victim.state, victim.why) == (EngineState.DRAINING, "new")
    assert not house.room.resumed
    house.state.level = Level.SOFT
    assert house.relieve() == []
    assert (victim.state, victim.why) == (EngineState.READY, "")
    assert house.room.resumed
    house.state.level = Level.NORMAL
    house.room.resumed = False
    assert house.relieve() == []
    assert not house.room.resumed


# --- loads ---


def test_without_anybody_who_waits_nothing_is_loaded_and_time_brings_nothing(house):
    assert house.room.wake_s == math.inf
    assert house.make_way() == []
    assert house.room.wake_s == math.inf


def test_an_engine_that_fits_is_loaded_for_the_step_that_waits(house):
    step = house.ask(engine("new", 50, peak=10))
    assert house.make_way() == [Load("new", 1)]
    loading = house.state.residents["new"]
    assert loading.state is EngineState.LOADING
    assert (loading.asked_s, loading.committed_bytes, loading.attempt) == (NOW_S, 60, 1)
    assert loading.lease == step.id
    assert house.make_way() == []


def test_who_only_wants_it_in_memory_has_no_lease(house):
    house.ask(engine("new", 50), load_only=True)
    assert house.make_way() == [Load("new", 1)]
    assert house.state.residents["new"].lease is None


@pytest.mark.parametrize("level", [Level.SOFT, Level.HARD])
def test_below_a_floor_nothing_is_loaded(house, level):
    house.ask(engine("new", 10))
    house.state.level = level
    assert house.make_way() == []
    house.state.level = Level.NORMAL
    assert house.make_way() == [Load("new", 1)]


@pytest.mark.parametrize("state", [EngineState.LOADING, EngineState.STOPPING])
def test_one_engine_moves_at_a_time(house, state):
    moving = house.put("a", state=state)
    house.ask(engine("new", 10))
    assert house.make_way() == []
    moving.state = EngineState.READY
    assert house.make_way() == [Load("new", 1)]


def test_the_engine_of_the_first_step_is_loaded_first(house):
    house.ask(engine("late", 10), Priority.BATCH)
    house.ask(engine("soon", 10), Priority.URGENT)
    assert house.make_way() == [Load("soon", 1)]
    house.state.residents["soon"].state = EngineState.READY
    assert house.make_way() == [Load("late", 1)]


def test_who_waits_for_an_engine_that_can_not_be_loaded_is_refused_and_the_next_is_loaded(house):
    large = house.ask(engine("large", 81), Priority.URGENT)
    broken = dataclasses.replace(engine("broken", 10), refusal=QUARANTINED)
    quarantined = [house.ask(broken, Priority.INTERACTIVE) for _ in range(2)]
    house.ask(engine("new", 10))
    first, *others, load = house.make_way()
    assert isinstance(first, Refuse)
    assert first.step == large
    assert first.error.reason == "ENGINE_TOO_LARGE"
    assert others == [Refuse(step, QUARANTINED) for step in quarantined]
    assert load == Load("new", 1)


def test_idle_caches_are_given_back_and_the_engine_is_loaded(house):
    idle = house.put("a", 40)
    idle.cache_bytes = 15
    house.ask(engine("new", 50))
    assert house.make_way() == [DropCache("a"), Load("new", 1)]
    assert (idle.committed_bytes, idle.held_bytes, idle.cache_bytes) == (25, 25, 0)


def test_a_cache_that_was_never_filled_was_not_held(house):
    idle = house.put("a", 40)
    idle.cache_bytes, idle.held_bytes = 15, 5
    house.ask(engine("new", 50))
    assert house.make_way() == [DropCache("a"), Load("new", 1)]
    assert idle.held_bytes == 0


# --- who waits for memory ---


def test_who_waits_for_others_memory_is_not_in_the_way_of_who_fits(house):
    house.put("a", 50)
    house.state.pins.add("a")
    house.state.machine = MachineView(Memory(100, 20))  # others have 30
    house.ask(engine("large", 30), Priority.URGENT)
    house.ask(engine("small", 20))
    assert house.make_way() == [Load("small", 1)]
    assert house.room.wake_s == math.inf


def test_who_waits_for_an_engine_to_be_free_is_in_the_way_of_who_fits(house):
    leased = house.put("a", 50)
    leased.lease = 99
    house.ask(engine("large", 50), Priority.URGENT)
    house.ask(engine("small", 20))
    assert house.make_way() == []
    leased.lease = None
    assert house.make_way() == [Unload("a", "ROOM")]


def test_the_end_of_an_engine_s_residency_is_waited_for(house):
    house.put("a", 50, ready_s=NOW_S - 4.0, used_s=NOW_S)
    house.ask(engine("new", 50))
    assert house.make_way() == []
    assert house.room.wake_s == NOW_S + 6.0
    assert house.make_way(NOW_S + 6.0) == [Unload("a", "ROOM")]
    assert house.room.wake_s == math.inf


def test_the_first_end_of_a_residency_that_somebody_waits_for_wakes(house):
    house.put("a", 30, ready_s=NOW_S - 7.0, used_s=NOW_S)
    house.put("b", 30, ready_s=NOW_S - 4.0, used_s=NOW_S)
    house.state.machine = MachineView(Memory(100, 15))  # others have 25
    house.ask(engine("large", 80), Priority.INTERACTIVE)  # for want of room, until `a` may go
    house.ask(engine("small", 75))  # when both may go
    assert house.make_way() == []
    assert house.room.wake_s == NOW_S + 3.0


# --- victims ---


def test_victims_leave_one_by_one_as_they_have_no_more_work(house):
    used, idle = house.put("a", 40), house.put("b", 40)
    (run,) = house.run(used, Priority.NORMAL)
    house.ask(engine("new", 80))
    assert house.make_way() == [Unload("b", "ROOM")]
    assert (used.state, used.why) == (EngineState.DRAINING, "new")
    assert (idle.state, idle.why) == (EngineState.STOPPING, "ROOM")
    house.state.leave("b")
    assert house.make_way() == []
    house.state.give_place(run.step, NOW_S)
    assert house.make_way() == [Unload("a", "ROOM")]
    house.state.leave("a")
    assert house.make_way() == [Load("new", 1)]
    assert not house.room.resumed


def test_the_batch_steps_of_a_victim_are_stopped_for_whom_it_leaves(house):
    victim = house.put("a", 50)
    _, batch = house.run(victim, Priority.URGENT, Priority.BATCH)
    batch.key = (2000.0, 1)
    step = house.ask(engine("new", 50))
    assert house.make_way() == [Preempt(batch.step, step)]
    assert house.make_way() == []


def test_a_plan_goes_on_for_a_sooner_step_on_the_same_engine(house):
    victim = house.put("a", 50)
    house.run(victim, Priority.URGENT)
    house.ask(engine("new", 50))
    house.make_way()
    house.ask(engine("new", 50), Priority.URGENT)
    assert house.make_way() == []
    assert victim.state is EngineState.DRAINING
    assert not house.room.resumed


def draining(house: House) -> tuple[Resident, QueuedStep]:
    """A victim at work, and the step on `new` for which it drains."""
    victim = house.put("a", 50)
    house.run(victim, Priority.URGENT)
    step = house.ask(engine("new", 50))
    assert house.make_way() == []
    assert victim.state is EngineState.DRAINING
    return victim, step


def resumes(house: House, victim: Resident) -> bool:
    """Whether the victim takes steps again."""
    assert house.room.resumed is (victim.state is EngineState.READY)
    return house.room.resumed


def test_a_victim_takes_steps_again_when_nobody_waits_any_more(house):
    victim, step = draining(house)
    house.state.drop(step.id)
    assert house.make_way() == []
    assert resumes(house, victim)


def test_it_does_so_at_once_while_another_engine_moves(house):
    victim, step = draining(house)
    house.put("b", state=EngineState.STOPPING)
    assert house.make_way() == []
    assert not resumes(house, victim)
    house.state.drop(step.id)
    assert house.make_way() == []
    assert resumes(house, victim)


def test_a_victim_takes_steps_again_when_a_probe_alone_is_left(house):
    victim, step = draining(house)
    house.put("b", state=EngineState.STOPPING)
    house.state.wait(house.step("new", probe=True))
    house.state.drop(step.id)
    assert house.make_way() == []
    assert resumes(house, victim)


def test_a_victim_takes_steps_again_when_somebody_wants_it_sooner(house):
    victim, _ = draining(house)
    house.ask(victim.facts, Priority.BATCH)
    assert house.make_way() == []
    assert not resumes(house, victim)
    house.ask(victim.facts, Priority.URGENT)
    assert house.make_way() == []
    assert resumes(house, victim)


def test_a_victim_takes_steps_again_when_another_engine_goes_first(house):
    victim, _ = draining(house)
    house.ask(engine("sooner", 10), Priority.URGENT)
    assert house.make_way() == [Load("sooner", 1)]
    assert resumes(house, victim)


def test_a_victim_takes_steps_again_when_who_goes_first_has_to_wait(house):
    victim, _ = draining(house)
    house.put("b", 20).lease = 99
    house.ask(engine("sooner", 70), Priority.URGENT)
    assert house.make_way() == []
    assert resumes(house, victim)


def test_a_victim_drains_on_when_who_goes_first_waits_for_others_memory(house):
    victim, _ = draining(house)
    house.state.machine = MachineView(Memory(100, 20))  # others have 30
    house.ask(engine("sooner", 80), Priority.URGENT)
    assert house.make_way() == []
    assert not resumes(house, victim)


def test_a_victim_takes_steps_again_when_there_is_room_without_it(house):
    victim, _ = draining(house)
    house.state.rules = dataclasses.replace(RULES, reserve_bytes=0)
    assert house.make_way() == [Load("new", 1)]
    assert resumes(house, victim)


def test_a_victim_takes_steps_again_when_its_engine_is_refused(house):
    victim, step = draining(house)
    house.state.facts["new"] = dataclasses.replace(house.state.facts["new"], refusal=QUARANTINED)
    assert house.make_way() == [Refuse(step, QUARANTINED)]
    assert resumes(house, victim)


def test_a_victim_drains_on_when_more_room_must_be_made_than_it_makes(house):
    victim, _ = draining(house)
    house.put("b", 40)
    assert house.make_way() == []
    assert not resumes(house, victim)
    assert house.state.residents["b"].state is EngineState.READY


def test_a_victim_drains_on_while_the_others_that_must_go_are_protected(house):
    victim, _ = draining(house)
    house.put("b", 40, ready_s=NOW_S - 4.0, used_s=NOW_S)
    assert house.make_way() == []
    assert not resumes(house, victim)


def test_a_victim_takes_steps_again_when_its_memory_would_not_do_any_more(house):
    victim, _ = draining(house)
    house.put("b", 20)
    house.state.pins.add("b")
    house.state.machine = MachineView(Memory(100, 0))  # others have 30
    house.state.facts["new"] = engine("new", 60)
    assert house.make_way() == []
    assert resumes(house, victim)


def test_a_plan_goes_on_while_one_of_its_victims_is_left(house):
    victim = house.put("a", 40)
    house.run(victim, Priority.URGENT)
    house.put("b", 40)
    house.ask(engine("new", 80))
    assert house.make_way() == [Unload("b", "ROOM")]
    house.state.leave("b")
    assert house.make_way() == []
    assert not resumes(house, victim)


def test_a_victim_drains_on_though_a_cache_that_would_do_idles_now(house):
    victim, _ = draining(house)
    house.put("b", 20).cache_bytes = 20
    house.state.rules = dataclasses.replace(RULES, reserve_bytes=0)  # 20 are missing
    assert house.make_way() == []
    assert not resumes(house, victim)


def test_when_all_victims_have_gone_and_it_was_not_enough_others_go(house):
    house.put("a", 50)
    house.ask(engine("new", 60))
    assert house.make_way() == [Unload("a", "ROOM")]
    house.state.leave("a")
    house.put("b", 50)
    assert house.make_way() == [Unload("b", "ROOM")]


def test_a_victim_that_has_begun_to_stop_is_not_brought_back(house):
    victim = house.put("a", 50)
    step = house.ask(engine("new", 50))
    assert house.make_way() == [Unload("a", "ROOM")]
    house.state.drop(step.id)
    assert house.make_way() == []
    assert (victim.state, victim.why) == (EngineState.STOPPING, "ROOM")
    assert not house.room.resumed


# --- second attempts ---


def test_before_a_second_attempt_everything_idle_goes(house):
    for name in ("b", "a"):
        house.put(name)
    house.run(house.put("used"), Priority.URGENT)
    house.ask(engine("new", 10))
    house.room.second_attempts.add("new")
    assert house.make_way() == [Unload("a", "ROOM")]
    house.state.leave("a")
    assert house.make_way() == [Unload("b", "ROOM")]
    house.state.leave("b")
    house.put("late")
    assert house.make_way() == [Unload("late", "ROOM")]
    house.state.leave("late")
    assert house.make_way() == [Load("new", 2)]
    assert house.state.residents["new"].attempt == 2


def test_where_nothing_idles_a_second_attempt_waits_for_those_at_work(house):
    victim = house.put("a", 50)
    (run,) = house.run(victim, Priority.URGENT)
    house.ask(engine("new", 50))
    house.room.second_attempts.add("new")
    assert house.make_way() == []
    house.state.give_place(run.step, NOW_S)
    assert house.make_way() == [Unload("a", "ROOM")]


def test_a_second_attempt_is_forgotten_with_those_who_waited_for_it(house):
    house.room.second_attempts.update({"new", "gone"})
    house.ask(engine("new", 10), probe=True)
    assert house.make_way() == []
    assert house.room.second_attempts == {"new"}


# --- preemption ---


def preempt(house: House, resident: Resident, step: QueuedStep) -> list[Preempt]:
    house.state.wait(step)
    head = house.state.queue.head(resident.name)
    assert head is not None
    return list(house.room.preempt_for(resident, (250.0, 7), step))


def full(house: House, *priorities: Priority) -> tuple[Resident, list[Running]]:
    resident = house.put("a")
    resident.slots = len(priorities)
    return resident, house.run(resident, *priorities)


def test_the_batch_step_whose_turn_is_last_leaves_and_one_at_a_time(house):
    resident, runs = full(house, Priority.BATCH, Priority.BATCH, Priority.BATCH)
    runs[1].key = (500.0, 1)
    step = house.step("a", Priority.NORMAL)
    assert preempt(house, resident, step) == [Preempt(runs[1].step, step)]
    assert [run.preempting for run in runs] == [False, True, False]
    assert list(house.room.preempt_for(resident, (250.0, 7), step)) == []


def test_for_a_batch_step_nobody_leaves(house):
    resident, _ = full(house, Priority.BATCH)
    assert preempt(house, resident, house.step("a", Priority.BATCH)) == []


def test_only_those_leave_that_may(house):
    resident, (run,) = full(house, Priority.NORMAL)
    run.key = (500.0, 1)
    assert preempt(house, resident, house.step("a", Priority.URGENT)) == []


@pytest.mark.parametrize(("key", "leaves"), [((250.0, 6), 0), ((250.0, 7), 0), ((250.0, 8), 1)])
def test_only_those_leave_whose_turn_is_later(house, key, leaves):
    resident, (run,) = full(house, Priority.BATCH)
    run.key = key
    assert len(preempt(house, resident, house.step("a", Priority.URGENT))) == leaves


@pytest.mark.parametrize(("times", "leaves"), [(2, 1), (3, 0)])
def test_who_was_stopped_three_times_stays(house, times, leaves):
    resident, (run,) = full(house, Priority.BATCH)
    house.state.preemptions[run.step.id] = times
    assert len(preempt(house, resident, house.step("a", Priority.URGENT))) == leaves


def test_nobody_leaves_where_that_makes_no_place(house):
    resident, _ = full(house, Priority.BATCH, Priority.NORMAL)
    step = house.step("a", Priority.URGENT, need_tokens=391)
    assert preempt(house, resident, step) == []
    fits = house.step("a", Priority.URGENT, need_tokens=390)
    assert len(preempt(house, resident, fits)) == 1
