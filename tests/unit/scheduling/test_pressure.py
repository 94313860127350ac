"""Levels do not flap; what nobody knows is not tight; stalls and heat kill nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.scheduling.pressure import Level, next_level, parallel_steps, slowdown
from edge_agent.scheduling.values import Heat, MachineView, Memory, Rules
from tests.support.chaos import examples

RULES = Rules(reserve_bytes=0, soft_floor_bytes=80, hard_floor_bytes=40)


def after(
    before: Level, free: int | None, some: float | None = None, full: float | None = None
) -> Level:
    return next_level(before, MachineView(Memory(1000, free), some, full), RULES)


@pytest.mark.parametrize(
    ("before", "free", "level"),
    [
        (Level.NORMAL, 80, Level.NORMAL),
        (Level.NORMAL, 79, Level.SOFT),
        (Level.NORMAL, 40, Level.SOFT),
        (Level.NORMAL, 39, Level.HARD),
        (Level.SOFT, 99, Level.SOFT),
        (Level.SOFT, 100, Level.NORMAL),
        (Level.SOFT, 40, Level.SOFT),
        (Level.HARD, 49, Level.HARD),
        (Level.HARD, 50, Level.SOFT),
        (Level.HARD, 100, Level.NORMAL),
        (Level.HARD, None, Level.NORMAL),
    ],
)
def test_a_level_is_entered_at_its_floor_and_left_a_quarter_above(before, free, level):
    assert after(before, free) is level


@pytest.mark.parametrize(
    ("before", "some", "full", "level"),
    [
        (Level.NORMAL, 20.0, None, Level.NORMAL),
        (Level.NORMAL, 20.1, None, Level.SOFT),
        (Level.NORMAL, None, 10.0, Level.NORMAL),
        (Level.NORMAL, None, 10.1, Level.SOFT),
        (Level.SOFT, 10.1, None, Level.SOFT),
        (Level.SOFT, 10.0, 5.0, Level.NORMAL),
        (Level.SOFT, 0.0, 5.1, Level.SOFT),
    ],
)
def test_stalls_are_soft_and_are_over_at_half_of_their_limit(before, some, full, level):
    assert after(before, 900, some, full) is level


@given(
    st.sampled_from(list(Level)),
    st.none() | st.integers(0, 1000),
    st.none() | st.floats(0, 100),
    st.none() | st.floats(0, 100),
)
@examples(200)
def test_only_memory_that_is_known_to_be_short_kills(before, free, some, full):
    level = after(before, free, some, full)
    assert level is not Level.HARD or (free is not None and free < 50)
    assert after(level, free, some, full) is level


@given(st.integers(1, 64), st.sampled_from(list(Heat)))
@examples(100)
def test_heat_takes_places_but_never_the_last(slots, heat):
    share = {Heat.NOMINAL: 1.0, Heat.THROTTLED: 0.5}.get(heat, 0.75)
    assert parallel_steps(slots, heat) == max(1, math.ceil(slots * share))
    assert slowdown(heat) == {Heat.NOMINAL: 1.0, Heat.THROTTLED: 2.0}.get(heat, 1.25)


def test_a_large_floor_is_left_a_quarter_of_a_gibibyte_above_it():
    gib = 1 << 30
    rules = Rules(reserve_bytes=0, soft_floor_bytes=10 * gib, hard_floor_bytes=gib)

    def left(free: int) -> Level:
        return next_level(Level.SOFT, MachineView(Memory(64 * gib, free)), rules)

    assert left(10 * gib + gib // 4 - 1) is Level.SOFT
    assert left(10 * gib + gib // 4) is Level.NORMAL
