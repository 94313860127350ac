"""What the sampler knows at one time: frozen values, each with its source, status and age.

Pure. Nothing here reads a clock: whoever holds a snapshot asks `at(now_s)` for what it is worth by
then, so a sampler that hangs shows as STALE to everybody.
"""

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from edge_agent.telemetry.reading import Reading, ReadingStatus
from edge_agent.telemetry.thermal import HottestZone, TripPoint

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

STALE_PERIODS: Final = 3
"""How many of its periods a value is believed for without being read again."""


class ThrottleReason(enum.StrEnum):
    """Why the machine is slower than its power mode allows."""

    THERMAL = "THERMAL"
    POWER = "POWER"
    HARDWARE = "HARDWARE"


@dataclass(frozen=True, slots=True)
class Metric(Generic[T_co]):
    """A reading and how old it is. `period_s` is how often it is read.

    STALE keeps the last value, for people; `fresh` is for decisions.
    """

    value: T_co | None
    source: str
    status: ReadingStatus
    detail: str
    age_s: float
    period_s: float

    @property
    def fresh(self) -> T_co | None:
        """The value if it holds now."""
        return self.value if self.status is ReadingStatus.OK else None

    def older(self, by_s: float) -> "Metric[T_co]":
        """The same `by_s` later."""
        return _metric(self, self.detail, self.age_s + by_s, self.period_s)


def metric(reading: Reading[T], age_s: float, period_s: float) -> Metric[T]:
    """A reading that is `age_s` old; STALE beyond STALE_PERIODS."""
    return _metric(reading, reading.detail, age_s, period_s)


def _metric(of: Reading[T] | Metric[T], detail: str, age_s: float, period_s: float) -> Metric[T]:
    status = of.status
    if status is ReadingStatus.OK and age_s > STALE_PERIODS * period_s:
        status, detail = ReadingStatus.STALE, "not read any more"
    return Metric(of.value, of.source, status, detail, age_s, period_s)


@dataclass(frozen=True, slots=True)
class MemoryMetrics:
    """/proc/meminfo and /proc/buddyinfo, in bytes; CMA and NvMap on a Jetson only."""

    total_bytes: Metric[int]
    available_bytes: Metric[int]
    free_bytes: Metric[int]
    swap_total_bytes: Metric[int]
    swap_free_bytes: Metric[int]
    cma_total_bytes: Metric[int]
    cma_free_bytes: Metric[int]
    largest_free_block_bytes: Metric[int]
    nvmap_used_bytes: Metric[int]


@dataclass(frozen=True, slots=True)
class PressureMetrics:
    """Share of time in which some or all tasks waited for memory, in percent."""

    some_avg10_percent: Metric[float]
    some_avg60_percent: Metric[float]
    full_avg10_percent: Metric[float]
    full_avg60_percent: Metric[float]


@dataclass(frozen=True, slots=True)
class ZoneMetrics:
    """One temperature sensor; no trip points where NVML is the source."""

    name: str
    temperature_milli_c: Metric[int]
    trip_points: tuple[TripPoint, ...]


@dataclass(frozen=True, slots=True)
class RailMetrics:
    """One measured supply."""

    name: str
    power_mw: Metric[int]


@dataclass(frozen=True, slots=True)
class GpuMetrics:
    """One GPU as NVML sees it; on Orin nearly nothing.

    `integrated`: it shares the memory of the CPU; only others have memory of their own.
    """

    index: int
    name: Metric[str]
    integrated: Metric[bool]
    memory_total_bytes: Metric[int]
    memory_used_bytes: Metric[int]
    utilisation_percent: Metric[int]
    temperature_milli_c: Metric[int]
    power_mw: Metric[int]
    clock_hz: Metric[int]


@dataclass(frozen=True, slots=True)
class TelemetrySnapshot:
    """The machine at one time.

    `sampled_at_s` is when the sampler was last at work and `as_of_s` what the ages refer to, both
    of the monotonic clock; `sampled_at_unix_s` is for people. `power_mw` is the whole machine's.
    """

    sampled_at_s: float
    as_of_s: float
    sampled_at_unix_s: float
    memory: MemoryMetrics
    pressure: PressureMetrics
    gpu_utilisation_percent: Metric[float]
    gpu_clock_hz: Metric[int]
    gpu_max_clock_hz: Metric[int]
    zones: tuple[ZoneMetrics, ...]
    hottest: Metric[HottestZone]
    rails: tuple[RailMetrics, ...]
    power_mw: Metric[int]
    power_mode: Metric[int]
    power_mode_name: Metric[str]
    throttling: Metric[tuple[ThrottleReason, ...]]
    driver_version: Metric[str]
    cuda_version: Metric[str]
    gpus: tuple[GpuMetrics, ...]

    def at(self, now_s: float) -> "TelemetrySnapshot":
        """What it is worth at `now_s` of the monotonic clock; never younger than it was."""
        by_s = now_s - self.as_of_s
        if by_s <= 0:
            return self
        aged: TelemetrySnapshot = _older(self, by_s)
        return dataclasses.replace(aged, as_of_s=now_s)

    @property
    def mem_total_bytes(self) -> int | None:
        """MemTotal, which does not change."""
        return self.memory.total_bytes.value

    @property
    def mem_available_bytes(self) -> int | None:
        """MemAvailable; None where it is not known now."""
        return self.memory.available_bytes.fresh

    @property
    def largest_free_block_bytes(self) -> int | None:
        """The largest contiguous free block; None where it is not known now."""
        return self.memory.largest_free_block_bytes.fresh

    @property
    def some_avg10_percent(self) -> float | None:
        """Memory pressure on some tasks over 10 s, 0 to 100."""
        return self.pressure.some_avg10_percent.fresh

    @property
    def full_avg10_percent(self) -> float | None:
        """Memory pressure on all tasks over 10 s, 0 to 100."""
        return self.pressure.full_avg10_percent.fresh

    @property
    def thermal_margin_milli_c(self) -> int | None:
        """What the hottest zone has left to its limit, below 0 beyond it."""
        hottest = self.hottest.fresh
        return None if hottest is None else hottest.margin_milli_c

    @property
    def thermal_slope_milli_c_per_s(self) -> float | None:
        """How fast the hottest zone heats, below 0 while it cools."""
        hottest = self.hottest.fresh
        return None if hottest is None else hottest.slope_milli_c_per_s

    @property
    def is_throttled(self) -> bool | None:
        """Whether anything slows the machine down."""
        reasons = self.throttling.fresh
        return None if reasons is None else bool(reasons)

    @property
    def power_mode_number(self) -> int | None:
        """The nvpmodel mode in force."""
        return self.power_mode.fresh


def _older(value: Any, by_s: float) -> Any:
    """The value with every metric in it `by_s` older."""
    if isinstance(value, Metric):
        return value.older(by_s)
    if isinstance(value, tuple):
        return tuple(_older(item, by_s) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return type(value)(**{name: _older(getattr(value, name), by_s) for name in names})
    return value
