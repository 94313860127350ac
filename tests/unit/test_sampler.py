"""What the sampler makes of each machine, and of machines that misbehave.

Time is handed to it; one test has the real thread.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.telemetry import sensors
from edge_agent.telemetry.reading import ReadingStatus
from edge_agent.telemetry.sampler import Sampler
from edge_agent.telemetry.snapshot import Metric, TelemetrySnapshot, ThrottleReason
from tests.support import sysroots

TICK_S = 0.25
OK, STALE = ReadingStatus.OK, ReadingStatus.STALE
ERROR, UNSUPPORTED = ReadingStatus.ERROR, ReadingStatus.UNSUPPORTED
ZONE = "sys/class/thermal/thermal_zone"


class Machine:
    """A tree, a clock that stands still, and a sampler that is driven by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_s = 1000.0
        self.sampler = Sampler(root, clock=lambda: self.now_s, unix_clock=lambda: 1.8e9)

    def sample(self) -> TelemetrySnapshot:
        return self.sampler.sample(self.now_s)

    def put(self, files: dict[str, str]) -> None:
        sysroots.put(self.root, files)

    def run(self, seconds: float, change: Callable[[], object] = lambda: None) -> TelemetrySnapshot:
        """Sample for so long, as the thread would; `change` is made before each sample."""
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            change()
            self.sample()
        return self.sampler.latest


@pytest.fixture
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    """An Orin Nano, or the profile that the test names."""
    sysroots.PROFILES[getattr(request, "param", "orin_nano")](tmp_path)
    return Machine(tmp_path)


def known(metric: Metric[object]) -> object:
    """The value of a metric that went well."""
    assert metric.status is OK, metric
    return metric.value


def nothing(metric: Metric[object]) -> ReadingStatus:
    """Why there is no value."""
    assert metric.value is None
    return metric.status


# --- machines ---


def test_orin_nano(machine: Machine):
    found = machine.sample()
    assert known(found.memory.available_bytes) == found.mem_available_bytes == 5_242_880 * 1024
    assert found.mem_total_bytes == 7_789_568 * 1024
    assert known(found.memory.cma_free_bytes) == 200_000 * 1024
    assert known(found.memory.nvmap_used_bytes) == 1 << 30
    assert found.largest_free_block_bytes == 16 * os.sysconf("SC_PAGE_SIZE")
    assert (found.some_avg10_percent, found.full_avg10_percent) == (0.0, 0.0)
    assert known(found.pressure.some_avg60_percent) == 0.1
    assert known(found.gpu_utilisation_percent) == 34.5
    assert found.gpu_utilisation_percent.source == "/sys/class/devfreq/17000000.gpu/device/load"
    assert known(found.gpu_clock_hz) == 612_000_000
    assert known(found.gpu_max_clock_hz) == 1_020_000_000
    assert [zone.name for zone in found.zones] == ["cpu-thermal", "gpu-thermal", "tj-thermal"]
    assert found.thermal_margin_milli_c == 95_000 - 49_593
    assert [(rail.name, known(rail.power_mw)) for rail in found.rails] == [
        ("VDD_IN", 5_966),
        ("VDD_CPU_GPU_CV", 1_666),
    ]
    assert known(found.power_mw) == 5_966
    assert (found.power_mode_number, known(found.power_mode_name)) == (2, "MAXN_SUPER")
    assert found.is_throttled is False
    assert nothing(found.driver_version) is ERROR  # not asked yet


@pytest.mark.parametrize("machine", ["agx_orin"], indirect=True)
def test_agx_orin(machine: Machine):
    found = machine.sample()
    assert known(found.gpu_utilisation_percent) == 0.0  # idle, which is not unknown
    assert known(found.power_mw) == 3_979 + 792 + 4_500
    assert found.hottest.fresh
    assert (found.hottest.fresh.name, found.hottest.fresh.unreadable) == (
        "cpu-thermal",
        ("gpu-thermal",),
    )
    assert found.is_throttled is None  # the GPU's sensor shows nonsense: it may be too hot
    assert found.power_mode_number == 1  # what it boots with
    assert nothing(found.memory.cma_total_bytes) is UNSUPPORTED


@pytest.mark.parametrize("machine", ["thor"], indirect=True)
def test_thor_has_clocks_but_no_load(machine: Machine):
    found = machine.sample()
    assert nothing(found.gpu_utilisation_percent) is UNSUPPORTED
    assert known(found.gpu_clock_hz) == 1_575_000_000
    assert known(found.power_mw) == 19_780


@pytest.mark.parametrize("machine", ["plain_pc"], indirect=True)
def test_a_pc_has_memory_and_lacks_the_rest(machine: Machine):
    found = machine.run(1)
    assert found.mem_available_bytes == 8_000_000 * 1024
    lacking = (
        found.gpu_utilisation_percent,
        found.gpu_clock_hz,
        found.hottest,
        found.power_mw,
        found.power_mode,
        found.power_mode_name,
        found.throttling,
        found.driver_version,
    )
    assert {nothing(metric) for metric in lacking} == {UNSUPPORTED}
    assert (found.zones, found.rails, found.gpus) == ((), (), ())
    assert found.thermal_margin_milli_c is found.is_throttled is found.power_mode_number is None


