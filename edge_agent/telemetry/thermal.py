"""How near the machine is to the temperature at which it slows down, and how fast it gets there.

Pure. A sensor that can't be read is unknown, never cool: it is named, and whether the machine is
throttled is unknown with it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edge_agent.telemetry.reading import Reading, ReadingStatus, failed, ok, unsupported

SLOPE_WINDOW_S: Final = 10.0
_MIN_SLOPE_SPAN_S: Final = 2.0
"""A sensor resolves 0.5 °C at best: a shorter span would show its steps as heating."""
_LIMITS: Final = ("passive", "hot", "critical")
_THERMAL: Final = "/sys/class/thermal"


@dataclass(frozen=True, slots=True)
class TripPoint:
    """A temperature at which the kernel acts: `kind` is active, passive, hot or critical."""

    kind: str
    temperature_milli_c: int


@dataclass(frozen=True, slots=True)
class ThermalZone:
    """One sensor and what happens at which temperature."""

    name: str
    temperature_milli_c: Reading[int]
    trip_points: tuple[TripPoint, ...]

    @property
    def passive_milli_c(self) -> int | None:
        """Where the kernel begins to lower clocks."""
        return self._lowest(("passive",))

    @property
    def limit_milli_c(self) -> int | None:
        """The nearest temperature that must not be reached; a fan's (active) is none."""
        return self._lowest(_LIMITS)

    def _lowest(self, kinds: tuple[str, ...]) -> int | None:
        # Firmware writes 0 for a trip point that it does not use.
        found = [
            point.temperature_milli_c
            for point in self.trip_points
            if point.kind in kinds and point.temperature_milli_c > 0
        ]
        return min(found, default=None)


@dataclass(frozen=True, slots=True)
class HottestZone:
    """The zone that is nearest to its limit.

    `margin_milli_c` is what is left to it, below 0 beyond it, None where no zone has one.
    `slope_milli_c_per_s` is over the last 10 s, None where that is too little to tell.
    `unreadable` are zones with a limit whose sensor failed: one of them may be hotter.
    """

    name: str
    temperature_milli_c: int
    margin_milli_c: int | None
    slope_milli_c_per_s: float | None
    unreadable: tuple[str, ...] = ()


class ThermalHistory:
    """The temperatures of the last SLOPE_WINDOW_S, zone by zone."""

    def __init__(self) -> None:
        self._points: dict[tuple[str, int], deque[tuple[float, int]]] = {}

    def add(self, now_s: float, zones: Sequence[ThermalZone]) -> Reading[HottestZone]:
        """Take the temperatures of now; the hottest zone with its slope up to now."""
        slopes: list[float | None] = []
        for key, zone in zip(_keys(zones), zones, strict=True):
            points = self._points.setdefault(key, deque())
            if zone.temperature_milli_c.status is ReadingStatus.OK:
                points.append((now_s, zone.temperature_milli_c.value or 0))
            while points and points[0][0] < now_s - SLOPE_WINDOW_S:
                points.popleft()
            slopes.append(slope_milli_c_per_s(points))
        return hottest_zone(zones, slopes)


def hottest_zone(
    zones: Sequence[ThermalZone], slopes: Sequence[float | None]
) -> Reading[HottestZone]:
    """The zone with the least margin, else the hottest; `slopes` are theirs, in order."""
    measured = [
        (zone, zone.temperature_milli_c.value, slope)
        for zone, slope in zip(zones, slopes, strict=True)
        if zone.temperature_milli_c.value is not None
    ]
    if not measured:
        if any(_has_failed(zone) for zone in zones):
            return failed(_THERMAL, "no sensor can be read")
        return unsupported(_THERMAL, "no sensors")
    limited = [entry for entry in measured if entry[0].limit_milli_c is not None]
    zone, value, slope = max(
        limited or measured, key=lambda entry: entry[1] - (entry[0].limit_milli_c or 0)
    )
    limit = zone.limit_milli_c
    margin = None if limit is None else limit - value
    unreadable = tuple(
        zone.name for zone in zones if zone.limit_milli_c is not None and _has_failed(zone)
    )
    hottest = HottestZone(zone.name, value, margin, slope, unreadable)
    return ok(hottest, zone.temperature_milli_c.source)


def is_throttled(zones: Sequence[ThermalZone]) -> Reading[bool]:
    """Whether a zone is at or over its passive trip point; `detail` names it."""
    watched = [(zone, limit) for zone in zones if (limit := zone.passive_milli_c) is not None]
    for zone, limit in watched:
        value = zone.temperature_milli_c.value
        if value is not None and value >= limit:
            detail = f"{zone.name} {value / 1000:.1f} °C, slowed down from {limit / 1000:.1f} °C on"
            return Reading(True, zone.temperature_milli_c.source, ReadingStatus.OK, detail)
    broken = next((zone for zone, _limit in watched if _has_failed(zone)), None)
    if broken is not None:
        return failed(broken.temperature_milli_c.source, f"{broken.name} can't be read")
    if not any(zone.temperature_milli_c.value is not None for zone, _limit in watched):
        return unsupported(_THERMAL, "no sensor with a passive trip point")
    return ok(False, _THERMAL)


def slope_milli_c_per_s(points: Sequence[tuple[float, int]]) -> float | None:
    """The least-squares slope of (seconds, milli-°C); None where they span too little."""
    if len(points) < 3 or points[-1][0] - points[0][0] < _MIN_SLOPE_SPAN_S:  # noqa: PLR2004 - two points are a step
        return None
    mean_s = sum(at for at, _value in points) / len(points)
    mean = sum(value for _at, value in points) / len(points)
    spread = sum((at - mean_s) ** 2 for at, _value in points)
    return sum((at - mean_s) * (value - mean) for at, value in points) / spread


def _has_failed(zone: ThermalZone) -> bool:
    """A sensor that is switched off is unsupported; only a broken one hides heat."""
    return zone.temperature_milli_c.status in (ReadingStatus.ERROR, ReadingStatus.STALE)


def _keys(zones: Sequence[ThermalZone]) -> list[tuple[str, int]]:
    """Names are not unique: the nth zone of a name."""
    names = [zone.name for zone in zones]
    return [(name, names[:index].count(name)) for index, name in enumerate(names)]
