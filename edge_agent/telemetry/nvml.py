"""The GPUs as NVML sees them, through the real `pynvml`, which is imported at the first use.

On Jetson the library is there and answers NOT_SUPPORTED to most questions: that is a reading
without a value, asked again each time, never 0. A library that is missing, a driver that is not
loaded or a GPU that is lost ends in readings too, and the next `read` starts afresh.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from edge_agent.telemetry.reading import Reading, failed, ok, unsupported
from edge_agent.telemetry.snapshot import ThrottleReason

T = TypeVar("T")

_LIBRARY: Final = "libnvidia-ml.so.1"
LIBRARY_MISSING: Final = f"the library {_LIBRARY} is not there"
_UNINITIALISED: Final = 1
_NOT_SUPPORTED: Final = frozenset({3, 13, 25, 26})
"""NOT_SUPPORTED, FUNCTION_NOT_FOUND, ARGUMENT_VERSION_MISMATCH, DEPRECATED."""
_LIBRARY_NOT_FOUND: Final = 12
_START_AFRESH: Final = frozenset({_UNINITIALISED, 9, 15, 16, 18})
"""UNINITIALIZED, DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED, LIB_RM_VERSION_MISMATCH:
what a new initialisation may mend."""
_WORDS: Final = {
    1: "not initialised any more",
    3: "not supported",
    9: "the driver is not loaded",
    12: LIBRARY_MISSING,
    13: "not in this driver",
    15: "the GPU is lost",
    16: "the GPU needs a reset",
    18: "driver and library are of different versions",
}
_NVGPU: Final = "(nvgpu)"
_UNIFIED: Final = ("Thor", "GB10")
_MAX_PERCENT: Final = 100
_PROCESSES: Final = "nvmlDeviceGetComputeRunningProcesses"
_MAX_GPUS: Final = 64
_THROTTLE_REASONS: Final = {
    0x04: ThrottleReason.POWER,  # SwPowerCap
    0x08: ThrottleReason.HARDWARE,  # HwSlowdown
    0x20: ThrottleReason.THERMAL,  # SwThermalSlowdown
    0x40: ThrottleReason.THERMAL,  # HwThermalSlowdown
    0x80: ThrottleReason.POWER,  # HwPowerBrakeSlowdown
}
"""The clocks event reasons that slow a GPU down; the others (idle, settings of an operator) do not
mean that it can do less. From nvml.h."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `integrated`: it shares the memory of the CPU, so there is no memory of its own."""

    index: int
    name: Reading[str]
    integrated: Reading[bool]
    compute_capability: Reading[tuple[int, int]]
    memory_total_bytes: Reading[int]
    memory_used_bytes: Reading[int]
    utilisation_percent: Reading[int]
    temperature_milli_c: Reading[int]
    power_mw: Reading[int]
    clock_hz: Reading[int]
    throttling: Reading[tuple[ThrottleReason, ...]]


@dataclass(frozen=True, slots=True)
class NvmlSnapshot:
    """What NVML said at one time."""

    driver_version: Reading[str]
    cuda_version: Reading[tuple[int, int]]
    gpus: Reading[tuple[Gpu, ...]]


