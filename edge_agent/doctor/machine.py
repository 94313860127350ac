"""Checks of the machine itself: Jetson, release, power mode, memory, sensors.

Pure over readings: every value comes from `telemetry`.
"""

from pathlib import Path
from typing import Final

from edge_agent.doctor.finding import (
    Finding,
    fail,
    good,
    is_absent,
    unknown,
    unread,
    warn,
)
from edge_agent.telemetry import procfs, sensors, tegra
from edge_agent.telemetry.energy import PowerRail
from edge_agent.telemetry.reading import Reading
from edge_agent.telemetry.thermal import ThermalZone
from edge_agent.units import size_text

MIN_L4T_MAJOR: Final = 39
LOW_MEMORY_BYTES: Final = 512 << 20
NOT_A_JETSON: Final = "not a Jetson"

_NEAR_LIMIT_MILLI_C: Final = 5000
_INSTALL_JETPACK: Final = "install JetPack 7.2 (L4T R39) or newer, for example with SDK Manager"
_FREE_MEMORY: Final = (
    "stop what is not needed; `sudo systemctl isolate multi-user.target` ends a desktop and frees "
    "about 800 MB"
)


def check_machine(sysroot: Path) -> list[Finding]:
    """All of them, in the order in which they are shown."""
    machine = tegra.read_machine(sysroot)
    return [
        _jetson(machine),
        _module(machine),
        _l4t(machine, tegra.read_jetpack(sysroot)),
        _power_mode(machine, tegra.read_power_mode(sysroot)),
        _gpu_clock(machine, sensors.read_gpu_clock(sysroot)),
        _temperature(machine, sensors.read_thermal_zones(sysroot)),
        _power_rails(machine, sensors.read_power_rails(sysroot)),
        _memory(procfs.read_memory(sysroot), procfs.read_largest_free_block_bytes(sysroot)),
        _swap(machine, procfs.read_swaps(sysroot)),
        _pressure(procfs.read_pressure(sysroot)),
    ]


def _jetson(machine: tegra.Machine) -> Finding:
    model = machine.model.value
    if machine.is_jetson:
        return good("jetson", f"{model or 'unknown model'} ({machine.soc.value or 'unknown chip'})")
    return good("jetson", f"{NOT_A_JETSON}: {model}" if model else NOT_A_JETSON)


def _module(machine: tegra.Machine) -> Finding:
    if not machine.is_jetson:
        return good("module", NOT_A_JETSON)
    module = machine.module.value
    if module is None:
        return unread("module", machine.module, "nothing depends on it; the memory is what counts")
    if module.name is None:
        hint = "edge-agent does not know this part number; nothing depends on it"
        return unknown("module", module.part, hint)
    return good("module", f"{module.name} ({module.part})")


def _l4t(machine: tegra.Machine, jetpack: Reading[str]) -> Finding:
    if not machine.is_jetson:
        return good("l4t", NOT_A_JETSON)
    release = machine.release.value
    if release is None:
        hint = (
            "package nvidia-l4t-core writes it; into a container mount it: "
            "-v /etc/nv_tegra_release:/etc/nv_tegra_release:ro"
        )
        return unread("l4t", machine.release, hint)
    name = jetpack.value or release.jetpack
    value = f"{release}, JetPack {name}" if name else str(release)
    if release.major < MIN_L4T_MAJOR:
        return fail("l4t", f"{value}: older than R{MIN_L4T_MAJOR}", _INSTALL_JETPACK)
    return good("l4t", value)


def _power_mode(machine: tegra.Machine, mode: Reading[tegra.PowerMode]) -> Finding:
    if not machine.is_jetson:
        return good("power_mode", NOT_A_JETSON)
    if mode.value is None:
        return unread(
            "power_mode", mode, "`sudo nvpmodel -q` shows it, `sudo nvpmodel -m N` sets it"
        )
    return good("power_mode", f"{mode.value.name or 'unnamed'} ({mode.value.number})")


def _gpu_clock(machine: tegra.Machine, clock: sensors.GpuClock | None) -> Finding:
    if not machine.is_jetson:
        return good("gpu_clock", NOT_A_JETSON)
    if clock is None:
        hint = "it appears late at boot; without it the GPU driver is not loaded: see `dmesg`"
        return unknown("gpu_clock", "no GPU in /sys/class/devfreq", hint)
    if clock.clock_hz.value is None:
        return unread("gpu_clock", clock.clock_hz, "see `dmesg` for what the GPU driver says")
    value = f"{_mhz(clock.clock_hz.value)} MHz"
    if clock.max_clock_hz.value is not None:
        value += f" of {_mhz(clock.max_clock_hz.value)} MHz"
    if clock.load_permille.value is not None:
        value += f", {clock.load_permille.value / 10:.1f} % busy"
    return good("gpu_clock", value)


