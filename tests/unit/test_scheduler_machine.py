"""How the scheduler sees a machine: every kind of it, failed sensors, processes, the reserve."""

import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.scheduling import reserve
from edge_agent.scheduling.machine import TelemetryMachine
from edge_agent.scheduling.values import Heat, MachineView, Memory
from edge_agent.telemetry.nvml import Nvml
from edge_agent.telemetry.sampler import Sampler
from tests.support import sysroots
from tests.support.fake_nvml import library
from tests.support.fake_nvml.library import DISCRETE, ORIN, THOR, FakeNvml

GIB, MIB = 1 << 30, 1 << 20
ZONE = "sys/class/thermal/thermal_zone"


def machine_of(root: Path) -> tuple[TelemetryMachine, Sampler]:
    sampler = Sampler(root, clock=lambda: 0.0, nvml=Nvml())
    return TelemetryMachine(sampler, root), sampler


def view_of(root: Path) -> MachineView:
    machine, sampler = machine_of(root)
    return machine.seen(sampler.sample(0.0))


AVAILABLE_KB = {
    "orin_nano": (7_789_568, 5_242_880),
    "agx_orin": (64_349_184, 58_720_256),
    "thor": (128_790_528, 94_371_840),
    "old_orin": (7_789_568, 5_242_880),
    "gb10": (127_600_748, 63_800_374),
    "discrete": (65_536_000, 32_768_000),
    "plain_pc": (16_000_000, 8_000_000),
}
HEATS = {"agx_orin": Heat.WARM}  # 91 of 95 degrees
POWER_MODES = {"orin_nano": 2, "agx_orin": 1, "thor": 2, "old_orin": 2}
RESERVES = {
    "orin_nano": 2 * GIB,
    "agx_orin": 10 * GIB,
    "thor": 20 * GIB,
    "old_orin": 2 * GIB,
}


@pytest.mark.parametrize("profile", sysroots.PROFILES)
def test_every_machine_has_its_memory_from_meminfo_and_a_heat(tmp_path: Path, profile: str):
    sysroots.PROFILES[profile](tmp_path)
    total_kb, available_kb = AVAILABLE_KB[profile]
    assert view_of(tmp_path) == MachineView(
        Memory(total_kb * 1024, available_kb * 1024),
        0.0,
        0.0,
        HEATS.get(profile, Heat.NOMINAL),
        POWER_MODES.get(profile),
    )