def test_before_the_first_sample_nothing_is_known(machine: Machine):
    found = machine.sampler.latest
    assert nothing(found.memory.available_bytes) is ERROR
    assert nothing(found.power_mw) is nothing(found.hottest) is ERROR
    assert found.power_mw.detail == "not read yet"


# --- rates ---


def test_each_metric_is_read_at_its_rate(machine: Machine):
    machine.sample()
    ages = []
    for _ in range(20):
        found = machine.run(TICK_S)
        ages.append(
            (
                found.memory.available_bytes.age_s,
                found.hottest.age_s,
                found.power_mw.age_s,
                found.power_mode.age_s,
            )
        )
    memory, hottest, power, mode = (list(column) for column in zip(*ages, strict=True))
    assert set(memory) == {0.0}
    assert hottest == [0.25, 0.5, 0.75, 0.0] * 5
    assert power == ([n * TICK_S for n in range(1, 8)] + [0.0]) * 2 + [0.25, 0.5, 0.75, 1.0]
    assert mode == [n * TICK_S for n in range(1, 20)] + [0.0]


def test_a_slow_metric_is_read_on_the_tick_that_is_nearest_to_its_time(machine: Machine):
    machine.sample()
    ages = []
    for _ in range(5):
        machine.now_s += 0.24  # a thread that wakes a little early each time
        ages.append(machine.sample().hottest.age_s)
    assert ages == pytest.approx([0.24, 0.48, 0.72, 0.0, 0.24])


# --- misbehaving machines ---


def test_a_node_that_appears_late_is_found_and_one_that_goes_is_missed(machine: Machine):
    link = machine.root / "sys/class/devfreq/17000000.gpu"
    target = link.readlink()
    link.unlink()
    assert nothing(machine.sample().gpu_utilisation_percent) is UNSUPPORTED
    link.symlink_to(target)
    assert known(machine.run(1).gpu_utilisation_percent) == 34.5
    link.unlink()
    assert nothing(machine.run(1).gpu_utilisation_percent) is UNSUPPORTED


def test_garbage_is_an_error_of_its_metric_alone_and_is_over_with_it(machine: Machine):
    machine.sample()
    machine.put({"proc/pressure/memory": "\xff\x00 nonsense", f"{ZONE}0/temp": "hot\n"})
    found = machine.run(1)
    assert nothing(found.pressure.some_avg10_percent) is ERROR
    assert nothing(found.zones[0].temperature_milli_c) is ERROR
    assert known(found.zones[1].temperature_milli_c) == 49_593
    assert found.is_throttled is None
    machine.put({"proc/pressure/memory": sysroots.PRESSURE, f"{ZONE}0/temp": "48000\n"})
    found = machine.run(1)
    assert found.some_avg10_percent == 0.0
    assert found.is_throttled is False


def test_a_snapshot_that_nobody_renews_becomes_stale(machine: Machine):
    snapshot = machine.sample()
    machine.now_s += 3 * TICK_S
    assert machine.sampler.latest.mem_available_bytes == snapshot.mem_available_bytes
    machine.now_s += 0.1
    late = machine.sampler.latest
    assert late.memory.available_bytes.status is STALE
    assert late.memory.available_bytes.value == snapshot.mem_available_bytes
    assert late.mem_available_bytes is late.some_avg10_percent is None
    assert late.mem_total_bytes == snapshot.mem_total_bytes
    assert known(late.hottest)  # read once a second
    machine.now_s += 3
    assert machine.sampler.latest.thermal_margin_milli_c is None
    assert machine.sampler.latest.is_throttled is None
    assert machine.sampler.latest.sampled_at_s == snapshot.sampled_at_s


def test_a_reader_that_raises_leaves_its_value_to_age(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
):
    machine.sample()

    def breaks(_root: Path) -> None:
        raise RuntimeError("a mistake of ours")

    with monkeypatch.context() as patched:
        patched.setattr(sensors, "read_power_rails", breaks)
        found = machine.run(6.25, lambda: move_memory(machine))
    assert found.power_mw.status is STALE
    assert found.memory.available_bytes.status is OK
    assert known(machine.run(0.25, lambda: move_memory(machine)).power_mw) == 5_966


def move_memory(machine: Machine) -> None:
    available = 4_000_000 + round(machine.now_s * 4) % 1000
    machine.put({"proc/meminfo": sysroots.meminfo(7_789_568, available)})


