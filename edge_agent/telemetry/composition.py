"""From what the readers returned to the metrics of a snapshot: which source counts, what is frozen.

Owns the order of sources. Reads nothing itself.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from edge_agent.telemetry.energy import PowerRail
from edge_agent.telemetry.nvml import Gpu, NvmlSnapshot
from edge_agent.telemetry.procfs import Memory, Pressure
from edge_agent.telemetry.reading import Reading, ReadingStatus, failed, stale, unsupported
from edge_agent.telemetry.sensors import GpuClock
from edge_agent.telemetry.snapshot import (
    GpuMetrics,
    MemoryMetrics,
    Metric,
    PressureMetrics,
    ThrottleReason,
    metric,
)
from edge_agent.telemetry.tegra import PowerMode
from edge_agent.telemetry.thermal import ThermalZone, is_throttled

T = TypeVar("T")

FROZEN_S: Final = 30.0
"""A value that always moves and has not for so long is not the machine's any more."""
_FROZEN_READS: Final = 10
"""Nor is it frozen by having been looked at too seldom."""
_FROZEN: Final = f"has not moved for {FROZEN_S:g} s"
_GPU: Final = "gpu"


@dataclass(frozen=True, slots=True)
class When:
    """How long ago a group of readers was asked, and how often it is."""

    age_s: float
    period_s: float

    def metric(self, reading: Reading[T]) -> Metric[T]:
        """One of its readings."""
        return metric(reading, self.age_s, self.period_s)


class Unchanged:
    """Since when something has been the same."""

    def __init__(self) -> None:
        self._value: Hashable = None
        self._since_s = 0.0
        self._reads = 0

    def see(self, now_s: float, value: Hashable) -> bool:
        """Whether `value` has not moved for FROZEN_S, over several reads."""
        if value != self._value:
            self._value, self._since_s, self._reads = value, now_s, 0
        self._reads += 1
        return now_s - self._since_s >= FROZEN_S and self._reads >= _FROZEN_READS


class Freezing:
    """Tells what has frozen of memory and pressure.

    MemAvailable and MemFree move all the time, together or apart. Pressure is often 0 for hours;
    but an average above 0 falls by itself. A temperature, a rail's power and a clock may well stay
    equal for minutes: they are believed.
    """

    def __init__(self) -> None:
        self._memory = Unchanged()
        self._pressure = Unchanged()

    def memory(self, now_s: float, memory: Memory) -> Memory:
        """The memory with all that moves STALE if it has frozen; totals stay."""
        moving = (memory.available_bytes.value, memory.free_bytes.value)
        if not self._memory.see(now_s, moving) or None in moving:
            return memory
        return dataclasses.replace(
            memory,
            available_bytes=_frozen(memory.available_bytes),
            free_bytes=_frozen(memory.free_bytes),
            swap_free_bytes=_frozen(memory.swap_free_bytes),
            cma_free_bytes=_frozen(memory.cma_free_bytes),
            nvmap_used_bytes=_frozen(memory.nvmap_used_bytes),
        )

    def pressure(self, now_s: float, pressure: Reading[Pressure]) -> Reading[Pressure]:
        """The pressure, STALE if it has frozen."""
        value = pressure.value
        has_frozen = self._pressure.see(now_s, value)
        falls = value is not None and (value.some_avg10_percent or value.full_avg10_percent)
        return _frozen(pressure) if has_frozen and falls else pressure


def unread(kind: Callable[..., T], reading: Reading[Any]) -> T:
    """A record of readings (a dataclass) each of which is this one, without a value."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**dict.fromkeys(names, reading))


def first_known(*metrics: Metric[T]) -> Metric[T]:
    """The first that holds, else the last value there was, else the first that says most."""
    for status in (ReadingStatus.OK, ReadingStatus.STALE, ReadingStatus.ERROR):
        for each in metrics:
            if each.status is status:
                return each
    return metrics[0]


def memory_metrics(memory: Memory, largest_block: Reading[int], when: When) -> MemoryMetrics:
    """Memory, all of one time."""
    return MemoryMetrics(
        total_bytes=when.metric(memory.total_bytes),
        available_bytes=when.metric(memory.available_bytes),
        free_bytes=when.metric(memory.free_bytes),
        swap_total_bytes=when.metric(memory.swap_total_bytes),
        swap_free_bytes=when.metric(memory.swap_free_bytes),
        cma_total_bytes=when.metric(memory.cma_total_bytes),
        cma_free_bytes=when.metric(memory.cma_free_bytes),
        largest_free_block_bytes=when.metric(largest_block),
        nvmap_used_bytes=when.metric(memory.nvmap_used_bytes),
    )


def pressure_metrics(pressure: Reading[Pressure], when: When) -> PressureMetrics:
    """Memory pressure, all of one time."""
    return PressureMetrics(
        some_avg10_percent=when.metric(pressure.parsed(lambda value: value.some_avg10_percent)),
        some_avg60_percent=when.metric(pressure.parsed(lambda value: value.some_avg60_percent)),
        full_avg10_percent=when.metric(pressure.parsed(lambda value: value.full_avg10_percent)),
        full_avg60_percent=when.metric(pressure.parsed(lambda value: value.full_avg60_percent)),
    )


def utilisation(clock: GpuClock | None, when: When, gpus: Sequence[GpuMetrics]) -> Metric[float]:
    """The GPU's: devfreq's load (Orin), else NVML's of the first GPU (Thor, cards)."""
    load = clock.load_permille if clock else _no_devfreq()
    found = [when.metric(load.parsed(lambda permille: permille / 10))]
    found += [_as_float(gpu.utilisation_percent) for gpu in gpus[:1]]
    return first_known(*found)


