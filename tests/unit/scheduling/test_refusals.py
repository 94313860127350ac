"""Refusals say the arithmetic, and only what is sure is refused."""

import pytest

from edge_agent.core import EngineState, Priority
from edge_agent.scheduling import refusals
from edge_agent.scheduling.eviction import TooLarge
from edge_agent.scheduling.pace import Pace, Served
from edge_agent.scheduling.residents import Resident
from edge_agent.scheduling.values import Heat, QueuedStep
from tests.support.scheduling_world import engine

FACTS = engine("a", 10, load_s=6.0)
STEP = QueuedStep(1, "a", "arm", Priority.NORMAL, 0.0, 100, prompt_tokens=50, output_tokens=10)


def pace() -> Pace:
    pace = Pace()
    pace.observe(Served(100, 20, 2.0, 4.0))
    return pace


def resident(state: EngineState) -> Resident:
    return Resident(FACTS, asked_s=100.0, state=state)


@pytest.mark.parametrize(
    ("state", "load_s"),
    [
        (None, 6.0),
        (EngineState.LOADING, 2.0),
        (EngineState.READY, 0.0),
        (EngineState.DRAINING, 0.0),
        (EngineState.STOPPING, 6.0),
    ],
)
def test_what_is_left_of_a_load_counts(state, load_s):
    there = resident(state) if state else None
    needs = refusals.estimate(STEP, FACTS, there, pace(), Heat.NOMINAL, 104.0)
    assert needs == refusals.Estimate(load_s, 1.0, 2.0)
    assert needs.sure_s == pytest.approx(0.8 * (load_s + 3.0))


def test_a_load_that_takes_longer_than_usual_is_about_to_end():
    there = resident(EngineState.LOADING)
    needs = refusals.estimate(STEP, FACTS, there, pace(), Heat.NOMINAL, 200.0)
    assert needs is not None
    assert needs.load_s == 0.0


def test_heat_slows_steps_and_not_loads():
    needs = refusals.estimate(STEP, FACTS, None, pace(), Heat.THROTTLED, 0.0)
    assert needs == refusals.Estimate(6.0, 2.0, 4.0)


def test_nothing_is_refused_before_something_was_measured():
    assert refusals.estimate(STEP, FACTS, None, Pace(), Heat.NOMINAL, 0.0) is None
    half = Pace()
    half.observe(Served(100, 0, 2.0, 0.0))
    assert refusals.estimate(STEP, FACTS, None, half, Heat.NOMINAL, 0.0) is None


def test_a_deadline_that_can_not_be_met_is_refused_with_the_sum():
    error = refusals.unmeetable(STEP, refusals.Estimate(6.0, 1.25, 2.5), 5.04)
    expected = (
        "engine a: load 6.0 s + prefill 1.2 s + decode 2.5 s = 9.8 s, but only 5.0 s are left"
    )
    assert error.message == expected
    assert error.reason == "DEADLINE_UNMEETABLE"
    assert error.metadata == {
        "engine": "a",
        "load_s": "6.000",
        "prefill_s": "1.250",
        "decode_s": "2.500",
        "left_s": "5.040",
    }


@pytest.mark.parametrize(
    ("steps_per_s", "retry_s"), [(None, 1.0), (10.0, 2.0), (1e6, 0.1), (1e-6, 60.0)]
)
def test_whoever_is_turned_away_hears_when_a_tenth_is_served(steps_per_s, retry_s):
    error = refusals.overloaded(200, 180, steps_per_s)
    assert error.retry_after_s == pytest.approx(retry_s)
    assert error.message == "200 steps wait already, at most 180"
    assert error.metadata == {"waiting_steps": "200", "limit": "180"}


def test_what_never_fits_is_refused_with_both_numbers():
    error = refusals.too_large(TooLarge("a", 90, 60, ("b", "c")))
    assert error.reason == "ENGINE_TOO_LARGE"
    assert error.message == (
        "engine a needs 90 bytes to load; at most 60 can be free for it beside the pinned b, c"
    )
    assert error.metadata["needed_bytes"] == "90"
    assert error.metadata["available_bytes"] == "60"
    assert error.metadata["pinned"] == "b, c"
    assert refusals.too_large(TooLarge("a", 90, 60)).message.endswith("can be free for it")