@pytest.mark.parametrize("profile", sysroots.PROFILES)
def test_what_the_rest_of_the_robot_gets_follows_the_module_else_the_size(
    tmp_path: Path, profile: str
):
    sysroots.PROFILES[profile](tmp_path)
    machine, _ = machine_of(tmp_path)
    total_bytes = AVAILABLE_KB[profile][0] * 1024
    expected = RESERVES.get(profile, total_bytes // 4)
    assert reserve.robot_reserve_bytes(machine.part, machine.total_bytes) == expected
    hard, soft = reserve.hard_floor_bytes(total_bytes), reserve.soft_floor_bytes(total_bytes)
    assert 128 * MIB <= hard < soft < expected


def test_machines_of_other_size_or_module_remember_apart(tmp_path: Path):
    devices = set()
    for name, profile in sysroots.PROFILES.items():
        profile(tmp_path / name)
        devices.add(machine_of(tmp_path / name)[0].device)
    assert len(devices) == len(sysroots.PROFILES) - 1  # the old Orin Nano is one as well


def test_without_meminfo_nothing_is_known(tmp_path: Path):
    assert view_of(tmp_path).memory == Memory(0, None)


def test_memory_that_stopped_being_read_is_unknown_and_its_size_is_not(tmp_path: Path):
    sysroots.thor(tmp_path)
    machine, sampler = machine_of(tmp_path)
    sampler.sample(0.0)
    (tmp_path / "proc/meminfo").unlink()
    view = machine.seen(sampler.sample(100.0))
    assert view.memory == Memory(AVAILABLE_KB["thor"][0] * 1024, None)


@pytest.mark.parametrize("temp", ["", "-256000", "nonsense"])
def test_a_sensor_that_fails_is_never_a_cool_one(tmp_path: Path, temp: str):
    sysroots.thor(tmp_path)
    machine, sampler = machine_of(tmp_path)
    assert machine.seen(sampler.sample(0.0)).heat is Heat.NOMINAL
    for zone in (0, 1):
        path = tmp_path / f"{ZONE}{zone}/temp"
        path.unlink()
        if temp:
            path.write_text(temp)
    assert machine.seen(sampler.sample(100.0)).heat is not Heat.NOMINAL


@pytest.mark.parametrize(
    ("milli_c", "heat"),
    [(40_000, Heat.NOMINAL), (89_000, Heat.NOMINAL), (91_000, Heat.WARM), (95_500, Heat.THROTTLED)],
)
def test_heat_is_what_is_left_to_the_passive_trip_point(tmp_path: Path, milli_c: int, heat: Heat):
    sysroots.thor(tmp_path)
    (tmp_path / f"{ZONE}0/temp").write_text(f"{milli_c}\n")
    assert view_of(tmp_path).heat is heat


# --- what one process holds, read by a process that loads the stand-in for NVML ---

READER = """
import sys
from pathlib import Path
from edge_agent.scheduling.machine import TelemetryMachine
from edge_agent.telemetry.nvml import Nvml
from edge_agent.telemetry.sampler import Sampler
root, on_gpu = Path(sys.argv[1]), sys.argv[2] == "gpu"
sampler = Sampler(root, clock=lambda: 0.0, nvml=Nvml())
machine = TelemetryMachine(sampler, root, on_gpu=on_gpu, nvml=Nvml())
for second in (0.0, 10.0):
    machine.seen(sampler.sample(second))
found = machine.process_bytes(77)
print((found.all_bytes, found.held_bytes) if found else None, machine.driver_bytes())
"""
ROLLUP = """\
5581000-7ffe4 ---p 00000000 00:00 0    [rollup]
Rss:             2000 kB
Pss:             1500 kB
Pss_Dirty:        900 kB
Pss_Anon:         900 kB
Pss_File:         600 kB
Pss_Shmem:          0 kB
"""
OWN = (1500 << 10, 900 << 10)


@pytest.fixture(scope="session")
def fake_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library.build(tmp_path_factory.mktemp("fake_nvml"))


@pytest.fixture
def nvml(fake_nvml_library: Path, tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path, fake_nvml_library)


def process_seen(nvml: FakeNvml, root: Path, where: str = "gpu") -> str:
    sysroots.put(root, {"proc/77/smaps_rollup": ROLLUP})
    return subprocess.run(
        [sys.executable, "-c", READER, str(root), where],
        env={"PYTHONPATH": ":".join(sys.path), **nvml.environ},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def plus(count: int) -> tuple[int, int]:
    return OWN[0] + count, OWN[1] + count


def test_on_the_cpu_it_is_the_proportional_set_and_files_can_be_taken_back(
    nvml: FakeNvml, tmp_path: Path
):
    sysroots.orin_nano(tmp_path)
    nvml.set(ORIN)
    assert process_seen(nvml, tmp_path, "cpu") == f"{OWN} None"


def test_on_thor_the_drivers_part_of_the_process_is_added(nvml: FakeNvml, tmp_path: Path):
    sysroots.thor(tmp_path)
    nvml.set(THOR, {"0.processes": f"12:5,77:{3 * GIB}"})
    assert process_seen(nvml, tmp_path) == f"{plus(3 * GIB)} None"


def test_on_orin_the_driver_tells_only_what_all_hold(nvml: FakeNvml, tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    nvml.set(ORIN)
    assert process_seen(nvml, tmp_path) == f"{OWN} {1 * GIB}"


def test_a_driver_that_is_not_believed_tells_nothing(nvml: FakeNvml, tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    nvml.set(ORIN, {"0.processes": f"77:{3 * GIB}"})
    assert process_seen(nvml, tmp_path) == f"{OWN} {1 * GIB}"


def test_on_a_card_it_is_what_the_process_holds_of_the_card(nvml: FakeNvml, tmp_path: Path):
    sysroots.discrete(tmp_path)
    nvml.set(DISCRETE, {"0.processes": f"77:{3 * GIB}"})
    assert process_seen(nvml, tmp_path) == f"{(3 * GIB, 3 * GIB)} None"


@pytest.mark.parametrize("processes", [None, "!3", "77:none", f"12:{GIB}"])
def test_a_gpu_that_tells_nothing_of_the_process_leaves_it_unknown(
    nvml: FakeNvml, tmp_path: Path, processes: str | None
):
    """A part of it would pass for all of it."""
    sysroots.thor(tmp_path)
    nvml.set(THOR, {"0.processes": processes})
    assert process_seen(nvml, tmp_path) == "None None"


def test_a_process_that_is_gone_is_unknown(nvml: FakeNvml, tmp_path: Path):
    sysroots.thor(tmp_path)
    machine, _ = machine_of(tmp_path)
    assert machine.process_bytes(78) is None


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_end_of_a_process_gives_back_all_memory_unless_a_driver_holds_some(
    tmp_path: Path, *, on_gpu: bool
):
    sysroots.PROFILES["orin_nano"](tmp_path)
    machine = TelemetryMachine(Sampler(tmp_path), tmp_path, on_gpu=on_gpu)
    assert machine.frees_with_process is not on_gpu
