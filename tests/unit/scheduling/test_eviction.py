"""Who goes for an engine that is needed: what is missing decides, and what protects counts."""

import dataclasses
import math
from typing import Any

import pytest

from edge_agent.core import EngineState, Priority
from edge_agent.scheduling.eviction import (
    Blocked,
    LoadPlan,
    Scene,
    TooLarge,
    plan_load,
    still_enough,
    still_holds,
)
from edge_agent.scheduling.pace import Demand
from edge_agent.scheduling.queue import StepQueue
from edge_agent.scheduling.residents import Leak, Resident, Running
from edge_agent.scheduling.values import Memory, QueuedStep, Rules
from edge_agent.status import WaitReason
from tests.support.scheduling_world import engine

GIB = 1  # of the made-up unit of `engine`
NOW_S = 1000.0
KEY = (50.0, 1)
RULES = Rules(
    reserve_bytes=2 * GIB,
    soft_floor_bytes=0,
    hard_floor_bytes=0,
    max_resident_engines=3,
    min_residency_s=10.0,
    residency_per_load=0.0,
)


def step(number: int, name: str, priority: Priority = Priority.NORMAL) -> QueuedStep:
    return QueuedStep(number, name, "arm", priority, 0.0, 10)


WANTED = step(1, "new")


def resident(name: str, gib: int, *, ready_s: float = 0.0, load_s: float = 1.0) -> Resident:
    facts = dataclasses.replace(engine(name, gib), load_s=load_s)
    return Resident(
        facts,
        asked_s=0.0,
        state=EngineState.READY,
        slots=1,
        held_bytes=gib * GIB,
        committed_bytes=gib * GIB,
        ready_s=ready_s,
        last_used_s=ready_s,
    )


def scene(new_gib: int, *residents: Resident, rules: Rules = RULES, **more: Any) -> Scene:
    """A machine of 12 GiB, 10 of them for engines."""
    held = sum(each.held_bytes for each in residents)
    there = {each.name: each for each in residents}
    facts = {"new": engine("new", new_gib)} | {each.name: each.facts for each in residents}
    fields: dict[str, Any] = {
        "memory": Memory(12 * GIB, 12 * GIB - held),
        "rules": rules,
        "facts": facts,
        "residents": there,
        "leaks": {},
        "pins": set(),
        "demands": {},
        "queue": StepQueue(),
    }
    return Scene(**(fields | more))


def plan(found: Scene, wanted: QueuedStep = WANTED) -> LoadPlan | Blocked | TooLarge:
    return plan_load(found, "new", KEY, wanted, NOW_S)


def need_gib(found: Scene) -> int:
    return found.facts["new"].footprint.load_peak_bytes


