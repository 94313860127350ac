"""Margins, slopes and throttling of thermal zones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.telemetry.reading import Reading, ReadingStatus, failed, ok, unsupported
from edge_agent.telemetry.thermal import (
    ThermalHistory,
    ThermalZone,
    TripPoint,
    hottest_zone,
    is_throttled,
    slope_milli_c_per_s,
)

BROKEN: Reading[int] = failed("f", "Input/output error")
OFF: Reading[int] = unsupported("f", "Resource temporarily unavailable")


def zone(name: str, reading: int | Reading[int], **trips: int) -> ThermalZone:
    value = ok(reading, f"/{name}") if isinstance(reading, int) else reading
    return ThermalZone(name, value, tuple(TripPoint(kind, at) for kind, at in trips.items()))


def hottest(*zones: ThermalZone) -> tuple[str, int | None]:
    found = hottest_zone(zones, [None] * len(zones)).value
    assert found
    return found.name, found.margin_milli_c


def test_the_hottest_zone_is_the_one_with_the_least_margin():
    cpu, gpu = zone("cpu", 80_000, passive=99_000), zone("gpu", 70_000, critical=75_000)
    assert hottest(cpu, gpu) == ("gpu", 5_000)


def test_the_margin_is_to_the_first_limit_and_a_fan_is_none():
    assert hottest(zone("cpu", 60_000, active=50_000, critical=105_000, passive=95_000)) == (
        "cpu",
        35_000,
    )


def test_a_trip_point_at_0_is_not_used():
    assert hottest(zone("acpi", 30_000, passive=0, critical=100_000)) == ("acpi", 70_000)


def test_beyond_the_limit_the_margin_is_negative():
    assert hottest(zone("cpu", 96_000, passive=95_000)) == ("cpu", -1_000)


def test_a_zone_without_a_limit_counts_only_where_none_has_one():
    assert hottest(zone("hot", 99_000), zone("cpu", 20_000, passive=95_000))[0] == "cpu"
    assert hottest(zone("warm", 40_000), zone("hot", 99_000)) == ("hot", None)


def test_a_failed_sensor_is_named_and_one_that_is_off_is_not():
    zones = [
        zone("cpu", 50_000, passive=95_000),
        zone("gpu", BROKEN, passive=95_000),
        zone("cv0", OFF, passive=95_000),
        zone("board", BROKEN),
    ]
    found = hottest_zone(zones, [None] * 4).value
    assert found
    assert (found.name, found.unreadable) == ("cpu", ("gpu",))


def test_without_a_readable_sensor_the_hottest_is_unknown():
    assert hottest_zone([], []).status is ReadingStatus.UNSUPPORTED
    assert hottest_zone([zone("cv0", OFF)], [None]).status is ReadingStatus.UNSUPPORTED
    assert hottest_zone([zone("cpu", BROKEN)], [None]).status is ReadingStatus.ERROR


@pytest.mark.parametrize(
    ("zones", "throttled"),
    [
        ([zone("cpu", 94_999, passive=95_000)], False),
        ([zone("cpu", 95_000, passive=95_000)], True),
        ([zone("cpu", 104_000, critical=105_000)], None),
        ([zone("cpu", 90_000, passive=95_000), zone("gpu", BROKEN, passive=95_000)], None),
        ([zone("cpu", 96_000, passive=95_000), zone("gpu", BROKEN, passive=95_000)], True),
        ([zone("cpu", 90_000, passive=95_000), zone("cv0", OFF, passive=95_000)], False),
        ([zone("cv0", OFF, passive=95_000)], None),
        ([], None),
    ],
)
def test_throttling_is_known_only_where_every_working_sensor_was_read(
    zones: list[ThermalZone],
    throttled: bool | None,  # noqa: FBT001 - what is expected
):
    assert is_throttled(zones).value is throttled


def test_a_throttled_zone_is_named():
    detail = is_throttled([zone("cpu", 96_400, passive=95_000)]).detail
    assert detail == "cpu 96.4 °C, slowed down from 95.0 °C on"


def test_the_slope_is_that_of_the_last_seconds_only():
    history = ThermalHistory()
    found = None
    for second in range(30):
        temperature = 50_000 if second < 15 else 50_000 + 500 * (second - 15)
        found = history.add(float(second), [zone("cpu", temperature, passive=95_000)]).value
    assert found
    assert found.slope_milli_c_per_s == pytest.approx(500)


def test_zones_of_the_same_name_have_slopes_of_their_own():
    history = ThermalHistory()
    found = None
    for second in range(6):
        still, heating = zone("acpitz", 40_000), zone("acpitz", 60_000 + second * 1000)
        found = history.add(float(second), [still, heating]).value
    assert found
    assert found.slope_milli_c_per_s == pytest.approx(1000)


def test_two_readings_or_a_moment_are_no_slope():
    assert slope_milli_c_per_s([(0, 1000), (5, 2000)]) is None
    assert slope_milli_c_per_s([(0, 1000), (0.5, 1500), (1.9, 2000)]) is None


@given(
    st.lists(st.integers(0, 100), min_size=3, max_size=10, unique=True),
    st.integers(-5_000, 5_000),
    st.integers(-40_000, 120_000),
)
def test_the_slope_of_a_straight_line_is_the_lines(times: list[int], slope: int, at_0: int):
    points = [(float(at), at_0 + slope * at) for at in sorted(times)]
    found = slope_milli_c_per_s(points)
    assert found is not None
    assert found == pytest.approx(slope, abs=0.01)
