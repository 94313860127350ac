"""The energy of the machine from samples of its total rail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.telemetry.energy import EnergyMeter, PowerRail, PowerSample, total_power_mw
from edge_agent.telemetry.reading import Reading, ReadingStatus, failed, ok

GAP_S = 6.0
BROKEN: Reading[int] = failed("f", "Input/output error")


def rails(**powers: int | Reading[int]) -> list[PowerRail]:
    return [
        PowerRail(name, ok(power, "f") if isinstance(power, int) else power)
        for name, power in powers.items()
    ]


def meter(started_s: float, *samples: tuple[float, int]) -> EnergyMeter:
    """What was sampled before the start is known to it then."""
    before = [PowerSample(*sample) for sample in samples if sample[0] <= started_s]
    found = EnergyMeter(started_s, before[-1] if before else None, GAP_S)
    for sample in samples[len(before) :]:
        found.add(PowerSample(*sample))
    return found


@pytest.mark.parametrize(
    ("found", "total_mw"),
    [
        (rails(VDD_IN=5_966, VDD_CPU_GPU_CV=1_666, VDD_SOC=900), 5_966),
        (rails(VDD_GPU=1_962, VIN=19_780), 19_780),
        (rails(VDD_GPU_SOC=3_979, VDD_CPU_CV=792, VIN_SYS_5V0=4_500), 9_271),
        (rails(VDD_IN=5_966, VDD_SOC=BROKEN), 5_966),
        (rails(VDD_IN=BROKEN, VDD_SOC=900), None),
        (rails(VDD_GPU_SOC=3_979, VDD_CPU_CV=BROKEN), None),
        ([], None),
    ],
)
def test_the_total_is_the_rail_of_the_whole_else_the_sum_of_all(
    found: list[PowerRail], total_mw: int | None
):
    assert total_power_mw(found).value == total_mw


def test_a_sum_names_its_parts_and_a_missing_part_its_reason():
    assert total_power_mw(rails(A=1, B=2)).source == "/sys/class/hwmon A + B"
    assert total_power_mw(rails(A=1, B=BROKEN)).status is ReadingStatus.ERROR
    assert total_power_mw([]).status is ReadingStatus.UNSUPPORTED


def test_constant_power_is_power_times_time():
    assert meter(0, (0, 5_000), (2, 5_000), (4, 5_000)).total_mj(5) == pytest.approx(25_000)


def test_between_samples_the_power_is_on_a_straight_line():
    assert meter(0, (0, 0), (2, 4_000)).total_mj(2) == pytest.approx(4_000)
    assert meter(1, (0, 0), (2, 4_000)).total_mj(2) == pytest.approx(3_000)


def test_a_run_between_two_samples_takes_the_last_power():
    assert meter(1.0, (0, 5_000)).total_mj(1.5) == pytest.approx(2_500)


def test_a_start_before_the_first_sample_takes_its_power():
    assert meter(0, (1, 5_000)).total_mj(2) == pytest.approx(10_000)


def test_without_a_sample_the_energy_is_unknown():
    assert meter(0).total_mj(1) is None


@pytest.mark.parametrize(
    ("started_s", "samples", "now_s"),
    [
        (0, [(0, 5_000), (7, 5_000)], 8),
        (0, [(0, 5_000)], 7),
        (8, [(0, 5_000)], 9),
        (0, [(7, 5_000)], 8),
    ],
)
def test_a_gap_is_not_bridged(started_s: float, samples: list[tuple[float, int]], now_s: float):
    assert meter(started_s, *samples).total_mj(now_s) is None


def test_a_gap_before_the_start_does_not_matter():
    assert meter(10, (0, 1), (9, 1_000), (11, 1_000)).total_mj(11) == pytest.approx(1_000)


POWERS = st.lists(st.integers(0, 60_000), min_size=2, max_size=20)


@given(POWERS, st.floats(0, 1), st.floats(0, 2))
def test_the_energy_is_between_the_least_and_the_most_power(
    powers: list[int], start: float, rest_s: float
):
    samples = [(2.0 * index, power) for index, power in enumerate(powers)]
    started_s, now_s = start * 2.0 * (len(powers) - 1), samples[-1][0] + rest_s
    total = meter(started_s, *samples).total_mj(now_s)
    assert total is not None
    seconds = now_s - started_s
    assert min(powers) * seconds - 1e-3 <= total <= max(powers) * seconds + 1e-3


@given(POWERS, st.integers(1, 18))
def test_two_parts_add_up_to_the_whole(powers: list[int], cut: int):
    samples = [(2.0 * index, power) for index, power in enumerate(powers)]
    middle_s, end_s = samples[min(cut, len(samples) - 1)][0], samples[-1][0]
    first = [sample for sample in samples if sample[0] <= middle_s]
    before, after = meter(0, *first).total_mj(middle_s), meter(middle_s, *samples).total_mj(end_s)
    assert before is not None
    assert after is not None
    assert before + after == pytest.approx(meter(0, *samples).total_mj(end_s))
