"""What doctor says of each machine, of access to its GPU, and of what the configuration needs."""

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from edge_agent.cli.doctor import describe
from edge_agent.doctor import access, host, worst
from edge_agent.doctor.finding import Finding, FindingStatus, fail, good, unknown, warn
from edge_agent.doctor.gpu import describe_nvml
from edge_agent.doctor.machine import check_machine
from edge_agent.telemetry.nvml import LIBRARY_MISSING, Gpu, NvmlSnapshot
from edge_agent.telemetry.reading import Reading, failed, ok, unsupported
from edge_agent.telemetry.tegra import DeviceNode
from edge_agent.units import size_text
from tests.support import sysroots

MIB = 1 << 20


def machine(root: Path) -> Mapping[str, Finding]:
    """The findings on the machine below `root`, by name."""
    return {finding.name: finding for finding in check_machine(root)}


def made(tmp_path: Path, profile: str) -> Path:
    """A tree of that machine."""
    sysroots.PROFILES[profile](tmp_path)
    return tmp_path


# --- the machine


def test_an_orin_nano_is_described_line_by_line(tmp_path: Path):
    found = machine(made(tmp_path, "orin_nano"))
    assert {name: finding.value for name, finding in found.items()} == {
        "jetson": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super (tegra234)",
        "module": "Orin Nano 8GB (developer kit) (p3767-0005)",
        "l4t": "R39.2.0, JetPack 7.2+b96",
        "power_mode": "MAXN_SUPER (2)",
        "gpu_clock": "612 MHz of 1020 MHz, 34.5 % busy",
        "temperature": "gpu-thermal 49.6 °C, slowed down from 95.0 °C on",
        "power_rails": "VDD_IN 6.0 W, VDD_CPU_GPU_CV 1.7 W",
        "memory": "5.0 GiB of 7.4 GiB available, CMA 195 MiB of 256 MiB free, "
        f"largest free block {16 * os.sysconf('SC_PAGE_SIZE') >> 10} KiB",
        "swap": "3.7 GiB in zram (the GPU's memory is never swapped)",
        "memory_pressure": "0.1 % of the last minute was lost waiting for memory",
    }
    assert {finding.status for finding in found.values()} == {FindingStatus.OK}


@pytest.mark.parametrize("profile", ["orin_nano", "agx_orin", "thor"])
def test_r39_passes_the_gate(tmp_path: Path, profile: str):
    assert machine(made(tmp_path, profile))["l4t"].status is FindingStatus.OK


@pytest.mark.parametrize("major", [36, 38])
def test_an_older_release_fails_and_says_what_to_install(tmp_path: Path, major: int):
    made(tmp_path, "thor")
    release = sysroots.RELEASE.format(major=major, rest="4.0")
    sysroots.put(tmp_path, {"etc/nv_tegra_release": release})
    found = machine(tmp_path)["l4t"]
    assert found.status is FindingStatus.FAIL
    assert f"R{major}.4.0" in found.value
    assert "JetPack 7.2" in found.hint


def test_a_newer_release_without_a_name_passes(tmp_path: Path):
    made(tmp_path, "thor")
    sysroots.put(tmp_path, {"etc/nv_tegra_release": sysroots.RELEASE.format(major=40, rest="0.0")})
    assert machine(tmp_path)["l4t"] == good("l4t", "R40.0.0")


@pytest.mark.parametrize("content", [None, "garbage"])
def test_a_jetson_without_a_readable_release_is_unknown_and_no_failure(
    tmp_path: Path, content: str | None
):
    made(tmp_path, "thor")
    (tmp_path / "etc/nv_tegra_release").unlink()
    if content is not None:
        sysroots.put(tmp_path, {"etc/nv_tegra_release": content})
    found = machine(tmp_path)["l4t"]
    assert found.status is FindingStatus.UNKNOWN
    assert "/etc/nv_tegra_release" in found.value
    assert "mount it" in found.hint


@pytest.mark.parametrize("profile", ["gb10", "discrete", "plain_pc"])
def test_what_is_no_jetson_is_not_blamed_for_it(tmp_path: Path, profile: str):
    found = machine(made(tmp_path, profile))
    assert {finding.status for finding in found.values()} == {FindingStatus.OK}
    for name in ("jetson", "module", "l4t", "power_mode", "gpu_clock", "power_rails"):
        assert found[name].value.startswith("not a Jetson")
    assert found["jetson"].value != "not a Jetson"  # it says which machine it is


