"""Why a step waits: each reason comes with the engines and numbers that are really in its way."""

from pathlib import Path
from typing import Any

import pytest

from edge_agent.core import Priority
from edge_agent.scheduling.explain import explain, memory_status
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.values import (
    EngineFacts,
    Footprint,
    Heat,
    MachineView,
    Memory,
    QueuedStep,
    Rules,
)
from edge_agent.status import StepWait, WaitReason

GIB = 1 << 30
TOTAL = 16 * GIB
LOAD_S = 8.0


class Told:
    """A planner with engines alpha, beta and gamma of 3 GiB, at a time that its test sets."""

    def __init__(self, **rules: Any) -> None:
        given: dict[str, Any] = {
            "reserve_bytes": 2 * GIB,
            "soft_floor_bytes": GIB,
            "hard_floor_bytes": GIB // 2,
            "min_residency_s": 0.0,
            "residency_per_load": 0.0,
            **rules,
        }
        self.now_s = 100.0
        self.planner = Planner(Rules(**given), self.view())
        self._ids = iter(range(1, 1000))
        for name in ("alpha", "beta", "gamma"):
            footprint = Footprint(4 * GIB, 3 * GIB)
            self.planner.know(EngineFacts(name, footprint, 2, 4096, LOAD_S))

    def view(self, available: int = 14 * GIB, heat: Heat = Heat.NOMINAL) -> MachineView:
        return MachineView(Memory(TOTAL, available), heat=heat)

    def step(self, engine: str, need_tokens: int = 100, **more: Any) -> QueuedStep:
        return QueuedStep(
            id=next(self._ids),
            engine=engine,
            client="robot",
            priority=more.pop("priority", Priority.NORMAL),
            asked_s=self.now_s,
            need_tokens=need_tokens,
            run_id=f"run of {engine}",
            **more,
        )

    def ask(self, engine: str, need_tokens: int = 100, **more: Any) -> QueuedStep:
        step = self.step(engine, need_tokens, **more)
        self.planner.submit(step, self.now_s)
        self.planner.decide(self.now_s)
        return step

    def ready(self, engine: str) -> QueuedStep:
        """Load an engine for a step that runs then, and has its first token."""
        step = self.ask(engine)
        self.planner.loaded(engine, 2, 3 * GIB, self.now_s)
        self.planner.decide(self.now_s)
        self.planner.first_token(step)
        return step

    def measure(self, engine: str, step_s: float) -> None:
        self.planner.state.pace(engine).observe(Served(10, 10, step_s / 2, step_s / 2))

    def why(self, step: QueuedStep) -> StepWait:
        waits = explain(self.planner.state, self.now_s)
        waiting = [each.id for each in self.planner.state.queue.in_order()]
        return waits[waiting.index(step.id)]


def test_the_places_of_its_engine_are_taken_until_a_step_as_usual_ends():
    told = Told()
    told.ready("alpha")
    told.measure("alpha", 6.0)
    told.now_s += 2.0
    told.ask("alpha")
    first, second, third = (told.ask("alpha") for _ in range(3))
    found = told.why(first)
    assert (found.reason, found.engines, found.position) == (WaitReason.PLACE, ("alpha",), 1)
    assert "all 2 places" in found.text
    assert found.starts_in_s == pytest.approx(4.0)
    assert told.why(second).starts_in_s == pytest.approx(4.0 + 6.0 / 2)
    assert told.why(third).position == 3


def test_before_anything_was_measured_nobody_says_when():
    told = Told()
    told.ready("alpha")
    told.ask("alpha")
    assert told.why(told.ask("alpha")).starts_in_s is None


def test_a_step_that_takes_longer_than_usual_is_about_to_end():
    told = Told()
    told.ready("alpha")
    told.measure("alpha", 6.0)
    told.ask("alpha")
    told.now_s += 60.0
    assert told.why(told.ask("alpha")).starts_in_s == 0.0


def test_on_an_engine_that_has_just_become_ready_the_first_starts_now():
    told = Told()
    first = told.ask("alpha")
    told.measure("alpha", 6.0)
    told.planner.loaded("alpha", 2, 3 * GIB, told.now_s)
    assert told.why(first).starts_in_s == 0.0