def test_memory_that_never_moves_is_stale_and_its_total_is_not(machine: Machine):
    machine.sample()
    assert machine.run(29.75).memory.available_bytes.status is OK
    frozen = machine.run(0.25)
    assert frozen.memory.available_bytes.status is STALE
    assert frozen.memory.free_bytes.status is frozen.memory.cma_free_bytes.status is STALE
    assert frozen.mem_available_bytes is None
    assert known(frozen.memory.total_bytes) == 7_789_568 * 1024
    move_memory(machine)
    assert machine.run(0.25).memory.available_bytes.status is OK


def test_memory_that_was_looked_at_seldom_is_not_frozen(machine: Machine):
    machine.sample()
    machine.now_s += 60
    assert machine.sample().memory.available_bytes.status is OK


def test_pressure_at_0_may_last_and_above_0_falls(machine: Machine):
    machine.sample()
    assert machine.run(60).pressure.full_avg10_percent.status is OK
    machine.put({"proc/pressure/memory": sysroots.PRESSURE.replace("avg10=0.00", "avg10=1.25")})
    machine.run(0.25)
    assert machine.run(29.75).some_avg10_percent == 1.25
    frozen = machine.run(0.25).pressure.some_avg10_percent
    assert (frozen.value, frozen.status) == (1.25, STALE)


def test_a_temperature_may_stay_equal_for_minutes(machine: Machine):
    machine.sample()
    assert machine.run(180).hottest.status is OK


def test_a_machine_that_heats_has_a_slope(machine: Machine):
    def heat() -> None:
        machine.put({f"{ZONE}0/temp": f"{round(60_000 + (machine.now_s - 1000) * 800)}\n"})

    heat()
    machine.sample()
    assert machine.run(10, heat).thermal_slope_milli_c_per_s == pytest.approx(800, rel=0.01)


def test_a_zone_at_its_passive_trip_point_throttles(machine: Machine):
    machine.put({f"{ZONE}1/temp": "95000\n"})
    found = machine.sample()
    assert known(found.throttling) == (ThrottleReason.THERMAL,)
    assert found.throttling.detail.startswith("gpu-thermal 95.0 °C")


def test_a_zone_without_power_is_off_and_not_broken(machine: Machine):
    path = machine.root / f"{ZONE}0/temp"
    path.unlink()
    os.mkfifo(path)  # with a writer and no data it answers EAGAIN, as the kernel does
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY)
    found = machine.sample()
    os.close(reader)
    os.close(writer)
    assert nothing(found.zones[0].temperature_milli_c) is UNSUPPORTED
    assert found.is_throttled is False


# --- ageing ---


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> TelemetrySnapshot:
    """An Orin Nano's, of the time 0."""
    root = tmp_path_factory.mktemp("orin")
    sysroots.orin_nano(root)
    return Sampler(root, clock=lambda: 0.0, unix_clock=lambda: 0.0).sample(0.0)


@given(st.floats(0, 20), st.floats(0, 20))
def test_a_snapshot_ages_the_same_at_once_or_in_parts(
    snapshot: TelemetrySnapshot, first_s: float, more_s: float
):
    whole, parts = snapshot.at(first_s + more_s), snapshot.at(first_s).at(first_s + more_s)
    assert parts.memory.available_bytes.age_s == pytest.approx(whole.memory.available_bytes.age_s)
    assert parts.hottest.age_s == pytest.approx(first_s + more_s)
    assert parts.as_of_s == whole.as_of_s


def test_a_snapshot_is_never_made_younger(snapshot: TelemetrySnapshot):
    assert snapshot.at(5).at(1) == snapshot.at(5)


# --- the thread ---


def test_the_thread_samples_until_it_is_stopped(tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    several, seen = threading.Event(), []

    def take(snapshot: TelemetrySnapshot) -> None:
        seen.append(snapshot)
        if len(seen) >= 5:
            several.set()

    sampler = Sampler(tmp_path, interval_s=10.0, on_snapshot=take)
    sampler.start()
    with sampler.fast():  # else the second snapshot came in 10 s
        assert several.wait(20)
    assert sampler.stop(10.0)
    assert seen[-1].mem_available_bytes == 5_242_880 * 1024
    assert [s.sampled_at_s for s in seen] == sorted({s.sampled_at_s for s in seen})
    count = len(seen)
    assert sampler.stop(10.0)
    assert len(seen) == count


def test_a_reader_that_blocks_holds_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sysroots.orin_nano(tmp_path)
    blocked, let_go = threading.Event(), threading.Event()

    def blocks(_root: Path) -> tuple[()]:
        blocked.set()
        let_go.wait(30)
        return ()

    monkeypatch.setattr(sensors, "read_power_rails", blocks)
    now_s = [1000.0]
    sampler = Sampler(tmp_path, clock=lambda: now_s[0])
    sampler.start()
    assert blocked.wait(20)
    now_s[0] += 60
    assert nothing(sampler.latest.memory.available_bytes) is ERROR
    assert sampler.stop(0.01) is False
    let_go.set()
    assert sampler.stop(10.0)


def test_one_that_was_never_started_stops(machine: Machine):
    assert machine.sampler.stop()