def test_an_empty_tree_is_no_jetson_and_its_memory_unknown(tmp_path: Path):
    found = machine(tmp_path)
    assert found["jetson"] == good("jetson", "not a Jetson")
    assert found["memory"].status is FindingStatus.UNKNOWN
    assert worst(tuple(found.values())) is FindingStatus.OK


def test_a_hot_zone_is_a_warning_before_it_slows_the_machine_down(tmp_path: Path):
    made(tmp_path, "agx_orin")
    found = machine(tmp_path)["temperature"]
    assert found.status is FindingStatus.WARN
    assert found.value == "cpu-thermal 91.0 °C, slowed down from 95.0 °C on"
    sysroots.put(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "89999\n"})
    assert machine(tmp_path)["temperature"].status is FindingStatus.OK


def test_a_jetson_whose_sensors_all_fail_is_unknown_and_not_cool(tmp_path: Path):
    made(tmp_path, "thor")
    for index in (0, 1):
        sysroots.put(tmp_path, {f"sys/class/thermal/thermal_zone{index}/temp": "-256000\n"})
    assert machine(tmp_path)["temperature"].status is FindingStatus.UNKNOWN


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("sys/class/hwmon/hwmon1/name", "power_rails"),
        ("etc/nvpmodel.conf", "power_mode"),
        ("proc/meminfo", "memory"),
        ("proc/device-tree/compatible", "module"),
        ("proc/swaps", "swap"),
    ],
)
def test_what_can_not_be_read_on_a_jetson_is_unknown_with_a_hint(
    tmp_path: Path, path: str, name: str
):
    made(tmp_path, "orin_nano")
    (tmp_path / "var/lib/nvpmodel/status").unlink()
    (tmp_path / path).unlink()
    found = machine(tmp_path)[name]
    assert found.status is FindingStatus.UNKNOWN
    assert found.hint


def test_little_memory_and_waiting_for_it_are_warnings(tmp_path: Path):
    made(tmp_path, "orin_nano")
    waiting = sysroots.PRESSURE.replace("avg60=0.05", "avg60=1.00")
    low = sysroots.meminfo(7_789_568, 512 * 1024 - 1)
    sysroots.put(tmp_path, {"proc/meminfo": low, "proc/pressure/memory": waiting})
    found = machine(tmp_path)
    assert found["memory"].status is found["memory_pressure"].status is FindingStatus.WARN
    sysroots.put(tmp_path, {"proc/meminfo": sysroots.meminfo(7_789_568, 512 * 1024)})
    assert machine(tmp_path)["memory"].status is FindingStatus.OK


@pytest.mark.parametrize("missing", ["MemTotal", "MemAvailable"])
def test_which_half_of_the_memory_is_unknown_is_named(tmp_path: Path, missing: str):
    lines = sysroots.meminfo(1000, 500).replace(missing, "Other")
    sysroots.put(tmp_path, {"proc/meminfo": lines})
    assert machine(tmp_path)["memory"].value == f"/proc/meminfo: no {missing}"


def test_what_is_kept_for_huge_pages_is_named(tmp_path: Path):
    pages = ("HugePages_Total:     512", "Hugepagesize:       2048 kB")
    sysroots.put(tmp_path, {"proc/meminfo": sysroots.meminfo(7_789_568, 5_242_880, *pages)})
    assert machine(tmp_path)["memory"].value.endswith(", 1.0 GiB kept for huge pages")


# --- access


def groups_and_nodes(root: Path) -> tuple[Finding, Finding]:
    groups, nodes = access.check_access(root)
    return groups, nodes


