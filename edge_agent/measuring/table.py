"""Results for people: an aligned table, one column for each result, and the machine's line.

Pure. Unknown is `-`.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from edge_agent.measuring.results import EngineResult, MachineInfo
from edge_agent.units import GIB, MIB

UNKNOWN: Final = "-"
_GAP: Final = "  "
_WRAPPING: Final[Mapping[str, Any]] = {"subsequent_indent": "  ", "break_on_hyphens": False}
_FINE: Final = 10
"""Below this a number is shown with one decimal more."""

Value = float | None


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of every result. `decimals` are for numbers of ten and more."""

    label: str
    value: Callable[[EngineResult], Value]
    decimals: int = 0


@dataclass(frozen=True, slots=True)
class Section:
    """Rows in one unit; `absent` is said where no result has any of them."""

    title: str
    rows: tuple[Row, ...]
    absent: str = "unknown"

    def known_rows(self, results: Sequence[EngineResult]) -> tuple[Row, ...]:
        """Those that some result has a value for."""
        return tuple(row for row in self.rows if any(row.value(r) is not None for r in results))


def sections(results: Sequence[EngineResult]) -> tuple[Section, ...]:
    """What is shown of these results, in order."""
    streams = _streams_label(results)
    return (
        Section("load, s", (Row("engine into memory", lambda r: r.load_s, 1),)),
        Section(
            "time to first token, ms",
            (
                Row("short prompt, cold", lambda r: r.short_prompt.ttft_cold_ms),
                Row("short prompt, beginning cached", lambda r: r.short_prompt.ttft_cached_ms),
                Row("long prompt, cold", lambda r: _long(r, "ttft_cold_ms")),
                Row("long prompt, beginning cached", lambda r: _long(r, "ttft_cached_ms")),
            ),
        ),
        Section(
            "tokens per second",
            (
                Row("one stream", lambda r: r.short_prompt.tokens_per_second, 1),
                Row("after the long prompt", lambda r: _long(r, "tokens_per_second"), 1),
                Row(f"{streams} together", lambda r: r.streams_tokens_per_second, 1),
            ),
        ),
        Section(
            "memory, MiB",
            (
                Row("worker process, PSS", lambda r: _mib(r.memory.pss_bytes)),
                Row("worker process, RSS", lambda r: _mib(r.memory.rss_bytes)),
                Row(
                    "fall of MemAvailable, all processes",
                    lambda r: _mib(r.memory.mem_available_fall_bytes),
                ),
                Row("rise of NvMapMemUsed", lambda r: _mib(r.memory.nvmap_rise_bytes)),
                Row("manifest's estimate", lambda r: _mib(r.memory.manifest_steady_bytes)),
            ),
        ),
        Section(
            "energy per token, mJ",
            (
                Row("one stream", lambda r: r.power.one_stream_energy_per_token_mj),
                Row(streams, lambda r: r.power.streams_energy_per_token_mj),
            ),
            absent="no power rail here",
        ),
        Section(
            "temperature, °C",
            (
                Row("before", lambda r: _celsius(r.temperature.before_milli_c), 1),
                Row("after", lambda r: _celsius(r.temperature.after_milli_c), 1),
            ),
            absent="no sensor here",
        ),
    )


