"""What `status --watch` shows for one moment."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.cli.live_view import MemoryParts, live_view, machine_lines, memory_bar
from edge_agent.core import EngineInfo, EngineState, WorkerInfo
from edge_agent.status import DaemonState, DaemonStatus, MemoryStatus
from edge_agent.telemetry.reading import ReadingStatus
from edge_agent.telemetry.sampler import Sampler
from edge_agent.telemetry.snapshot import TelemetrySnapshot, ThrottleReason
from tests.support import sysroots

GIB = 1 << 30
MEMORY = MemoryStatus(
    total_bytes=8 * GIB,
    available_bytes=5 * GIB,
    reserve_bytes=2 * GIB,
    budget_bytes=None,
    soft_floor_bytes=GIB,
    hard_floor_bytes=GIB // 2,
    kept_bytes=2 * GIB,
    committed_bytes=GIB,
    held_bytes=GIB,
    leaked_bytes=0,
    room_bytes=4 * GIB,
    level="SOFT",
)
STATUS = DaemonStatus(
    version="1.2.3",
    state=DaemonState.READY,
    degraded_reasons=(),
    pid=42,
    started_at_s=0.0,
    uptime_s=125.0,
    runs={},
    engines_installed=1,
    engines_loaded=1,
    max_resident_engines=1,
    halts=(),
    config_path="",
    memory=MEMORY,
    waiting_steps=2,
    running_steps=3,
)
ENGINE = EngineInfo(
    name="small",
    digest="d",
    backend="llama_cpp",
    state=EngineState.READY,
    context_tokens=2048,
    max_output_tokens=256,
    load_peak_bytes=GIB,
    steady_bytes=GIB,
    capabilities=("text",),
    licence="Apache-2.0",
    worker=WorkerInfo(4242, 4, 3, 2, 0.5),
)


def sampled(root: Path, profile: str = "orin_nano") -> TelemetrySnapshot:
    sysroots.PROFILES[profile](root)
    return Sampler(root, clock=lambda: 0.0).sample(0.0)


def line(telemetry: TelemetrySnapshot, label: str, columns: int = 100) -> str:
    """The machine's line with this label."""
    (found,) = (
        each for each in machine_lines(telemetry, None, columns) if each.startswith(f"{label} ")
    )
    return found


# --- the bar ---


def test_the_bar_shows_who_has_the_memory():
    assert memory_bar(MemoryParts(8 * GIB, 4 * GIB), 16) == "########........"
    assert memory_bar(MemoryParts(8 * GIB, 4 * GIB, GIB, GIB), 16) == "######==......--"


def test_floors_are_marked_from_the_right():
    bar = memory_bar(MemoryParts(8 * GIB, 4 * GIB, floors_bytes=(GIB, 2 * GIB)), 16)
    assert bar == "########....|.|."


SIZES = st.integers(0, 128 * GIB)


@given(SIZES, SIZES, st.none() | SIZES, st.none() | SIZES, st.lists(SIZES), st.integers(1, 200))
@example(0, 0, None, None, [], 10)
@example(1, GIB, GIB, GIB, [GIB, 1], 3)
def test_a_bar_has_its_width_whatever_the_figures(
    total: int,
    available: int,
    engines: int | None,
    reserve: int | None,
    floors: list[int],
    cells: int,
):
    parts = MemoryParts(total, available, engines, reserve)
    bar = memory_bar(parts, cells)
    assert len(bar) == cells
    assert bar == "".join(sorted(bar, key="#=.-".index))
    marked = memory_bar(dataclasses.replace(parts, floors_bytes=tuple(floors)), cells)
    assert all(mark in (cell, "|") for mark, cell in zip(marked, bar, strict=True))


# --- the lines ---