class Nvml:
    """Keeps the library initialised between reads. For one thread; its calls may block."""

    def __init__(self) -> None:
        """Nothing is loaded yet: an initialisation does not survive a fork."""
        self._library: Any = None
        self._process_id: int | None = None

    def read(self) -> NvmlSnapshot:
        """Everything, as of now."""
        start = self._start()
        if start.value is None:
            return NvmlSnapshot(
                start.parsed(str), start.parsed(_no_version), start.parsed(_no_gpus)
            )
        library = self._library
        return NvmlSnapshot(
            self._ask("nvmlSystemGetDriverVersion"),
            self._ask("nvmlSystemGetCudaDriverVersion", read=_cuda_version),
            self._ask("nvmlDeviceGetCount").parsed(
                lambda count: (
                    tuple(self._gpu(library, index) for index in range(count))
                    if count <= _MAX_GPUS
                    else None
                )
            ),
        )

    def process_bytes(self, pid: int) -> Reading[int]:
        """GPU memory of one process, over all GPUs; 0 when none computes for it."""
        start = self._start()
        count: Reading[int] = self._ask("nvmlDeviceGetCount") if start.value else start.parsed(int)
        held = 0
        for index in range(min(count.value or 0, _MAX_GPUS)):
            found = self._process_bytes(index, pid)
            if found.value is None:
                return found
            held += found.value
        return count.parsed(lambda _: held)

    def _process_bytes(self, index: int, pid: int) -> Reading[int]:
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        name = self._ask("nvmlDeviceGetName", handle.value) if handle.value else handle
        if name.value is None:
            return name
        processes: Reading[list[Any]] = self._ask(_PROCESSES, handle.value)
        held = [each.usedGpuMemory for each in processes.value or () if each.pid == pid]
        if None in held:
            return unsupported(_PROCESSES, "the driver does not tell how much")
        return _believed(name, processes.parsed(lambda _: sum(held)))

    def close(self) -> None:
        """Let go of the driver; the next read initialises again."""
        library, self._process_id = self._library, None
        if library is not None:
            with contextlib.suppress(library.NVMLError):
                library.nvmlShutdown()

    def _start(self) -> Reading[bool]:
        if self._process_id == os.getpid():
            return ok(True, "nvmlInit")
        import ctypes

        try:
            ctypes.CDLL(_LIBRARY)
        except OSError:  # found out here, since pynvml takes 5 MiB to say the same
            return unsupported("nvmlInit", LIBRARY_MISSING)
        import pynvml  # large: only where there is a driver

        self._library = pynvml
        started = self._ask("nvmlInit", read=lambda _: True)
        if started.value:
            self._process_id = os.getpid()
        return started

    def _gpu(self, library: Any, index: int) -> Gpu:
        handle: Reading[Any] = self._ask("nvmlDeviceGetHandleByIndex", index)

        def ask(function: str, *arguments: object, read: Callable[[Any], Any]) -> Reading[Any]:
            if handle.value is None:
                return handle
            return self._ask(function, handle.value, *arguments, read=read)

        name: Reading[str] = ask("nvmlDeviceGetName", read=_text)
        memory: Reading[Any] = ask("nvmlDeviceGetMemoryInfo", read=_memory)
        sensor, clock = library.NVML_TEMPERATURE_GPU, library.NVML_CLOCK_SM
        return Gpu(
            index=index,
            name=name,
            integrated=_integrated(name, memory),
            compute_capability=ask("nvmlDeviceGetCudaComputeCapability", read=tuple),
            memory_total_bytes=memory.parsed(lambda info: int(info.total)),
            memory_used_bytes=memory.parsed(lambda info: int(info.used)),
            utilisation_percent=_believed(
                name, ask("nvmlDeviceGetUtilizationRates", read=lambda rates: int(rates.gpu))
            ).parsed(lambda value: value if value <= _MAX_PERCENT else None),
            temperature_milli_c=ask(
                "nvmlDeviceGetTemperature", sensor, read=lambda celsius: int(celsius) * 1000
            ),
            power_mw=ask("nvmlDeviceGetPowerUsage", read=int),
            clock_hz=ask("nvmlDeviceGetClockInfo", clock, read=lambda mhz: int(mhz) * 1_000_000),
            throttling=_believed(
                name, ask("nvmlDeviceGetCurrentClocksEventReasons", read=_throttle_reasons)
            ),
        )

    def _ask(
        self, function: str, *arguments: object, read: Callable[[Any], T | None] | None = None
    ) -> Reading[Any]:
        """One call: its value, or unsupported, or an error. `read` returns None for nonsense."""
        library = self._library
        try:
            answer = getattr(library, function)(*arguments)
        except library.NVMLError as error:
            return self._refused(function, error)
        except UnicodeDecodeError:
            return failed(function, "makes no sense")
        value = read(answer) if read else answer
        return failed(function, "makes no sense") if value is None else ok(value, function)

    def _refused(self, function: str, error: Any) -> Reading[Any]:
        number = int(error.value)
        words = _WORDS.get(number) or f"NVML error {number}"
        if number in _START_AFRESH:
            self.close()
        if number in _NOT_SUPPORTED or number == _LIBRARY_NOT_FOUND:
            return unsupported(function, words)
        return failed(function, words)


def _integrated(name: Reading[str], memory: Reading[Any]) -> Reading[bool]:
    """By name and by what NVML says of memory: it supports none where the CPU's is used."""
    if name.value is None:
        return Reading(None, name.source, name.status, name.detail)
    if _NVGPU in name.value:
        return ok(True, name.source)
    if memory.value is not None:
        return ok(False, memory.source)
    if any(word in name.value for word in _UNIFIED):
        return ok(True, name.source)
    return Reading(None, memory.source, memory.status, memory.detail)


def _believed(name: Reading[str], reading: Reading[T]) -> Reading[T]:
    """Under nvgpu NVML was seen to answer SUCCESS with zeros: not believed there."""
    if reading.value is not None and _NVGPU in (name.value or ""):
        return unsupported(reading.source, "not believed under nvgpu")
    return reading


def _throttle_reasons(mask: int) -> tuple[ThrottleReason, ...]:
    found = {reason for bit, reason in _THROTTLE_REASONS.items() if mask & bit}
    return tuple(sorted(found))


def _memory(info: Any) -> Any | None:
    return info if info.total > 0 and info.used <= info.total else None


def _text(name: str) -> str | None:
    return name or None


def _cuda_version(number: int) -> tuple[int, int] | None:
    """13020 is 13.2."""
    return (number // 1000, number % 1000 // 10) if number > 0 else None


def _no_version(_: object) -> tuple[int, int] | None:
    return None


def _no_gpus(_: object) -> tuple[Gpu, ...] | None:
    return None