def _temperature(machine: tegra.Machine, zones: tuple[ThermalZone, ...]) -> Finding:
    measured = [
        (value, zone) for zone in zones if (value := zone.temperature_milli_c.value) is not None
    ]
    if not measured:
        if not machine.is_jetson:
            return good("temperature", "no sensors")
        hint = "unread sensors hide a hot machine: see `dmesg` for what the thermal driver says"
        return unknown("temperature", "no thermal zone can be read", hint)
    # The zone that is nearest to what it may reach, else the hottest.
    value, zone = max(
        measured, key=lambda pair: (pair[0] - (pair[1].passive_milli_c or 1 << 30), pair[0])
    )
    limit = zone.passive_milli_c
    text = f"{zone.name} {value / 1000:.1f} °C"
    if limit is None:
        return good("temperature", text)
    text += f", slowed down from {limit / 1000:.1f} °C on"
    if value < limit - _NEAR_LIMIT_MILLI_C:
        return good("temperature", text)
    return warn("temperature", text, "cool it, or choose a lower power mode: `sudo nvpmodel -m N`")


def _power_rails(machine: tegra.Machine, rails: tuple[PowerRail, ...]) -> Finding:
    shown = [
        f"{rail.name} {rail.power_mw.value / 1000:.1f} W"
        for rail in rails
        if rail.power_mw.value is not None
    ]
    if shown:
        return good("power_rails", ", ".join(shown))
    if not machine.is_jetson:
        return good("power_rails", NOT_A_JETSON)
    hint = "this carrier board has no INA3221 or INA238, or its driver is not loaded: see `dmesg`"
    return unknown("power_rails", "none can be read", hint)


def _memory(memory: procfs.Memory, largest_block_bytes: Reading[int]) -> Finding:
    total, available = memory.total_bytes, memory.available_bytes
    if total.value is None or available.value is None:
        missing = total if total.value is None else available
        hint = "in a container or a unit /proc must be whole: no ProcSubset=pid, no masked /proc"
        return unread("memory", missing, hint)
    parts = [f"{size_text(available.value)} of {size_text(total.value)} available"]
    if memory.cma_free_bytes.value is not None and memory.cma_total_bytes.value:
        cma = (
            f"{size_text(memory.cma_free_bytes.value)} of {size_text(memory.cma_total_bytes.value)}"
        )
        parts.append(f"CMA {cma} free")
    if largest_block_bytes.value:
        parts.append(f"largest free block {size_text(largest_block_bytes.value)}")
    if memory.huge_pages.value and memory.huge_page_bytes.value:
        reserved = memory.huge_pages.value * memory.huge_page_bytes.value
        parts.append(f"{size_text(reserved)} kept for huge pages")
    value = ", ".join(parts)
    if available.value < LOW_MEMORY_BYTES:
        return warn("memory", value, _FREE_MEMORY)
    return good("memory", value)


def _swap(machine: tegra.Machine, swaps: Reading[tuple[procfs.Swap, ...]]) -> Finding:
    if swaps.value is None:
        return unread("swap", swaps, "`swapon --show` tells; engines do not depend on it")
    zram = sum(swap.size_bytes for swap in swaps.value if swap.is_zram)
    disk = sum(swap.size_bytes for swap in swaps.value if not swap.is_zram)
    parts = [f"{size_text(disk)} on disk"] if disk else []
    parts += [f"{size_text(zram)} in zram"] if zram else []
    value = ", ".join(parts)
    if not value:
        return good("swap", "none")
    return good(
        "swap", f"{value} (the GPU's memory is never swapped)" if machine.is_jetson else value
    )


def _pressure(pressure: Reading[procfs.Pressure]) -> Finding:
    """Waiting for memory already now, before an engine is loaded."""
    if pressure.value is None:
        if is_absent(pressure):
            return good("memory_pressure", "not counted by this kernel")
        return unread("memory_pressure", pressure, "engines do not depend on it")
    percent = pressure.value.full_avg60_percent
    value = f"{percent:.1f} % of the last minute was lost waiting for memory"
    if percent >= 1:
        return warn("memory_pressure", value, _FREE_MEMORY)
    return good("memory_pressure", value)


def _mhz(hertz: int) -> int:
    return round(hertz / 1_000_000)
