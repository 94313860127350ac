"""How the daemon and its machine look while they are watched: lines of text for one moment.

Pure. Every figure of the machine stands with its source; what is unknown says why, and is never 0.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from edge_agent.cli.output import cut
from edge_agent.cli.status import daemon_lines, engine_lines, run_lines
from edge_agent.core import EngineInfo
from edge_agent.status import DaemonStatus, MemoryStatus
from edge_agent.telemetry.reading import ReadingStatus
from edge_agent.telemetry.snapshot import GpuMetrics, Metric, TelemetrySnapshot
from edge_agent.telemetry.thermal import HottestZone
from edge_agent.units import size_text

T = TypeVar("T")

_LABEL_CELLS: Final = 9
_MAX_BAR_CELLS: Final = 60
_MIN_SOURCE_CELLS: Final = 12
_OTHERS, _ENGINES, _FREE, _RESERVE, _FLOOR = "#=.-|"
_Row: TypeAlias = tuple[str, str, Metric[object] | None]
"""Label, text and where it is from."""


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Who has the memory, in bytes. What is None or empty is not drawn.

    `engines_bytes` is a part of what is used, `reserve_bytes` a part of what is available that is
    kept for others. A floor is an amount of available memory below which something happens.
    """

    total_bytes: int
    available_bytes: int
    engines_bytes: int | None = None
    reserve_bytes: int | None = None
    floors_bytes: tuple[int, ...] = ()


def live_view(
    status: DaemonStatus,
    engines: Sequence[EngineInfo],
    telemetry: TelemetrySnapshot,
    columns: int,
) -> list[str]:
    """Everything, in lines of at most `columns`."""
    lines = [
        *daemon_lines(status),
        *run_lines(status),
        *engine_lines(status, engines),
        *machine_lines(telemetry, status.memory, columns),
    ]
    return [cut(line, columns) for line in lines]


def memory_bar(parts: MemoryParts, cells: int) -> str:
    """`#` others, `=` engines, `.` free, `-` reserve, and `|` where a floor is."""
    total = max(parts.total_bytes, 1)
    available = min(max(parts.available_bytes, 0), total)
    used = total - available
    engines = min(parts.engines_bytes or 0, used)
    reserve = min(parts.reserve_bytes or 0, available)
    ends = (used - engines, used, total - reserve, total)
    bar = ""
    for mark, end in zip((_OTHERS, _ENGINES, _FREE, _RESERVE), ends, strict=True):
        bar += mark * (round(cells * end / total) - len(bar))
    for floor in parts.floors_bytes:
        if 0 < floor < total:
            at = min(round(cells * (total - floor) / total), cells - 1)
            bar = bar[:at] + _FLOOR + bar[at + 1 :]
    return bar


def machine_lines(
    telemetry: TelemetrySnapshot, memory: MemoryStatus | None, columns: int
) -> list[str]:
    """The machine: memory and what of it is the engines', pressure, GPU, heat, power."""
    pressure, gpu = telemetry.pressure.some_avg10_percent, telemetry.gpu_utilisation_percent
    name = telemetry.power_mode_name.value
    rows: list[_Row] = [
        *_memory_rows(telemetry, memory, columns),
        ("pressure", _told(pressure, lambda _: _pressure(telemetry)), pressure),
        ("gpu", _told(gpu, lambda percent: f"{percent:.1f} % busy"), gpu),
        (
            "clock",
            _told(telemetry.gpu_clock_hz, lambda hz: _clock(telemetry, hz)),
            telemetry.gpu_clock_hz,
        ),
        ("heat", _told(telemetry.hottest, _heat), telemetry.hottest),
        (
            "throttle",
            _told(telemetry.throttling, lambda _: _throttling(telemetry)),
            telemetry.throttling,
        ),
        ("power", _told(telemetry.power_mw, lambda mw: _power(telemetry, mw)), telemetry.power_mw),
        (
            "mode",
            _told(telemetry.power_mode, lambda number: f"{number} {name or ''}".rstrip()),
            telemetry.power_mode,
        ),
    ]
    rows += [_card_row(gpu) for gpu in telemetry.gpus if gpu.memory_total_bytes.value]
    if telemetry.driver_version.value is not None:
        rows.append(("driver", _driver(telemetry), telemetry.driver_version))
    return [_row(label, text, metric, columns) for label, text, metric in rows]


def _memory_rows(
    telemetry: TelemetrySnapshot, kept: MemoryStatus | None, columns: int
) -> list[_Row]:
    memory = telemetry.memory
    total, available = memory.total_bytes.value, memory.available_bytes.value
    if total is None or available is None:
        missing = memory.total_bytes if total is None else memory.available_bytes
        return [("memory", _told(missing, size_text), missing)]
    parts = _memory_parts(total, available, kept)
    told = f"{size_text(available)} of {size_text(total)} available"
    if kept is not None:
        told += f", {kept.level}"
    if memory.available_bytes.status is ReadingStatus.STALE:
        told += f" (stale: {memory.available_bytes.detail})"
    room = columns - _LABEL_CELLS
    below = [
        f"[{memory_bar(parts, max(1, min(_MAX_BAR_CELLS, room - 2)))}]",
        _legend(parts),
        *textwrap.wrap(", ".join(_memory_details(telemetry, kept)), max(room, 1)),
    ]
    return [("memory", told, memory.available_bytes), *(("", line, None) for line in below)]


