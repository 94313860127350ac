"""Identity and sensors of each machine below its sysroot."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.doctor.access import check_access
from edge_agent.doctor.machine import check_machine
from edge_agent.telemetry import procfs, sensors, tegra
from edge_agent.telemetry.reading import ReadingStatus
from edge_agent.telemetry.tegra import L4tRelease, Module, PowerMode
from tests.support import sysroots

OLD, NEW = L4tRelease(36, 5, 0), L4tRelease(39, 2, 0)


@pytest.fixture(params=sysroots.PROFILES)
def profile(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The name of a machine whose tree is below tmp_path."""
    sysroots.PROFILES[request.param](tmp_path)
    return str(request.param)


EXPECTED = {
    "orin_nano": (True, "tegra234", "p3767-0005", NEW),
    "agx_orin": (True, "tegra234", "p3701-0005", L4tRelease(39, 2, 1)),
    "thor": (True, "tegra264", "p3834-0008", NEW),
    "old_orin": (True, "tegra234", "p3767-0005", OLD),
    "gb10": (False, None, None, None),
    "discrete": (False, None, None, None),
    "plain_pc": (False, None, None, None),
}


def test_each_machine_is_known_for_what_it_is(profile: str, tmp_path: Path):
    machine = tegra.read_machine(tmp_path)
    module = machine.module.value
    found = (machine.is_jetson, machine.soc.value, module and module.part, machine.release.value)
    assert found == EXPECTED[profile]


def test_the_model_is_the_device_trees_else_dmis(tmp_path: Path):
    sysroots.gb10(tmp_path / "spark")
    sysroots.thor(tmp_path / "thor")
    sysroots.plain_pc(tmp_path / "pc")
    models = {name: tegra.read_machine(tmp_path / name).model for name in ("spark", "thor", "pc")}
    assert models["thor"].value == "NVIDIA Jetson AGX Thor Developer Kit"
    assert models["spark"].value == "NVIDIA DGX Spark"
    assert models["pc"].value == "Dell Inc. OptiPlex 7070"
    assert models["pc"].source == "/sys/class/dmi/id/product_name"


def test_a_device_tree_may_also_be_below_sys(tmp_path: Path):
    base = "sys/firmware/devicetree/base"
    sysroots.put(
        tmp_path, {f"{base}/model": "Jetson X\0", f"{base}/compatible": "nvidia,tegra234\0"}
    )
    machine = tegra.read_machine(tmp_path)
    assert (machine.model.value, machine.soc.value) == ("Jetson X", "tegra234")


def test_a_jetson_is_told_by_its_chip_its_model_or_its_release(tmp_path: Path):
    for index, files in enumerate(
        (
            {"proc/device-tree/compatible": "acme,robot\0nvidia,tegra234\0"},
            {"proc/device-tree/model": "NVIDIA Jetson AGX Thor"},
            {"etc/nv_tegra_release": sysroots.RELEASE.format(major=39, rest="2.0")},
        )
    ):
        assert not tegra.read_machine(tmp_path / str(index)).is_jetson
        sysroots.put(tmp_path / str(index), files)
        assert tegra.read_machine(tmp_path / str(index)).is_jetson


def test_the_module_is_found_behind_the_carrier_board(tmp_path: Path):
    path = "proc/device-tree/compatible"
    sysroots.put(tmp_path, {path: "nvidia,p3768-0000+p3767-0003\0nvidia,tegra234\0"})
    assert tegra.read_machine(tmp_path).module.value == Module("p3767-0003", "Orin Nano 8GB")
    sysroots.put(tmp_path, {path: "nvidia,p4071-0000+p9999-0001\0nvidia,tegra264\0"})
    assert tegra.read_machine(tmp_path).module.value == Module("p9999-0001", None)
    sysroots.put(tmp_path, {path: "nvidia,tegra264\0"})
    assert tegra.read_machine(tmp_path).module.status is ReadingStatus.ERROR


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic", L4tRelease(39, 2, 0)),
        ("# R36 (release), REVISION: 4.3, GCID: 1", L4tRelease(36, 4, 3)),
        ("# R40 (release), REVISION: 1, GCID: 1", L4tRelease(40, 1, 0)),
        ("R39 (release), REVISION: 2.1", L4tRelease(39, 2, 1)),
        ("# R (release), REVISION: 2.0", None),
        ("# R39 (release), REVISION: x", None),
        ("39.2.0", None),
        (f"# R{'9' * 5000} (release), REVISION: 2.0", None),
        ("", None),
    ],
)
def test_releases(text: str, expected: L4tRelease | None):
    assert tegra.parse_release(text) == expected


