"""Rates and energies from times: by example and by property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.measuring.prompts import Question, long_prompt, short_prompt
from edge_agent.measuring.statistics import (
    Timeline,
    Window,
    decode_window,
    energy_per_token_mj,
    mean_power_mw,
    median_of,
    ttft_ms,
)
from edge_agent.telemetry.energy import PowerSample

TIMES = st.floats(min_value=0, max_value=1000, allow_nan=False).map(lambda x: round(x, 3))
ARRIVALS = st.lists(st.tuples(TIMES, st.integers(1, 9)), max_size=20).map(
    lambda found: Timeline(0.0, tuple(sorted(found)))
)
POWERS = st.integers(0, 60_000)


@st.composite
def sampled(draw: st.DrawFn) -> tuple[list[PowerSample], float, float]:
    """Samples at rising times, and a time span within them."""
    times = sorted(draw(st.lists(TIMES, min_size=2, max_size=20, unique=True)))
    samples = [PowerSample(time, draw(POWERS)) for time in times]
    ends = st.floats(min_value=times[0], max_value=times[-1], allow_nan=False)
    start, end = sorted((draw(ends), draw(ends)))
    return samples, start, end


def test_the_first_token_counts_from_the_call():
    assert ttft_ms(Timeline(10.0, ((10.25, 1), (10.5, 1)))) == 250.0
    assert ttft_ms(Timeline(10.0, ())) is None


def test_the_tokens_of_the_first_arrival_were_decoded_before_it():
    window = decode_window([Timeline(0.0, ((1.0, 3), (1.5, 1), (2.0, 1)))])
    assert window == Window(1.0, 2.0, 2)
    assert window.tokens_per_second == 2.0


def test_streams_count_together_from_the_first_token_of_any():
    slow = Timeline(0.0, ((2.0, 1), (4.0, 1)))
    fast = Timeline(0.0, ((1.0, 1), (3.0, 1)))
    assert decode_window([slow, fast]) == Window(1.0, 4.0, 3)


@pytest.mark.parametrize("arrivals", [(), ((1.0, 5),), ((1.0, 1), (1.0, 1))])
def test_there_is_no_rate_without_time_between_tokens(arrivals):
    assert decode_window([Timeline(0.0, arrivals)]) is None


@given(st.lists(ARRIVALS, max_size=4))
def test_a_window_holds_every_token_but_those_of_its_first_moment_and_has_a_rate(lines):
    window = decode_window(lines)
    everything = [arrival for line in lines for arrival in line.arrivals]
    if window is None:
        assert len({at for at, _ in everything}) < 2
        return
    assert window.start_s == min(at for at, _ in everything)
    assert window.end_s == max(at for at, _ in everything)
    after = sum(tokens for at, tokens in everything if at > window.start_s)
    assert after <= window.tokens < sum(tokens for _, tokens in everything)
    assert window.tokens_per_second > 0


@given(st.lists(st.none() | st.floats(-1e6, 1e6)))
def test_a_median_is_of_what_is_known_and_between_its_ends(values):
    known = [value for value in values if value is not None]
    median = median_of(values)
    if median is None:
        assert not known
    else:
        assert min(known) <= median <= max(known)


def test_power_is_a_line_between_samples():
    samples = [PowerSample(0.0, 1000), PowerSample(1.0, 3000), PowerSample(2.0, 3000)]
    assert mean_power_mw(samples, 0.0, 1.0) == 2000
    assert mean_power_mw(samples, 0.5, 1.5) == pytest.approx((2500 + 3000) / 2)
    assert mean_power_mw(samples, 0.25, 0.75) == 2000


@given(sampled())
def test_a_mean_lies_between_the_lowest_and_the_highest_power(found):
    samples, start, end = found
    mean = mean_power_mw(samples, start, end)
    if end <= start:
        assert mean is None
        return
    powers = [sample.power_mw for sample in samples]
    assert mean is not None
    assert min(powers) - 1e-3 <= mean <= max(powers) + 1e-3


@given(sampled(), st.floats(0.001, 10))
def test_there_is_no_mean_where_no_samples_were(found, beyond):
    samples, _, _ = found
    first, last = samples[0].at_s, samples[-1].at_s
    assert mean_power_mw(samples, first - beyond, last) is None
    assert mean_power_mw(samples, first, last + beyond) is None
    assert mean_power_mw([], first, last) is None


def test_energy_is_power_by_time_over_tokens():
    samples = [PowerSample(0.0, 6000), PowerSample(10.0, 6000)]
    assert energy_per_token_mj(samples, Window(1.0, 3.0, 100)) == pytest.approx(6000 * 2 / 100)
    assert energy_per_token_mj(samples, None) is None
    assert energy_per_token_mj([], Window(1.0, 3.0, 100)) is None


@pytest.mark.parametrize("make", [short_prompt, long_prompt])
def test_prompts_of_one_mark_differ_at_their_end_alone_and_of_two_from_the_start(make):
    first, second = make("aa", Question.FIRST), make("aa", Question.SECOND)
    assert first.system == second.system
    assert first.goal != second.goal
    shared = next(
        i for i, (a, b) in enumerate(zip(first.goal, second.goal, strict=False)) if a != b
    )
    assert shared > len(first.goal) * 0.6
    assert make("bb", Question.FIRST).system[0] != first.system[0]
    assert make("aa", Question.FIRST) == first