def test_each_figure_stands_with_its_source(tmp_path: Path):
    telemetry = sampled(tmp_path)
    for label, text, source in (
        ("memory", "5.0 GiB of 7.4 GiB available", "/proc/meminfo"),
        ("pressure", "some 0.0 %, full 0.0 % of the last 10 s", "/proc/pressure/memory"),
        ("gpu", "34.5 % busy", "/sys/class/devfreq/17000000.gpu/device/load"),
        ("clock", "612 of 1020 MHz", "/sys/class/devfreq/17000000.gpu/cur_freq"),
        ("heat", "gpu-thermal 49.6 °C, 45.4 below its limit", "/thermal/thermal_zone1/temp"),
        ("throttle", "none", "/sys/class/thermal"),
        ("power", "6.0 W (VDD_IN 6.0, VDD_CPU_GPU_CV 1.7)", "/sys/class/hwmon VDD_IN"),
        ("mode", "2 MAXN_SUPER", "/var/lib/nvpmodel/status"),
    ):
        found = line(telemetry, label)
        assert found[9:].startswith(text + "  ")
        assert found.endswith(source)


def test_the_view_holds_daemon_engines_and_steps(tmp_path: Path):
    view = live_view(STATUS, [ENGINE], sampled(tmp_path), 80)
    assert view[:4] == [
        "daemon   READY  pid 42, up 2m 5s, version 1.2.3",
        "runs     none",
        "steps    3 running, 2 waiting: `edge-agent explain` says why",
        "engines  1 installed, 1 of at most 1 in memory",
    ]


def test_the_view_tells_what_of_the_memory_engines_and_robot_have(tmp_path: Path):
    view = live_view(STATUS, [ENGINE], sampled(tmp_path), 80)
    (told,) = (each for each in view if each.startswith("memory "))
    assert told.startswith("memory   5.0 GiB of 7.4 GiB available, SOFT  ")
    bar, legend, details = view[view.index(told) + 1 :][:3]
    assert (bar.count("="), bar.count("-"), bar.count("|")) == (8, 4, 2)
    assert (
        legend.split("  ")[1:]
        == [
            "         # others 1.4 GiB".strip(),
            "= engines 1.0 GiB",
            ". free 4.4 GiB",
            "- reserve 590 MiB",
        ]
        or legend
    )
    assert details.strip().startswith("room for 4.0 GiB, floors 1.0 GiB and 512 MiB, ")


@pytest.mark.parametrize("profile", sysroots.PROFILES)
@pytest.mark.parametrize("columns", [1, 20, 80, 200])
def test_no_line_is_longer_than_the_terminal(profile: str, columns: int, tmp_path: Path):
    telemetry = sampled(tmp_path, profile)
    for each in live_view(STATUS, [ENGINE], telemetry, columns):
        assert len(each) <= columns


def test_what_a_machine_lacks_and_what_failed_say_why_and_are_never_0(tmp_path: Path):
    telemetry = sampled(tmp_path, "plain_pc")
    assert line(telemetry, "gpu")[9:].startswith("-  no GPU in it  ")
    assert line(telemetry, "power")[9:].startswith("-  no power rail  ")
    hidden = sampled(tmp_path / "agx", "agx_orin")
    assert line(hidden, "throttle")[9:].startswith("unknown: gpu-thermal can't be read")
    assert "unread: gpu-thermal" in line(hidden, "heat")


def test_a_stale_figure_says_so(tmp_path: Path):
    late = sampled(tmp_path).at(60)
    assert late.memory.available_bytes.status is ReadingStatus.STALE
    for label in ("memory", "gpu", "heat", "power"):
        assert "(stale: not read any more)" in line(late, label, 120)


def test_throttling_says_why(tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    sysroots.put(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "96400\n"})
    telemetry = Sampler(tmp_path, clock=lambda: 0.0).sample(0.0)
    assert "thermal: cpu-thermal 96.4 °C, slowed down from 95.0 °C on" in line(
        telemetry, "throttle"
    )
    assert "cpu-thermal 96.4 °C, 1.4 over its limit" in line(telemetry, "heat")
    power = dataclasses.replace(
        telemetry.throttling, value=(ThrottleReason.POWER,), detail="", source="NVML"
    )
    assert line(dataclasses.replace(telemetry, throttling=power), "throttle")[9:14] == "power"


def test_memory_that_can_not_be_read_has_no_bar(tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    (tmp_path / "proc/meminfo").unlink()
    lines = machine_lines(Sampler(tmp_path, clock=lambda: 0.0).sample(0.0), MEMORY, 80)
    assert lines[0].startswith("memory   -  No such file or directory")
    assert not any("[" in each for each in lines)
