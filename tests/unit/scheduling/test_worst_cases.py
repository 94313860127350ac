"""Each way in which schedulers of engines are known to fail, by name."""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from edge_agent.core import EngineState, Priority
from edge_agent.errors import LoadFailed
from edge_agent.scheduling.values import (
    DropCache,
    EngineFacts,
    Kill,
    Load,
    QueuedStep,
    Rules,
    Start,
    Unload,
)
from tests.support.scheduling_world import World, engine

RULES = Rules(reserve_bytes=20, soft_floor_bytes=8, hard_floor_bytes=4)
A, B = engine("a", 50, slots=2), engine("b", 50, slots=2)  # only one fits into 80


def world(*engines: EngineFacts, rules: Rules = RULES) -> World:
    return World(rules, 100, list(engines))


def names(world: World, kind: type[Load | Unload | Kill | DropCache]) -> list[str]:
    """The engines that were loaded, unloaded, and so on, in that order."""
    return [action.engine for _, action in world.actions if isinstance(action, kind)]


def start(world: World, name: str, **ask: object) -> QueuedStep:
    """A step that runs, in an engine that is loaded for it where it must be."""
    step_id = world.submit(name, **ask)  # type: ignore[arg-type]
    while step_id in world.waiting:
        assert world.move_on()
    step = next(step for step in world.running() if step.id == step_id)
    world.first_token(step)
    return step


def state_of(world: World, name: str) -> EngineState:
    return world.planner.state.residents[name].state


class Simulation:
    """A world where loads, steps and exits take their time by themselves."""

    def __init__(self, world: World, step_s: float = 1.0) -> None:
        self.world, self.step_s = world, step_s
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.seen = 0
        self.waits: dict[int, float] = {}

    def at(self, at_s: float, do: Callable[[], object]) -> None:
        heapq.heappush(self.events, (at_s, next(self.numbers), do))

    def run(self, seconds: float) -> None:
        world, end_s = self.world, self.world.now_s + seconds
        while True:
            self.follow()
            next_s = self.events[0][0] if self.events else end_s
            wake_s = world.planner.wake_s()
            at_s = min(next_s, end_s, end_s if wake_s is None else wake_s)
            if at_s >= end_s:
                return
            world.now_s = at_s
            if self.events and self.events[0][0] <= at_s:
                heapq.heappop(self.events)[2]()
            else:
                world.turn()

    def follow(self) -> None:
        world, now_s = self.world, self.world.now_s
        for _, action in world.actions[self.seen :]:
            match action:
                case Load(engine=name):
                    self.at(now_s + world.facts[name].load_s, partial(world.load_ends, name))
                case Unload(engine=name):
                    self.at(now_s + 0.5, partial(world.process_ends, name))
                    self.at(now_s + 0.5, world.observe)
                case Start(step=step):
                    self.waits[step.id] = now_s - step.asked_s
                    self.at(now_s + self.step_s / 2, partial(world.first_token, step))
                    self.at(now_s + self.step_s, partial(world.finish, step))
                case _:
                    pass
        self.seen = len(world.actions)

    def keep_asking(self, name: str, every_s: float, until_s: float, **ask: object) -> None:
        """A client that asks again and again."""

        def again() -> None:
            self.world.submit(name, **ask)  # type: ignore[arg-type]
            if self.world.now_s + every_s < until_s:
                self.at(self.world.now_s + every_s, again)

        self.at(self.world.now_s, again)


def test_a_victim_is_not_resurrected_by_steps_that_find_it_in_memory():
    w = world(A, B)
    running = start(w, "a", client="arm")
    w.let_time_pass(100.0)
    w.submit("b", client="base")
    assert w.planner.state.residents["a"].state is EngineState.DRAINING
    late = w.submit("a", client="arm")
    assert late in w.waiting
    w.finish(running)
    assert names(w, Unload) == ["a"]
    w.process_ends("a")
    w.observe()
    assert names(w, Load) == ["a", "b"]


def test_a_victim_goes_on_at_once_when_nobody_needs_its_memory_any_more():
    w = world(A, B)
    start(w, "a")
    w.let_time_pass(100.0)
    gone = w.submit("b", client="base")
    late = w.submit("a")
    assert late in w.waiting
    w.withdraw(gone)
    assert late not in w.waiting


def test_two_waiters_do_not_choose_one_victim():
    w = world(engine("a", 40), engine("b", 40), engine("c", 40), engine("d", 40))
    start(w, "a", client="1")
    w.finish(next(w.running()))
    start(w, "b", client="2")
    w.finish(next(w.running()))
    w.let_time_pass(100.0)
    w.submit("c", client="3")
    w.submit("d", client="4")
    w.come_to_rest()
    assert sorted(names(w, Unload)) == ["a", "b"]
    assert names(w, Load) == ["a", "b", "c", "d"]
    assert set(w.outcomes.values()) == {"ended"}