def test_the_units_user_needs_both_groups(tmp_path: Path):
    made(tmp_path, "orin_nano")
    sysroots.unit(tmp_path, "User=robot")
    groups, nodes = groups_and_nodes(tmp_path)
    assert groups.status is nodes.status is FindingStatus.WARN
    assert groups.value == "user robot of edge-agent.service: robots; not in video, render"
    assert "SupplementaryGroups=video render" in groups.hint
    assert "/dev/nvmap (mode 0660)" in nodes.value
    sysroots.unit(tmp_path, "User=robot", "SupplementaryGroups=video", "SupplementaryGroups=render")
    groups, nodes = groups_and_nodes(tmp_path)
    assert groups == good("groups", "user robot of edge-agent.service: render, robots, video")
    assert nodes == good("device_nodes", "/dev/nvmap, /dev/nvgpu/igpu0/ctrl, /dev/dri/renderD128")


def test_a_drop_in_completes_the_unit_and_a_dynamic_user_has_only_its_groups(tmp_path: Path):
    made(tmp_path, "thor")
    sysroots.unit(tmp_path, "DynamicUser=yes", "SupplementaryGroups=robots")
    drop_in = "etc/systemd/system/edge-agent.service.d/10-gpu-groups.conf"
    text = "[Service]\nSupplementaryGroups=\nSupplementaryGroups=video render\n"
    sysroots.put(tmp_path, {drop_in: text})
    identity = access.find_identity(tmp_path)
    assert (identity.user, identity.user_id) == ("edge-agent", None)
    assert sorted(identity.groups) == ["render", "video"]
    groups, nodes = groups_and_nodes(tmp_path)
    assert groups.status is nodes.status is FindingStatus.OK


def test_a_unit_without_a_user_is_roots(tmp_path: Path):
    made(tmp_path, "thor")
    sysroots.unit(tmp_path)
    assert (
        groups_and_nodes(tmp_path)[0].value
        == "user root of edge-agent.service may use every device"
    )


def test_without_a_unit_this_process_counts(tmp_path: Path):
    made(tmp_path, "plain_pc")
    identity = access.find_identity(tmp_path)
    assert (identity.user_id, identity.from_unit) == (os.geteuid(), False)
    assert set(identity.groups) >= {"video", "render"}  # the tests' own group, in that tree


@pytest.mark.parametrize(
    ("mode", "user_id", "group_ids", "expected"),
    [
        (0o660, 7, (44,), True),
        (0o440, 7, (44,), False),
        (0o640, 7, (44,), False),
        (0o660, 7, (), False),
        (0o666, 7, (), True),
        (0o600, 1, (), True),
        (0o066, 1, (44,), False),  # the owner's bits count, however open the rest is
        (0o660, None, (44,), True),
        (0o000, 0, (), True),
    ],
)
def test_mode_bits_as_the_kernel_reads_them(
    mode: int, user_id: int | None, group_ids: tuple[int, ...], *, expected: bool
):
    node = DeviceNode("/dev/nvmap", mode, user_id=1, group_id=44, usable=not expected)
    groups = {f"group{number}": number for number in group_ids}
    assert access.Identity("u", user_id, groups, from_unit=True).may_use(node) is expected


def test_for_this_process_the_kernels_word_counts():
    node = DeviceNode("/dev/nvmap", 0o000, user_id=1, group_id=44, usable=True)
    me = access.Identity("u", 7, {}, from_unit=False)
    assert me.may_use(node)
    assert not me.may_use(replace(node, mode=0o666, usable=False))


def test_a_user_outside_the_groups_is_told_the_command(tmp_path: Path, monkeypatch):
    made(tmp_path, "orin_nano")
    me = access.Identity("me", 1000, MappingProxyType({"video": 44}), from_unit=False)
    monkeypatch.setattr(access, "find_identity", lambda _: me)
    groups, _ = groups_and_nodes(tmp_path)
    assert groups.status is FindingStatus.WARN
    assert groups.hint.startswith("`sudo usermod -aG render me`")
    sysroots.put(tmp_path, {"etc/group": "video:x:44:\n"})
    assert "no group render" in groups_and_nodes(tmp_path)[0].hint


@pytest.mark.parametrize(
    ("profile", "path", "named"),
    [
        ("orin_nano", "dev/nvmap", "/dev/nvmap"),
        ("orin_nano", "dev/nvgpu/igpu0/ctrl", "/dev/nvgpu/igpu0/ctrl"),
        ("orin_nano", "dev/dri/renderD128", "/dev/dri/renderD*"),
        ("thor", "dev/nvidia-uvm", "/dev/nvidia-uvm"),
        ("discrete", "dev/nvidia0", "/dev/nvidia0"),
    ],
)
def test_a_missing_node_is_named(tmp_path: Path, profile: str, path: str, named: str):
    made(tmp_path, profile)
    (tmp_path / path).unlink()
    _, nodes = groups_and_nodes(tmp_path)
    assert (nodes.status, nodes.value) == (FindingStatus.WARN, f"missing: {named}")