def test_its_context_does_not_fit_beside_what_runs():
    told = Told()
    told.ready("alpha")
    told.ask("alpha", need_tokens=3000)
    told.planner.state.residents["alpha"].slots = 4
    found = told.why(told.ask("alpha", need_tokens=1500))
    assert (found.reason, found.engines) == (WaitReason.PLACE, ("alpha",))
    assert f"{4096 - 3000 - 100} tokens are free" in found.text


def test_a_warm_machine_gives_out_fewer_places_and_takes_longer():
    told = Told()
    told.ready("alpha")
    told.measure("alpha", 6.0)
    told.planner.observe(told.view(10 * GIB, Heat.THROTTLED))
    found = told.why(told.ask("alpha"))
    assert (found.reason, found.engines) == (WaitReason.HEAT, ("alpha",))
    assert "only 1 of 2 may while heat is throttled" in found.text
    assert found.starts_in_s == pytest.approx(12.0)
    assert found.missing_bytes == 0
    assert told.why(told.ask("alpha")).starts_in_s == pytest.approx(24.0)


def test_its_engine_is_on_its_way_for_as_long_as_the_last_load_took():
    told = Told()
    step = told.ask("alpha")
    told.now_s += 3.0
    found = told.why(step)
    assert (found.reason, found.engines) == (WaitReason.LOADING, ("alpha",))
    assert "for 3.0 s so far" in found.text
    assert found.starts_in_s == pytest.approx(LOAD_S - 3.0)
    assert found.waited_s == pytest.approx(3.0)
    told.now_s += 60.0
    assert told.why(step).starts_in_s == 0.0


def test_who_comes_second_to_an_engine_on_its_way_starts_a_usual_step_later():
    told = Told()
    told.ask("alpha")
    second = told.ask("alpha")
    assert told.why(second).starts_in_s is None
    told.measure("alpha", 6.0)
    assert told.why(second).starts_in_s == pytest.approx(LOAD_S + 6.0)


def test_another_engine_moves_and_whoever_comes_behind_waits_for_his_turn():
    told = Told()
    told.ask("alpha")
    second, third = told.ask("beta"), told.ask("gamma")
    found = told.why(second)
    assert (found.reason, found.engines) == (WaitReason.TRANSITION, ("alpha",))
    found = told.why(third)
    assert (found.reason, found.engines) == (WaitReason.TURN, ("beta",))


def test_victims_finish_what_they_run_and_take_nothing_new():
    told = Told(max_resident_engines=1)
    told.ready("alpha")
    wants = told.ask("beta")
    found = told.why(wants)
    assert (found.reason, found.engines) == (WaitReason.DRAINING, ("alpha",))
    assert found.text == "alpha finish what they run and leave for it"
    found = told.why(told.ask("alpha"))
    assert (found.reason, found.engines) == (WaitReason.DRAINING, ("beta",))


def test_an_engine_that_leaves_takes_no_steps():
    told = Told()
    done = told.ready("alpha")
    told.planner.ended(done, told.now_s, None)
    told.planner.unload("alpha")
    found = told.why(told.ask("alpha"))
    assert (found.reason, found.engines) == (WaitReason.TRANSITION, ("alpha",))
    assert "REQUESTED" in found.text


def test_who_was_just_loaded_stays_for_a_while():
    told = Told(max_resident_engines=1, min_residency_s=20.0)
    told.ready("alpha")
    told.now_s += 5.0
    found = told.why(told.ask("beta"))
    assert (found.reason, found.engines) == (WaitReason.RESIDENCY, ("alpha",))
    assert "may go in 15.0 s" in found.text
    assert found.starts_in_s == pytest.approx(15.0 + LOAD_S)
    assert found.missing_bytes == 0


def test_who_was_loaded_for_a_step_is_its_own_until_the_first_token():
    told = Told(max_resident_engines=1)
    told.ask("alpha")
    told.planner.loaded("alpha", 2, 3 * GIB, told.now_s)
    found = told.why(told.ask("beta"))
    assert (found.reason, found.engines) == (WaitReason.LEASE, ("alpha",))