def test_an_engine_that_was_just_loaded_serves_its_step_before_it_goes():
    w = world(A, B)
    asked = w.submit("a", client="arm")
    w.submit("b", client="base", priority=Priority.URGENT)
    w.load_ends("a")
    assert [step.id for step in w.running()] == [asked]
    assert state_of(w, "a") is EngineState.READY
    w.first_token(next(w.running()))
    assert state_of(w, "a") is EngineState.DRAINING


def test_what_can_not_fit_now_does_not_keep_others_from_loading():
    w = world(engine("pinned", 20), engine("big", 55), engine("small", 10))
    start(w, "pinned")
    w.finish(next(w.running()))
    w.pin("pinned", pinned=True)
    w.others_bytes = 40
    w.observe()
    w.submit("big", client="arm")
    w.submit("small", client="base")
    assert names(w, Load) == ["pinned", "small"]
    w.come_to_rest()
    assert w.outcomes == {1: "ended", 2: "ended", 3: "ended"}


def test_what_waits_for_others_memory_comes_first_again_once_it_is_back():
    w = world(engine("big", 75), engine("small", 10))
    w.others_bytes = 40
    w.observe()
    w.submit("big", client="arm")
    start(w, "small", client="base")
    w.finish(next(w.running()))
    w.others_bytes = 0
    w.observe()
    w.let_time_pass(100.0)
    assert names(w, Unload) == ["small"]


def test_two_engines_that_take_turns_load_for_a_small_part_of_the_time():
    w = world(A, B)
    simulation = Simulation(w)
    end_s = w.now_s + 600.0
    simulation.keep_asking("a", 1.0, end_s, client="arm")
    simulation.keep_asking("b", 1.0, end_s, client="base")
    simulation.run(600.0)
    loads = Counter(names(w, Load))
    assert 2 <= loads.total() <= 600 / (A.load_s + RULES.residency_per_load * A.load_s)
    assert abs(loads["a"] - loads["b"]) <= 1


def test_steady_traffic_on_one_engine_does_not_starve_another():
    w = world(A, B)
    simulation = Simulation(w)
    simulation.keep_asking("a", 0.4, w.now_s + 600.0, client="arm", priority=Priority.URGENT)
    simulation.run(60.0)
    asked = w.submit("b", client="base", priority=Priority.INTERACTIVE)
    simulation.run(540.0)
    assert w.outcomes.get(asked) == "ended"
    assert simulation.waits[asked] < 2 * 120.0 + 60.0


def test_memory_that_does_not_come_back_shrinks_the_budget_and_nothing_hangs():
    w = world(A, engine("b", 60), engine("small", 10))
    start(w, "a")
    w.finish(next(w.running()))
    w.let_time_pass(100.0)
    w.submit("b", client="base")
    w.process_ends("a", leak_bytes=40)
    w.observe()
    assert "b" not in w.processes
    w.submit("small", client="eye")
    assert names(w, Load) == ["a", "small"]
    w.load_ends("small")
    assert w.allowed_bytes() == 80 - 40 - 10
    w.leaked_bytes.clear()
    w.observe()
    assert not w.planner.state.leaks
    w.come_to_rest()
    assert set(w.outcomes.values()) == {"ended"}


def test_another_process_that_takes_the_memory_between_admission_and_load_costs_one_retry():
    w = world(A, engine("idle", 10))
    start(w, "idle")
    w.finish(next(w.running()))
    asked = w.submit("a", client="base")
    w.others_bytes = 80
    w.load_fails("a", retry=True)
    w.observe()
    assert asked in w.waiting
    w.others_bytes = 20
    w.observe()
    assert names(w, Unload) == ["idle"]
    w.process_ends("idle")
    w.observe()
    assert [action.attempt for _, action in w.actions if type(action) is Load] == [1, 1, 2]
    w.load_fails("a", LoadFailed("out of memory", reason="OUT_OF_MEMORY"), retry=True)
    assert w.outcomes[asked] == "refused"
    assert w.errors[asked].reason == "OUT_OF_MEMORY"


def test_a_second_attempt_is_forgotten_with_those_who_waited_for_it():
    w = world(A, engine("idle", 10))
    step = start(w, "idle")
    asked = w.submit("a", client="base")
    w.others_bytes = 80
    w.observe()
    w.load_fails("a", retry=True)
    w.withdraw(asked)
    w.finish(step)
    w.others_bytes = 0
    w.observe()
    w.let_time_pass(100.0)
    w.submit("a", client="base")
    assert names(w, Unload) == []
    assert [action.attempt for _, action in w.actions if type(action) is Load] == [1, 1, 1]