def test_either_name_of_orins_control_node_will_do(tmp_path: Path):
    made(tmp_path, "orin_nano")
    (tmp_path / "dev/nvgpu/igpu0/ctrl").unlink()
    sysroots.nodes(tmp_path, "nvhost-ctrl-gpu")
    assert groups_and_nodes(tmp_path)[1].status is FindingStatus.OK


def test_a_pc_without_a_card_needs_no_node(tmp_path: Path):
    assert groups_and_nodes(made(tmp_path, "plain_pc"))[1].status is FindingStatus.OK


# --- NVML's word


def gpu(**changes: object) -> Gpu:
    nothing: Reading[object] = unsupported("f", "not supported")
    fields = dict.fromkeys(Gpu.__dataclass_fields__, nothing) | {"index": 0} | changes
    return Gpu(**fields)  # type: ignore[arg-type]


def snapshot(*gpus: Gpu) -> NvmlSnapshot:
    return NvmlSnapshot(ok("595.78", "f"), ok((13, 2), "f"), ok(gpus, "f"))


def test_an_integrated_gpu_shows_no_memory_of_its_own():
    thor = gpu(name=ok("NVIDIA Thor", "f"), integrated=ok(value=True, source="f"))
    found = describe_nvml(snapshot(thor), is_jetson=True)
    expected = "driver 595.78, CUDA 13.2; NVIDIA Thor, integrated: shares the CPU's memory"
    assert found == good("nvml", expected)


def test_a_discrete_gpu_shows_its_memory():
    card = gpu(
        name=ok("RTX", "f"),
        integrated=ok(value=False, source="f"),
        memory_total_bytes=ok(24 << 30, "f"),
        compute_capability=ok((8, 9), "f"),
    )
    found = describe_nvml(snapshot(card), is_jetson=False)
    assert found.value.endswith("; RTX, 24.0 GiB, compute capability 8.9")


def test_a_missing_library_matters_on_a_jetson_only():
    nothing = NvmlSnapshot(*[unsupported("nvmlInit", LIBRARY_MISSING)] * 3)
    assert describe_nvml(nothing, is_jetson=False).status is FindingStatus.OK
    found = describe_nvml(nothing, is_jetson=True)
    assert found.status is FindingStatus.WARN
    assert "nvidia-jetpack" in found.hint


def test_a_driver_that_is_not_loaded_a_lost_gpu_and_none_at_all_are_warnings():
    not_loaded = NvmlSnapshot(*[failed("nvmlInit", "the driver is not loaded")] * 3)
    lost = snapshot(gpu(name=failed("nvmlDeviceGetName", "the GPU is lost")))
    for said, value in ((not_loaded, "not loaded"), (lost, "GPU is lost"), (snapshot(), "no GPU")):
        found = describe_nvml(said, is_jetson=False)
        assert found.status is FindingStatus.WARN
        assert value in found.value
        assert found.hint


# --- host


def test_the_kernel_says_whether_the_clock_is_synchronised():
    assert host.describe_clock(0x2001, 12_400, by_timesyncd=False) == good(
        "clock", "synchronised to within 12 ms (kernel)"
    )
    found = host.describe_clock(0x40, 16_000_000, by_timesyncd=False)
    assert (found.status, "timedatectl" in found.hint) == (FindingStatus.WARN, True)
    assert host.describe_clock(0x40, 1, by_timesyncd=True).status is FindingStatus.OK


def test_this_machines_clock_can_be_asked():
    found = host.check_clock(Path("/"))
    assert "synchronised" in found.value


def test_in_a_tree_only_timesyncd_tells(tmp_path: Path):
    assert host.check_clock(tmp_path).status is FindingStatus.UNKNOWN
    made(tmp_path, "thor")
    assert host.check_clock(tmp_path).value == "synchronised (systemd-timesyncd)"