class TestPlan:
    def test_what_fits_exactly_makes_nobody_go(self):
        assert plan(scene(4, resident("a", 6))) == LoadPlan("new", KEY)
        found = plan(scene(5, resident("a", 6)))
        assert isinstance(found, LoadPlan)
        assert found.victims == ("a",)

    def test_the_last_place_is_taken_and_one_more_makes_somebody_go(self):
        assert plan(scene(1, resident("a", 1), resident("b", 1))) == LoadPlan("new", KEY)
        full = scene(1, resident("a", 1), resident("b", 1), resident("c", 1))
        found = plan(full)
        assert isinstance(found, LoadPlan)
        assert len(found.victims) == 1

    def test_the_one_that_is_wanted_least_goes(self):
        demand = Demand()
        for _ in range(5):
            demand.arrived(NOW_S)
        found = plan(scene(4, resident("a", 4), resident("b", 4), demands={"a": demand}))
        assert isinstance(found, LoadPlan)
        assert found.victims == ("b",)

    def test_what_is_quick_to_bring_back_goes_before_what_weighs_more(self):
        busy = {name: Demand(3.0, NOW_S) for name in "ab"}
        slow = resident("a", 4, load_s=9.0)
        found = plan(scene(4, slow, resident("b", 4), demands=busy))
        assert isinstance(found, LoadPlan)
        assert found.victims == ("b",)
        heavy = resident("b", 4)
        heavy.facts = dataclasses.replace(heavy.facts, weight=20.0)
        found = plan(scene(4, slow, heavy, demands=busy))
        assert isinstance(found, LoadPlan)
        assert found.victims == ("a",)

    def test_one_that_is_in_use_costs_as_if_it_were_surely_wanted(self):
        used = resident("a", 4)
        used.running[7] = Running(step(7, "a"), (0.0, 0), 0.0)
        found = plan(scene(4, used, resident("b", 4), demands={"b": Demand(3.0, NOW_S)}))
        assert isinstance(found, LoadPlan)
        assert found.victims == ("b",)

    def test_a_pinned_one_stays_and_another_goes(self):
        found = plan(scene(4, resident("a", 4), resident("b", 4), pins={"a"}))
        assert isinstance(found, LoadPlan)
        assert found.victims == ("b",)

    def test_beside_the_pinned_it_can_be_too_large_by_a_byte(self):
        found = scene(3, resident("a", 6), pins={"a"})
        need = need_gib(found)
        exact = dataclasses.replace(
            found, rules=dataclasses.replace(RULES, budget_bytes=6 * GIB + need)
        )
        assert isinstance(plan(exact), LoadPlan)
        short = dataclasses.replace(
            found, rules=dataclasses.replace(RULES, budget_bytes=6 * GIB + need - 1)
        )
        assert plan(short) == TooLarge("new", need, need - 1, ("a",))

    def test_as_large_as_all_that_engines_may_have_is_not_too_large(self):
        found = plan(scene(10, resident("a", 6)))
        assert isinstance(found, LoadPlan)
        assert found.victims == ("a",)
        found = plan(scene(4, resident("a", 6), resident("b", 4), pins={"a"}))
        assert isinstance(found, LoadPlan)
        assert found.victims == ("b",)

    def test_caches_of_engines_at_work_stay(self):
        used = resident("a", 10)
        used.cache_bytes = 2
        used.running[7] = Running(step(7, "a"), (0.0, 0), 0.0)
        found = plan(scene(1, used))
        assert isinstance(found, LoadPlan)
        assert (found.victims, found.drop_caches) == (("a",), ())

    def test_when_every_place_is_pinned_nothing_is_left_for_it(self):
        rules = dataclasses.replace(RULES, max_resident_engines=1)
        found = scene(1, resident("a", 1), rules=rules, pins={"a"})
        assert plan(found) == TooLarge("new", need_gib(found), 0, ("a",))

    def test_one_on_its_way_is_waited_for(self):
        moving = resident("a", 6)
        moving.state = EngineState.STOPPING
        found = plan(scene(6, moving))
        assert isinstance(found, Blocked)
        assert (found.reason, found.engines) == (WaitReason.TRANSITION, ("a",))

    def test_a_lease_keeps_it_for_whom_it_was_loaded(self):
        leased = resident("a", 6)
        leased.lease = 7
        found = plan(scene(6, leased))
        assert isinstance(found, Blocked)
        assert (found.reason, found.engines) == (WaitReason.LEASE, ("a",))

    def test_it_stays_for_its_minimum_residency_but_for_an_urgent_step(self):
        fresh = resident("a", 6, ready_s=NOW_S - 4.0, load_s=100.0)
        found = plan(scene(6, fresh))
        assert isinstance(found, Blocked)
        assert (found.reason, found.until_s) == (WaitReason.RESIDENCY, NOW_S + 6.0)
        urgent = plan(scene(6, fresh), step(1, "new", Priority.URGENT))
        assert isinstance(urgent, LoadPlan)
        assert urgent.victims == ("a",)

    def test_the_first_time_at_which_enough_may_go_is_told(self):
        one = resident("a", 4, ready_s=NOW_S - 4.0, load_s=100.0)
        two = resident("b", 4, ready_s=NOW_S - 7.0, load_s=100.0)
        found = plan(scene(9, one, two))
        assert isinstance(found, Blocked)
        assert (set(found.engines), found.until_s) == ({"a", "b"}, NOW_S + 6.0)
        small = plan(scene(3, one, two))
        assert isinstance(small, Blocked)
        assert (small.engines, small.until_s) == (("b",), NOW_S + 3.0)

    def test_among_those_who_may_go_at_the_same_time_the_name_decides(self):
        fresh = [resident(name, 5, ready_s=NOW_S - 4.0, load_s=100.0) for name in "ba"]
        found = plan(scene(5, *fresh))
        assert found == Blocked("new", WaitReason.RESIDENCY, 5, ("a",), NOW_S + 6.0)

    def test_who_serves_somebody_sooner_stays_until_then(self):
        queue = StepQueue()
        queue.add(step(9, "a", Priority.URGENT))
        found = plan(scene(6, resident("a", 6), queue=queue))
        assert isinstance(found, Blocked)
        assert (found.reason, found.engines) == (WaitReason.TURN, ("a",))

    def test_idle_caches_go_before_engines_do(self):
        cached = [resident(name, 5) for name in "ab"]
        for each in cached:
            each.cache_bytes = 2 * GIB
        cached[0].last_used_s = 5.0
        found = plan(scene(1, *cached))
        assert found == LoadPlan("new", KEY, drop_caches=("b",))

    def test_what_fits_is_loaded_though_another_is_on_its_way(self):
        rules = dataclasses.replace(RULES, max_resident_engines=2)
        moving = resident("a", 6)
        moving.state = EngineState.STOPPING
        assert plan(scene(4, moving, rules=rules)) == LoadPlan("new", KEY)

    def test_what_would_not_fit_alone_is_too_large_whatever_is_pinned(self):
        assert plan(scene(11, resident("a", 4), pins={"a"})) == TooLarge("new", 11, 10)

    def test_the_pinned_that_are_in_memory_are_named(self):
        pinned = [resident(name, 1) for name in "dbeca"]
        rules = dataclasses.replace(RULES, max_resident_engines=8)
        found = plan(scene(6, *pinned, rules=rules, pins={*"abcde", "away"}))
        assert found == TooLarge("new", 6, 5, tuple("abcde"))

    def test_beside_more_pinned_than_may_be_there_nothing_is_left(self):
        rules = dataclasses.replace(RULES, budget_bytes=5)
        found = plan(scene(1, resident("a", 6), rules=rules, pins={"a"}))
        assert found == TooLarge("new", 1, 0, ("a",))

    @pytest.mark.parametrize(
        ("new_gib", "found"),
        [
            (6, LoadPlan("new", KEY, drop_caches=("a",))),
            (7, TooLarge("new", 7, 6, ("a",))),
        ],
    )
    def test_the_cache_of_a_pinned_one_is_not_in_the_way(
        self, new_gib: int, found: LoadPlan | TooLarge
    ):
        pinned = resident("a", 6)
        pinned.cache_bytes = 2
        assert plan(scene(new_gib, pinned, pins={"a"})) == found

    @pytest.mark.parametrize(
        ("missing", "drop_caches", "victims"),
        [(2, ("a",), ()), (3, ("a", "b"), ()), (4, ("a", "b"), ()), (5, (), ("a",))],
    )
    def test_no_more_caches_go_than_are_needed_and_none_where_all_are_too_few(
        self, missing: int, drop_caches: tuple[str, ...], victims: tuple[str, ...]
    ):
        cached = [resident(name, 5) for name in "ba"]
        for each in cached:
            each.cache_bytes = 2
        assert plan(scene(missing, *cached)) == LoadPlan("new", KEY, victims, drop_caches)

    def test_only_what_has_a_cache_is_asked_for_it(self):
        cached = resident("b", 5)
        cached.cache_bytes, cached.last_used_s = 2, 5.0
        found = plan(scene(2, resident("a", 5), cached))
        assert found == LoadPlan("new", KEY, drop_caches=("b",))

    def test_the_cache_of_one_that_stops_is_not_asked_for(self):
        moving = resident("a", 6)
        moving.state, moving.cache_bytes = EngineState.STOPPING, 2
        assert plan(scene(6, moving)) == Blocked("new", WaitReason.TRANSITION, 2, ("a",))

    def test_caches_stay_where_a_place_is_missing_as_well(self):
        rules = dataclasses.replace(RULES, max_resident_engines=1)
        cached = resident("a", 6)
        cached.cache_bytes = 2
        assert plan(scene(5, cached, rules=rules)) == LoadPlan("new", KEY, ("a",))

    def test_one_that_is_surely_wanted_costs_its_load_and_no_more(self):
        queue = StepQueue()
        queue.add(step(9, "a", Priority.BATCH))
        often = {"b": Demand(10_000.0, NOW_S)}
        residents = resident("a", 4, load_s=3.0), resident("b", 4, load_s=5.0)
        found = plan(scene(4, *residents, queue=queue, demands=often))
        assert found == LoadPlan("new", KEY, ("a",))

    def test_one_that_somebody_waits_for_costs_as_if_it_were_surely_wanted(self):
        queue = StepQueue()
        queue.add(step(9, "a", Priority.BATCH))
        found = plan(scene(4, resident("a", 4), resident("b", 4), queue=queue))
        assert found == LoadPlan("new", KEY, ("b",))

    def test_what_nobody_ever_asked_for_costs_nothing_however_long_it_loads(self):
        found = plan(scene(4, resident("b", 4, load_s=9.0), resident("a", 4)))
        assert found == LoadPlan("new", KEY, ("a",))

    def test_what_did_not_come_back_when_an_engine_ended_is_not_there(self):
        leaks = {"gone": Leak(3, 0)}
        memory = Memory(12, 9)
        assert plan(scene(7, memory=memory, leaks=leaks)) == LoadPlan("new", KEY)
        found = plan(scene(8, memory=memory, leaks=leaks))
        assert found == Blocked("new", WaitReason.ROOM, 1)

    def test_one_that_drains_already_may_be_the_victim(self):
        victim = resident("a", 6)
        victim.state = EngineState.DRAINING
        assert plan(scene(6, victim)) == LoadPlan("new", KEY, ("a",))

    @pytest.mark.parametrize(("weight", "goes"), [(0.503, "a"), (0.497, "b")])
    def test_the_chance_that_it_is_wanted_within_a_minute_counts(self, weight: float, goes: str):
        every_minute = Demand(300.0 * math.log(2.0) / 60.0, NOW_S)  # the chance is a half
        used = resident("b", 4)
        used.facts = dataclasses.replace(used.facts, weight=weight)
        used.running[7] = Running(step(7, "b"), (0.0, 0), 0.0)
        found = plan(scene(4, resident("a", 4), used, demands={"a": every_minute}))
        assert found == LoadPlan("new", KEY, (goes,))

    def test_at_the_end_of_its_residency_it_may_go(self):
        old = resident("a", 6, ready_s=NOW_S - 10.0, load_s=100.0)
        assert plan(scene(6, old)) == LoadPlan("new", KEY, ("a",))

    def test_for_one_who_waits_for_it_it_stays_for_longer(self):
        fresh = resident("a", 6, ready_s=NOW_S - 4.0)
        assert plan(scene(6, fresh)) == LoadPlan("new", KEY, ("a",))
        queue = StepQueue()
        queue.add(step(9, "a", Priority.BATCH))
        found = plan(scene(6, fresh, queue=queue))
        assert found == Blocked("new", WaitReason.RESIDENCY, 2, ("a",), NOW_S + 6.0)


