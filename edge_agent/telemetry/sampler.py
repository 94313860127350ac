"""The thread that asks the machine how it is, and keeps the newest snapshot.

Owns the thread and what is read how often. Memory is read fast; the rest on the same ticks, more
rarely. Every reader is asked again each time, whatever it said before. A reader that blocks blocks
this thread alone: the last snapshot ages, and whoever looks at it sees STALE.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog

from edge_agent.telemetry import composition, procfs, sensors, tegra
from edge_agent.telemetry.composition import When
from edge_agent.telemetry.energy import PowerRail, total_power_mw
from edge_agent.telemetry.nvml import Gpu, Nvml, NvmlSnapshot
from edge_agent.telemetry.reading import Reading, failed, unsupported
from edge_agent.telemetry.snapshot import RailMetrics, TelemetrySnapshot, ZoneMetrics
from edge_agent.telemetry.thermal import HottestZone, ThermalHistory, ThermalZone

T = TypeVar("T")

DEFAULT_INTERVAL_S: Final = 0.25
_FAST_S: Final = 0.05
_SENSORS_S: Final = 1.0
_RAILS_S: Final = 2.0
"""An INA3221 takes some 0.6 ms of I2C a rail."""
_MODE_S: Final = 5.0
_NVML_S: Final = 5.0
_NVML_ALONE_S: Final = 1.0
"""Where devfreq has no load, NVML is what tells it."""
_STOP_S: Final = 1.0
_NOT_READ: Final = "not read yet"

log = structlog.get_logger()


class _Group(Generic[T]):
    """Readers that are asked together, every `period_s`."""

    def __init__(self, name: str, read: Callable[[], T], nothing: T, period_s: float) -> None:
        self.name = name
        self.value = nothing
        self.period_s = period_s
        self.read_at_s: float | None = None
        self._read = read
        self._fails = False

    def is_due(self, now_s: float, tolerance_s: float) -> bool:
        return self.read_at_s is None or now_s - self.read_at_s >= self.period_s - tolerance_s

    def refresh(self, now_s: float) -> bool:
        """Ask; what raises against its contract leaves the old value, which ages."""
        try:
            self.value = self._read()
        except Exception:
            if not self._fails:
                log.exception("telemetry_reader_failed", readers=self.name)
            self._fails = True
            return False
        self._fails, self.read_at_s = False, now_s
        return True


class Sampler:
    """Samples the machine below `sysroot` from `start` to `stop`.

    `on_snapshot` is called in the sampler's thread with each new snapshot and must not block.
    `nvml` None: the driver's, which knows this machine alone, so only where `sysroot` is `/`.
    """

    def __init__(
        self,
        sysroot: Path,
        *,
        interval_s: float = DEFAULT_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        on_snapshot: Callable[[TelemetrySnapshot], None] = lambda _snapshot: None,
        nvml: Nvml | None = None,
    ) -> None:
        self._sysroot = sysroot
        self._interval_s = interval_s
        self._clock = clock
        self._unix_clock = unix_clock
        self._on_snapshot = on_snapshot
        self._nvml_library = nvml or (Nvml() if sysroot == Path("/") else None)
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._wake = threading.Event()
        self._stopping = False
        self._fast_count = 0
        self._fast_lock = threading.Lock()
        self._freezing = composition.Freezing()
        self._history = ThermalHistory()
        self._hottest: Reading[HottestZone] = failed("/sys/class/thermal", _NOT_READ)
        self._started_s = clock()
        self._make_groups()
        self._latest = self._compose(self._started_s)

    def _make_groups(self) -> None:
        nothing = composition.unread(procfs.Memory, failed("/proc/meminfo", _NOT_READ))
        pressure: Reading[procfs.Pressure] = failed("/proc/pressure/memory", _NOT_READ)
        block: Reading[int] = failed("/proc/buddyinfo", _NOT_READ)
        zones: tuple[ThermalZone, ...] = ()
        clock: sensors.GpuClock | None = None
        rails: tuple[PowerRail, ...] = ()
        mode: Reading[tegra.PowerMode] = failed("/var/lib/nvpmodel/status", _NOT_READ)
        nvml = composition.unread(NvmlSnapshot, failed("NVML", _NOT_READ))
        root = self._sysroot
        self._memory = _Group(
            "memory", self._read_memory, (nothing, pressure, block), self._interval_s
        )
        self._sensors = _Group("sensors", self._read_sensors, (zones, clock), _SENSORS_S)
        self._rails = _Group("rails", lambda: sensors.read_power_rails(root), rails, _RAILS_S)
        self._mode = _Group("power_mode", lambda: tegra.read_power_mode(root), mode, _MODE_S)
        self._nvml = _Group("nvml", self._read_nvml, nvml, _NVML_S)

    def start(self) -> None:
        """Begin to sample, in a thread of its own. After any fork: NVML does not survive one."""
        self._thread.start()

    def stop(self, timeout_s: float = _STOP_S) -> bool:
        """End the thread; False if a reader blocks it still, which harms nobody."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def latest(self) -> TelemetrySnapshot:
        """The newest snapshot, as old as it is by now; from any thread."""
        return self._latest.at(self._clock())

    @contextlib.contextmanager
    def fast(self) -> Iterator[None]:
        """Memory is read at 20 Hz in this block; blocks may overlap."""
        self._count_fast(1)
        try:
            yield
        finally:
            self._count_fast(-1)

    def sample(self, now_s: float) -> TelemetrySnapshot:
        """Ask all readers that are due, NVML from the second time on; the thread's work.

        NVML's first call may take long or never return: it does not keep the first snapshot back.
        """
        is_first = self._memory.read_at_s is None
        self._memory.refresh(now_s)
        sensors_read = self._refresh_if_due(self._sensors, now_s)
        self._refresh_if_due(self._rails, now_s)
        self._refresh_if_due(self._mode, now_s)
        nvml_read = not is_first and self._refresh_if_due(self._nvml, now_s)
        if nvml_read:
            self._nvml.period_s = _NVML_S if self._has_load() or not self._gpus() else _NVML_ALONE_S
        supplier_read = sensors_read if self._sensors.value[0] or not self._gpus() else nvml_read
        if supplier_read:
            self._hottest = self._history.add(now_s, self._zones(now_s)[0])
        self._latest = self._compose(now_s)
        return self._latest

    def _refresh_if_due(self, group: "_Group[T]", now_s: float) -> bool:
        """Slow groups are asked on the ticks of memory: the one that is nearest to their time."""
        return group.is_due(now_s, self._interval_s / 2) and group.refresh(now_s)

    def _run(self) -> None:
        while not self._stopping:
            now_s = self._clock()
            snapshot = self.sample(now_s)
            if not self._stopping:  # else whom it is for may be gone
                self._on_snapshot(snapshot)
            interval_s = _FAST_S if self._fast_count else self._interval_s
            self._wake.wait(max(0.0, now_s + interval_s - self._clock()))
            self._wake.clear()
        if self._nvml_library is not None:
            self._nvml_library.close()

    def _count_fast(self, change: int) -> None:
        with self._fast_lock:
            self._fast_count += change
        if change > 0:
            self._wake.set()

    # --- reading ---

    def _read_memory(
        self,
    ) -> tuple[procfs.Memory, Reading[procfs.Pressure], Reading[int]]:
        root, now_s = self._sysroot, self._clock()
        return (
            self._freezing.memory(now_s, procfs.read_memory(root)),
            self._freezing.pressure(now_s, procfs.read_pressure(root)),
            procfs.read_largest_free_block_bytes(root),
        )

    def _read_sensors(self) -> tuple[tuple[ThermalZone, ...], sensors.GpuClock | None]:
        return sensors.read_thermal_zones(self._sysroot), sensors.read_gpu_clock(self._sysroot)

    def _read_nvml(self) -> NvmlSnapshot:
        if self._nvml_library is None:
            return composition.unread(NvmlSnapshot, unsupported("NVML", "of another machine"))
        return self._nvml_library.read()

    # --- composing ---

    def _gpus(self) -> tuple[Gpu, ...]:
        return self._nvml.value.gpus.value or ()

    def _has_load(self) -> bool:
        clock = self._sensors.value[1]
        return clock is not None and clock.load_permille.value is not None

    def _when(self, group: "_Group[T]", now_s: float) -> When:
        read_at_s = self._started_s if group.read_at_s is None else group.read_at_s
        return When(max(0.0, now_s - read_at_s), group.period_s)

    def _zones(self, now_s: float) -> tuple[tuple[ThermalZone, ...], When]:
        """The kernel's, else NVML's."""
        zones, _clock = self._sensors.value
        if zones or not self._gpus():
            return zones, self._when(self._sensors, now_s)
        return composition.zones_of_gpus(self._gpus()), self._when(self._nvml, now_s)

    def _power(self, now_s: float) -> tuple[tuple[PowerRail, ...], Reading[int], When]:
        """The rails, the machine's total, and when: NVML's power is of GPUs alone, so no total."""
        rails, when = self._rails.value, self._when(self._rails, now_s)
        if self._rails.read_at_s is None:
            return (), failed("/sys/class/hwmon", _NOT_READ), when
        if rails or not self._gpus():
            return rails, total_power_mw(rails), when
        return composition.rails_of_gpus(self._gpus()), total_power_mw(()), when

    def _compose(self, now_s: float) -> TelemetrySnapshot:
        memory, pressure, block = self._memory.value
        _, clock = self._sensors.value
        mode, nvml = self._mode.value, self._nvml.value
        memory_when, sensors_when = (
            self._when(self._memory, now_s),
            self._when(self._sensors, now_s),
        )
        mode_when, nvml_when = self._when(self._mode, now_s), self._when(self._nvml, now_s)
        zones, zones_when = self._zones(now_s)
        rails, power, rails_when = self._power(now_s)
        gpus = composition.gpu_metrics(self._gpus(), nvml_when)
        return TelemetrySnapshot(
            sampled_at_s=now_s,
            as_of_s=now_s,
            sampled_at_unix_s=self._unix_clock(),
            memory=composition.memory_metrics(memory, block, memory_when),
            pressure=composition.pressure_metrics(pressure, memory_when),
            gpu_utilisation_percent=composition.utilisation(clock, sensors_when, gpus),
            gpu_clock_hz=composition.clock_hz(clock, sensors_when, gpus),
            gpu_max_clock_hz=composition.max_clock_hz(clock, sensors_when),
            zones=tuple(
                ZoneMetrics(
                    zone.name, zones_when.metric(zone.temperature_milli_c), zone.trip_points
                )
                for zone in zones
            ),
            hottest=zones_when.metric(self._hottest),
            rails=tuple(RailMetrics(rail.name, rails_when.metric(rail.power_mw)) for rail in rails),
            power_mw=rails_when.metric(power),
            power_mode=mode_when.metric(mode.parsed(lambda mode: mode.number)),
            power_mode_name=mode_when.metric(composition.mode_name(mode)),
            throttling=zones_when.metric(composition.throttling(zones, self._gpus())),
            driver_version=nvml_when.metric(nvml.driver_version),
            cuda_version=nvml_when.metric(composition.cuda_version(nvml)),
            gpus=gpus,
        )
