"""What is read of a machine around a measurement, below made trees."""

import threading
from pathlib import Path
from typing import Any

import pytest

from edge_agent.measuring.machine import (
    PowerMeter,
    read_machine_info,
    read_power_mw,
    read_temperature_milli_c,
)
from edge_agent.measuring.residency import admin_address
from edge_agent.telemetry.nvml import Nvml
from edge_agent.telemetry.process import read_process_memory
from edge_agent.telemetry.reading import ReadingStatus
from tests.support.sysroots import PROFILES, put

WAIT_S = 20.0


@pytest.fixture
def machine(request, tmp_path: Path) -> Path:
    PROFILES[request.param](tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("machine", "power"),
    [
        ("orin_nano", (5966, "VDD_IN")),
        ("agx_orin", (3979 + 792 + 4500, "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0")),
        ("thor", (19_780, "VIN")),
        ("plain_pc", None),
    ],
    indirect=["machine"],
)
def test_power_is_the_rail_of_the_whole_else_the_sum_of_all(machine, power):
    assert read_power_mw(machine, Nvml()) == power


@pytest.mark.parametrize("machine", ["agx_orin"], indirect=True)
def test_a_rail_that_can_not_be_read_leaves_no_sum(machine):
    rail = next(machine.glob("sys/class/hwmon/*/curr2_input"))
    rail.write_text("nonsense\n")
    assert read_power_mw(machine, Nvml()) is None


@pytest.mark.parametrize(
    ("machine", "temperature"),
    [("orin_nano", 49_593), ("agx_orin", 91_000), ("plain_pc", None)],
    indirect=["machine"],
)
def test_the_temperature_is_the_hottest_sensors(machine, temperature):
    assert read_temperature_milli_c(machine, Nvml()) == temperature


@pytest.mark.parametrize("machine", ["orin_nano"], indirect=True)
def test_a_jetson_is_named_with_its_power_mode(machine):
    info = read_machine_info(machine)
    assert "Orin Nano" in (info.model or "")
    assert info.module == "Orin Nano 8GB (developer kit)"
    assert info.power_mode in {"15W", "25W", "MAXN_SUPER"}
    assert info.l4t_release == "R39.2.0"


@pytest.mark.parametrize("machine", ["plain_pc"], indirect=True)
def test_another_machine_has_a_processor_and_no_power_mode(machine):
    put(machine, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: A  Processor\n" * 2})
    info = read_machine_info(machine)
    assert (info.cpu, info.power_mode, info.module) == ("A Processor", None, None)


@pytest.mark.parametrize("machine", ["thor"], indirect=True)
def test_a_meters_samples_span_the_time_in_which_it_was_open(machine, monkeypatch):
    read = threading.Semaphore(0)

    def telling(*arguments: Any) -> tuple[int, str] | None:
        read.release()
        return read_power_mw(*arguments)

    monkeypatch.setattr("edge_agent.measuring.machine.read_power_mw", telling)
    with PowerMeter(machine) as meter:
        inside = meter.samples[0].at_s
        for _ in range(5):  # when the fifth begins there are four
            assert read.acquire(timeout=WAIT_S)
    assert meter.source == "VIN"
    assert len(meter.samples) >= 5  # one more at its end
    assert meter.samples[0].at_s == inside < meter.samples[-1].at_s
    assert {sample.power_mw for sample in meter.samples} == {19_780}


@pytest.mark.parametrize("machine", ["plain_pc"], indirect=True)
def test_a_meter_without_a_rail_has_no_samples(machine):
    with PowerMeter(machine) as meter:
        assert meter.source is None
    assert meter.samples == ()


@pytest.mark.parametrize(
    ("address", "admin"),
    [
        ("/run/edge-agent/api.sock", "/run/edge-agent/admin.sock"),
        ("unix:/run/x.sock", "/run/admin.sock"),
        ("./api.sock", "./admin.sock"),
        ("../run/admin.sock", "../run/admin.sock"),
        ("localhost:50051", None),
    ],
)
def test_the_admin_socket_stands_beside_the_other(address, admin):
    assert admin_address(address) == admin


def test_a_processs_memory_is_the_kernels_sums(tmp_path):
    put(
        tmp_path,
        {"proc/7/smaps_rollup": "00400000-7fff ---p 0 00:00 0\nRss:  900 kB\nPss: 800 kB\n"},
    )
    memory = read_process_memory(tmp_path, 7)
    assert (memory.pss_bytes.value, memory.rss_bytes.value) == (800 * 1024, 900 * 1024)


def test_another_users_process_has_a_resident_size_alone(tmp_path):
    put(tmp_path, {"proc/7/status": "Name:\tworker\nVmHWM:\t 950 kB\nVmRSS:\t 900 kB\n"})
    memory = read_process_memory(tmp_path, 7)
    assert memory.rss_bytes.value == 900 * 1024
    assert memory.pss_bytes.status is ReadingStatus.UNSUPPORTED


@pytest.mark.parametrize("content", ["", "Pss: many kB\n", "Pss: -1 kB\n", "Pss:\n"])
def test_what_makes_no_sense_is_no_number(tmp_path, content):
    put(tmp_path, {"proc/7/smaps_rollup": content, "proc/7/status": "VmRSS: x\n"})
    memory = read_process_memory(tmp_path, 7)
    assert memory.pss_bytes.status is memory.rss_bytes.status is ReadingStatus.ERROR
