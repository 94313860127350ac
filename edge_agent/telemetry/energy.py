"""The energy that a machine took: its total rail over time.

Pure. Only a rail that carries the whole machine counts; a GPU's own power is no part of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edge_agent.telemetry.reading import Reading, ReadingStatus, ok, unsupported

_TOTAL_RAILS: Final = ("VDD_IN", "VIN")
"""Of Orin Nano and NX, and of Thor's carrier: they hold the others."""
_HWMON: Final = "/sys/class/hwmon"


@dataclass(frozen=True, slots=True)
class PowerRail:
    """One measured supply."""

    name: str
    power_mw: Reading[int]


@dataclass(frozen=True, slots=True)
class PowerSample:
    """One reading of the power."""

    at_s: float
    power_mw: int


def total_rails(rails: Sequence[PowerRail]) -> Sequence[PowerRail]:
    """The rail of the whole machine, else (AGX Orin) all rails, whose sum it is."""
    return [rail for rail in rails if rail.name in _TOTAL_RAILS] or rails


def total_power_mw(rails: Sequence[PowerRail]) -> Reading[int]:
    """The power of the whole machine; a sum with a part unknown is unknown."""
    if not rails:
        return unsupported(_HWMON, "no power rail")
    total = total_rails(rails)
    for rail in total:
        if rail.power_mw.status is not ReadingStatus.OK:
            return rail.power_mw
    names = " + ".join(rail.name for rail in total)
    return ok(sum(rail.power_mw.value or 0 for rail in total), f"{_HWMON} {names}")


class EnergyMeter:
    """Adds up the energy from `started_s` on, by straight lines between samples (trapezoid).

    Between the last sample and the end the power is taken to be the last one. A time longer than
    `max_gap_s` without a sample is not bridged: the energy is unknown from then on.
    """

    def __init__(self, started_s: float, last: PowerSample | None, max_gap_s: float) -> None:
        """`last` is the newest sample before the start, if there is one."""
        self._started_s = started_s
        self._last = last
        self._max_gap_s = max_gap_s
        self._total_mj = 0.0
        self._has_gap = last is not None and started_s - last.at_s > max_gap_s

    def add(self, sample: PowerSample) -> None:
        """Take a sample that is newer than all before it."""
        last, self._last = self._last, sample
        begin_s = self._started_s if last is None else last.at_s
        self._has_gap |= sample.at_s - begin_s > self._max_gap_s
        if sample.at_s <= self._started_s:
            return
        if last is None:
            self._total_mj += sample.power_mw * (sample.at_s - begin_s)
            return
        from_s = max(last.at_s, self._started_s)
        share = (from_s - last.at_s) / (sample.at_s - last.at_s)
        first_mw = last.power_mw + share * (sample.power_mw - last.power_mw)
        self._total_mj += (first_mw + sample.power_mw) / 2 * (sample.at_s - from_s)

    def total_mj(self, now_s: float) -> float | None:
        """The energy up to now, in millijoules; None without samples or with a gap."""
        if self._last is None or self._has_gap or now_s - self._last.at_s > self._max_gap_s:
            return None
        rest_s = now_s - max(self._last.at_s, self._started_s)
        return self._total_mj + self._last.power_mw * max(rest_s, 0.0)
