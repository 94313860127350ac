"""Temperatures, power rails and the GPU's clock, from sysfs.

Directories are looked for at every read: some appear late at boot. A rail costs some 0.6 ms of I2C
and lags by 0.3 s, so whoever samples does not ask for them often.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.telemetry.energy import PowerRail
from edge_agent.telemetry.files import names_in, read_int, read_text
from edge_agent.telemetry.reading import Reading, failed
from edge_agent.telemetry.thermal import ThermalZone, TripPoint

_THERMAL: Final = "sys/class/thermal"
_HWMON: Final = "sys/class/hwmon"
_DEVFREQ: Final = "sys/class/devfreq"
_PLAUSIBLE_MILLI_C: Final = range(-50_000, 200_001)
_RAILS: Final = 3  # an INA3221 measures three; its further channels are sums of them
_MAX_TRIP_POINTS: Final = 16
_GPU_NAMES: Final = ("gpu", "ga10b", "gb10b", "gv11b", "gp10b")
_MAX_PERMILLE: Final = 1000


@dataclass(frozen=True, slots=True)
class GpuClock:
    """The GPU as devfreq shows it: load on Orin only, clocks on Thor too."""

    name: str
    load_permille: Reading[int]
    clock_hz: Reading[int]
    max_clock_hz: Reading[int]


def read_thermal_zones(sysroot: Path) -> tuple[ThermalZone, ...]:
    """Every zone; the PMIC's is left out, since it shows a constant."""
    zones = []
    for entry in names_in(sysroot, _THERMAL):
        path = f"{_THERMAL}/{entry}"
        name = read_text(sysroot, f"{path}/type").value
        if not entry.startswith("thermal_zone") or not name or "PMIC" in name:
            continue
        temperature = read_int(sysroot, f"{path}/temp").parsed(_plausible)
        zones.append(ThermalZone(name, temperature, _trip_points(sysroot, path)))
    return tuple(zones)


def read_power_rails(sysroot: Path) -> tuple[PowerRail, ...]:
    """Every rail of INA3221 (Orin) and INA238 (Thor)."""
    rails: list[PowerRail] = []
    for entry in names_in(sysroot, _HWMON):
        path = f"{_HWMON}/{entry}"
        chip = read_text(sysroot, f"{path}/name").value
        if chip == "ina238":
            micro_w = read_int(sysroot, f"{path}/power1_input")
            rails.append(PowerRail("VIN", micro_w.parsed(lambda uw: max(uw, 0) // 1000)))
        if chip == "ina3221":
            rails += _ina3221(sysroot, path)
    return tuple(rails)


def read_gpu_clock(sysroot: Path) -> GpuClock | None:
    """The GPU's entry in devfreq; None where there is none, or not yet."""
    for entry in names_in(sysroot, _DEVFREQ):
        path = f"{_DEVFREQ}/{entry}"
        node = read_text(sysroot, f"{path}/device/of_node/name").value or ""
        if any(name in entry or name == node for name in _GPU_NAMES):
            load = read_int(sysroot, f"{path}/device/load")
            return GpuClock(
                entry,
                load.parsed(lambda value: value if 0 <= value <= _MAX_PERMILLE else None),
                read_int(sysroot, f"{path}/cur_freq").parsed(_positive),
                read_int(sysroot, f"{path}/max_freq").parsed(_positive),
            )
    return None


def _trip_points(sysroot: Path, path: str) -> tuple[TripPoint, ...]:
    points = []
    for index in range(_MAX_TRIP_POINTS):
        kind = read_text(sysroot, f"{path}/trip_point_{index}_type").value
        at = read_int(sysroot, f"{path}/trip_point_{index}_temp").parsed(_plausible).value
        if not kind:
            break
        if at is not None:
            points.append(TripPoint(kind, at))
    return tuple(points)


def _ina3221(sysroot: Path, path: str) -> list[PowerRail]:
    rails = []
    for channel in range(1, _RAILS + 1):
        name = read_text(sysroot, f"{path}/in{channel}_label").value
        if not name or name == "NC" or "sum of" in name:
            continue
        milli_v = read_int(sysroot, f"{path}/in{channel}_input")
        milli_a = read_int(sysroot, f"{path}/curr{channel}_input")
        rails.append(PowerRail(name, _product(milli_v, milli_a)))
    return rails


def _product(milli_v: Reading[int], milli_a: Reading[int]) -> Reading[int]:
    volts, amperes = milli_v.value, milli_a.value
    if volts is None or amperes is None:
        missing = milli_v if volts is None else milli_a
        return Reading(None, missing.source, missing.status, missing.detail)
    power_mw = volts * amperes // 1000
    if power_mw < 0:
        return failed(milli_a.source, "a negative power")
    return Reading(power_mw, milli_a.source, milli_a.status)


def _plausible(milli_c: int) -> int | None:
    """A sensor that is switched off shows numbers such as -256000."""
    return milli_c if milli_c in _PLAUSIBLE_MILLI_C else None


def _positive(value: int) -> int | None:
    return value if value > 0 else None