def test_there_is_not_enough_memory_whatever_goes():
    told = Told()
    told.planner.observe(told.view(available=2 * GIB))
    found = told.why(told.ask("alpha", deadline_s=told.now_s + 60.0))
    assert (found.reason, found.engines) == (WaitReason.ROOM, ())
    assert found.missing_bytes == 4 * GIB - (2 * GIB - GIB)
    assert (found.starts_in_s, found.deadline_in_s) == (None, 60.0)
    assert found.text == "3.0 GiB are missing and nothing can go for them"


def test_whoever_waits_behind_a_step_that_nothing_makes_room_for_waits_for_memory_himself():
    told = Told()
    told.planner.observe(told.view(available=2 * GIB))
    told.ask("alpha")
    second = told.ask("beta")
    assert told.why(second).reason is WaitReason.ROOM


def test_pinned_engines_are_named_where_memory_is_missing_and_only_there():
    told = Told(max_resident_engines=2)
    told.ready("alpha")
    told.planner.state.pins = {"alpha"}
    assert "pinned" not in told.why(told.ask("alpha", need_tokens=4096)).text
    told.planner.observe(told.view(available=3 * GIB))
    found = told.why(told.ask("beta"))
    assert found.reason is WaitReason.ROOM
    assert found.text.endswith("nothing can go for them; pinned: alpha")


def test_an_engine_that_will_never_fit_beside_what_is_pinned():
    told = Told(budget_bytes=6 * GIB)
    told.ready("alpha")
    step = told.ask("beta")
    told.planner.state.pins = {"alpha"}
    found = told.why(step)
    assert (found.reason, found.engines) == (WaitReason.ROOM, ("alpha",))
    assert found.text == "needs 4.0 GiB, at most 3.0 GiB can be free"
    assert found.missing_bytes == GIB


def test_a_step_that_loads_nothing_waits_for_one_that_does():
    told = Told()
    found = told.why(told.ask("alpha", probe=True))
    assert (found.reason, found.engines) == (WaitReason.LOADING, ())
    assert found.text == "nothing that waits makes alpha load"


def test_before_anything_was_decided_the_first_is_loaded_next():
    told = Told()
    told.planner.submit(told.step("alpha"), told.now_s)
    (found,) = explain(told.planner.state, told.now_s)
    assert found.text == "it is loaded next"


def test_memory_is_below_a_floor():
    told = Told()
    told.planner.observe(told.view(available=800 * (GIB >> 10)))
    found = told.why(told.ask("alpha"))
    assert found.reason is WaitReason.PRESSURE
    assert found.text == "memory is short, at the soft floor: 800 MiB are free"


def test_stalls_stop_loads_also_where_nobody_knows_what_is_free():
    told = Told()
    told.planner.observe(MachineView(Memory(TOTAL, None), stalled_some_percent=99.0))
    assert told.why(told.ask("alpha")).text == "memory is short, at the soft floor"


def test_every_reason_is_tested_here():
    source = Path(__file__).read_text()
    left = {r.name for r in WaitReason if f"WaitReason.{r.name}" not in source}
    assert left == {"UNSPECIFIED"}


def test_one_run_can_be_asked_about_and_keeps_its_position():
    told = Told()
    told.ask("alpha")
    told.ask("alpha")
    told.ask("beta")
    (found,) = explain(told.planner.state, told.now_s, "run of beta")
    assert (found.run_id, found.position) == ("run of beta", 1)
    assert explain(told.planner.state, told.now_s, "another run") == ()


def test_the_memory_adds_up():
    told = Told()
    told.ready("alpha")
    told.planner.observe(told.view(available=10 * GIB))
    found = memory_status(told.planner.state)
    others = TOTAL - 10 * GIB - 3 * GIB
    assert found.committed_bytes == found.held_bytes == 3 * GIB
    assert found.kept_bytes == max(2 * GIB, others + GIB)
    assert found.room_bytes == TOTAL - found.kept_bytes - 3 * GIB
    assert (found.level, found.leaked_bytes) == ("NORMAL", 0)
    told.planner.observe(told.view(available=GIB))
    assert memory_status(told.planner.state).room_bytes == 0
