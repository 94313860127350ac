"""Whether whoever runs the daemon may use the GPU: groups and device nodes.

Where a unit `edge-agent.service` is installed its user counts, else this process.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.doctor.finding import Finding, good, warn
from edge_agent.doctor.machine import NOT_A_JETSON
from edge_agent.telemetry import tegra
from edge_agent.telemetry.files import names_in, parse_int, read_text

NEEDED_GROUPS: Final = ("video", "render")
UNIT: Final = "edge-agent.service"

_UNIT_DIRECTORIES: Final = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
_OWNER_BITS, _GROUP_BITS, _OTHER_BITS = 0o600, 0o060, 0o006


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the daemon is. `user_id` None: a dynamic user, which exists while the unit runs."""

    user: str
    user_id: int | None
    groups: Mapping[str, int]
    from_unit: bool

    def may_use(self, node: tegra.DeviceNode) -> bool:
        """Read and write; for this process the kernel is asked, which knows ACLs too."""
        if self.user_id == 0:
            return True
        if not self.from_unit:
            return node.usable
        if self.user_id == node.user_id:
            bits = _OWNER_BITS
        elif node.group_id in self.groups.values():
            bits = _GROUP_BITS
        else:
            bits = _OTHER_BITS
        return node.mode & bits == bits


def find_identity(sysroot: Path) -> Identity:
    """The user of the unit below `sysroot`, else of this process."""
    unit = _unit_settings(sysroot)
    groups, members = _groups(sysroot)
    if unit is None:
        mine = set(os.getgroups()) | {os.getegid()}
        names = {name: number for name, number in groups.items() if number in mine}
        user_id = os.geteuid()
        user = next((name for name, ids in _users(sysroot) if ids[0] == user_id), str(user_id))
        return Identity(user, user_id, names, from_unit=False)
    dynamic = unit.get("DynamicUser", ["no"])[-1].lower() in {"yes", "true", "on", "1"}
    user = unit.get("User", ["edge-agent" if dynamic else "root"])[-1]
    ids = dict(_users(sysroot)).get(user)
    wanted = {word for line in unit.get("SupplementaryGroups", []) for word in line.split()}
    wanted.update(unit.get("Group", []))
    wanted.update(
        name for name in groups if user in members[name] or (ids and groups[name] == ids[1])
    )
    named = {name: number for name, number in groups.items() if name in wanted}
    return Identity(user, ids[0] if ids else None, named, from_unit=True)


def check_access(sysroot: Path) -> list[Finding]:
    """Groups, then device nodes."""
    identity = find_identity(sysroot)
    machine = tegra.read_machine(sysroot)
    who = f"user {identity.user}" + (f" of {UNIT}" if identity.from_unit else "")
    return [
        _check_groups(machine, identity, who, _groups(sysroot)[0]),
        _check_nodes(sysroot, machine, identity, who),
    ]


def _check_groups(
    machine: tegra.Machine, identity: Identity, who: str, known: Mapping[str, int]
) -> Finding:
    value = f"{who}: {', '.join(sorted(identity.groups)) or 'no groups'}"
    if identity.user_id == 0:
        return good("groups", f"{who} may use every device")
    if not machine.is_jetson:
        return good("groups", value)
    missing = [name for name in NEEDED_GROUPS if name not in identity.groups]
    if not missing:
        return good("groups", value)
    absent = [name for name in missing if name not in known]
    if absent:
        hint = f"this system has no group {', '.join(absent)}: install JetPack's packages"
    elif identity.from_unit:
        hint = f"`sudo systemctl edit {UNIT}`: [Service] SupplementaryGroups={' '.join(missing)}"
    else:
        hint = f"`sudo usermod -aG {','.join(missing)} {identity.user}`, then log in again"
    return warn("groups", f"{value}; not in {', '.join(missing)}", hint)


def _check_nodes(sysroot: Path, machine: tegra.Machine, identity: Identity, who: str) -> Finding:
    wanted = _wanted_nodes(machine)
    found = [(patterns, tegra.find_node(sysroot, patterns)) for patterns in wanted]
    nodes = [node for _, node in found if node]
    if not machine.is_jetson and not nodes:
        return good("device_nodes", f"{NOT_A_JETSON}, and no NVIDIA device")
    missing = [f"/{patterns[0]}" for patterns, node in found if node is None]
    denied = [f"{node.path} (mode {node.mode:04o})" for node in nodes if not identity.may_use(node)]
    present = ", ".join(node.path for node in nodes)
    if missing:
        hint = "see `dmesg` for what the GPU driver says; in a container use --runtime nvidia"
        return warn("device_nodes", f"missing: {', '.join(missing)}", hint)
    if denied:
        hint = (
            "nodes of a Jetson are group video or render, mode 0660: see the groups above and "
            "/etc/udev/rules.d/99-tegra-devices.rules"
        )
        return warn("device_nodes", f"{who} may not use {', '.join(denied)}", hint)
    return good("device_nodes", present)


def _wanted_nodes(machine: tegra.Machine) -> tuple[tuple[str, ...], ...]:
    if not machine.is_jetson:
        return tegra.OTHER_NODES
    return tegra.NODES.get(machine.soc.value or "", tegra.NODES["tegra234"])


def _unit_settings(sysroot: Path) -> dict[str, list[str]] | None:
    """The values of each key of the unit and its drop-ins, in order; an empty one starts anew."""
    texts = [
        text
        for directory in reversed(_UNIT_DIRECTORIES)
        for path in (
            f"{directory}/{UNIT}",
            *(
                f"{directory}/{UNIT}.d/{name}"
                for name in names_in(sysroot, f"{directory}/{UNIT}.d")
            ),
        )
        if (text := read_text(sysroot, path).value) is not None
    ]
    if not texts:
        return None
    settings: dict[str, list[str]] = {}
    for line in "\n".join(texts).splitlines():
        key, equals, value = (part.strip() for part in line.partition("="))
        if equals and value:
            settings.setdefault(key, []).append(value)
        elif equals:
            settings.pop(key, None)
    return settings


def _users(sysroot: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, user id and group id of each line of /etc/passwd that makes sense."""
    for line in (read_text(sysroot, "etc/passwd").value or "").splitlines():
        name, *rest = line.split(":")
        user_id, group_id = (parse_int(text) for text in [*rest, "", "", ""][1:3])
        if user_id is not None and group_id is not None:
            yield name, (user_id, group_id)


def _groups(sysroot: Path) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Number and members of each group of /etc/group."""
    numbers: dict[str, int] = {}
    members: dict[str, set[str]] = {}
    for line in (read_text(sysroot, "etc/group").value or "").splitlines():
        name, *rest = line.split(":")
        _, number, listed, *_ = [*rest, "", "", ""]
        group_id = parse_int(number)
        if group_id is not None:
            numbers[name] = group_id
            members[name] = set(listed.split(","))
    return numbers, members