def test_a_release_names_the_jetpack_it_came_with_where_that_is_known():
    assert (str(NEW), NEW.jetpack, OLD.jetpack) == ("R39.2.0", "7.2", "6.2.2")
    assert L4tRelease(41, 0, 0).jetpack is None


def test_the_installed_jetpack_is_dpkgs(tmp_path: Path):
    assert tegra.read_jetpack(tmp_path).status is ReadingStatus.UNSUPPORTED
    sysroots.orin_nano(tmp_path)
    assert tegra.read_jetpack(tmp_path).value == "7.2+b96"
    status = "Package: nvidia-jetpack\nStatus: x\n\nPackage: other\nVersion: 1.0\n"
    sysroots.put(tmp_path, {"var/lib/dpkg/status": status})
    assert tegra.read_jetpack(tmp_path).value is None


def test_the_power_mode_is_the_kept_one_else_the_one_of_the_boot(tmp_path: Path):
    sysroots.orin_nano(tmp_path / "kept")
    sysroots.agx_orin(tmp_path / "boot")
    kept, boot = (tegra.read_power_mode(tmp_path / name) for name in ("kept", "boot"))
    assert (kept.value, kept.source) == (PowerMode(2, "MAXN_SUPER"), "/var/lib/nvpmodel/status")
    assert (boot.value, boot.source) == (PowerMode(1, "25W"), "/etc/nvpmodel.conf")


def test_a_kept_mode_that_can_not_be_read_is_not_taken_for_the_one_of_the_boot(tmp_path: Path):
    sysroots.agx_orin(tmp_path)
    (tmp_path / "var/lib/nvpmodel/status").mkdir()
    assert tegra.read_power_mode(tmp_path).status is ReadingStatus.ERROR


