"""What the machine says around a measurement: what it is, its power and its temperature.

Reads below a root and changes nothing. `PowerMeter` owns a thread while it is open.
"""

import contextlib
import os
import platform
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from edge_agent.measuring.results import MachineInfo
from edge_agent.telemetry import procfs, sensors, tegra
from edge_agent.telemetry.energy import PowerSample, total_rails
from edge_agent.telemetry.files import read_lines
from edge_agent.telemetry.nvml import Gpu, Nvml

_SAMPLE_INTERVAL_S: Final = 0.1
"""A rail is its own mean over some 0.3 s: to ask more often tells nothing more."""


def read_machine_info(sysroot: Path) -> MachineInfo:
    """The machine below `sysroot`, with the power mode that is in force."""
    machine = tegra.read_machine(sysroot)
    mode = tegra.read_power_mode(sysroot).value
    module = machine.module.value
    return MachineInfo(
        model=machine.model.value,
        module=(module.name or module.part) if module else None,
        cpu=_cpu(sysroot),
        cores=os.cpu_count(),
        memory_total_bytes=procfs.read_memory(sysroot).total_bytes.value,
        l4t_release=str(machine.release.value) if machine.release.value else None,
        kernel=f"Linux {platform.release()} {platform.machine()}",
        power_mode=(mode.name or f"mode {mode.number}") if mode else None,
    )


def read_temperature_milli_c(sysroot: Path, nvml: Nvml) -> int | None:
    """The hottest thermal zone, else the hottest GPU."""
    zones = [zone.temperature_milli_c.value for zone in sensors.read_thermal_zones(sysroot)]
    known = [value for value in zones if value is not None]
    if not known:
        gpus = [gpu.temperature_milli_c.value for gpu in _gpus(sysroot, nvml)]
        known = [value for value in gpus if value is not None]
    return max(known, default=None)


def read_power_mw(sysroot: Path, nvml: Nvml) -> tuple[int, str] | None:
    """The power now and what it was read from: the rail of the whole, all rails, else the GPUs."""
    rails = sensors.read_power_rails(sysroot)
    total = total_rails(rails)
    watts = [rail.power_mw.value for rail in total]
    source = " + ".join(rail.name for rail in total)
    if not total:
        gpus = _gpus(sysroot, nvml)
        watts = [gpu.power_mw.value for gpu in gpus]
        source = "NVML, GPU alone" if len(gpus) == 1 else "NVML, GPUs alone"
    known = [value for value in watts if value is not None]
    return (sum(known), source) if known and len(known) == len(watts) else None


class PowerMeter:
    """Samples the power in a thread of its own while it is open; none where there is no rail."""

    def __init__(self, sysroot: Path) -> None:
        self._sysroot = sysroot
        self._nvml = Nvml()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power-meter", daemon=True)
        first = read_power_mw(sysroot, self._nvml)
        self.source = first[1] if first else None
        self._samples = [PowerSample(time.monotonic(), first[0])] if first else []

    def __enter__(self) -> Self:
        if self.source is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self._nvml.close()

    @property
    def samples(self) -> tuple[PowerSample, ...]:
        """By `time.monotonic`; once it is closed they span the time in which it was open."""
        return tuple(self._samples)

    def _run(self) -> None:
        has_ended = False
        while not has_ended:
            has_ended = self._end.wait(_SAMPLE_INTERVAL_S)
            power = read_power_mw(self._sysroot, self._nvml)
            if power is not None:
                self._samples.append(PowerSample(time.monotonic(), power[0]))


def _gpus(sysroot: Path, nvml: Nvml) -> tuple[Gpu, ...]:
    """NVML knows this machine alone."""
    return (nvml.read().gpus.value or ()) if sysroot == Path("/") else ()


def _cpu(sysroot: Path) -> str | None:
    """As an x86-64 kernel names it; Arm kernels name none."""
    with contextlib.suppress(OSError):
        for line in read_lines(sysroot, "proc/cpuinfo"):
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return None
