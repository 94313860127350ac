"""A BATCH step leaves its place for one whose turn is sooner, a few times; others never do."""

from edge_agent.core import Priority
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.values import (
    Load,
    MachineView,
    Memory,
    Preempt,
    QueuedStep,
    Rules,
    Start,
)
from tests.support.scheduling_world import engine

GIB = 1 << 30


class OnePlace:
    """A planner with one engine in memory that decides one step at a time."""

    def __init__(self) -> None:
        self.planner = Planner(Rules(0, 0, 0), MachineView(Memory(64 * GIB, 60 * GIB)))
        self.planner.know(engine("a", 1, slots=1))
        self.steps = 0

    def load_for(self, priority: Priority) -> QueuedStep:
        """The step for which it was loaded, running."""
        first = self.ask(priority)
        assert self.planner.decide(0.0) == [Load("a", 1)]
        self.planner.loaded("a", 1, GIB, 0.0)
        assert self.planner.decide(0.0) == [Start(first)]
        self.planner.first_token(first)
        return first

    def ask(self, priority: Priority) -> QueuedStep:
        self.steps += 1
        step = QueuedStep(
            self.steps, "a", "arm", priority, 0.0, 10, preemptible=priority is Priority.BATCH
        )
        self.planner.submit(step, 0.0)
        return step


def test_an_urgent_step_has_a_batch_one_leave_once_and_runs_then():
    place = OnePlace()
    batch = place.load_for(Priority.BATCH)
    urgent = place.ask(Priority.URGENT)
    assert place.planner.decide(0.0) == [Preempt(batch, urgent)]
    assert place.planner.decide(0.0) == []  # it is on its way out
    place.planner.preempted(batch, 0.0)
    assert place.planner.decide(0.0) == [Start(urgent)]
    place.planner.ended(urgent, 0.0, None)
    assert place.planner.decide(0.0) == [Start(batch)]


def test_nobody_else_leaves_and_a_batch_step_makes_nobody_leave():
    for running, comes in (
        (Priority.NORMAL, Priority.URGENT),
        (Priority.INTERACTIVE, Priority.URGENT),
        (Priority.BATCH, Priority.BATCH),
    ):
        place = OnePlace()
        place.load_for(running)
        place.ask(comes)
        assert place.planner.decide(0.0) == []


def test_after_three_times_a_batch_step_stays():
    place = OnePlace()
    batch = place.load_for(Priority.BATCH)
    for _ in range(3):
        urgent = place.ask(Priority.URGENT)
        assert place.planner.decide(0.0) == [Preempt(batch, urgent)]
        place.planner.preempted(batch, 0.0)
        assert place.planner.decide(0.0) == [Start(urgent)]
        place.planner.ended(urgent, 0.0, None)
        assert place.planner.decide(0.0) == [Start(batch)]
    place.ask(Priority.URGENT)
    assert place.planner.decide(0.0) == []