def test_a_power_mode_without_a_name_or_without_sense(tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    sysroots.put(tmp_path, {"var/lib/nvpmodel/status": "pmode:0007"})
    assert tegra.read_power_mode(tmp_path).value == PowerMode(7, None)
    sysroots.put(tmp_path, {"var/lib/nvpmodel/status": "garbage"})
    assert tegra.read_power_mode(tmp_path).status is ReadingStatus.ERROR
    sysroots.plain_pc(tmp_path / "pc")
    assert tegra.read_power_mode(tmp_path / "pc").status is ReadingStatus.UNSUPPORTED


def test_device_nodes_with_mode_and_owner(tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    node = tegra.find_node(tmp_path, ("dev/dri/renderD*",))
    assert node is not None
    assert (node.path, node.mode, node.usable) == ("/dev/dri/renderD128", 0o660, True)
    assert tegra.find_node(tmp_path, ("dev/missing", "dev/nvmap")) is not None
    assert tegra.find_node(tmp_path, ("dev/missing", "nowhere/at/all")) is None


def test_thermal_zones_with_trip_points(tmp_path: Path):
    sysroots.agx_orin(tmp_path)
    cpu, gpu = sensors.read_thermal_zones(tmp_path)  # the PMIC's is a constant
    assert (cpu.name, cpu.temperature_milli_c.value) == ("cpu-thermal", 91_000)
    expected = {("critical", 104_500), ("passive", 95_000)}
    assert {(p.kind, p.temperature_milli_c) for p in cpu.trip_points} == expected
    assert (gpu.temperature_milli_c.value, gpu.temperature_milli_c.status) == (None, "error")


def test_a_trip_point_without_a_temperature_is_left_out(tmp_path: Path):
    sysroots.thor(tmp_path)
    sysroots.put(tmp_path, {"sys/class/thermal/thermal_zone0/trip_point_0_temp": "soon"})
    gpu, _ = sensors.read_thermal_zones(tmp_path)
    assert [point.kind for point in gpu.trip_points] == ["passive"]


def test_power_rails_of_both_chips(tmp_path: Path):
    sysroots.orin_nano(tmp_path / "orin")
    sysroots.thor(tmp_path / "thor")
    orin = {rail.name: rail.power_mw.value for rail in sensors.read_power_rails(tmp_path / "orin")}
    assert orin == {"VDD_IN": 5966, "VDD_CPU_GPU_CV": 1666}  # neither NC nor the sum
    (vin,) = sensors.read_power_rails(tmp_path / "thor")
    assert (vin.name, vin.power_mw.value) == ("VIN", 19_780)


def test_a_rail_without_load_is_at_0_and_a_negative_power_is_an_error(tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    chip = "sys/class/hwmon/hwmon1"
    sysroots.put(tmp_path, {f"{chip}/curr1_input": "0\n", f"{chip}/curr2_input": "-1\n"})
    first, second = sensors.read_power_rails(tmp_path)
    assert (first.power_mw.value, second.power_mw.status) == (0, ReadingStatus.ERROR)


def test_a_rail_without_a_current_has_no_power(tmp_path: Path):
    sysroots.orin_nano(tmp_path)
    (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").unlink()
    sysroots.put(tmp_path, {"sys/class/hwmon/hwmon1/in2_input": "x"})
    first, second = sensors.read_power_rails(tmp_path)
    assert (first.power_mw.value, first.power_mw.status) == (None, "unsupported")
    assert (second.power_mw.value, second.power_mw.status) == (None, "error")


def test_the_gpus_clock_and_load(tmp_path: Path):
    sysroots.orin_nano(tmp_path / "orin")
    sysroots.thor(tmp_path / "thor")
    orin, thor = (sensors.read_gpu_clock(tmp_path / name) for name in ("orin", "thor"))
    assert orin is not None
    assert thor is not None
    assert (orin.clock_hz.value, orin.max_clock_hz.value) == (612_000_000, 1_020_000_000)
    assert orin.load_permille.value == 345
    assert thor.clock_hz.value == 1_575_000_000
    assert (thor.load_permille.value, thor.load_permille.status) == (None, "unsupported")


def test_an_idle_gpu_is_idle_and_a_load_above_all_is_an_error(tmp_path: Path):
    sysroots.agx_orin(tmp_path)
    load = tmp_path / "sys/devices/platform/bus@0/17000000.gpu/load"
    clock = sensors.read_gpu_clock(tmp_path)
    assert clock is not None
    assert clock.load_permille.value == 0
    load.write_text("1001\n")
    clock = sensors.read_gpu_clock(tmp_path)
    assert clock is not None
    assert clock.load_permille.status is ReadingStatus.ERROR


def test_a_gpu_that_appears_late_is_found_then(tmp_path: Path):
    assert sensors.read_gpu_clock(tmp_path) is None
    sysroots.thor(tmp_path)
    assert sensors.read_gpu_clock(tmp_path) is not None


def test_the_gpu_is_known_by_its_device_tree_name_too(tmp_path: Path):
    entry = "sys/class/devfreq/17000000.ga"
    sysroots.put(tmp_path, {f"{entry}/device/of_node/name": "ga10b\0", f"{entry}/cur_freq": "1"})
    assert sensors.read_gpu_clock(tmp_path) is not None


def read_everything(root: Path) -> None:
    """Every reader, and every check of doctor that builds on them."""
    procfs.read_memory(root)
    procfs.read_swaps(root)
    procfs.read_pressure(root)
    procfs.read_largest_free_block_bytes(root)
    tegra.read_power_mode(root)
    sensors.read_thermal_zones(root)
    sensors.read_power_rails(root)
    sensors.read_gpu_clock(root)
    for finding in (*check_machine(root), *check_access(root)):
        assert finding.status == "ok" or finding.hint


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every file of every machine, a unit included."""
    root = tmp_path_factory.mktemp("trees")
    for name, write in sysroots.PROFILES.items():
        write(root / name)
        sysroots.unit(root / name, "User=robot", "SupplementaryGroups=video")
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


NUMBERS = st.sampled_from(["0", "-1", "9" * 18, "9" * 5000, "1e9", "٣", "nan", ""])


@settings(
    max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(data=st.data())
def test_no_content_of_any_file_makes_a_reader_raise(trees: list[Path], data: st.DataObject):
    path = data.draw(st.sampled_from(trees))
    before = path.read_bytes()
    root = next(parent for parent in path.parents if parent.name in sysroots.PROFILES)
    try:
        if data.draw(st.booleans()) or not before:
            path.write_bytes(data.draw(st.binary(max_size=300)))
        else:  # nearly right: one word is another number
            words = before.decode().split(" ")
            words[data.draw(st.integers(0, len(words) - 1))] = data.draw(NUMBERS)
            path.write_bytes(" ".join(words).encode())
        read_everything(root)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "loop", "dangling"])
def test_anything_else_in_a_files_place_makes_no_reader_raise(
    kind: str, profile: str, tmp_path: Path
):
    assert profile
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        before = path.read_bytes()
        path.unlink()
        if kind == "directory":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "dangling":
            path.symlink_to("/nowhere")
        read_everything(tmp_path)
        if kind == "directory":
            path.rmdir()
        elif kind != "missing":
            path.unlink()
        path.write_bytes(before)
