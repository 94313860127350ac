"""Memory as the kernel counts it: /proc/meminfo, swap, free blocks and pressure.

MemAvailable is what decides whether an engine fits on a GPU that shares the memory of the CPU:
cudaMemGetInfo counts the page cache as used, and NVML says nothing there.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.telemetry.files import parse_int, read_text
from edge_agent.telemetry.reading import Reading, failed, unsupported

MEMINFO: Final = "proc/meminfo"
_MAX_ORDERS: Final = 32  # of free blocks; Linux has 11
_PRESSURE_LINE: Final = re.compile(
    r"(some|full) avg10=([0-9]{1,3}\.[0-9]{1,4}) avg60=([0-9]{1,3}\.[0-9]{1,4}) "
    r"avg300=([0-9]{1,3}\.[0-9]{1,4}) total=([0-9]{1,18})"
)


@dataclass(frozen=True, slots=True)
class Memory:
    """/proc/meminfo, in bytes; the two counts of huge pages apart."""

    total_bytes: Reading[int]
    available_bytes: Reading[int]
    free_bytes: Reading[int]
    swap_total_bytes: Reading[int]
    swap_free_bytes: Reading[int]
    cma_total_bytes: Reading[int]
    cma_free_bytes: Reading[int]
    huge_pages: Reading[int]
    huge_pages_free: Reading[int]
    huge_page_bytes: Reading[int]
    nvmap_used_bytes: Reading[int]


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap area; swap in zram is compressed memory and no more room."""

    path: str
    size_bytes: int
    used_bytes: int

    @property
    def is_zram(self) -> bool:
        """Whether it is a part of the memory itself."""
        return "zram" in self.path


@dataclass(frozen=True, slots=True)
class Pressure:
    """Share of time in which some or all tasks waited for memory (PSI), in percent."""

    some_avg10_percent: float
    some_avg60_percent: float
    some_total_us: int
    full_avg10_percent: float
    full_avg60_percent: float
    full_total_us: int


def read_memory(sysroot: Path) -> Memory:
    """All of it from one read."""
    text = read_text(sysroot, MEMINFO)
    lines = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in (text.value or "").splitlines())
    }

    def number(key: str, unit: str = "kB") -> Reading[int]:
        if text.value is None:
            return text.parsed(lambda _: None)
        if key not in lines:
            return unsupported(text.source, f"no {key}")
        count = parse_int(lines[key].removesuffix(unit).rstrip()) if unit else parse_int(lines[key])
        if count is None or count < 0 or (unit and not lines[key].endswith(unit)):
            return failed(text.source, f"{key} makes no sense")
        return Reading(count * 1024 if unit else count, text.source, text.status)

    return Memory(
        total_bytes=number("MemTotal"),
        available_bytes=number("MemAvailable"),
        free_bytes=number("MemFree"),
        swap_total_bytes=number("SwapTotal"),
        swap_free_bytes=number("SwapFree"),
        cma_total_bytes=number("CmaTotal"),
        cma_free_bytes=number("CmaFree"),
        huge_pages=number("HugePages_Total", ""),
        huge_pages_free=number("HugePages_Free", ""),
        huge_page_bytes=number("Hugepagesize"),
        nvmap_used_bytes=number("NvMapMemUsed"),
    )


def read_swaps(sysroot: Path) -> Reading[tuple[Swap, ...]]:
    """The swap areas in use; none is an empty tuple."""
    return read_text(sysroot, "proc/swaps").parsed(_parse_swaps)


def read_pressure(sysroot: Path) -> Reading[Pressure]:
    """How much the machine waits for memory, where the kernel counts it."""
    return read_text(sysroot, "proc/pressure/memory").parsed(_parse_pressure)


def read_largest_free_block_bytes(sysroot: Path) -> Reading[int]:
    """The largest contiguous free block of any zone.

    A GPU driver that needs contiguous memory fails without it although memory is free.
    """
    return read_text(sysroot, "proc/buddyinfo").parsed(_parse_buddyinfo)


def _parse_swaps(text: str) -> tuple[Swap, ...] | None:
    swaps = []
    header, *lines = text.splitlines() or [""]
    if not header.startswith("Filename"):
        return None
    for line in lines:
        # The name comes first and may hold spaces, as \040.
        columns = line.split()
        size, used = (parse_int(column) for column in [*columns, "", "", "", ""][2:4])
        if size is None or used is None:
            return None
        swaps.append(Swap(columns[0], size * 1024, used * 1024))
    return tuple(swaps)


def _parse_pressure(text: str) -> Pressure | None:
    found = {match[1]: match for match in map(_PRESSURE_LINE.fullmatch, text.splitlines()) if match}
    some, full = found.get("some"), found.get("full")
    if some is None or full is None:
        return None
    return Pressure(
        some_avg10_percent=float(some[2]),
        some_avg60_percent=float(some[3]),
        some_total_us=int(some[5]),
        full_avg10_percent=float(full[2]),
        full_avg60_percent=float(full[3]),
        full_total_us=int(full[5]),
    )


def _parse_buddyinfo(text: str) -> int | None:
    """Lines such as `Node 0, zone Normal 12 5 0 1`: how many free blocks of 2**column pages."""
    largest = None
    for line in text.splitlines():
        _, zone, counts = line.partition(" zone ")
        numbers = [parse_int(word) for word in counts.split()[1:]]
        if not zone or None in numbers or len(numbers) > _MAX_ORDERS:
            return None
        orders = [order for order, count in enumerate(numbers) if count]
        largest = max(largest or 0, os.sysconf("SC_PAGE_SIZE") << orders[-1] if orders else 0)
    return largest