def test_page_cache_does_not_block_a_load():
    """What is available says how much the page cache would give back; what is free is not read."""
    w = world(engine("a", 70))
    w.submit("a")
    assert names(w, Load) == ["a"]


def free_everything(w: World) -> Iterator[str]:
    """Each way in which all that is idle goes."""
    yield "second attempt"
    w.submit("b", client="base")
    w.load_fails("b", retry=True)
    w.observe()
    yield "soft floor"
    w.others_bytes = w.available_bytes() - 6
    w.observe()


def test_a_pinned_engine_stays_when_everything_goes():
    w = world(engine("a", 10), engine("b", 30))
    start(w, "a")
    w.finish(next(w.running()))
    w.pin("a", pinned=True)
    w.let_time_pass(100.0)
    for _ in free_everything(w):
        assert names(w, Unload) == []
    assert names(w, Unload) == []
    assert "a" in w.processes


def test_a_worker_that_is_killed_while_another_loads_leaves_the_load_alone():
    w = world(engine("a", 10), engine("b", 30))
    start(w, "a")
    asked = w.submit("b", client="base")
    w.crash("a")
    w.process_ends("a")
    w.observe()
    w.load_ends("b")
    assert [step.id for step in w.running()] == [asked]


def test_below_the_hard_floor_one_reading_kills_one_worker():
    w = world(engine("a", 10), engine("b", 30))
    start(w, "a", client="arm", priority=Priority.BATCH)
    start(w, "b", client="base", priority=Priority.URGENT)
    w.others_bytes = 57
    w.observe()
    assert names(w, Kill) == ["a"]
    w.process_ends("a")
    assert names(w, Kill) == ["a"]  # the old reading says the same as before
    w.observe()
    assert names(w, Kill) == ["a"]


def test_idle_engines_go_one_by_one_and_not_beside_a_load():
    w = world(engine("a", 10), engine("b", 10), engine("c", 10))
    for name in ("a", "b"):
        start(w, name)
        w.finish(next(w.running()))
    w.submit("c", client="base")
    w.others_bytes = 73
    w.observe()
    assert names(w, Unload) == []
    w.load_ends("c")
    w.first_token(next(w.running()))
    assert names(w, Unload) == ["a"]


def test_a_step_that_only_loads_does_not_wait_for_the_places():
    w = world(engine("a", 10))
    start(w, "a", client="arm")
    w.submit("a", client="arm")
    asked = w.submit("a", client="base", load_only=True, priority=Priority.BATCH)
    assert w.outcomes[asked] == "ready"


def test_a_probe_never_causes_a_load():
    w = world(A)
    w.submit("a", probe=True, within_s=10.0)
    assert names(w, Load) == []
    w.submit("a", client="base")
    assert names(w, Load) == ["a"]


def test_an_engine_that_took_more_than_is_known_goes_before_somebody_waits_for_ever():
    w = world(engine("a", 30), engine("b", 70))
    w.submit("a")
    w.load_ends("a", held_bytes=5)
    w.observe()
    w.finish(next(w.running()))
    w.let_time_pass(100.0)
    w.submit("b", client="base")
    assert names(w, Unload) == ["a"]


def test_what_is_idle_and_pinned_gives_its_cache_rather_than_that_a_step_is_refused():
    w = world(engine("a", 30, cache_gib=15), engine("b", 60))
    start(w, "a")
    w.finish(next(w.running()))
    w.pin("a", pinned=True)
    w.submit("b", client="base")
    assert names(w, DropCache) == ["a"]
    assert names(w, Load) == ["a", "b"]


@pytest.mark.parametrize("told", ["ended", "preempted"])
def test_a_step_whose_engine_is_gone_already_is_not_counted_twice(told):
    w = world(A)
    step = start(w, "a", preemptible=True, priority=Priority.BATCH)
    w.planner.lost("a")
    w.planner.gone("a")
    if told == "ended":
        w.planner.ended(step, w.now_s, None)
        assert len(w.planner.state.queue) == 0
    else:
        w.planner.preempted(step, w.now_s)
        assert len(w.planner.state.queue) == 1
        assert w.planner.state.queue.count("a") == 1


def test_no_batch_step_is_stopped_where_that_makes_no_place():
    w = world(engine("a", 10, slots=2))
    start(w, "a", client="1", priority=Priority.INTERACTIVE, tokens=150)
    start(w, "a", client="2", priority=Priority.BATCH, tokens=10, preemptible=True)
    w.submit("a", client="3", priority=Priority.URGENT, tokens=100)
    assert not w.preempting
    w.submit("a", client="4", priority=Priority.URGENT, tokens=10)
    assert not w.preempting