class TestRoom:
    """Others have taken so much that not even all engines together would make room."""

    def test_somebody_waits_for_what_others_have_taken(self):
        found = scene(9, memory=Memory(12, 8))
        assert plan(found) == Blocked("new", WaitReason.ROOM, 1)

    def test_it_is_looked_at_again_when_the_first_engine_may_go(self):
        one = resident("a", 3, ready_s=NOW_S - 4.0, load_s=100.0)
        two = resident("b", 3, ready_s=NOW_S - 7.0, load_s=100.0)
        found = plan(scene(9, one, two, memory=Memory(12, 2)))
        assert found == Blocked("new", WaitReason.ROOM, 7, until_s=NOW_S + 3.0)

    def taken(self, others: int, **more: Any) -> Scene:
        """`a` claims 4 and is known to hold 1: up to 3 of what others seem to use may be its."""
        idle = resident("a", 4)
        idle.held_bytes = 1
        return scene(10, idle, memory=Memory(12, 12 - 1 - others), **more)

    def test_an_idle_engine_goes_that_may_hold_what_others_seem_to_use(self):
        assert plan(self.taken(5)) == LoadPlan("new", KEY, ("a",))
        assert plan(self.taken(6)) == Blocked("new", WaitReason.ROOM, 8)

    def test_one_that_is_used_or_wanted_does_not_go_for_what_it_may_hold(self):
        used = self.taken(5)
        used.residents["a"].running[7] = Running(step(7, "a"), (0.0, 0), 0.0)
        assert plan(used) == Blocked("new", WaitReason.ROOM, 7)
        queue = StepQueue()
        queue.add(step(9, "a", Priority.BATCH))
        assert plan(self.taken(5, queue=queue)) == Blocked("new", WaitReason.ROOM, 7)


