"""How the scheduler sees the machine: from a telemetry snapshot to a `MachineView`.

MemAvailable is the truth where the GPU shares the CPU's memory; a discrete card's own memory counts
where there is one and engines are loaded into it.
"""

import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.scheduling.values import Heat, MachineView, Memory
from edge_agent.telemetry import procfs, tegra
from edge_agent.telemetry.nvml import Nvml
from edge_agent.telemetry.process import read_process_memory
from edge_agent.telemetry.reading import ReadingStatus
from edge_agent.telemetry.sampler import Sampler
from edge_agent.telemetry.snapshot import GpuMetrics, TelemetrySnapshot

_WARM_MILLI_C = 5000
"""Nearer than this to its limit a zone counts as warm."""
_AHEAD_S = 30.0
"""So is one that would get there within this time, heating as it does now."""


@dataclass(frozen=True, slots=True)
class ProcessBytes:
    """What one process takes: `all_bytes`, and of it `held_bytes` that are missing of MemAvailable.

    The pages of the files that it maps are in the former only: the kernel can take them back.
    """

    all_bytes: int
    held_bytes: int

    def plus(self, count: int) -> "ProcessBytes":
        """With so much more of a driver, which nobody can take back."""
        return ProcessBytes(self.all_bytes + count, self.held_bytes + count)


class Machine(Protocol):
    """What the scheduler asks of telemetry."""

    def view(self) -> MachineView:
        """How the machine is now."""
        ...

    @property
    def frees_with_process(self) -> bool:
        """Whether all that an engine takes is its process's own, so that its end gives it back.

        Not so where a GPU's driver holds a part of it.
        """
        ...

    def watch_closely(self) -> AbstractContextManager[None]:
        """Memory is sampled fast in this block."""
        ...

    def process_bytes(self, pid: int) -> ProcessBytes | None:
        """What one process holds; None where nobody tells all of it. Blocks.

        Without the driver's part where `driver_bytes` tells that.
        """
        ...

    def driver_bytes(self) -> int | None:
        """What the GPU's driver holds for all processes together; None where that is no question.

        Only where engines run on a GPU whose driver does not tell each process's part. Blocks.
        """
        ...


class TelemetryMachine:
    """The machine below `sysroot`, as the sampler sees it."""

    def __init__(
        self,
        sampler: Sampler,
        sysroot: Path,
        *,
        on_gpu: bool = False,
        nvml: Nvml | None = None,
    ) -> None:
        """Read once what does not change.

        `on_gpu`: engines run on a GPU. `nvml` None: as in `Sampler`.
        """
        machine = tegra.read_machine(sysroot)
        module = machine.module.value
        self._sampler = sampler
        self._sysroot = sysroot
        self._on_gpu = on_gpu
        self._had_zones = False
        self._on_card = False
        self._nvml = nvml or (Nvml() if sysroot == Path("/") else None)
        self._nvml_turn = threading.Lock()
        self.part = module.part if module else None
        self.total_bytes = procfs.read_memory(sysroot).total_bytes.value or 0

    @property
    def device(self) -> str:
        """The machine's kind, for what is remembered of engines on it."""
        return f"{self.part or 'unknown'}/{self.total_bytes >> 20}MiB"

    def view(self) -> MachineView:
        """How the machine is now."""
        return self.seen(self._sampler.latest)

    def seen(self, snapshot: TelemetrySnapshot) -> MachineView:
        """What a snapshot means."""
        self._on_card = _discrete(snapshot.gpus) is not None
        self._had_zones = self._had_zones or snapshot.thermal_margin_milli_c is not None
        return machine_view(
            snapshot,
            total_bytes=self.total_bytes,
            on_gpu=self._on_gpu,
            had_zones=self._had_zones,
        )

    @property
    def frees_with_process(self) -> bool:
        """On the CPU: the kernel takes everything back."""
        return not self._on_gpu

    def watch_closely(self) -> AbstractContextManager[None]:
        """Memory is sampled at 20 Hz in this block."""
        return self._sampler.fast()

    def process_bytes(self, pid: int) -> ProcessBytes | None:
        """The process's proportional set, and what NVML says it holds of an integrated GPU.

        On a discrete card only the latter: engines are loaded into its own memory. Blocks.
        """
        own = self._own_bytes(pid)
        if not self._on_gpu:
            return own
        on_gpu = self._on_nvml(pid)
        if on_gpu is None:
            return own if self._nvmap_bytes() is not None else None
        if self._on_card:
            own = ProcessBytes(0, 0)
        return own.plus(on_gpu) if own and on_gpu else None

    def driver_bytes(self) -> int | None:
        """NvMapMemUsed of a Jetson Orin, where NVML tells nothing of processes. Blocks."""
        if not self._on_gpu or self._on_nvml(os.getpid()) is not None:
            return None
        return self._nvmap_bytes()

    def _own_bytes(self, pid: int) -> ProcessBytes | None:
        memory = read_process_memory(self._sysroot, pid)
        pss, of_files = memory.pss_bytes.value, memory.pss_file_bytes.value
        return None if pss is None or of_files is None else ProcessBytes(pss, pss - of_files)

    def _on_nvml(self, pid: int) -> int | None:
        if self._nvml is None:
            return None
        with self._nvml_turn:
            return self._nvml.process_bytes(pid).value

    def _nvmap_bytes(self) -> int | None:
        return procfs.read_memory(self._sysroot).nvmap_used_bytes.value


def machine_view(
    snapshot: TelemetrySnapshot, *, total_bytes: int, on_gpu: bool, had_zones: bool
) -> MachineView:
    """What a snapshot means for decisions.

    Args:
        snapshot: as old as it is by now.
        total_bytes: for where telemetry has no total yet.
        on_gpu: whether engines run on a GPU at all; a discrete card's memory counts only then.
        had_zones: whether a temperature was ever read: if so, none now is not nominal.
    """
    card = _discrete(snapshot.gpus) if on_gpu else None
    if card is not None:
        total, used = card.memory_total_bytes.value or 0, card.memory_used_bytes.fresh
        memory = Memory(total, None if used is None else total - used)
    else:
        memory = Memory(snapshot.mem_total_bytes or total_bytes, snapshot.mem_available_bytes)
    return MachineView(
        memory,
        snapshot.some_avg10_percent,
        snapshot.full_avg10_percent,
        heat(snapshot, had_zones=had_zones),
        snapshot.power_mode_number,
    )


def heat(snapshot: TelemetrySnapshot, *, had_zones: bool) -> Heat:
    """How warm the machine is; a sensor that has failed is never taken for a cool one."""
    if snapshot.is_throttled:
        return Heat.THROTTLED
    margin = snapshot.thermal_margin_milli_c
    if margin is None:
        failed = snapshot.hottest.status in (ReadingStatus.ERROR, ReadingStatus.STALE)
        return Heat.UNKNOWN if had_zones or failed else Heat.NOMINAL
    slope = snapshot.thermal_slope_milli_c_per_s or 0.0
    if margin < _WARM_MILLI_C or margin - slope * _AHEAD_S <= 0:
        return Heat.WARM
    return Heat.NOMINAL


def _discrete(gpus: tuple[GpuMetrics, ...]) -> GpuMetrics | None:
    for gpu in gpus:
        if gpu.integrated.value is False and gpu.memory_total_bytes.value:
            return gpu
    return None
