"""Places, protection and leaks."""

import pytest

from edge_agent.core import EngineState, Priority
from edge_agent.scheduling.budget import Reservation
from edge_agent.scheduling.residents import Leak, Resident, Running
from edge_agent.scheduling.values import QueuedStep, Rules
from tests.support.scheduling_world import engine

RULES = Rules(0, 0, 0, min_residency_s=10.0, residency_per_load=3.0)


def step(number: int, tokens: int) -> QueuedStep:
    return QueuedStep(number, "a", "arm", Priority.NORMAL, 0.0, tokens)


def ready(load_s: float, *tokens: int) -> Resident:
    """Loaded within `load_s`, ready at 100 s."""
    facts = engine("a", 30, slots=2, peak=10, cache_gib=5)
    resident = Resident(facts, asked_s=100.0 - load_s, committed_bytes=40)
    resident.became_ready(2, 12, 100.0)
    for number, need in enumerate(tokens):
        resident.running[number] = Running(step(number, need), (0.0, number), 100.0)
    return resident


def test_what_begins_to_load_holds_nothing_yet_and_has_no_places():
    loading = Resident(engine("a", 30), asked_s=1.0)
    assert (loading.state, loading.attempt) == (EngineState.LOADING, 1)
    assert loading.reservation == Reservation(committed_bytes=0, held_bytes=0)
    assert (loading.slots, loading.cache_bytes, loading.used_tokens) == (0, 0, 0)


def test_what_is_loaded_claims_what_it_takes_at_its_largest_step():
    resident = ready(4.0)
    assert resident.state is EngineState.READY
    assert resident.reservation.committed_bytes == 30
    assert resident.reservation.held_bytes == 12
    assert resident.cache_bytes == 5
    over = Resident(resident.facts, asked_s=0.0)
    over.became_ready(2, 99, 1.0)
    assert over.reservation.held_bytes == 30


@pytest.mark.parametrize(
    ("running", "need", "parallel", "has"),
    [
        ((), 10, 2, True),
        ((), 999, 2, True),
        ((100,), 100, 2, True),
        ((100,), 101, 2, False),
        ((10,), 10, 1, False),
        ((10, 10), 10, 2, False),
    ],
)
def test_a_step_has_a_place_when_all_that_it_needs_is_free(running, need, parallel, has):
    assert ready(4.0, *running).has_place(step(9, need), parallel) is has


def test_a_place_counts_as_free_without_those_who_would_leave():
    resident = ready(4.0, 100, 50)
    assert not resident.has_place(step(9, 120), 2, {1})
    assert resident.has_place(step(9, 150), 2, {0})
    assert resident.has_place(step(9, 999), 2, {0, 1})


@pytest.mark.parametrize(
    ("load_s", "wanted", "running", "until_s"),
    [
        (2.0, True, (), 110.0),  # the least
        (8.0, True, (), 124.0),  # three loads
        (8.0, False, (10,), 124.0),
        (8.0, False, (), 108.0),  # idle: one load
    ],
)
def test_an_engine_stays_so_that_loading_is_a_small_part_of_the_time(
    load_s, wanted, running, until_s
):
    assert ready(load_s, *running).protected_until_s(RULES, wanted=wanted) == until_s


def test_an_idle_engine_stays_for_one_load_after_its_last_use():
    resident = ready(8.0)
    resident.last_used_s = 114.0
    assert resident.protected_until_s(RULES, wanted=False) == 122.0
    resident.last_used_s = 500.0
    assert resident.protected_until_s(RULES, wanted=False) == 124.0


def test_a_leak_has_returned_once_three_quarters_are_free_again():
    leak = Leak(missing_bytes=100, others_bytes=50)
    assert leak.reservation.committed_bytes == leak.reservation.held_bytes == 100
    assert not leak.returned(150)
    assert not leak.returned(76)
    assert leak.returned(75)
    assert leak.returned(0)