def clock_hz(clock: GpuClock | None, when: When, gpus: Sequence[GpuMetrics]) -> Metric[int]:
    """The GPU's: devfreq's, else NVML's of the first GPU."""
    found = [when.metric(clock.clock_hz if clock else _no_devfreq())]
    return first_known(*found, *(gpu.clock_hz for gpu in gpus[:1]))


def max_clock_hz(clock: GpuClock | None, when: When) -> Metric[int]:
    """The GPU's highest clock in this power mode, from devfreq."""
    return when.metric(clock.max_clock_hz if clock else _no_devfreq())


def zones_of_gpus(gpus: Sequence[Gpu]) -> tuple[ThermalZone, ...]:
    """What NVML knows of temperatures, where the kernel has no thermal zones."""
    return tuple(
        ThermalZone(_name(gpu), gpu.temperature_milli_c, ())
        for gpu in gpus
        if gpu.temperature_milli_c.status is not ReadingStatus.UNSUPPORTED
    )


def rails_of_gpus(gpus: Sequence[Gpu]) -> tuple[PowerRail, ...]:
    """What NVML knows of power, where the kernel has no rails: of GPUs alone."""
    return tuple(
        PowerRail(_name(gpu), gpu.power_mw)
        for gpu in gpus
        if gpu.power_mw.status is not ReadingStatus.UNSUPPORTED
    )


def throttling(
    zones: Sequence[ThermalZone], gpus: Sequence[Gpu]
) -> Reading[tuple[ThrottleReason, ...]]:
    """What slows the machine down, by its thermal zones and by NVML's clocks event reasons.

    Unknown if nothing is found while one of them has failed; a low clock alone is no sign.
    """
    thermal = is_throttled(zones)
    said = [gpu.throttling for gpu in gpus]
    found = {reason for reading in said for reason in reading.value or ()}
    if thermal.value:
        found.add(ThrottleReason.THERMAL)
    heard = [thermal, *said]
    broken = next((reading for reading in heard if reading.status is ReadingStatus.ERROR), None)
    known = [reading for reading in heard if reading.value is not None]
    if not found and broken is not None:
        return failed(broken.source, broken.detail)
    if not known:
        return unsupported(thermal.source, thermal.detail)
    source = " + ".join(dict.fromkeys(reading.source for reading in known))
    return Reading(tuple(sorted(found)), source, ReadingStatus.OK, thermal.detail)


def gpu_metrics(gpus: Sequence[Gpu], when: When) -> tuple[GpuMetrics, ...]:
    """Each GPU as NVML sees it."""
    return tuple(
        GpuMetrics(
            index=gpu.index,
            name=when.metric(gpu.name),
            integrated=when.metric(gpu.integrated),
            memory_total_bytes=when.metric(gpu.memory_total_bytes),
            memory_used_bytes=when.metric(gpu.memory_used_bytes),
            utilisation_percent=when.metric(gpu.utilisation_percent),
            temperature_milli_c=when.metric(gpu.temperature_milli_c),
            power_mw=when.metric(gpu.power_mw),
            clock_hz=when.metric(gpu.clock_hz),
        )
        for gpu in gpus
    )


def mode_name(mode: Reading[PowerMode]) -> Reading[str]:
    """The name of the power mode, where nvpmodel's configuration gives it one."""
    if mode.value is not None and mode.value.name is None:
        return unsupported("/etc/nvpmodel.conf", f"no name for mode {mode.value.number}")
    return mode.parsed(lambda value: value.name)


def cuda_version(nvml: NvmlSnapshot) -> Reading[str]:
    """As people write it, such as 13.2."""
    return nvml.cuda_version.parsed(lambda version: "{}.{}".format(*version))


def _frozen(reading: Reading[T]) -> Reading[T]:
    return reading if reading.value is None else stale(reading.value, reading.source, _FROZEN)


def _as_float(of: Metric[int]) -> Metric[float]:
    value = None if of.value is None else float(of.value)
    return Metric(value, of.source, of.status, of.detail, of.age_s, of.period_s)


def _no_devfreq() -> Reading[int]:
    return unsupported("/sys/class/devfreq", "no GPU in it")


def _name(gpu: Gpu) -> str:
    return _GPU if gpu.index == 0 else f"{_GPU}{gpu.index}"
