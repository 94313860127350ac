"""Which machine this is, for a Jetson: model, module, L4T release, power mode, device nodes.

Read from the device tree and from what L4T (Jetson Linux) writes; on other machines most of it is
unsupported. Sensors are `telemetry.sensors`'.
"""

import fnmatch
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.telemetry.files import names_in, parse_int, read_lines, read_text
from edge_agent.telemetry.reading import Reading, ReadingStatus, failed, ok, unsupported

MODULES: Final = {
    "p3701-0000": "AGX Orin 32GB (developer kit)",
    "p3701-0004": "AGX Orin 32GB",
    "p3701-0005": "AGX Orin 64GB",
    "p3701-0008": "AGX Orin Industrial 64GB",
    "p3767-0000": "Orin NX 16GB",
    "p3767-0001": "Orin NX 8GB",
    "p3767-0003": "Orin Nano 8GB",
    "p3767-0004": "Orin Nano 4GB",
    "p3767-0005": "Orin Nano 8GB (developer kit)",
    "p3834-0000": "Thor T4000 64GB",
    "p3834-0008": "Thor T5000 128GB",
}
JETPACKS: Final = {
    (36, 5, 0): "6.2.2",
    (38, 2, 0): "7.0",
    (38, 4, 0): "7.1",
    (39, 0, 0): "7.2 EA",
    (39, 2, 0): "7.2",
    (39, 2, 1): "7.2.1",
    (39, 2, 2): "7.2.2",
}
"""Names for people. What is supported is decided by the release, never by this table."""

NODES: Final = {
    "tegra234": (
        ("dev/nvmap",),
        ("dev/nvgpu/igpu0/ctrl", "dev/nvhost-ctrl-gpu"),
        ("dev/dri/renderD*",),
    ),
    "tegra264": (
        ("dev/nvidia0",),
        ("dev/nvidiactl",),
        ("dev/nvidia-uvm",),
        ("dev/dri/renderD*",),
    ),
}
"""What a process opens to use the GPU, by chip: one of each group. Orin has the nvgpu driver, Thor
the one of discrete cards."""
OTHER_NODES: Final = (("dev/nvidia0",), ("dev/nvidiactl",), ("dev/nvidia-uvm",))

_DEVICE_TREES: Final = ("sys/firmware/devicetree/base", "proc/device-tree")
_SOC: Final = re.compile(r"nvidia,(tegra[0-9]{3})")
_PART: Final = re.compile(r"p[0-9]{4}-[0-9]{4}")
_RELEASE: Final = re.compile(
    r"#? ?R([0-9]{1,4}) \(release\), REVISION: ([0-9]{1,4})(?:\.([0-9]{1,4}))?"
)
_MODE: Final = re.compile(r"<\s*POWER_MODEL\s+ID=([0-9]{1,4})\s+NAME=([A-Za-z0-9_.+-]{1,64})\s*>")
_DEFAULT_MODE: Final = re.compile(r"<\s*PM_CONFIG\s+DEFAULT=([0-9]{1,4})\s*>")
_CURRENT_MODE: Final = re.compile(r"\bpmode:([0-9]{1,4})\b")
_JETPACK_FIELD: Final = re.compile(r"Version: ([0-9][A-Za-z0-9.+~-]{0,40})")


@dataclass(frozen=True, slots=True)
class L4tRelease:
    """A release of Jetson Linux, such as R39.2.0."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"R{self.major}.{self.minor}.{self.patch}"

    @property
    def jetpack(self) -> str | None:
        """The JetPack that came with it, where we know."""
        return JETPACKS.get((self.major, self.minor, self.patch))


@dataclass(frozen=True, slots=True)
class Module:
    """The computer on a carrier board; `name` None: a part number that we don't know."""

    part: str
    name: str | None


