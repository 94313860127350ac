"""What was measured, and what follows: nothing before something was, and never more than usual."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.scheduling.pace import Demand, Pace, Served
from tests.support.chaos import examples

SERVED = st.builds(
    Served,
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.floats(0.001, 10),
    st.floats(0.001, 10),
)


def test_nothing_is_estimated_before_something_was_measured():
    pace = Pace()
    assert pace.prefill_s(10) is None
    assert pace.decode_s(10) is None
    assert pace.estimate_s(10, 10) is None
    pace.observe(Served(0, 0, 0.0, 0.0))
    assert pace.estimate_s(10, 10) is None


def test_one_measurement_is_believed():
    pace = Pace()
    pace.observe(Served(100, 20, 2.0, 4.0))
    assert pace.prefill_s(50) == pytest.approx(1.0)
    assert pace.prefill_s(1000) == pytest.approx(2.0)  # the rest is usually cached
    assert pace.decode_s(5) == pytest.approx(1.0)
    assert pace.decode_s(500) == pytest.approx(4.0)
    assert pace.estimate_s(50, 5) == pytest.approx(2.0)
    assert pace.step_s == pytest.approx(6.0)


def test_averages_follow_a_change_within_ten_steps():
    pace = Pace()
    pace.observe(Served(100, 100, 1.0, 1.0))
    pace.observe(Served(100, 100, 2.0, 1.0))
    assert pace.prefill_tokens_per_s == pytest.approx(100 + 0.2 * (50 - 100))
    for _ in range(9):
        pace.observe(Served(100, 100, 2.0, 1.0))
    assert pace.prefill_tokens_per_s == pytest.approx(50, rel=0.15)
    assert pace.decode_tokens_per_s == pytest.approx(100)


def test_what_a_warm_machine_took_is_kept_as_if_it_were_cool():
    pace = Pace()
    pace.observe(Served(100, 100, 2.0, 4.0), 2.0)
    assert pace.prefill_tokens_per_s == pytest.approx(100)
    assert pace.decode_tokens_per_s == pytest.approx(50)
    assert pace.step_s == pytest.approx(3.0)


@given(st.lists(SERVED, min_size=1, max_size=20), st.integers(0, 2000), st.integers(0, 2000))
@examples(100)
def test_an_estimate_lies_among_what_was_measured(history, prompt, output):
    pace = Pace()
    for served in history:
        pace.observe(served)
    rates = [each.computed_tokens / each.prefill_s for each in history if each.computed_tokens]
    estimate = pace.prefill_s(prompt)
    assert (estimate is None) == (not rates)
    if estimate is not None:
        most = max(each.computed_tokens for each in history)
        assert 0 <= estimate <= min(prompt, most) / min(rates) * (1 + 1e-9)


@given(st.lists(st.floats(0, 100), max_size=20), st.floats(0, 1000), st.floats(0.1, 100))
@examples(100)
def test_demand_is_a_chance_that_fades(gaps, later_s, within_s):
    demand, now_s = Demand(), 0.0
    for gap in gaps:
        now_s += gap
        demand.arrived(now_s)
    chance = demand.reuse(now_s, within_s)
    assert 0 <= chance < 1 or chance == pytest.approx(1)
    assert (chance == 0) == (not gaps)
    assert demand.reuse(now_s + later_s, within_s) <= chance
    assert demand.reuse(now_s, within_s + 1) >= chance


def test_demand_counts_a_third_after_five_minutes():
    demand = Demand()
    demand.arrived(10.0)
    demand.arrived(310.0)
    assert demand.count == pytest.approx(1 + 1 / math.e)
    assert demand.reuse(310.0, 300.0) == pytest.approx(1 - math.exp(-(1 + 1 / math.e)))


@pytest.mark.parametrize(
    ("served", "prefill", "decode"),
    [
        (Served(100, 10, 0.0, 2.0), None, 5.0),  # no time
        (Served(0, 10, 1.0, 2.0), None, 5.0),  # nothing read
        (Served(100, 0, 1.0, 2.0), 100.0, None),  # nothing written
        (Served(100, 10, 1.0, 0.0), 100.0, None),
        (Served(1, 1, 1.0, 1.0), 1.0, 1.0),
    ],
)
def test_what_a_step_did_not_do_says_nothing_of_its_rate(served, prefill, decode):
    pace = Pace()
    pace.observe(served)
    assert (pace.prefill_tokens_per_s, pace.decode_tokens_per_s) == (prefill, decode)


def test_a_whole_step_is_estimated_from_both_rates_or_not_at_all():
    pace = Pace()
    pace.observe(Served(100, 0, 1.0, 0.0))
    assert pace.estimate_s(100, 10) is None
    pace.observe(Served(100, 10, 1.0, 2.0))
    assert pace.estimate_s(100, 10) is not None
