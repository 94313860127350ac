"""Each power mode has a pace of its own: what one was measured to do says nothing of another."""

import dataclasses

import pytest

from edge_agent.core import Priority
from edge_agent.errors import DeadlineExceeded
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.values import MachineView, Memory, QueuedStep, Rules
from tests.support.scheduling_world import engine

GIB = 1 << 30
VIEW = MachineView(Memory(64 * GIB, 60 * GIB), power_mode=0)
STEP = QueuedStep(1, "a", "arm", Priority.NORMAL, 0.0, 100, prompt_tokens=50, output_tokens=10)


def late(number: int) -> QueuedStep:
    return dataclasses.replace(STEP, id=number, deadline_s=0.5)


def test_what_is_too_late_in_one_mode_is_tried_in_another_that_nobody_has_measured():
    planner = Planner(Rules(0, 0, 0), VIEW)
    planner.know(engine("a", 1, load_s=0.0))
    planner.state.pace("a").observe(Served(50, 10, 1.0, 4.0))
    with pytest.raises(DeadlineExceeded, match=r"prefill 1\.0 s"):
        planner.submit(late(1), 0.0)
    planner.observe(dataclasses.replace(VIEW, power_mode=2))
    planner.submit(late(2), 0.0)
    planner.observe(VIEW)
    with pytest.raises(DeadlineExceeded):
        planner.submit(late(3), 0.0)