@dataclass(frozen=True, slots=True)
class PowerMode:
    """An nvpmodel mode; the name is the configuration's."""

    number: int
    name: str | None


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device's file: who owns it and what they may do; `usable` is by this process."""

    path: str
    mode: int
    user_id: int
    group_id: int
    usable: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine is. `soc` is the chip, such as tegra234 (Orin) or tegra264 (Thor)."""

    is_jetson: bool
    model: Reading[str]
    soc: Reading[str]
    module: Reading[Module]
    release: Reading[L4tRelease]


def read_machine(sysroot: Path) -> Machine:
    """The machine below `sysroot`: a Jetson has a Tegra in its device tree, or L4T installed."""
    model = _model(sysroot)
    compatible = _device_tree(sysroot, "compatible")
    soc = compatible.parsed(_parse_soc)
    release = read_text(sysroot, "etc/nv_tegra_release").parsed(parse_release)
    named = "Jetson" in (model.value or "")
    return Machine(
        is_jetson=named or soc.value is not None or release.value is not None,
        model=model,
        soc=soc,
        module=compatible.parsed(_parse_module),
        release=release,
    )


def parse_release(text: str) -> L4tRelease | None:
    """From /etc/nv_tegra_release: `# R39 (release), REVISION: 2.0, GCID: ...`."""
    match = _RELEASE.match(text)
    return L4tRelease(int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def read_jetpack(sysroot: Path) -> Reading[str]:
    """The version of the installed package `nvidia-jetpack`."""
    path = "var/lib/dpkg/status"
    inside = False
    try:
        for line in read_lines(sysroot, path):
            if not line:
                inside = False
            elif line == "Package: nvidia-jetpack":
                inside = True
            elif inside and (match := _JETPACK_FIELD.fullmatch(line)):
                return ok(match[1], f"/{path}")
    except OSError as error:
        return unsupported(f"/{path}", error.strerror or str(error))
    return unsupported(f"/{path}", "nvidia-jetpack is not installed")


def read_power_mode(sysroot: Path) -> Reading[PowerMode]:
    """The mode that nvpmodel keeps, else the one that the machine boots with."""
    config = read_text(sysroot, "etc/nvpmodel.conf")
    modes = {int(number): name for number, name in _MODE.findall(config.value or "")}
    current = read_text(sysroot, "var/lib/nvpmodel/status")
    if current.value is not None:
        return current.parsed(lambda text: _parse_mode(_CURRENT_MODE.search(text), modes))
    if current.status is not ReadingStatus.UNSUPPORTED:
        return failed(current.source, current.detail)
    return config.parsed(lambda text: _parse_mode(_DEFAULT_MODE.search(text), modes))


def find_node(sysroot: Path, patterns: tuple[str, ...]) -> DeviceNode | None:
    """The first node that one of the patterns names; a `*` may stand in the last part."""
    for pattern in patterns:
        directory, _, last = pattern.rpartition("/")
        for name in fnmatch.filter(names_in(sysroot, directory), last):
            path = sysroot / directory / name
            try:
                status = path.stat()
            except OSError:
                continue
            usable = os.access(path, os.R_OK | os.W_OK)
            mode = stat.S_IMODE(status.st_mode)
            return DeviceNode(f"/{directory}/{name}", mode, status.st_uid, status.st_gid, usable)
    return None


def _model(sysroot: Path) -> Reading[str]:
    """From the device tree; where firmware has none, as on a PC or a DGX Spark, from DMI."""
    model = _device_tree(sysroot, "model")
    if model.value:
        return model
    vendor = read_text(sysroot, "sys/class/dmi/id/sys_vendor")
    product = read_text(sysroot, "sys/class/dmi/id/product_name")
    if not product.value:
        return Reading(None, model.source, ReadingStatus.UNSUPPORTED, "no model, nor in DMI")
    name = product.value.replace("_", " ")
    maker = vendor.value or ""
    return ok(name if name.startswith(maker) else f"{maker} {name}", product.source)


def _device_tree(sysroot: Path, name: str) -> Reading[str]:
    """A property of the root, whichever way this kernel shows the tree."""
    first, second = (read_text(sysroot, f"{tree}/{name}") for tree in _DEVICE_TREES)
    return first if first.value is not None else second


def _parse_soc(compatible: str) -> str | None:
    found = _SOC.search(compatible)
    return found[1] if found else None


def _parse_module(compatible: str) -> Module | None:
    """The module among the part numbers: the board's own number may stand before it."""
    parts = _PART.findall(compatible)
    for part in parts:
        if part in MODULES:
            return Module(part, MODULES[part])
    return Module(parts[-1], None) if parts else None


def _parse_mode(match: re.Match[str] | None, modes: dict[int, str]) -> PowerMode | None:
    number = parse_int(match[1]) if match else None
    return None if number is None else PowerMode(number, modes.get(number))