def test_disk_space_where_the_directory_will_be(tmp_path: Path, monkeypatch):
    directory = tmp_path / "not" / "yet"
    assert host.check_disk("disk/state", directory).value.endswith(f"free in {directory}")
    assert not directory.exists()
    monkeypatch.setattr(host, "LOW_DISK_BYTES", 1 << 62)
    found = host.check_disk("disk/state", directory)
    assert (found.status, bool(found.hint)) == (FindingStatus.WARN, True)


def test_a_file_in_the_way_of_a_directory_is_seen(tmp_path: Path):
    (tmp_path / "file").touch()
    assert host.check_disk("disk/state", tmp_path / "file" / "below").status is not FindingStatus.OK


def test_the_sockets_directory(runtime_root: Path):
    environ = {"RUNTIME_DIRECTORY": str(runtime_root / "run")}
    assert host.check_sockets(environ).value.endswith("no daemon listens")
    (runtime_root / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(runtime_root / "run" / "api.sock"))
        assert host.find_daemon(environ) is None  # a dead daemon's
        server.listen()
        assert host.check_sockets(environ).value.endswith("a daemon listens")
    long = host.check_sockets({"RUNTIME_DIRECTORY": f"/{'x' * 96}"})
    assert (long.status, "108 bytes" in long.value) == (FindingStatus.WARN, True)
    assert host.check_sockets({"RUNTIME_DIRECTORY": f"/{'x' * 95}"}).value.count("bytes") == 0
    unset = host.check_sockets({})
    assert (unset.status, "XDG_RUNTIME_DIR" in unset.hint) == (FindingStatus.WARN, True)


def test_the_systems_daemon_is_found_from_any_session(runtime_root: Path, monkeypatch):
    monkeypatch.setattr(host, "SYSTEM_RUNTIME_DIR", runtime_root)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(runtime_root / "api.sock"))
        server.listen()
        for environ in ({}, {"XDG_RUNTIME_DIR": "/nowhere"}):
            assert host.check_sockets(environ) == good(
                "sockets", f"{runtime_root}: a daemon listens"
            )


@pytest.fixture
def runtime_root(tmp_path_factory: pytest.TempPathFactory):
    """Short enough for a socket."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ea-") as directory:
        yield Path(directory)


# --- how it is shown

ALL = (good("a", "fine"), warn("bb", "odd", "mend it"), unknown("c", "who knows", "ask"))


def test_the_worst_decides_and_what_is_unknown_is_no_fault():
    assert worst(ALL[:1]) is worst((ALL[0], ALL[2])) is FindingStatus.OK
    assert worst(ALL) is FindingStatus.WARN
    assert worst((*ALL, fail("d", "gone", "get it"))) is FindingStatus.FAIL


def test_lines_are_aligned_and_every_hint_stands_below_its_value():
    assert describe(ALL, columns=None) == [
        "ok    a   fine",
        "warn  bb  odd",
        "          -> mend it",
        "?     c   who knows",
        "          -> ask",
        "1 warning, 1 unknown: nothing that the configuration needs is missing",
    ]
    assert describe(ALL[:1], columns=None)[-1] == "everything is ok"
    failing = describe((fail("d", "gone", "get it"),) * 2, columns=None)
    assert failing[0] == "FAIL  d  gone"
    assert failing[-1] == "2 failures: something that the configuration needs is missing"


def test_a_terminal_gets_colours_and_wrapped_values():
    long = " ".join(["word"] * 40)
    lines = describe((good("a", long),), columns=80)
    assert lines[0].startswith("\x1b[32mok  \x1b[0m  a  word")
    assert all(len(line.replace("\x1b[32m", "").replace("\x1b[0m", "")) <= 80 for line in lines)
    assert " ".join(" ".join(line.split()) for line in lines[:-1]).count("word") == 40


def test_what_could_confuse_a_terminal_is_replaced():
    odd = warn("a\udce9", "\x1b[31mred\nline", "\x07").printable()
    assert (odd.name, odd.value, odd.hint) == ("a?", "?[31mred\nline", "?")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 KiB"), (MIB - 1, "1023 KiB"), ((1 << 30) - MIB, "1023 MiB"), (1 << 30, "1.0 GiB")],
)
def test_sizes_for_people(size: int, text: str):
    assert size_text(size) == text
