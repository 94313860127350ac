"""How often a tool may be called, and how long to wait before what failed is tried again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.tools.bucket import Bucket
from edge_agent.tools.pause import LONGEST_PAUSE_S, pause_s

RATES = st.integers(min_value=1, max_value=1000)
PAUSES = st.lists(st.floats(min_value=0.0, max_value=90.0), min_size=1, max_size=80)


class TestBucket:
    @given(RATES, PAUSES)
    def test_lets_no_more_through_in_any_stretch_than_it_holds_and_gains(self, rate, pauses_s):
        bucket = Bucket(rate, 0.0)
        now_s, taken_s = 0.0, []
        for pause in pauses_s:
            now_s += pause
            while bucket.take(now_s) is None:
                taken_s.append(now_s)
        stride = max(1, rate // 3)  # not every pair of thousands
        for first in range(0, len(taken_s), stride):
            for last in range(first, len(taken_s), stride):
                passed_s = taken_s[last] - taken_s[first]
                assert last - first + 1 <= rate * (1 + passed_s / 60) + 1e-6

    @given(RATES, PAUSES)
    def test_who_waits_as_long_as_it_is_told_is_let_through(self, rate, pauses_s):
        bucket = Bucket(rate, 0.0)
        now_s = 0.0
        for pause in pauses_s:
            now_s += pause / rate
            wait_s = bucket.take(now_s)
            if wait_s is not None:
                assert 0 < wait_s <= 60 / rate + 1e-6
                now_s += wait_s + 1e-6
                assert bucket.take(now_s) is None

    def test_a_refusal_takes_nothing(self):
        bucket = Bucket(1, 0.0)
        assert bucket.take(0.0) is None
        assert bucket.take(30.0) == pytest.approx(30.0)
        assert bucket.take(59.0) == pytest.approx(1.0)
        assert bucket.take(60.0) is None

    def test_a_quiet_hour_saves_up_one_minutes_calls(self):
        bucket = Bucket(3, 0.0)
        assert [bucket.take(3600.0) for _ in range(3)] == [None] * 3
        assert bucket.take(3600.0) == pytest.approx(20.0)

    def test_a_clock_that_stands_or_goes_back_gives_nothing(self):
        bucket = Bucket(1, 100.0)
        assert bucket.take(100.0) is None
        assert bucket.take(40.0) == pytest.approx(60.0)
        assert bucket.take(100.0) == pytest.approx(60.0)


class TestPause:
    def test_doubles_with_each_failure_up_to_a_minute(self):
        assert [pause_s(failures, 1.0) for failures in range(1, 9)] == [
            *(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
            *(LONGEST_PAUSE_S, LONGEST_PAUSE_S),
        ]

    def test_stays_there_however_often_it_fails(self):
        assert pause_s(10**9, 0.001) == LONGEST_PAUSE_S