def headings(results: Sequence[EngineResult]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Lines that tell the columns apart: engine, then what differs or is worth knowing."""
    lines = [("engine", tuple(result.engine for result in results))]
    if any(result.machine.power_mode for result in results):
        lines.append(("power mode", tuple(r.machine.power_mode or UNKNOWN for r in results)))
    machines = distinct_machines(results)
    if len(machines) > 1:
        numbers = (machines.index(_unmoded(r.machine)) + 1 for r in results)
        lines.append(("machine", tuple(map(str, numbers))))
    if _differ(result.settings.streams for result in results):
        lines.append(("streams", tuple(str(result.settings.streams) for result in results)))
    columns = list(zip(*(cells for _, cells in lines), strict=True))
    if len(set(columns)) < len(columns):
        lines.append(("measured", tuple(result.measured_at[:16] for result in results)))
    return tuple(lines)


def describe(results: Sequence[EngineResult], *, columns: int | None) -> list[str]:
    """The machines and the table; `columns` None: no terminal, as wide as it gets."""
    lines = [*_machine_lines(results), how_measured(results)]
    if columns is not None:
        lines = [part for line in lines for part in textwrap.wrap(line, columns, **_WRAPPING)]
    for group in _groups(results, columns):
        lines += ["", *_table(group, results)]
    return lines


def machine_text(machine: MachineInfo) -> str:
    """A machine in one line, without its power mode."""
    said = [machine.model or machine.cpu, machine.module]
    if machine.cores is not None:
        cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
        said.append(f"{cores} of {machine.cpu}" if machine.model and machine.cpu else cores)
    if machine.memory_total_bytes is not None:
        said.append(f"{machine.memory_total_bytes / GIB:.1f} GiB")
    said += [f"L4T {machine.l4t_release}" if machine.l4t_release else None, machine.kernel]
    return ", ".join(_plain(text) for text in said if text) or "unknown machine"


def how_measured(results: Sequence[EngineResult]) -> str:
    """Rounds, prompts and output in one line."""
    settings = [result.settings for result in results]
    rounds = _one_or_range(setting.rounds for setting in settings)
    short = _one_or_range(r.short_prompt.prompt_tokens for r in results)
    long = _one_or_range(r.long_prompt.prompt_tokens for r in results if r.long_prompt)
    output = _one_or_range(setting.max_output_tokens for setting in settings)
    prompts = f"prompts of {short} and {long} tokens" if long else f"a prompt of {short} tokens"
    return f"medians of {rounds} rounds; {prompts}, at most {output} tokens out".replace(
        "medians of 1 rounds", "one round"
    )


def distinct_machines(results: Iterable[EngineResult]) -> list[MachineInfo]:
    """Each machine once, whatever its power mode was."""
    return list(dict.fromkeys(_unmoded(result.machine) for result in results))


def number_text(value: Value, decimals: int) -> str:
    """A figure as it is shown."""
    if value is None:
        return UNKNOWN
    return f"{value:.{decimals + (abs(value) < _FINE)}f}"


def _machine_lines(results: Sequence[EngineResult]) -> list[str]:
    machines = distinct_machines(results)
    modes = list(dict.fromkeys(r.machine.power_mode for r in results if r.machine.power_mode))
    lines = [
        f"machine {number}  {machine_text(machine)}" if len(machines) > 1 else machine_text(machine)
        for number, machine in enumerate(machines, 1)
    ]
    lines.append(f"power mode: {', '.join(modes) if modes else 'this machine has none'}")
    return lines


def _table(shown: range, everyone: Sequence[EngineResult]) -> list[str]:
    """The columns of some results; which rows there are is for everyone."""
    group = [everyone[index] for index in shown]
    heads = headings(everyone)
    lines = [(label, tuple(cells[index] for index in shown)) for label, cells in heads]
    for section in sections(everyone):
        rows = section.known_rows(everyone)
        lines += [("", ()), (section.title, ())]
        if not rows:
            lines.append((f"  {section.absent}", (UNKNOWN,) * len(group)))
        lines += [
            (f"  {row.label}", tuple(number_text(row.value(r), row.decimals) for r in group))
            for row in rows
        ]
    label_cells = max(len(label) for label, _ in lines)
    widths = [max(len(cells[index]) for _, cells in lines if cells) for index in range(len(group))]
    return [
        _GAP.join(
            [
                label.ljust(label_cells),
                *(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)),
            ]
        ).rstrip()
        for label, cells in lines
    ]


def _groups(results: Sequence[EngineResult], columns: int | None) -> list[range]:
    """As many results side by side as fit, at least one."""
    everything = range(len(results))
    if columns is None:
        return [everything]
    for size in range(len(results), 1, -1):
        groups = [everything[start : start + size] for start in everything[::size]]
        if all(len(line) <= columns for group in groups for line in _table(group, results)):
            return groups
    return [everything[index : index + 1] for index in everything]


def _streams_label(results: Sequence[EngineResult]) -> str:
    counts = {result.settings.streams for result in results}
    return f"{counts.pop()} streams" if len(counts) == 1 else "all streams"


def _long(result: EngineResult, name: str) -> Value:
    return getattr(result.long_prompt, name) if result.long_prompt else None


def _mib(size_bytes: int | None) -> Value:
    return None if size_bytes is None else size_bytes / MIB


def _celsius(milli_c: int | None) -> Value:
    return None if milli_c is None else milli_c / 1000


def _unmoded(machine: MachineInfo) -> MachineInfo:
    return replace(machine, power_mode=None)


def _differ(values: Iterable[object]) -> bool:
    return len(set(values)) > 1


def _one_or_range(values: Iterable[int | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return str(low) if low == high else f"{low} to {high}"


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