class TestPlanUnderWay:
    @pytest.mark.parametrize(("new_gib", "enough"), [(3, False), (4, True), (6, True), (7, False)])
    def test_it_goes_on_while_its_victims_are_needed_and_enough(self, new_gib: int, enough: bool):  # noqa: FBT001
        found = scene(new_gib, resident("a", 3), resident("b", 4))
        assert still_enough(found, LoadPlan("new", KEY, ("a",))) is enough

    def test_a_place_counts_as_well_as_bytes(self):
        rules = dataclasses.replace(RULES, max_resident_engines=2)
        found = scene(1, resident("a", 1), resident("b", 1), rules=rules)
        assert still_enough(found, LoadPlan("new", KEY, ("a",)))
        assert not still_enough(found, LoadPlan("new", KEY, ("gone",)))

    def test_it_is_given_up_for_a_pin_a_lease_or_a_sooner_turn(self):
        under_way = LoadPlan("new", KEY, ("a",))
        assert still_holds(scene(6, resident("a", 6)), under_way, KEY)
        assert not still_holds(scene(6, resident("a", 6), pins={"a"}), under_way, KEY)
        leased = resident("a", 6)
        leased.lease = 7
        assert still_holds(scene(6, leased), under_way, KEY) is False
        queue = StepQueue()
        queue.add(step(9, "a", Priority.URGENT))
        assert not still_holds(scene(6, resident("a", 6), queue=queue), under_way, KEY)
        assert still_holds(scene(6, resident("a", 6), queue=queue), under_way, queue.head("a")[0])  # type: ignore[index]

    def test_who_has_gone_or_is_going_is_not_asked_but_the_next_one_is(self):
        going = resident("a", 3)
        going.state, going.lease = EngineState.STOPPING, 7
        found = scene(6, going, resident("b", 3), pins={"b"})
        assert still_holds(found, LoadPlan("new", KEY, ("gone", "a")), KEY)
        assert not still_holds(found, LoadPlan("new", KEY, ("gone", "a", "b")), KEY)