def _memory_parts(total: int, available: int, kept: MemoryStatus | None) -> MemoryParts:
    """`reserve_bytes`: what of the available memory is left to the robot, and not to engines."""
    if kept is None:
        return MemoryParts(total, available)
    others = max(0, total - available - kept.held_bytes)
    return MemoryParts(
        total,
        available,
        engines_bytes=kept.committed_bytes,
        reserve_bytes=max(0, kept.kept_bytes - others),
        floors_bytes=(kept.soft_floor_bytes, kept.hard_floor_bytes),
    )


def _legend(parts: MemoryParts) -> str:
    engines, reserve = parts.engines_bytes or 0, parts.reserve_bytes or 0
    others = parts.total_bytes - parts.available_bytes - engines
    shown = [
        (_OTHERS, "others", max(others, 0)),
        (_ENGINES, "engines", engines),
        (_FREE, "free", max(parts.available_bytes - reserve, 0)),
        (_RESERVE, "reserve", reserve),
    ]
    return "  ".join(f"{mark} {name} {size_text(size)}" for mark, name, size in shown if size)


def _memory_details(telemetry: TelemetrySnapshot, kept: MemoryStatus | None) -> list[str]:
    memory = telemetry.memory
    details = []
    if kept is not None:
        details += [
            f"room for {size_text(kept.room_bytes)}",
            f"floors {size_text(kept.soft_floor_bytes)} and {size_text(kept.hard_floor_bytes)}",
        ]
    if (block := memory.largest_free_block_bytes.fresh) is not None:
        details.append(f"largest free block {size_text(block)}")
    cma, cma_free = memory.cma_total_bytes.value, memory.cma_free_bytes.fresh
    if cma and cma_free is not None:
        details.append(f"CMA {size_text(cma_free)} of {size_text(cma)} free")
    if (nvmap := memory.nvmap_used_bytes.fresh) is not None:
        details.append(f"NvMap {size_text(nvmap)}")
    swap, swap_free = memory.swap_total_bytes.value, memory.swap_free_bytes.fresh
    if swap and swap_free is not None:
        details.append(f"swap {size_text(swap - swap_free)} used")
    return details


def _pressure(telemetry: TelemetrySnapshot) -> str:
    some = telemetry.pressure.some_avg10_percent.value or 0.0
    full = telemetry.pressure.full_avg10_percent.value or 0.0
    return f"some {some:.1f} %, full {full:.1f} % of the last 10 s"


def _clock(telemetry: TelemetrySnapshot, hertz: int) -> str:
    most = telemetry.gpu_max_clock_hz.value
    of = "" if most is None else f" of {most / 1e6:.0f}"
    return f"{hertz / 1e6:.0f}{of} MHz"


def _heat(zone: HottestZone) -> str:
    told = f"{zone.name} {zone.temperature_milli_c / 1000:.1f} °C"
    if zone.margin_milli_c is not None:
        where = "below" if zone.margin_milli_c >= 0 else "over"
        told += f", {abs(zone.margin_milli_c) / 1000:.1f} {where} its limit"
    if zone.slope_milli_c_per_s is not None:
        told += f", {zone.slope_milli_c_per_s / 1000:+.1f} °C/s"
    return told + (f"; unread: {', '.join(zone.unreadable)}" if zone.unreadable else "")


def _throttling(telemetry: TelemetrySnapshot) -> str:
    reasons = telemetry.throttling.value or ()
    if not reasons:
        return "none"
    told = ", ".join(reason.lower() for reason in reasons)
    detail = telemetry.throttling.detail
    return f"{told}: {detail}" if detail else told


def _power(telemetry: TelemetrySnapshot, total_mw: int) -> str:
    rails = [
        f"{rail.name} {rail.power_mw.value / 1000:.1f}"
        for rail in telemetry.rails
        if rail.power_mw.value is not None
    ]
    return f"{total_mw / 1000:.1f} W" + (f" ({', '.join(rails)})" if len(rails) > 1 else "")


def _card_row(gpu: GpuMetrics) -> _Row:
    """A GPU with memory of its own."""
    used = _told(gpu.memory_used_bytes, size_text)
    total = size_text(gpu.memory_total_bytes.value or 0)
    return "card", f"{gpu.name.value or gpu.index}, {used} of {total} used", gpu.memory_used_bytes


def _driver(telemetry: TelemetrySnapshot) -> str:
    cuda = telemetry.cuda_version.value
    return f"{telemetry.driver_version.value}" + (f", CUDA {cuda}" if cuda else "")


def _told(metric: Metric[T], tell: Callable[[T], str]) -> str:
    """The value in words, or why there is none."""
    if metric.value is None:
        is_absent = metric.status is ReadingStatus.UNSUPPORTED
        return f"-  {metric.detail}" if is_absent else f"unknown: {metric.detail}"
    told = tell(metric.value)
    is_stale = metric.status is ReadingStatus.STALE
    return f"{told} (stale: {metric.detail})" if is_stale else told


def _row(label: str, text: str, metric: Metric[object] | None, columns: int) -> str:
    """Label, value, and at the right the end of the source's path, where there is room."""
    row = f"{label:<{_LABEL_CELLS}}{text}"
    source = metric.source if metric is not None else ""
    room = columns - len(row) - 2
    if not source or room < _MIN_SOURCE_CELLS:
        return row
    if len(source) > room:
        source = "…" + source[1 - room :]
    return f"{row}{source:>{columns - len(row)}}"
